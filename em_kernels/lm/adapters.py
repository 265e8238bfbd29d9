"""PEFT models: what of them can be trained, their checkpoints, and their merged weights.

A checkpoint of one holds the adapter that is active, not the weights below it:
    adapter_config.json, adapter_model.safetensors    as PEFT writes them, the adapter at the root
    base_model.json                                   of the weights below: dtype, digest, quantised
    merged/                                           with `save_merged`: a whole model
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from em_kernels.lm.data import read_json_object
from em_kernels.lm.fingerprint import digest, is_packed
from em_kernels.lm.heads import ModelError, causal_lm
from em_kernels.lm.loading import loading
from em_kernels.lm.lora_heads import is_lora
from em_kernels.lm.optional import require

ADAPTER_FILE = "adapter_config.json"
BASE_FILE = "base_model.json"
MERGED = "merged"
_SAME_ADAPTER = {  # settings that may differ between an adapter and its checkpoint
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
}


def require_peft() -> ModuleType:
    """The peft package, or how to get it."""
    return require("peft", "em-kernels[peft]")


def is_adapted(model) -> bool:
    """A `peft.PeftModel`, or a transformers model that adapters were added to."""
    return bool(getattr(model, "peft_config", None))


def has_adapter(folder: str | Path) -> bool:
    """The folder holds an adapter rather than a whole model."""
    return (Path(folder) / ADAPTER_FILE).is_file()


def active_adapter(model) -> str:
    """The name of the one adapter that is active.

    Raises:
        ModelError: there is none, or several.
    """
    names = active_adapters(model)
    if len(names) != 1:
        raise ModelError(
            f"a PEFT model must have one active adapter, got {names}: choose one with "
            "set_adapter, and merge the others into the weights below it"
        )
    return names[0]


def active_adapters(model) -> list[str]:
    names = model.active_adapters
    return list(names() if callable(names) else names)


def adapter_settings(model) -> dict[str, dict]:
    """What decides what the weights of the active adapters do, by adapter."""
    return {name: _settings(model.peft_config[name]) for name in active_adapters(model)}


def check_adapted(model, *, saved: bool, merged: bool) -> None:
    """Make sure that a PEFT model can be trained, written down (`saved`) and merged.

    Raises:
        ModelError: it cannot.
    """
    peft = require_peft()
    if not _is_wrapped(model) and not getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{type(model).__name__} has adapters but is no peft.PeftModel: pass what "
            "peft.get_peft_model returned"
        )
    _check_kind(model.peft_config[active_adapter(model)])
    if saved:
        _check_not_compiled_inside(model)
        state = peft.get_peft_model_state_dict(model, adapter_name=active_adapter(model))
        held = {value.data_ptr() for value in state.values()}
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        left = [name for name, value in trained if value.data_ptr() not in held]
        if left:
            raise ModelError(
                f"the adapter's files would not hold {_listed(left)}, which would be trained: put "
                "the modules into modules_to_save, or freeze them (requires_grad_(False))"
            )
    if merged:
        _check_mergeable(model)


def write_model(model, folder: Path, merged: bool = False) -> None:
    """`save_pretrained`; of a PEFT model, its active adapter, and what it was made for."""
    if not is_adapted(model):
        model.save_pretrained(folder)
        return
    name = active_adapter(model)
    if _is_wrapped(model):
        model.save_pretrained(folder, selected_adapters=[name])
        if name != "default":
            for path in (folder / name).iterdir():
                path.rename(folder / path.name)
            (folder / name).rmdir()
    else:
        model.save_pretrained(folder)
    _write_base(model, folder)
    if merged:
        merged_copy(model).save_pretrained(folder / MERGED)


def base_name(folder: str | Path) -> tuple[str, str | None]:
    """(folder or hub name of the model below an adapter, its revision).

    Raises:
        ModelError: it is not known, or the adapter is of a kind that is not supported.
    """
    config = _read_config(folder)
    _check_kind(config)
    base = config.base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{folder}: its {ADAPTER_FILE} names no model below the adapter: write a folder or a "
            "hub name there as base_model_name_or_path"
        )
    if has_adapter(base):
        raise ModelError(f"{folder}: the model below, {base}, is an adapter itself: merge that one")
    return base, getattr(config, "revision", None)


def base_dtype(folder: str | Path) -> torch.dtype | None:
    """What the weights below an adapter had in training; None where the trainer did not say."""
    written = _read_base(folder)
    return None if written is None else getattr(torch, written["dtype"])


def attach_adapter(model, folder: str | Path):
    """The PEFT model, in eval mode, of an adapter's folder around its base; it can be trained.

    Raises:
        ModelError: the adapter does not fit, or was trained on other weights.
    """
    peft = require_peft()
    with loading(f"cannot load the adapter of {folder}"):
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(
            model, str(folder), is_trainable=True, torch_device="cpu"
        )
    _check_base(adapted, folder, same_dtype=False)
    return adapted.eval()


def load_weights(model, folder: Path) -> None:
    """The weights of an adapter's folder, into the active adapter of a model.

    Raises:
        ModelError: the model below or the adapter differs from the folder's.
    """
    peft, name = require_peft(), active_adapter(model)
    theirs, ours = _settings(_read_config(folder)), _settings(model.peft_config[name])
    changed = [key for key in theirs if key in ours and ours[key] != theirs[key]]
    if changed:
        raise ModelError(
            f"the adapter differs from that of {folder}: {changed[0]} was {theirs[changed[0]]!r}, "
            f"got {ours[changed[0]]!r}"
        )
    _check_base(model, folder, same_dtype=True)
    with loading(f"cannot load the adapter of {folder}"):
        state = peft.utils.load_peft_weights(str(folder), device="cpu")
        report = peft.set_peft_model_state_dict(model, state, adapter_name=name)
    wrong = sorted(_left_out(model, set(report.missing_keys))) + report.unexpected_keys
    if wrong:
        raise ModelError(
            f"the adapter of {folder} does not fit the model ({_listed(wrong)}): pass the PEFT "
            "model that it was saved from"
        )


def _left_out(model, missing: set[str]) -> list[str]:
    """What is trained and was not loaded: a parameter of several layers has one name in a file."""
    named = list(model.named_parameters(remove_duplicate=False))
    loaded = {id(value) for name, value in named if name not in missing}
    left = {id(value): name for name, value in named if value.requires_grad}
    return [name for key, name in left.items() if key not in loaded]


def check_same_head(model) -> None:
    """Make sure that the merged weights fit the architecture of the model below the adapter.

    Raises:
        ModelError: its tied head and embeddings have become two.
    """
    _check_mergeable(model)
    if model.config.get_text_config().tie_word_embeddings:
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if type(layer) not in (nn.Linear, nn.Embedding):
                raise ModelError(
                    "the head and the embeddings of the model are one, and the adapter changes "
                    "only one of them, which vLLM has no place for: leave both out of the "
                    "adapter, or use sampler='transformers'"
                )


def merged_copy(model):
    """A plain transformers model with the active adapter in its weights, on the CPU.

    The PEFT model is left as it is: to merge and to undo that again is not exact.

    Raises:
        ModelError: such weights cannot be made of it.
    """
    _check_mergeable(model)
    on_cpu = {
        id(value): nn.Parameter(value.detach().to("cpu", copy=True), requires_grad=False)
        for value in model.parameters()
    }
    copied = copy.deepcopy(model, on_cpu).to("cpu")
    plain = causal_lm(copied)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    if (type(head) is nn.Linear and type(embeddings) is not nn.Embedding) or is_lora(head):
        # an adapter on one of the two, where they are tied, is not one on the other
        head = getattr(head, "base_layer", head)
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    try:
        return copied.merge_and_unload()
    except NotImplementedError as error:
        raise ModelError(f"the adapter cannot be merged: {error}") from error


def base_parameters(model) -> Iterator[tuple[str, Tensor]]:
    """The frozen weights below the adapters, by the names that they have without any."""
    inserted, own = (".base_layer.", ".original_module.", ".token_adapter."), _of_adapters(model)
    for name, value in model.named_parameters():
        if value.requires_grad or id(value) in own:
            continue
        plain = name.removeprefix("base_model.model.")
        for part in inserted:
            plain = plain.replace(part, ".")
        yield plain, value


def _check_not_compiled_inside(model) -> None:
    if any("_orig_mod" in name.split(".") for name, _ in model.named_modules()):
        raise ModelError(
            "the model below the adapter was compiled first, and so the names in the adapter's "
            "files would fit no other: use model.compile(), which adds no wrapper"
        )


def _of_adapters(model) -> set[int]:
    """The ids of all adapters' parameters: PEFT keeps them in dicts by the adapter's name."""
    dicts = [m for m in model.modules() if isinstance(m, (nn.ModuleDict, nn.ParameterDict))]
    parts = [held[name] for held in dicts for name in model.peft_config if name in held]
    modules = [part for part in parts if isinstance(part, nn.Module)]
    found = [part for part in parts if isinstance(part, Tensor)]
    return {id(p) for p in [*found, *(p for m in modules for p in m.parameters())]}


def _check_kind(config) -> None:
    if getattr(config, "megatron_config", None):
        raise ModelError(
            "an adapter with a megatron_config is not supported: it names a module to import"
        )
    if config.is_prompt_learning:
        raise ModelError(
            f"adapters of type {config.peft_type.value} put virtual tokens into the sequence, "
            "which is not supported; use one that changes weights, as peft.LoraConfig"
        )


def _is_wrapped(model) -> bool:
    return isinstance(model, require_peft().PeftModel)


def _check_mergeable(model) -> None:
    if not _is_wrapped(model):
        raise ModelError(
            f"the adapter of a {type(model).__name__} cannot be merged: make a PEFT model with "
            "peft.get_peft_model instead of add_adapter"
        )
    if is_quantised(model):
        raise ModelError(
            "an adapter is not merged into quantised weights, which would round it away: train "
            "without merged weights, then merge its checkpoint into the unquantised model"
        )


def is_quantised(model) -> bool:
    """Whether weights of the model are kept as integers, or in torchao's tensors."""
    configured = getattr(model.config, "quantization_config", None) is not None
    return configured or any(is_packed(p) or not p.is_floating_point() for p in model.parameters())


def _write_base(model, folder: Path) -> None:
    """Which weights the adapter belongs on: their name, as a path that holds anywhere; a digest."""
    path = folder / ADAPTER_FILE
    values = json.loads(path.read_text(encoding="utf-8"))
    name = values.get("base_model_name_or_path") or causal_lm(model).name_or_path or None
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())
    values["base_model_name_or_path"] = name
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / BASE_FILE).write_text(json.dumps(_base(model)) + "\n", encoding="utf-8")


def _base(model) -> dict:
    return {
        "dtype": str(causal_lm(model).dtype).removeprefix("torch."),
        "quantised": is_quantised(model),
        "weights": digest(base_parameters(model)),
    }


def _read_base(folder: str | Path) -> dict | None:
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        return None
    remedy = "remove it to load the adapter unchecked"
    try:
        written = read_json_object(path)
    except ValueError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ModelError(f"{path} cannot be read ({reason}); {remedy}") from error
    for name in ("dtype", "weights"):
        if not isinstance(written.get(name), str):
            raise ModelError(f"{path} cannot be read (no text {name!r}); {remedy}")
    if not isinstance(getattr(torch, written["dtype"], None), torch.dtype):
        wrong = f"{written['dtype']!r:.60} is no dtype"
        raise ModelError(f"{path} cannot be read ({wrong}); {remedy}")
    return written


def _check_base(model, folder: str | Path, same_dtype: bool) -> None:
    """By the digest that the trainer wrote; in another dtype the weights have other bits, as they
    have when they were quantised in training."""
    written, before, dtype = _read_base(folder), base_dtype(folder), causal_lm(model).dtype
    if written is None or (dtype != before and not same_dtype):
        return
    if written.get("quantised") and not is_quantised(model) and not same_dtype:
        return
    if dtype != before:
        raise ModelError(
            f"the adapter of {folder} was trained on weights of {before}, got {dtype}: load the "
            "model below it in that dtype"
        )
    if written["weights"] != digest(base_parameters(model)):
        raise ModelError(
            f"the weights below the adapter of {folder} are not those it was trained on; give it "
            f"that model (base_model_name_or_path in its {ADAPTER_FILE})"
        )


def _read_config(folder: str | Path):
    peft = require_peft()
    with loading(f"cannot read {Path(folder) / ADAPTER_FILE}"):
        read_json_object(Path(folder) / ADAPTER_FILE)
        return peft.PeftConfig.from_pretrained(str(folder))


def _settings(config) -> dict:
    """Without what may differ; how the weights were made at first is in the weights."""
    kept = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _SAME_ADAPTER and not key.startswith("init_")
    }
    plain = json.dumps(kept, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return json.loads(plain)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
