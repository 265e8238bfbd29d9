"""The accuracy table: rows have the entropy they are built for, and ours holds its promise."""

import pytest
import torch

from benchmarks import accuracy


def test_rows_have_the_entropy_they_are_built_for():
    targets = (1e-6, 0.1, 5.0)
    found = accuracy.entropy64(accuracy.rows_with_entropy(targets, 2000).double())
    torch.testing.assert_close(found, torch.tensor(targets, dtype=torch.float64), rtol=1e-3, atol=0)


def test_truth_is_the_entropy():
    logits = torch.randn(4, 50, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(accuracy.entropy64(logits), -(log_p.exp() * log_p).sum(-1))


def test_table_is_written_and_ours_stays_below_1e_4(tmp_path, capsys):
    text = accuracy.main(["--v", "70000", "--out", str(tmp_path)])
    assert (tmp_path / "accuracy.md").read_text() == text and text in capsys.readouterr().out
    rows = [line.split("|")[2:3] for line in text.splitlines() if line[:3] in ("| 1", "| 5", "| 0")]
    assert len(rows) == len(accuracy.TARGETS)
    assert all(float(error) < 1e-4 for (cell,) in rows for error in cell.split("/"))


def test_a_vocabulary_too_small_for_the_largest_entropy_is_refused(capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--v", "100"])
    assert "--v must be at least 59875, got 100" in capsys.readouterr().err
