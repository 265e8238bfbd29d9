"""Everything that decides what a training run does."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields

from em_kernels.lm.data import ONE_SHOT_PROMPT, check_text
from em_kernels.trainer.schedule import Stage

DTYPES = ("float32", "bfloat16")
SAMPLERS = ("transformers", "vllm")
RESUMABLE = (
    "updates",
    "save_every",
    "keep_checkpoints",
    "output",
    "device",
    "shards_only",
    "save_merged",
    "vllm_memory",
)


@dataclass(frozen=True)
class TrainConfig:
    """One-shot entropy minimisation as published, unless told otherwise.

    An update samples `responses` answers to the prompts from the current model, and takes one
    AdamW step on the mean entropy of the next-token distributions that produced them,

        L = sum_t mask_t H(softmax(z_t / loss_temperature)) / sum_t mask_t,

    over every generated token of the update, the end token included. It uses no labels. However
    the update is cut into micro-batches, L is the same.

    Defaults are those of Gao et al., "One-shot Entropy Minimization" (2025); about 10 updates is
    where their accuracy peaks, while L goes on falling.

    Args:
        model: a folder or a hub name, for `train` to load; None if a model is passed to it.
        output: folder of the run (metrics.jsonl, checkpoint-*); None keeps everything in memory.
        prompts: one text or several; response i of update u answers prompt (u * responses + i)
            modulo their number, so several prompts take turns.
        updates: optimiser updates in all, those before a resume included.
        responses, micro_batch: sampled answers an update; how many go through the loss at once.
        sample_batch: how many are sampled at once, by all ranks together; it changes which answers
            are drawn, not how.
        loss_temperature, sampling_temperature: T of the loss; of the sampling.
        top_p, top_k, repetition_penalty: of the sampling; top_k = 0 truncates nothing. The
            checkpoint's own generation settings are not used, its end tokens are.
        max_new_tokens: longest answer; cut to what the model's positions leave after the prompt.
        sampler: "transformers", or "vllm" for an engine of vLLM on each rank's GPU; vllm_memory is
            the share of the GPU's memory that it may take.
        reduction: "token_mean" (L above) or "sequence_mean" (mean over each answer, then over
            answers).
        learning_rate, weight_decay, clip: of AdamW, constant; largest gradient norm.
        dtype: "float32", or "bfloat16" for autocast around float32 parameters; with several ranks,
            for bfloat16 parameters gathered from float32 shards.
        device: "auto", "cpu", "cuda", "cuda:1", ...; with several ranks each takes its own GPU.
        gradient_checkpointing: recompute the layers in the backward pass to spare memory.
        compat: None, or "official" to count as the published script does, for comparison:
            - its mask: position t counts if t >= the number of prompt tokens that are not PAD and
              token t is not PAD, with the distribution that position t itself emits. So the
              distribution of the first generated token is left out and the one after the last
              token put in; where PAD is the end token, the end token's own position is left out
              too; where the prompt is left-padded by k, its last k tokens are put in;
            - its mean: over each micro-batch by itself, then over micro-batches, so the loss
              depends on `micro_batch`;
            - its steps: "step" in the metrics counts micro-batches (32 an update by default), as
              one process of the script would; "update", `updates` and `save_every` do not change.
            Not reproduced: log(p + 1e-12) in bfloat16, and the library's top_k of 50 that the
            script samples with (set top_k=50).
        seed: of the sampling; the caller's random state is left alone.
        save_every: updates between checkpoints (one is always written at the end); 0: only then.
        keep_checkpoints: how many of the newest to keep; 0 keeps all.
        stop_entropy, stop_skew: end before `updates` once the mean entropy (nats) is below, or the
            skewness of the logits above, in `stop_patience` updates in a row; None: never.
        shards_only: with several ranks, write each rank's part of a checkpoint but no weights for
            transformers; `merge_checkpoint` makes them of the parts.
        save_merged: of a PEFT model, whose checkpoints are its adapter, also write the whole model
            with the adapter merged into it, as `merged` in each checkpoint.

    Raises:
        TypeError, ValueError: naming the argument and what was received.
    """

    model: str | None = None
    output: str | None = None
    prompts: tuple[str, ...] = (ONE_SHOT_PROMPT,)
    updates: int = 10
    responses: int = 64
    micro_batch: int = 2
    sample_batch: int = 64
    loss_temperature: float = 0.5
    sampling_temperature: float = 0.5
    top_p: float = 0.95
    top_k: int = 0
    repetition_penalty: float = 1.15
    max_new_tokens: int = 2048
    sampler: str = "transformers"
    vllm_memory: float = 0.3
    reduction: str = "token_mean"
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    clip: float = 1.0
    dtype: str = "float32"
    device: str = "auto"
    gradient_checkpointing: bool = False
    compat: str | None = None
    seed: int = 0
    save_every: int = 5
    keep_checkpoints: int = 0
    stop_entropy: float | None = None
    stop_skew: float | None = None
    stop_patience: int = 1
    shards_only: bool = False
    save_merged: bool = False

    REDUCTIONS = ("token_mean", "sequence_mean")

    def __post_init__(self):
        prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(self.prompts)
        object.__setattr__(self, "prompts", prompts)
        for name in ("model", "output"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        for name in ("updates", "responses", "micro_batch", "sample_batch", "max_new_tokens"):
            check_int(name, getattr(self, name), 1)
        check_int("stop_patience", self.stop_patience, 1)
        for name in ("top_k", "seed", "save_every", "keep_checkpoints"):
            check_int(name, getattr(self, name), 0)
        for name in ("loss_temperature", "sampling_temperature", "repetition_penalty", "clip"):
            check_float(name, getattr(self, name), lambda v: v > 0, "positive")
        for name in ("top_p", "vllm_memory"):
            check_float(name, getattr(self, name), lambda v: 0 < v <= 1, "in (0, 1]")
        for name in ("learning_rate", "weight_decay"):
            check_float(name, getattr(self, name), lambda v: v >= 0, "0 or more")
        for name in ("stop_entropy", "stop_skew"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), math.isfinite, "a number")
        check_choice("reduction", self.reduction, self.REDUCTIONS)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("sampler", self.sampler, SAMPLERS)
        check_choice("compat", self.compat, (None, "official"))
        _check_prompts(self.prompt_texts)
        if self.compat == "official" and self.reduction != "token_mean":
            raise ValueError(
                f"reduction must be 'token_mean' with compat='official', got {self.reduction!r}"
            )

    @property
    def steps_per_update(self) -> int:
        """How far "step" in the metrics advances with each optimiser update."""
        return -(-self.responses // self.micro_batch) if self.compat == "official" else 1

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What the updates are spent on: here, entropy minimisation alone."""
        return (Stage(("em",), self.updates),)

    @property
    def prompt_texts(self) -> tuple[str, ...]:
        """What entropy minimisation samples from."""
        return self.prompts

    @property
    def all_texts(self) -> tuple[str, ...]:
        """Everything that answers are sampled to."""
        return self.prompt_texts

    def labels(self, index: int, stage: Stage) -> dict:
        """What the metrics say about the stage of an update."""
        return {}

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> TrainConfig:
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings of a training run: {sorted(unknown)}")
        return cls(**values)


def check_resume(old: TrainConfig, new: TrainConfig) -> None:
    """A resumed run may go on for longer, or elsewhere, but not turn into another run."""
    if type(old) is not type(new):
        raise ValueError(
            f"objective: a run of {type(old).__name__} cannot go on as one of {type(new).__name__}"
        )
    for field in fields(new):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if field.name not in RESUMABLE and before != after:
            raise ValueError(
                f"{field.name} cannot change when a run is resumed: "
                f"it was started with {before!r}, got {after!r}"
            )


def _check_prompts(prompts: tuple) -> None:
    if not prompts:
        raise ValueError("prompts must have at least one prompt, got none")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompts must be text, got {type(prompt).__name__}")
        check_text("prompt", prompt)


def check_int(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")


def check_float(name: str, value, good, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or not good(value):
        raise ValueError(f"{name} must be {rule} and finite, got {value!r}")


def check_choice(name: str, value, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
