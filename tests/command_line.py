"""What tests of the command line share."""

from em_kernels import cli


def error_of(capsys, *arguments: object) -> str:
    """The one line that a failing command ends with."""
    capsys.readouterr()
    assert cli.main(list(map(str, arguments))) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("em-kernels: error: ") and output.err.count("\n") == 1
    assert "not foreseen" not in output.err
    return output.err
