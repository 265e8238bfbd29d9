"""The peers' wheels for a GPU machine: what pip is asked for, what is kept and said. No network."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_wheels, peers
from benchmarks.gpu_wheels import PEERS, Peer, download_command

REFUSED = "ERROR: No matching distribution found for verl"


@pytest.fixture
def pip(monkeypatch):
    """Downloads a file of 1 MiB a package, and nothing of verl."""

    def run(command, **options):
        place = Path(command[command.index("--dest") + 1])
        packages = command[command.index("-c") + 2 :]
        if "verl" in packages:
            return SimpleNamespace(returncode=1, stderr=f"a warning\n{REFUSED}\n")
        for package in packages:
            name = package.replace("-", "_")
            (place / f"{name}-1.0-py3-none-any.whl").write_bytes(bytes(1 << 20))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(gpu_wheels.subprocess, "run", run)


def test_what_pip_is_asked_for():
    command = download_command(("trl", "peft"), "3.13", Path("/there"))
    assert command[1:4] == ["-m", "pip", "download"] and command[-2:] == ["trl", "peft"]
    assert "--no-deps" in command and command[command.index("--python-version") + 1] == "3.13"
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert "manylinux_2_28_x86_64" in command and command[command.index("--dest") + 1] == "/there"
    assert not any(word.startswith("torch") for peer in PEERS.values() for word in peer.packages)


def test_the_folder_holds_what_fits_and_says_the_rest(pip, tmp_path, capsys):
    folder = tmp_path / ".whl"
    folder.mkdir()
    (folder / "old-1.0-py3-none-any.whl").touch()
    (folder / "of the user").touch()
    assert gpu_wheels.main(["--folder", str(folder), "--mib", "5"]) == 0
    names = {path.name.partition("-")[0] for path in folder.glob("*.whl")}
    assert names == {"trl", "liger_kernel"}
    said = capsys.readouterr().out
    assert "   1.0 MiB  trl-1.0-py3-none-any.whl" in said
    assert f"   2.0 MiB  in all, in {folder}" in said
    assert f"verl is left out: {REFUSED}" in said
    large = "nvidia-cutlass-dsl is left out: 8.0 MiB would make it more than 5 MiB"
    assert large in said
    kept = json.loads((folder / gpu_wheels.LEFT_OUT).read_text())
    assert kept.keys() == {"verl", "nvidia-cutlass-dsl"}
    assert (folder / "of the user").exists()


def test_no_wheel_at_all_is_exit_code_1(pip, tmp_path):
    assert gpu_wheels.main(["--folder", str(tmp_path), "--mib", "0.5"]) == 1


@pytest.mark.parametrize("python", ("4.7", "3", "python3.12", "3.12.1"))
def test_a_python_that_is_none_is_refused(python, capsys):
    with pytest.raises(SystemExit):
        gpu_wheels.main(["--python", python])
    assert f"--python must be a version such as 3.12, got '{python}'" in capsys.readouterr().err


def test_the_last_error_that_says_something():
    link = "ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/"
    done = SimpleNamespace(returncode=1, stderr=f"ERROR: Cannot install trl\n{link}\n")
    assert gpu_wheels.last_error(done) == "ERROR: Cannot install trl"
    assert gpu_wheels.last_error(SimpleNamespace(returncode=3, stderr="")) == "exit code 3"


def wheel(folder, name, **files):
    """A wheel of small modules."""
    about = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as packed:
        for path, text in files.items():
            packed.writestr(path.replace("__", "/") + ".py", text)
        packed.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        packed.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        packed.writestr(f"{about}/RECORD", "")


def test_make_gpu_unpacks_them_and_its_stages_find_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pip")
    folder, target = tmp_path / ".whl", tmp_path / "build/peers"
    folder.mkdir()
    wheel(folder, "somepeer", somepeer__core="value = 3", tests__theirs="")
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    (folder / gpu_wheels.LEFT_OUT).write_text('{"large": "100 MiB would make it more"}')
    every = {"somepeer": "somepeer", "large": "no_such_large", "other": "no_such_other"}
    monkeypatch.setattr(gpu_wheels, "PEERS", {k: Peer(v, (k,)) for k, v in every.items()})
    assert gpu_wheels.main(["--folder", str(folder), "--unpack", str(target)]) == 0
    said = capsys.readouterr().out
    assert "somepeer-1.0-py3-none-any.whl is unpacked" in said
    assert "broken-1.0-py3-none-any.whl is left out: ERROR" in said
    assert "large is left out: 100 MiB would make it more" in said
    assert "other is left out: it is not installed, and .whl/ has no wheel of it" in said
    assert not (target / "tests").exists()
    monkeypatch.setattr(gpu_wheels, "UNPACKED", target)
    code = "import somepeer.core, importlib.metadata as m; print(m.version('somepeer'))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=gpu.environment(), capture_output=True, text=True)
    assert done.stdout == "1.0\n", done.stderr


def test_without_wheels_what_is_installed_is_used(tmp_path, capsys):
    arguments = ["--folder", str(tmp_path / "none"), "--unpack", str(tmp_path / "peers")]
    assert gpu_wheels.main(arguments) == 0
    said = capsys.readouterr().out
    assert "unpacked" not in said
    for name, peer in PEERS.items():
        installed = gpu_wheels.importlib.util.find_spec(peer.module) is not None
        assert (f"{name} is left out: " in said) is not installed


def package(folder, **modules):
    for name, text in modules.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if not (path.parent / "__init__.py").exists():
            (path.parent / "__init__.py").write_text("import no_such_ray")


def test_verl_is_measured_where_what_else_it_needs_is_not_there(tmp_path, monkeypatch):
    """Its packages import ray; the formulas do not. Nothing of the stand-ins stays."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "verl"]:
        monkeypatch.delitem(sys.modules, name)
    package(tmp_path, verl__utils__formulas="from verl.utils.kind import value")
    package(tmp_path, verl__utils__kind="value = 5", verl__other="")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.verl_module("verl.utils.formulas").value == 5
    assert not any(name.partition(".")[0] == "verl" for name in sys.modules)
    with pytest.raises(ImportError, match="no_such_thing"):
        package(tmp_path, verl__utils__worse="import no_such_thing")
        peers.verl_module("verl.utils.worse")
    assert not any(name.partition(".")[0] == "verl" for name in sys.modules)


def test_trl_is_measured_without_what_its_trainers_need(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    head = "def selective_log_softmax_and_entropy(logits, index, temperature):"
    kernel = f"{head}\n    return logits, index"
    package(tmp_path, trl__trainer__utils="import no_such_datasets")
    for folder, text in (("trl", ""), ("trl/trainer", ""), ("trl/kernels", kernel)):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.arange(3)
    assert peers.trl()(x, x + 1)[1] is not None and "trl.kernels" in sys.modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "trl"]:
        del sys.modules[name]
