"""What makes the tests fast changes nothing they see."""

from types import SimpleNamespace

import pytest
import torch
from conftest import pytest_xdist_make_scheduler


def test_a_file_is_tested_by_one_process(monkeypatch):
    pytest.importorskip("xdist")
    options = {"dist": "load", "tx": ["2*popen"]}
    config = SimpleNamespace(getvalue=options.get)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    scheduler = pytest_xdist_make_scheduler(config, None)
    assert scheduler._split_scope("tests/test_a.py::test_b[c::d]") == "tests/test_a.py"
    options["dist"] = "worksteal"
    assert pytest_xdist_make_scheduler(config, None) is None
    options["dist"] = "load"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pytest_xdist_make_scheduler(config, None) is None


def test_the_interpreter_puts_back_what_it_replaces(monkeypatch):
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("the kernels are compiled here")
    from em_kernels.backends.interface import RowSpec
    from em_kernels.backends.triton import kernels
    from em_kernels.backends.triton.backend import Triton

    def launch():
        return Triton().stats(torch.ones(1, 3, 50), RowSpec(valid_vocab=50), ("entropy",))

    looked = []
    builtin = triton.runtime.interpreter._patch_builtin
    monkeypatch.setattr(
        triton.runtime.interpreter, "_patch_builtin", lambda *a: looked.append(a) or builtin(*a)
    )
    want = launch()
    assert triton.language.core.is_builtin(triton.language.load)
    with monkeypatch.context() as broken:
        broken.setattr(kernels, "put_row", None)
        with pytest.raises(Exception, match="NoneType"):
            launch()
    assert triton.language.core.is_builtin(triton.language.load)
    assert all(map(torch.equal, launch(), want)) and 0 < len(looked) < 100
