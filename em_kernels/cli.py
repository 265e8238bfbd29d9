"""The command line: em-kernels train | merge | eval | compare | select | analyze |
report | info."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import em_kernels
from em_kernels.evaluator.commands import add_commands
from em_kernels.evaluator.options import quiet_transformers
from em_kernels.trainer import (
    CheckpointError,
    RankError,
    TrainConfig,
    TrainResult,
    merge_checkpoint,
    read_config,
    read_prompts,
    train,
)
from em_kernels.trainer.config import DTYPES, SAMPLERS
from em_kernels.trainer.models import newest_checkpoint

USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    FloatingPointError,
    CheckpointError,
    torch.OutOfMemoryError,
)
FAILED, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; an error is one line on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except RankError:  # the rank that failed says why
        return FAILED
    except USER_ERRORS as error:
        if arguments.traceback:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"em-kernels: error: {_rank_name()}{message}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"\nem-kernels: interrupted{_where_it_stopped(arguments)}", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="em-kernels", description="Entropy minimisation of language models."
    )
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
    parser.set_defaults(command=command)


def _add_train(commands) -> None:
    """The options are the fields of TrainConfig; one that is not given stays out."""
    parser = commands.add_parser(
        "train",
        help="one-shot entropy minimisation",
        description="Minimise the entropy of a model's answers to one prompt, without labels.",
        argument_default=argparse.SUPPRESS,
    )
    default = TrainConfig()

    def setting(flag: str, text: str, **kwargs) -> None:
        name = flag[2:].replace("-", "_")
        value = getattr(default, name)
        kind = {} if "action" in kwargs or "choices" in kwargs else {"type": type(value)}
        parser.add_argument(flag, help=f"{text} (default {value})", **{**kind, **kwargs})

    parser.add_argument("--model", help="a model folder or a hub name")
    parser.add_argument("--output", help="folder of the run: metrics.jsonl and checkpoints")
    parser.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, with its settings"
    )
    parser.add_argument(
        "--prompt", action="append", help="the prompt (default: the published one); may be repeated"
    )
    parser.add_argument("--prompts", metavar="FILE", help='JSON lines {"prompt": ...}')
    setting("--updates", "optimiser updates")
    setting("--responses", "sampled answers an update")
    setting("--micro-batch", "answers that go through the loss at once")
    setting("--sample-batch", "answers sampled at once")
    setting("--loss-temperature", "temperature of the loss")
    setting("--sampling-temperature", "temperature of the sampling")
    setting("--top-p", "nucleus of the sampling")
    setting("--top-k", "likeliest tokens to sample from, 0 for all")
    setting("--repetition-penalty", "of the sampling")
    setting("--max-new-tokens", "longest answer")
    setting("--sampler", "vllm: an engine of it on each GPU", choices=SAMPLERS)
    setting("--vllm-memory", "share of a GPU's memory that vLLM may take")
    setting("--reduction", "of the loss", choices=("token_mean", "sequence_mean"))
    setting("--learning-rate", "of AdamW, constant")
    setting("--weight-decay", "of AdamW")
    setting("--clip", "largest gradient norm")
    setting("--dtype", "bfloat16 is autocast around float32 parameters", choices=DTYPES)
    setting("--device", "auto, cpu, cuda, cuda:1, ...")
    setting("--gradient-checkpointing", "recompute layers to spare memory", action="store_true")
    setting("--compat", "count as the published script does", choices=("official",))
    setting("--seed", "of the sampling")
    setting("--save-every", "updates between checkpoints, 0: only at the end")
    setting("--keep-checkpoints", "how many to keep, 0: all")
    setting("--shards-only", "under torchrun: no merged weights", action="store_true")
    parser.add_argument("--quiet", action="store_true", default=False, help="no progress bar")
    _add_common(parser, _train)
    parser.set_defaults(traceback=False)


def _add_merge(commands) -> None:
    parser = commands.add_parser(
        "merge",
        help="a model folder of a sharded checkpoint",
        description="Make a model folder for transformers of what several ranks wrote.",
    )
    parser.add_argument("checkpoint", help="checkpoint-<update> of a run under torchrun")
    parser.add_argument("--output", required=True, help="the folder to make")
    _add_common(parser, _merge)


def _train(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    resumed = getattr(arguments, "resume", None)
    config = _resumed_config(arguments) if resumed else _new_config(arguments)
    result = train(config, resume=bool(resumed), progress=not arguments.quiet)
    if os.environ.get("RANK", "0") == "0":
        _print_training(result)
    return 0


def _merge(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    print(f"model: {merge_checkpoint(arguments.checkpoint, arguments.output)}")
    return 0


def _new_config(arguments: argparse.Namespace) -> TrainConfig:
    given = _settings(arguments)
    for name in ("model", "output"):
        if name not in given:
            raise ValueError(f"--{name} must be given")
    return TrainConfig(**given)


def _resumed_config(arguments: argparse.Namespace) -> TrainConfig:
    """The run's own settings, with those given on top; `train` refuses what cannot change."""
    given = _settings(arguments)
    if "output" in given:
        raise ValueError("--output cannot be given with --resume: a run goes on in its folder")
    return replace(read_config(arguments.resume), output=arguments.resume, **given)


def _settings(arguments: argparse.Namespace) -> dict:
    """The fields of TrainConfig that the command line gives."""
    given = dict(vars(arguments))
    prompt, file = given.pop("prompt", None), given.pop("prompts", None)
    if prompt is not None and file is not None:
        raise ValueError("give --prompt or --prompts, not both")
    if prompt is not None:
        given["prompts"] = tuple(prompt)
    if file is not None:
        given["prompts"] = read_prompts(file)
    return {name: given[name] for name in TrainConfig.__dataclass_fields__ if name in given}


def _info(arguments: argparse.Namespace) -> int:
    print(f"em_kernels    {em_kernels.__version__}")
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "transformers", "math-verify"):
        print(f"{package:13} {_version(package)}")
    print("backends")
    for name, state in em_kernels.backends().items():
        print(f"  {name:11} {state}")
    print(f"CPU           {_cpu()}; {torch.get_num_threads()} threads")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    for gpu in gpus:
        size = f"{gpu.total_memory / 2**30:.0f} GiB"
        print(f"GPU           {gpu.name}, {size}, compute capability {gpu.major}.{gpu.minor}")
    if not gpus:
        print("GPU           none visible to torch")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The instruction set of the compiled kernels, or of torch where they are not built."""
    try:
        built = importlib.import_module("em_kernels.cpu").build_info()
    except ImportError:
        return f"{torch.backends.cpu.get_cpu_capability().lower()}, torch's choice"
    levels = ", ".join(built["isa_levels"])
    return f"{built['isa']} in use out of {levels}; built by {built['compiler']}"


def _print_training(result: TrainResult) -> None:
    for line in result.metrics[:1] + result.metrics[1:][-1:]:
        print(
            f"update {line['update']:>4}: loss {line['loss']:.4f}, mean entropy "
            f"{line['mean_entropy']:.4f}, response length {line['response_length']:.1f}"
        )
    print(f"checkpoint: {result.checkpoint}")


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
    last = newest_checkpoint(Path(folder))
    state = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
    return f"; {state}; go on with: em-kernels train --resume {folder}"
