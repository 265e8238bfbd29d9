"""Everything that decides what a training run does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from typing_extensions import Self

from em_kernels.lm.chat import (
    SYSTEM,
    TEMPLATE_KWARGS,
    Prompt,
    WithChat,
    check_prompts,
    check_system,
)
from em_kernels.lm.data import ONE_SHOT_PROMPT, check_text
from em_kernels.lm.demonstrations import Demonstration
from em_kernels.lm.models import DTYPES, REMOTE_CODE
from em_kernels.lm.settings import (
    at_least,
    check_settings,
    device_text,
    documented,
    finite,
    fraction,
    key_values,
    not_negative,
    path_text,
    positive,
    setting,
    share,
    texts,
)
from em_kernels.objectives.aggregation import CONSTANT
from em_kernels.trainer.adamw import OPTIMIZER_DTYPES
from em_kernels.trainer.conditions import EVERYWHERE, idle
from em_kernels.trainer.loggers import LOGGERS
from em_kernels.trainer.schedule import Stage

PURE = "pure_bfloat16"
SAMPLERS = ("transformers", "vllm")
REDUCTIONS = ("token_mean", "sequence_mean")
RESUMABLE = (
    "updates",
    "save_every",
    "keep_checkpoints",
    "output",
    "device",
    "shards_only",
    "save_merged",
    "vllm_memory",
    "log_to",
    "trust_remote_code",
)
NOT_WRITTEN = ("trust_remote_code",)
"""Settings that no file of a run has: only who starts it can say them."""


@documented
@dataclass(frozen=True)
class TrainConfig(WithChat):
    """One-shot entropy minimisation as published, unless told otherwise.

    An update samples `responses` answers to the prompts from the current model, and takes one
    AdamW step on the mean entropy of the next-token distributions that produced them,

        L = sum_t mask_t H(softmax(z_t / loss_temperature)) / sum_t mask_t,

    over every generated token of the update, the end token included. It uses no labels. However
    the update is cut into micro-batches, L is the same.

    Defaults are those of Gao et al., "One-shot Entropy Minimization" (2025); about 10 updates is
    where their accuracy peaks, while L goes on falling. The checkpoint's own generation settings
    are not used, its end tokens are.

    With compat="official" a run counts as the published script does, for comparison:
    - its mask: position t counts if t >= the number of prompt tokens that are not PAD and token t
      is not PAD, with the distribution that position t itself emits. So the distribution of the
      first generated token is left out and the one after the last token put in; where PAD is the
      end token, the end token's own position is left out too; where the prompt is left-padded by
      k, its last k tokens are put in;
    - its mean: over each micro-batch by itself, then over micro-batches, so the loss depends on
      `micro_batch`;
    - its steps: "step" in the metrics counts micro-batches (32 an update by default), as one
      process of the script would; "update", `updates` and `save_every` do not change.
    Not reproduced: log(p + 1e-12) in bfloat16, and the library's top_k of 50 that the script
    samples with (set top_k=50).
    """

    model: str | None = setting(
        None,
        "a model folder or a hub name; in Python, None where a model is passed",
        check=path_text,
    )
    output: str | None = setting(
        None,
        "folder of the run: metrics.jsonl and checkpoints; in Python, None keeps all in memory",
        check=path_text,
    )
    prompts: tuple[Prompt, ...] = setting(
        (ONE_SHOT_PROMPT,),
        "one text or several, or chats as lists of turns (role, content); response i of update u "
        "answers prompt (u * responses + i) modulo "
        "their number, so several prompts take turns",
        check=check_prompts,
        no_flag="--prompt gives them one by one, --prompts a file of them",
        shown="the published one",
    )
    updates: int = setting(
        10, "optimiser updates in all, those before a resume included", check=at_least(1)
    )
    responses: int = setting(64, "sampled answers an update", check=at_least(1))
    micro_batch: int = setting(
        None,
        "answers that go through the loss at once",
        check=at_least(1),
        shown="2; with long 1, as answers side by side need a mask of all pairs of tokens",
    )
    sample_batch: int = setting(
        64, "answers sampled at once, by all ranks together", check=at_least(1)
    )
    loss_temperature: float = setting(0.5, "temperature of the loss", check=positive)
    sampling_temperature: float = setting(0.5, "temperature of the sampling", check=positive)
    top_p: float = setting(0.95, "nucleus of the sampling", check=fraction)
    top_k: int = setting(0, "likeliest tokens to sample from, 0 for all", check=at_least(0))
    min_p: float = setting(
        0.0,
        "sample from the tokens that have at least this share of the probability of the likeliest, "
        "0 for all",
        check=share,
    )
    repetition_penalty: float = setting(
        1.15,
        "of the sampling",
        check=positive,
    )
    max_new_tokens: int = setting(
        2048,
        "longest answer; cut to what the model's positions leave after the prompt",
        check=at_least(1),
    )
    sampler: str = setting(
        "transformers",
        "what draws the answers; vllm: an engine of it in each process",
        choices=SAMPLERS,
    )
    vllm_memory: float = setting(
        0.3, "share of a GPU's, else of the machine's, memory that vLLM may take", check=fraction
    )
    reduction: str = setting(
        "token_mean",
        "of the loss: mean over all tokens, or over each answer and then over answers",
        choices=REDUCTIONS,
    )
    learning_rate: float = setting(2e-5, "of AdamW, constant", check=not_negative)
    weight_decay: float = setting(0.0, "of AdamW", check=not_negative)
    clip: float = setting(1.0, "largest gradient norm", check=positive)
    dtype: str = setting(
        "float32",
        "bfloat16 is autocast around float32 parameters; with several ranks, bfloat16 parameters "
        "gathered from float32 shards; pure_bfloat16 has the parameters and their gradients in "
        "bfloat16 too, and rounds its steps stochastically",
        choices=(*DTYPES, PURE),
    )
    optimizer_dtype: str | None = setting(
        None,
        "of the two moments of AdamW, 8bit in blocks of 256 values with a scale; what is narrower "
        "than float32 is rounded stochastically",
        choices=(None, *OPTIMIZER_DTYPES),
        shown="that of the parameters",
    )
    device: str = setting(
        "auto",
        "auto, cpu, cuda, cuda:1, ...; with several ranks each takes its own GPU",
        check=device_text,
    )
    long: bool = setting(
        False,
        "for long answers in little memory: gradient_checkpointing, a micro_batch of 1, the MLP of "
        "every layer over pieces of the sequence, and on a GPU what the layers are given kept in "
        "the machine's memory; the loss is the same up to rounding",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute the layers in the backward pass to spare memory; long does as well"
    )
    compat: str | None = setting(
        None, "count as the published script does", choices=(None, "official")
    )
    seed: int = setting(
        0, "of the sampling; the caller's random state is left alone", check=at_least(0)
    )
    save_every: int = setting(
        5,
        "updates between checkpoints (one is always written at the end); 0: only then",
        check=at_least(0),
    )
    keep_checkpoints: int = setting(
        2, "how many of the newest checkpoints to keep; 0 keeps all", check=at_least(0)
    )
    stop_entropy: float | None = setting(
        None,
        "end once the mean entropy is below this (nats) in stop_patience updates in a row",
        check=not_negative,
        shown="never",
    )
    stop_skew: float | None = setting(
        None,
        "end once the skewness of the logits is above this in stop_patience updates in a row",
        check=finite,
        shown="never",
    )
    stop_patience: int = setting(
        1, "how many such updates in a row end the run or the stage", check=at_least(1)
    )
    shards_only: bool = setting(
        False,
        "with several ranks: write each rank's part of a checkpoint but no weights for "
        "transformers, which `em-kernels merge` makes of the parts",
    )
    save_merged: bool = setting(
        False,
        "of a PEFT model, whose checkpoints are its adapter: also write the whole model with the "
        "adapter merged into it, as `merged` in each checkpoint",
    )
    log_to: tuple[str, ...] = setting(
        (),
        "loggers that get the metrics besides metrics.jsonl, one or several; the environment says "
        "where their own settings are not the usual ones (WANDB_PROJECT, WANDB_MODE, "
        "TRACKIO_PROJECT, TRACKIO_SPACE_ID, ...)",
        check=texts,
        choices=tuple(LOGGERS),
        shown="none",
    )
    trust_remote_code: bool = setting(False, REMOTE_CODE)
    system: str | None = setting(None, SYSTEM, check=check_system, metavar="TEXT")
    chat_template_kwargs: Mapping[str, Any] | None = setting(
        None, TEMPLATE_KWARGS, check=key_values, metavar="KEY=VALUE"
    )

    def __post_init__(self):
        if self.micro_batch is None:
            object.__setattr__(self, "micro_batch", 1 if self.long and self.compat is None else 2)
        check_settings(self)
        if "tensorboard" in self.log_to and self.output is None:
            raise ValueError(
                "output must be a folder with log_to='tensorboard', which writes into it, got None"
            )
        _check_prompts(self.prompt_texts)
        for name, reason in _idle(self).items():
            raise ValueError(f"{name} is for {reason}: leave it out")
        if self.compat == "official" and self.reduction != "token_mean":
            raise ValueError(
                f"reduction must be 'token_mean' with compat='official', got {self.reduction!r}"
            )

    @property
    def steps_per_update(self) -> int:
        """How far "step" in the metrics advances with each optimiser update."""
        return -(-self.responses // self.micro_batch) if self.compat == "official" else 1

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the parameters of a model that is loaded to be trained."""
        return torch.bfloat16 if self.dtype == PURE else torch.float32

    @property
    def compute_dtype(self) -> str:
        """What the products are made in."""
        return "bfloat16" if self.dtype == PURE else self.dtype

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the updates are spent on: here, entropy minimisation alone."""
        return (Stage(("em",), self.updates),)

    @property
    def prompt_texts(self) -> tuple[Prompt, ...]:
        """What entropy minimisation samples from."""
        return self.prompts

    @property
    def all_texts(self) -> tuple[Prompt, ...]:
        """Everything that answers are sampled to."""
        return self.prompt_texts

    @property
    def demonstrations(self) -> tuple[Demonstration, ...]:
        """What stages that are given the answers train on."""
        return ()

    def check_entries(self, entries: int) -> None:
        """Refuse what does not fit a model's head of so many entries."""

    @property
    def keeps_sets(self) -> bool:
        """Whether the update is told what the sampler kept at every token."""
        return False

    def labels(self, index: int, stage: Stage) -> dict:
        """What the metrics say about the stage of an update."""
        return {}

    def setting(self, name: str, objective: str) -> Any:
        """As given, else what an objective has in its place."""
        return getattr(self, name)

    def in_use(self, name: str) -> Any:
        """A setting as the run reads it: runs of the same are the same."""
        return getattr(self, name)

    def aggregation(self, objective: str) -> dict[str, Any]:
        """`mode`, and `max_length` where it has one, of `aggregate_loss`."""
        mode = self.setting("reduction", objective)
        return {"mode": mode, **({"max_length": self.max_new_tokens} if mode == CONSTANT else {})}

    def to_dict(self) -> dict:
        return asdict(self)

    def to_written(self) -> dict:
        """What a run's own files say."""
        return {name: v for name, v in self.to_dict().items() if name not in NOT_WRITTEN}

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings of a training run: {sorted(unknown)}")
        return cls(**values)

    @classmethod
    def from_written(cls, values: dict) -> Self:
        """Of a run's own file, which an older version may have written: without what was given of
        settings that did not act."""
        values = written(values)
        draft, defaults = object.__new__(cls), {item.name: item.default for item in fields(cls)}
        draft.__dict__.update(defaults, **values)
        return cls.from_dict({**values, **{name: defaults[name] for name in _idle(draft)}})


def written(values: dict) -> dict:
    """What is taken of a run's own file."""
    return {name: value for name, value in values.items() if name not in NOT_WRITTEN}


def check_resume(old: TrainConfig, new: TrainConfig) -> None:
    """A resumed run may go on for longer, or elsewhere, but not turn into another run."""
    if type(old) is not type(new):
        raise ValueError(
            f"objective: a run of {type(old).__name__} cannot go on as one of {type(new).__name__}"
        )
    for field in fields(new):
        before, after = old.in_use(field.name), new.in_use(field.name)
        if field.name not in RESUMABLE and before != after:
            raise ValueError(
                f"{field.name} cannot change when a run is resumed: "
                f"it was started with {before!r}, got {after!r}"
            )


def _idle(config: TrainConfig) -> dict[str, str]:
    """Of every setting that does not act, what it is for and what was received."""
    defaults = {item.name: item.default for item in fields(config)}
    told = {name: idle(config, name, defaults[name], c) for name, c in EVERYWHERE.items()}
    return {name: reason for name, reason in told.items() if reason is not None}


def _check_prompts(prompts: tuple) -> None:
    if not prompts:
        raise ValueError("prompts must have at least one prompt, got none")
    for prompt in prompts:
        if isinstance(prompt, tuple):
            continue  # a chat, whose turns are checked
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be text, got {type(prompt).__name__}")
        check_text("prompt", prompt)
