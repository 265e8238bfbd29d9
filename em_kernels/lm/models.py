"""Loading a causal language model, and the hidden states that its head multiplies."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from em_kernels.lm.adapters import ADAPTER_FILE, attach_adapter, base_name, has_adapter
from em_kernels.lm.head_call import check_head, head_input
from em_kernels.lm.heads import Head, ModelError, causal_lm
from em_kernels.lm.hub import looks_like_a_path, quick_to_fail
from em_kernels.lm.loading import check_kernels, loading
from em_kernels.lm.modes import eval_mode
from em_kernels.lm.optional import require
from em_kernels.lm.weights import check_not_nan

DTYPES = ("float32", "bfloat16")  # that a model may be asked to compute in
SHARDS = "shards"  # folder of the parts of a checkpoint that several ranks wrote
REMOTE_CODE = (
    "run the Python code that a model's folder, or its repository on the hub, brings along; only "
    "where this is given, and no file can give it"
)


def require_transformers() -> ModuleType:
    """The transformers package, or how to get it."""
    transformers = require("transformers", "em-kernels[train]")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers must be 5.0 or newer, got {transformers.__version__}")
    return transformers


def load_model(
    name: str,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple:
    """(model, tokenizer) from a folder or a hub name, the parameters in `dtype`, in eval mode.

    A folder with an adapter, as the trainer and PEFT write them, is a `peft.PeftModel` around the
    model that it names; the adapter can be trained. Nothing that the files hold is run, unless
    `trust_remote_code` lets the code of the model's own run; pickled weights are read as tensors.

    Raises:
        ModelError: nothing there, not a causal language model, or no weights for its head; a
            weight that is NaN; code of the model's own that is not trusted; for an adapter also:
            the model below it is not there, or has other weights than in training.
        ImportError: transformers, or peft for an adapter, is missing.
    """
    place = _device(device)
    _check_path(name)
    if has_adapter(name):
        model, tokenizer = _load_adapted(name, dtype, trust_remote_code)
    else:
        model = _load_weights(name, dtype, trust_remote_code)
        tokenizer = _load_tokenizer(name, trust_remote_code)
    check_not_nan(model, name)
    return model.to(place), tokenizer


def _load_adapted(folder: str, dtype: torch.dtype, trust: bool) -> tuple:
    """(PEFT model, tokenizer) of a folder with an adapter."""
    base, revision = base_name(folder)
    try:
        _check_path(base)
        model = _load_weights(base, dtype, trust, revision)
    except ModelError as error:
        raise ModelError(
            f"{folder} is an adapter, and the model below it cannot be loaded: {error}; "
            f"base_model_name_or_path in its {ADAPTER_FILE} says where that is"
        ) from error
    own = (Path(folder) / "tokenizer_config.json").is_file()
    tokenizer = _load_tokenizer(folder if own else base, trust)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))  # the adapter's files hold the new ones
    return attach_adapter(model, folder), tokenizer


def _load_weights(name: str, dtype: torch.dtype, trust: bool, revision: str | None = None):
    transformers = require_transformers()
    told: dict[str, Any] = {"trust_remote_code": trust, "revision": revision or "main"}
    options = dict(dtype=dtype, output_loading_info=True, **told)

    def load() -> tuple:
        check_kernels(name, transformers.AutoConfig.from_pretrained(name, **told), trust)
        return transformers.AutoModelForCausalLM.from_pretrained(name, **options)

    model, report = _loaded(name, "a causal language model from", load, trust)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name!r} is not a causal language model: it has no weights for {', '.join(missing)}"
        )
    return model


def _load_tokenizer(name: str, trust: bool):
    auto = require_transformers().AutoTokenizer
    load = partial(auto.from_pretrained, name, trust_remote_code=trust)
    return _loaded(name, "the tokenizer of", load, trust)


def _loaded(name: str, what: str, load: Callable[[], Any], trust: bool) -> Any:
    failed = f"cannot load {what} {name!r}"
    with quick_to_fail(name) as silent, loading(failed, trust, silent):
        return load()


def load_architecture(
    folder: Path,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple:
    """(model, tokenizer) of a model folder, the weights, in `dtype`, not those of the folder."""
    transformers = require_transformers()
    tokenizer = _load_tokenizer(str(folder), trust_remote_code)
    options = {"trust_remote_code": trust_remote_code}
    with loading(f"cannot make the model of {folder}", trust_remote_code):
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        check_kernels(str(folder), config, trust_remote_code)
        with torch.random.fork_rng():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
        if (folder / "generation_config.json").is_file():
            settings = transformers.GenerationConfig.from_pretrained(folder)
            model.generation_config = settings
    return model.eval().to(_device(device)), tokenizer


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if p.name[len("checkpoint-") :].isdecimal()]
    return sorted(filter(_holds_model, found), key=updates_of)


def updates_of(checkpoint: Path) -> int:
    """The updates behind it, which its name says."""
    return int(checkpoint.name.rpartition("-")[2])


def weights_in_parts(checkpoint: Path) -> bool:
    """The checkpoint has its weights in the parts alone."""
    published = any(checkpoint.glob("*.safetensors")) or has_adapter(checkpoint)
    return (checkpoint / SHARDS).is_dir() and not published


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or has_adapter(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint of a run that has the most updates behind it."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def hidden_states(
    model, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The final hidden states (B, T, D): what the head multiplies.

    Positions are counted from the first token that is attended to, unless given.
    """
    mask = attention_mask.long()
    inputs = dict(input_ids=input_ids, attention_mask=mask, use_cache=False)
    if "position_ids" in inspect.signature(causal_lm(model).forward).parameters:
        counted = (mask.cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = counted if position_ids is None else position_ids
    return head_input(model, **inputs)


def enable_gradient_checkpointing(model) -> None:
    """By either of the names that transformers 5 has had for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)()


@torch.no_grad()
def check_causal(model, head: Head, prompt: list[int]) -> None:
    """Make sure that `head` gives the model's own logits, and that no position sees a later token.

    Raises:
        ModelError: as `check_head`; or a position sees a later one, there are more or fewer
            positions than tokens, or the model counts them otherwise than `hidden_states` does.
    """
    check_head(model, head)
    ids = torch.tensor([prompt, prompt], device=model.device)
    ids[1, -1] = (ids[1, -1] + 1) % head.weight.shape[0]
    with eval_mode(model):
        first, second = hidden = hidden_states(model, ids, torch.ones_like(ids))
        own = head_input(model, input_ids=ids, use_cache=False)
    name = type(model).__name__
    if hidden.shape[:2] != ids.shape:
        raise ModelError(
            f"{name} gives its head {hidden.shape[1]} positions for {len(prompt)} tokens; such a "
            "model is not supported"
        )
    if not _close(hidden, own):
        raise ModelError(
            f"{name} does not count positions from 0 at the first token; such a model is not "
            "supported"
        )
    if not _close(second[:-1], first[:-1]):
        raise ModelError(f"{name} is not causal: earlier positions see later ones")


def _close(actual: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-5 + 4 * torch.finfo(expected.dtype).eps
    return bool((actual - expected).float().norm() <= tolerance * expected.float().norm())


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from None
    return device


def _check_path(name: str) -> None:
    """Refuse what is meant as a path and is not a model folder, rather than ask the hub for it."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not _holds_model(path):
            newest = newest_checkpoint(path)
            hint = f"; did you mean {newest}?" if newest else ""
            raise ModelError(f"no model in the folder {name}: it has no config.json{hint}")
        if weights_in_parts(path):
            raise ModelError(f"{name} is in parts: `em-kernels merge {name}` makes a model of them")
    elif path.exists():
        raise ModelError(f"a model is a folder, got the file {name}")
    elif looks_like_a_path(name):
        raise ModelError(f"no such folder: {name}")
