"""Models that are read beside the one that is trained: the reference of a KL, and a teacher.

They are frozen and in eval mode, and every rank holds them whole.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from em_kernels.lm.adapters import is_adapted
from em_kernels.lm.heads import Head, ModelError, read_head
from em_kernels.lm.models import check_causal, load_model
from em_kernels.lm.ranks import Ranks
from em_kernels.trainer.config import TrainConfig
from em_kernels.trainer.rl_config import RLConfig


class SecondModel(NamedTuple):
    """A frozen model; its tokenizer, None if it is not known; the setting that asks for it."""

    model: Any
    tokenizer: Any
    setting: str


def second_models(config: TrainConfig, model, teacher, ranks: Ranks) -> dict[str, SecondModel]:
    """What the settings ask for: "reference", "teacher", both or none.

    Args:
        model: as passed to `train`, before anything trains it.
        teacher: the same, or it and its tokenizer; None loads `config.teacher`.

    Raises:
        ValueError: `train` was called without a model or teacher that it needs, or with one that
            it does not.
        ModelError: it cannot be loaded.
    """
    found: dict[str, SecondModel] = {}
    if teacher is not None and not (isinstance(config, RLConfig) and config.has_opd):
        raise ValueError("teacher is for the objective 'opd', got one for another: leave it out")
    if model is not None and model in _pair(teacher):
        raise ValueError("teacher must be another model than the one that is trained, got the same")
    if not isinstance(config, RLConfig):
        return found
    if config.reference_setting is not None:
        setting = config.reference_setting
        found["reference"] = SecondModel(initial_model(config, model, ranks), None, setting)
    if config.has_opd:
        found["teacher"] = _teacher(config, teacher)
    return found


def initial_model(config: RLConfig, model, ranks: Ranks):
    """The reference: the model as the run was started with it.

    It shares the weights that an adapter leaves alone; several ranks take those apart.
    """
    if model is None and config.model is None:
        raise ValueError(
            f"model must be given with {config.reference_setting}: the model that the run was "
            "started with, got None"
        )
    if model is None:
        model, _ = load_model(
            str(config.model), config.device, config.weights_dtype, config.trust_remote_code
        )
        return _frozen(model)
    shared = {}
    if is_adapted(model) and ranks.size == 1:
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return _frozen(copy.deepcopy(model, shared))


def _teacher(config: RLConfig, passed) -> SecondModel:
    """The teacher that is passed, else the one that is named, in the dtype of the run."""
    if passed is not None and config.teacher is not None:
        raise ValueError(f"teacher must be passed or named, got both (named {config.teacher!r})")
    if passed is None and config.teacher is None:
        raise ValueError(
            "teacher must be given for 'opd': a model folder or a hub name, or a model passed to "
            "train, got None"
        )
    model, tokenizer = _pair(passed)
    if passed is None:
        dtype = getattr(torch, config.compute_dtype)
        trust = config.trust_remote_code
        model, tokenizer = load_model(str(config.teacher), config.device, dtype, trust)
        _frozen(model)
    try:
        check_causal(model, read_head(model), [0, 1, 1, 0])
    except ModelError as error:
        raise ModelError(f"teacher: {error}") from error
    return SecondModel(model, tokenizer, "teacher")


def _pair(teacher) -> tuple:
    """(model, tokenizer or None) of what `train` is passed."""
    if not isinstance(teacher, tuple):
        return teacher, None
    if len(teacher) != 2:
        raise ValueError(f"teacher must be a model or (model, tokenizer), got {len(teacher)} items")
    return teacher


def _frozen(model):
    return model.eval().requires_grad_(False)


def check_vocabulary(other: SecondModel, head: Head, tokenizer) -> None:
    """Make sure that both models speak of the same tokens.

    Heads may have different numbers of rows beyond the tokens of the tokenizer, as those that are
    padded have; the first ones, as many as both have, are compared.

    Raises:
        ValueError: the vocabularies differ; says which setting asks for the other model.
    """
    own = tokenizer.get_vocab()
    theirs = None if other.tokenizer is None else other.tokenizer.get_vocab()
    name = getattr(other.model, "name_or_path", "") or type(other.model).__name__
    wanted = f"{other.setting}: {name} must have the vocabulary of the model"
    if theirs is not None and theirs != own:
        differ = len(set(own.items()) ^ set(theirs.items()))
        raise ValueError(
            f"{wanted}, got {len(theirs)} tokens against {len(own)}, of which {differ} differ"
        )
    rows, used = len(read_head(other.model).weight), 1 + max(own.values())
    if rows < used or (theirs is None and rows != len(head.weight)):
        remedy = "; where heads are padded, pass (model, tokenizer)" if theirs is None else ""
        raise ValueError(
            f"{wanted}, got a head of {rows} rows against {len(head.weight)}, of which the "
            f"tokenizer uses {used}{remedy}"
        )
