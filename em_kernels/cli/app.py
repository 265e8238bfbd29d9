"""The command line: em-kernels train | merge | eval | compare | select | analyze |
report | info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import re
import sys
import traceback
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import em_kernels
from em_kernels.cli.evaluate import add_commands
from em_kernels.cli.messages import as_typed
from em_kernels.cli.options import quiet_transformers
from em_kernels.cli.parser import FAILED, Parser, short_warnings
from em_kernels.lm.lock import InUseError
from em_kernels.lm.models import newest_checkpoint
from em_kernels.lm.setting_files import check_names, check_values, read_settings
from em_kernels.lm.settings import add_flags, given_settings, settings_of
from em_kernels.lm.text import one_line
from em_kernels.trainer import (
    CheckpointError,
    EngineError,
    LostRankError,
    RankError,
    RLConfig,
    TrainConfig,
    TrainResult,
    merge_checkpoint,
    read_config,
    read_prompts,
    train,
)
from em_kernels.trainer.checkpoint import CONFIG_FILE
from em_kernels.trainer.config import NOT_WRITTEN

USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    CheckpointError,
    EngineError,
    InUseError,
    torch.OutOfMemoryError,
)
INTERRUPTED = 130
REMOTE = {"trust_remote_code": False}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.refuse_unknown(unknown)
    try:
        _check_not_empty(arguments)
        with short_warnings(lambda text: as_typed(text, arguments)):
            return arguments.command(arguments)
    except RankError as error:  # the rank that failed says why, where it still can
        if isinstance(error, LostRankError):
            print(f"em-kernels: error: {_rank_name()}{one_line(error, None)}", file=sys.stderr)
        return FAILED
    except USER_ERRORS as error:
        if arguments.traceback:
            traceback.print_exc()
        return _failed(as_typed(one_line(error, None), arguments))
    except Exception as error:  # nobody has thought of it: a fault here, or a file that is odd
        if arguments.traceback:
            traceback.print_exc()
        return _failed(
            f"{type(error).__name__}: {one_line(error, None)} (not foreseen; --traceback shows "
            "where it came from)"
        )
    except KeyboardInterrupt:
        print(f"\nem-kernels: interrupted{_where_it_stopped(arguments)}", file=sys.stderr)
        return INTERRUPTED


def _failed(message: str) -> int:
    print(f"em-kernels: error: {_rank_name()}{message}", file=sys.stderr)
    return FAILED


def _check_not_empty(arguments: argparse.Namespace) -> None:
    """A shell makes nothing of a variable that is not set; no folder or model is called that."""
    for name, value in vars(arguments).items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(one, str) and not one.strip():
                raise ValueError(f"--{name.replace('_', '-')} must not be empty, got {one!r}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="em-kernels", description="Entropy minimisation of language models.")
    parser.add_argument("--version", action="version", version=em_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_merge(commands)
    add_commands(commands, _add_common)
    info = commands.add_parser("info", help="versions, backends, CPU and GPUs")
    _add_common(info, _info)
    return parser


def _add_common(parser: argparse.ArgumentParser, command) -> None:
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(command=command, parser=parser)


def _add_train(commands) -> None:
    """The options are the settings of TrainConfig and RLConfig; one that is not given stays out."""
    parser = commands.add_parser(
        "train",
        help="one-shot entropy minimisation, or by name RL, distillation, fine-tuning",
        description="Minimise the entropy of a model's answers to one prompt, without labels; or, "
        "with --objective, train it on problems by GRPO and its kin, toward a teacher (opd), or on "
        "worked solutions (sft, eaft).",
    )
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, with its settings"
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="settings in a .yaml, .toml or .json file, as the run.yaml that every run writes; "
        "flags go before them",
    )
    parser.add_argument(
        "--prompt", action="append", help="a prompt to train on; may be repeated; - reads stdin"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file of rows {"prompt": ...} in any form of --problems, or of chats '
        '{"messages": [...]} that may bring their own system turn',
    )
    add_flags(parser, TrainConfig, others={"with --objective": RLConfig})
    parser.add_argument("--quiet", action="store_true", help="no progress")
    _add_common(parser, _train)


def _add_merge(commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="a model folder of a sharded checkpoint, or of an adapter",
        description="Make a model folder for transformers of what several ranks wrote, or of an "
        "adapter and the model below it.",
    )
    parser.add_argument("checkpoint", help="checkpoint-<update> of a run")
    parser.add_argument("--output", required=True, help="the folder to make")
    add_flags(parser, TrainConfig, only=REMOTE, defaults=REMOTE)
    _add_common(parser, _merge)


def _train(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    config = _resumed_config(arguments) if arguments.resume else _new_config(arguments)
    result = train(config, resume=bool(arguments.resume), progress=not arguments.quiet)
    if os.environ.get("RANK", "0") == "0":
        _print_training(result, config)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    where = (arguments.checkpoint, arguments.output)
    print(f"model: {merge_checkpoint(*where, arguments.trust_remote_code)}")
    return 0


def _new_config(arguments: argparse.Namespace) -> TrainConfig:
    flags, path = _settings(arguments), arguments.config
    given = flags if path is None else {**_from_file(path, flags), **flags}
    for name in ("model", "output"):
        if given.get(name) is None:
            where = "" if path is None else f": it is not in {path}"
            raise ValueError(f"--{name} must be given{where}")
    cls = _config_class(given, flags, path)
    if path is None:
        return cls(**given)
    check_values(path, {name: given[name] for name in given if name not in flags}, cls)
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"with the settings of {path}: {one_line(error, None)}") from error


def _from_file(path: str, flags: dict) -> dict:
    """The settings of a file; `prompts` are texts in a list, or the name of a file of them."""
    found = read_settings(path)
    check_names(path, found, settings_of(RLConfig))
    for name in set(found) & set(NOT_WRITTEN):
        raise ValueError(
            f"{path}: {name} is not taken from a file, which may be anybody's: give "
            f"--{name.replace('_', '-')} with the command"
        )
    for one, other in (("objective", "schedule"), ("schedule", "objective")):
        if one in flags:  # the two say the same thing
            found.pop(other, None)
    prompts = found.get("prompts")
    if isinstance(prompts, str) and "prompts" not in flags:
        try:
            found["prompts"] = read_prompts(prompts)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path}: prompts must be a list of texts, or a file of them, got {prompts!r}, "
                "and there is no such file"
            ) from None
    return found


def _config_class(given: dict, flags: Container[str], path: str | None) -> type[TrainConfig]:
    """RLConfig where an objective with rewards, or a schedule, is asked for."""
    if given.get("schedule") or given.get("objective", "em") != "em":
        return RLConfig
    given.pop("objective", None)
    if given.get("schedule") is None:
        given.pop("schedule", None)
    others = sorted(set(given) - set(TrainConfig.__dataclass_fields__))
    if others:
        name, needed = others[0], "needs an --objective other than em, or a --schedule"
        if name not in flags:
            raise ValueError(f"{path}: {name} {needed}")
        raise ValueError(f"--{name.replace('_', '-')} {needed}")
    return TrainConfig


def _resumed_config(arguments: argparse.Namespace) -> TrainConfig:
    """The run's own settings, with those given on top; `train` refuses what cannot change."""
    given = _settings(arguments)
    if arguments.config is not None:
        raise ValueError(
            "--config cannot be given with --resume: a run goes on with its own settings, and "
            "flags for those that may change"
        )
    if "output" in given:
        raise ValueError("--output cannot be given with --resume: a run goes on in its folder")
    config = read_config(arguments.resume)
    unknown = sorted(set(given) - set(type(config).__dataclass_fields__))
    if unknown:
        raise ValueError(f"--{unknown[0].replace('_', '-')} is no setting of the run to resume")
    return replace(config, output=arguments.resume, **given)


def _settings(arguments: argparse.Namespace) -> dict:
    """The fields of RLConfig, those of TrainConfig among them, that the command line gives."""
    given = given_settings(arguments, RLConfig)
    file = given.pop("prompts")
    if arguments.prompt is not None and file is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if arguments.prompt is not None:
        given["prompts"] = tuple(_stdin() if text == "-" else text for text in arguments.prompt)
    if file is not None:
        given["prompts"] = read_prompts(file)
    return given


def _stdin() -> str:
    return sys.stdin.read().strip("\n")


def _info(arguments: argparse.Namespace) -> int:
    print(f"em_kernels    {em_kernels.__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "transformers", "math-verify"):
        print(f"{package:13} {_version(package)}")
    print("backends")
    for name, state in em_kernels.backends().items():
        print(f"  {name:11} {state}")
    print(f"CPU           {_cpu()}; {torch.get_num_threads()} threads")
    print(f"CUDA          {_cuda()}")
    for gpu in _gpus():
        print(f"GPU           {gpu}")
    return 0


def _gpus() -> list[str]:
    """What torch says of each, of there being none, or of not being able to look."""
    try:
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return [f"torch cannot look: {type(error).__name__}: {error}"]
    return [
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, "
        f"compute capability {gpu.major}.{gpu.minor}"
        for gpu in gpus
    ] or ["none visible to torch"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The instruction set of the compiled kernels, or of torch where they are not built."""
    try:
        built = importlib.import_module("em_kernels.backends.cpu").load().build_info()
    except Exception:  # the backends above say why
        return f"{torch.backends.cpu.get_cpu_capability().lower()}, torch's choice"
    levels = ", ".join(built["isa_levels"])
    return f"{built['isa']} in use out of {levels}; built by {built['compiler']}"


def _cuda() -> str:
    """What the CUDA kernels were compiled for; from sm_90 on, `loss` keeps a row in a cluster."""
    try:
        built = importlib.import_module("em_kernels._cuda")
    except ModuleNotFoundError:
        return "not built"
    except Exception:  # the backends above say why
        return "cannot be loaded"
    numbers = [int(number) for number in re.findall(r"_(\d+)", built.architectures)]
    clusters = "with" if max(numbers) >= 90 else "without"
    return f"{built.architectures}, {clusters} thread-block clusters; built by nvcc {built.nvcc}"


def _print_training(result: TrainResult, config: TrainConfig) -> None:
    """The first update against the last."""
    for line in result.metrics[:1] + result.metrics[1:][-1:]:
        print(
            f"update {line['update']:>4}: loss {line['loss']:.4f}, mean entropy "
            f"{line['mean_entropy']:.4f}, response length {line['response_length']:.1f}"
            + (f", reward {line['reward_mean']:.3f}" if "reward_mean" in line else "")
        )
    kept, updates = config.keep_checkpoints, len(result.metrics)
    written = -(-updates // (config.save_every or max(updates, 1)))
    gone = 0 < kept < written
    note = f" (the newest {kept} are kept; --keep-checkpoints 0 keeps all)" if gone else ""
    print(f"checkpoint: {result.checkpoint}{note}")


def _rank_name() -> str:
    """Under torchrun, which of several processes speaks."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return f"rank {os.environ.get('RANK')}: " if several else ""


def _where_it_stopped(arguments: argparse.Namespace) -> str:
    if hasattr(arguments, "go_on"):
        return arguments.go_on
    folder = getattr(arguments, "resume", None) or getattr(arguments, "output", None)
    if folder is None:
        return ""
    if not (Path(folder) / CONFIG_FILE).is_file():
        return "; nothing was begun yet: start it again with the same command"
    last = newest_checkpoint(Path(folder))
    state = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"; {state}; go on with: em-kernels train --resume {folder}"
