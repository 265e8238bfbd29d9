"""What one call asks of a row of logits, `RowSpec`, and what answers it, a `Backend`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree

if TYPE_CHECKING:
    from em_kernels.backends.pair import (
        Divergence,
        OtherSpec,
        PairOut,
        PairSaved,
        PairWeights,
        Side,
    )

Kind = TypeVar("Kind")
Spec = TypeVar("Spec", "RowSpec", "OtherSpec")


class Argument(NamedTuple):
    """In `Annotated`: name and type of a field in an operator's schema, where not its own.

    A field that is `last` lies behind all others, with its default: it came after programs had been
    exported that must still load. In its record it is among the last ones too.
    """

    name: str = ""
    type: str = ""
    last: bool = False


Size = Annotated[int, Argument(type="SymInt")]  # a number that torch.compile may leave open
LaterTensor = Annotated[Tensor | None, Argument(last=True)]


def serializable(kind: type[Kind]) -> type[Kind]:
    """A NamedTuple that an exported program may return and be saved with."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"em_kernels.{kind.__name__}")
    return kind


MaybeNone: TypeAlias = Any  # None where it was not asked for or given, which its user knows


@serializable
class TokenStats(NamedTuple):
    """Per-token statistics, each of the leading shape, None where not asked for.

    With p = softmax(z), l = log p, z as in `softmax_stats`, entropies in nats.

    Attributes:
        logprob: l_y.
        entropy: H = -sum p l.
        lse: log sum exp z.
        varentropy: sum p l^2 - H^2, in float32 to 2e-6 of itself or of (sum p z - max z)^2.
        collision: sum p^2.
        max_prob: max p.
        is_top1: y is the first argmax (bool).
        self_certainty: KL(U || p) = lse - mean z - log n, U uniform over the n finite logits.
        logit_mean: of the finite z, as the next two.
        logit_var: population variance.
        logit_skew: population skewness.
        entropy_slope: -[p_y (l_y + H) - (sum p^2 l + H sum p^2)], the first-order change of H per
            unit of learning rate x advantage in a policy-gradient step on token y, in logit space.
        rank: how many u_v are larger than u_y, with z = c u (int64).
        kept_mass: of what is kept of a truncated distribution, under the whole one; else 1.
        is_kept: y has a probability, logprob > -inf (bool); of a truncated distribution, y is kept.
    """

    logprob: Tensor | MaybeNone = None
    entropy: Tensor | MaybeNone = None
    lse: Tensor | MaybeNone = None
    varentropy: Tensor | MaybeNone = None
    collision: Tensor | MaybeNone = None
    max_prob: Tensor | MaybeNone = None
    is_top1: Tensor | MaybeNone = None
    self_certainty: Tensor | MaybeNone = None
    logit_mean: Tensor | MaybeNone = None
    logit_var: Tensor | MaybeNone = None
    logit_skew: Tensor | MaybeNone = None
    entropy_slope: Tensor | MaybeNone = None
    rank: Tensor | MaybeNone = None
    kept_mass: Tensor | MaybeNone = None
    is_kept: Tensor | MaybeNone = None


OUTPUTS = TokenStats._fields
ROW_OUTPUTS = OUTPUTS[: OUTPUTS.index("rank")]
"""What `Backend.stats` of row kernels makes; the others are made by backends around them."""
NEEDS_TARGET = frozenset({"logprob", "is_top1", "entropy_slope", "rank", "is_kept"})
RESULT_DTYPES = {"is_top1": torch.bool, "is_kept": torch.bool, "rank": torch.int64}
"""Of outputs that are no floats."""
OF_IDS = frozenset({"logprob", "is_top1", "rank"})  # (N, K) where targets are
PADDING = -(1 << 61)  # an id of a row of ids that stands for none
NEEDS_SECOND_ORDER = frozenset({"varentropy", "collision", "entropy_slope"})
NEEDS_LOGIT_MOMENTS = frozenset({"self_certainty", "logit_mean", "logit_var", "logit_skew"})


_ROW_OUTPUTS = frozenset(ROW_OUTPUTS)


def has_ids(spec: RowSpec) -> bool:
    """Whether a flattened spec has several ids a row."""
    return spec.target is not None and spec.target.dim() == 2


def where_rows(mask: Tensor, x: Tensor) -> Tensor:
    """x (N, ...) where mask (N,) is True, else 0."""
    return torch.where(mask.view(-1, *[1] * (x.dim() - 1)), x, 0)


def row_kernels_make(outputs: Iterable[str]) -> bool:
    """Whether all of them are of `ROW_OUTPUTS`."""
    return _ROW_OUTPUTS.issuperset(outputs)


class RowSpec(NamedTuple):
    """Everything but the logits. Inside the operators the leading dimensions are flattened to N.

    A row is computed where `mask` is True (everywhere if None). `mask` already holds
    `target != ignore_index`, so a target is read only in computed rows.

    Backends get the fields before `group`.
    """

    bias: Tensor | None = None  # (V,)
    target: Tensor | None = None  # (N,) int64, or (N, K): backends around others serve it
    mask: Tensor | None = None  # (N,) bool
    temperature_rows: Tensor | None = None  # (N,), in place of `temperature`
    temperature: float = 1.0
    softcap: float = 0.0  # 0 means none
    logit_scale: float = 1.0
    valid_vocab: Size = 0  # 1 <= valid_vocab <= V; with a group over all ranks, 0 for all
    group: str | None = None  # name of the vocabulary-parallel process group
    numbers: Tensor | None = None  # see `Numbers`
    compact: bool = True  # rows may be looked for though that waits for the device; see `row_index`
    # (K,) int64, where `mask` is True, if that was looked for. It hides a method of tuples.
    index: Tensor | None = None  # type: ignore[assignment]
    # What a sampler kept, see `truncation`: by limits, or by ids. Row kernels do not see it.
    truncation: LaterTensor = None  # (N, 3) float64: top_k, top_p, min_p
    kept_ids: LaterTensor = None  # (M,) int64, of row i from kept_rows[i, 0] to before [i, 1]
    kept_rows: LaterTensor = None  # (N, 2) int64
    border: LaterTensor = None  # (N, 3) float64, of a backward pass: `BORDER`, and `is_kept`
    min_p_first: Annotated[bool, Argument(last=True)] = False
    # An output is not a row kernel's own: rows are not gone through in parts.
    whole: Annotated[bool, Argument(last=True)] = False


BORDER = ("border_level", "border_first")
"""Outputs that a forward pass over truncated rows makes for its backward pass."""


class Numbers(NamedTuple):
    """The floats of a call. Where they are inputs of a compiled graph, an operator takes them as a
    float64 tensor on the CPU, `RowSpec.numbers`, in place of its own arguments of these names."""

    temperature: float = 1.0
    softcap: float = 0.0  # 0 means none
    logit_scale: float = 1.0
    filter_eps: float = 0.0  # 0 means none


class Saved(NamedTuple):
    """The three per-row scalars the gradient needs: max u, log1p(r), E = q / (1 + r)."""

    max: Tensor
    log1p_r: Tensor
    mean_d: Tensor


class Upstream(NamedTuple):
    """Per-row gradients of the loss in logprob, entropy and lse; None is zero."""

    logprob: Annotated[Tensor | None, Argument("g_logprob")] = None
    entropy: Annotated[Tensor | None, Argument("g_entropy")] = None
    lse: Annotated[Tensor | None, Argument("g_lse")] = None


DIFFERENTIABLE = Upstream._fields


class Goal(NamedTuple):
    """H(softmax(z / T)) = max(threshold, ratio * H), with T in [minimum, 1] found by halving."""

    threshold: float
    ratio: float
    minimum: float
    iterations: int


class Descent(NamedTuple):
    """z <- z - learning_rate * dH/dz while H > threshold, at most `steps` times."""

    threshold: float
    learning_rate: float
    steps: int


class Backend(Protocol):
    """What makes statistics and gradients of rows of logits, (outer, inner, V) with unit last
    stride, N = outer * inner of them; `reference` has the formulas.

    `stats`, `grad` and `loss` are what a backend must have. All else is optional, and has its
    default here: an attribute promises nothing, and a method leaves the work to its caller, which
    it tells by False or None.
    """

    name: str
    narrows: bool = False
    """`grad` and `loss` take a 16-bit `out` for float32 logits, which may lie over them: row i of
    `out` then begins at the byte where row i of the logits does."""
    counts: bool = False
    """`above` is there; `backends.above` gives it to all."""
    part_entries: int | None = None
    """Rows may be gone through in parts, by `new_parts` and `part_stats`; in parts of a multiple of
    this many entries, with the bits of whole rows."""
    first_entry: int = 0
    """Of the vocabulary, where the logits are one rank's entries of it."""
    widest_shard: int | None = None
    """Entries of the rank that has most of them, where the ranks of a group share a vocabulary:
    all ranks plan memory, and chunk rows, for as many. None without a group."""
    sums_weight: bool = False
    """A rank of the group needs dW, be it another: all chunk rows as it does."""

    entries: int | None = None
    """Of the vocabulary over all ranks of a group. None without one."""

    @property
    def local(self) -> Backend:
        """The backend to which the entries of this rank are whole rows."""
        return self

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks that share rows; x itself where none do."""
        return x

    def gathered(self, x: Tensor) -> Tensor:
        """(R, ...), the x of each of the R ranks that share rows, in their order."""
        return x[None]

    @abstractmethod
    def stats(self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...]) -> list[Tensor]:
        """[max, log1p_r, mean_d, *outputs], each (N,)."""

    @abstractmethod
    def grad(
        self, logits: Tensor, spec: RowSpec, saved: Saved, upstream: Upstream, out: Tensor
    ) -> None:
        """Write d loss / d logits into `out`, which has the shape of `logits` and may be `logits`.

        Entries from `valid_vocab` on get 0.
        """

    @abstractmethod
    def loss(
        self,
        logits: Tensor,
        spec: RowSpec,
        upstream: Upstream,
        outputs: tuple[str, ...],
        out: Tensor,
    ) -> list[Tensor]:
        """`stats`, then `grad` of the loss whose per-row weights are `upstream`, into `out`."""

    def new_parts(self, rows: int) -> Tensor:
        """What is known of as many rows before their first part."""
        raise RuntimeError(f"{self.name} goes through whole rows: part_entries is None")

    def part_stats(
        self, logits: Tensor, spec: RowSpec, outputs: tuple[str, ...], parts: Tensor, first: int
    ) -> list[Tensor]:
        """`stats` of all entries so far, of which logits are those from `first` on.

        Bias is that of these entries, and targets count from the beginning of the rows. Logprob,
        is_top1 and entropy_slope hold once the target was among the entries. Updates `parts`.
        """
        raise RuntimeError(f"{self.name} goes through whole rows: part_entries is None")

    def linear_stats(
        self, hidden: Tensor, weight: Tensor, spec: RowSpec, outputs: tuple[str, ...]
    ) -> list[Tensor]:
        """`stats` of hidden (N, D) @ weight (V, D)^T."""
        raise RuntimeError(f"{self.name} is given logits, and multiplies nothing")

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised and contiguous, for gradients and chunks of logits."""
        return torch.empty(shape, dtype=dtype, device=device)

    def add_product(self, total: Tensor, grad_logits: Tensor, x: Tensor, add: bool) -> bool:
        """total = (total if add) + grad_logits.T @ x, in float32 throughout, of 16 bits."""
        return False

    def product(self, out: Tensor, x: Tensor, weight: Tensor) -> bool:
        """out (N, V) = x (N, D) @ weight (V, D)^T in float32 throughout, of one 16-bit dtype."""
        return False

    def scale_(self, x: Tensor, factor: Tensor) -> bool:
        """x *= factor, a tensor of one number on the device of `x`; rounded once."""
        return False

    def count_present(self, logits: Tensor, spec: RowSpec, top: Tensor | None) -> Tensor | None:
        """How many u of each row are not -inf, (N,) int64; -1 where `top` is given and not NaN."""
        return None

    def above(
        self,
        logits: Tensor,
        spec: RowSpec,
        levels: Tensor,
        top: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What lies above each of K levels of every row, where `mask` is True and 0 elsewhere.

            counts_k = |A_k|,   sums_k = sum of e^(c (u_v - top)) over A_k,
            A_k = {v: u_v > level_k}

        Args:
            levels: (N, K) in units of u (`units`), in `accumulate_dtype`.
            top: (N,), the largest u of the row; None leaves out the sums.
            ids: (N, K) int64: A_k has v with u_v = level_k and v < id_k too, any id taken.

        Returns:
            counts (N, K) int64 and sums (N, K) float64, or None. A NaN is above nothing.
        """
        raise RuntimeError(f"{self.name} counts nothing: counts is False")

    def find_temperature(self, logits: Tensor, goal: Goal) -> Tensor | None:
        """The temperature of every row, (N,); as `entropy_control.find_temperature`."""
        return None

    def descend(self, z: Tensor, descent: Descent) -> Tensor | None:
        """The rows after the descent, which may overwrite them; as `entropy_control.descend`."""
        return None

    def divergence_sums(
        self, own: Side, other: Side, saved: PairSaved, divergence: Divergence
    ) -> Tensor | None:
        """As `divergence.define_sums`."""
        return None

    def divergence_grad(
        self,
        own: Side,
        other: Side,
        saved: PairSaved,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
    ) -> bool:
        """As `divergence.grad`; `narrows` holds for both gradients."""
        return False

    def divergence_loss(
        self,
        own: Side,
        other: Side,
        divergence: Divergence,
        weights: PairWeights,
        out: PairOut,
        outputs: tuple[str, ...],
        other_outputs: tuple[str, ...],
    ) -> list[Tensor] | None:
        """As `divergence.loss`; without weights as `divergence.stats`."""
        return None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_rows(logits: Tensor, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Where the results of `Backend.stats` go, by name."""
    count, dtype = logits.shape[0] * logits.shape[1], accumulate_dtype(logits.dtype)
    names = (*Saved._fields, *outputs)
    return {name: torch.empty(count, dtype=dtype, device=logits.device) for name in names}
