"""The keyword arguments that the public functions share, each said once: type, default and text.

A function takes them as `**options: Unpack[RowOptions]`, which type checkers and editors read;
`takes_options` shows the flat list to `help` and `inspect`, and refuses what is not in it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypedDict, TypeVar, cast, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""The label that PyTorch and transformers take for none."""


class SupportOptions(TypedDict, total=False):
    top_k: int | Tensor | None
    top_p: float | Tensor | None
    min_p: float | Tensor | None
    sampler: str
    kept: tuple[Tensor, Tensor] | None


class LogitOptions(TypedDict, total=False):
    temperature: float | Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    valid_vocab: int | None
    group: dist.ProcessGroup | None
    impl: str


class RowOptions(LogitOptions, SupportOptions, total=False):
    outputs: tuple[str, ...]
    mask: Tensor | None


class ProductOptions(TypedDict, total=False):
    allreduce_dgrad: bool
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    product_dtype: torch.dtype | None
    filter_eps: float | None


class StatsOptions(RowOptions, total=False):
    entropy_requires_grad: bool


class SumOptions(TypedDict, total=False):
    accumulate_into: Tensor | None


class HeadOptions(TypedDict, total=False):
    lora: tuple[Tensor, Tensor, float] | None


class ChunkOptions(RowOptions, ProductOptions, HeadOptions, SumOptions, total=False):
    pass


class TopOptions(LogitOptions, total=False):
    mask: Tensor | None


class LinearTopOptions(TopOptions, HeadOptions, total=False):
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    product_dtype: torch.dtype | None


class CovarianceOptions(LogitOptions, SupportOptions, ProductOptions, HeadOptions, total=False):
    keep_logits: int | None
    fuse_product: bool
    entropy_requires_grad: bool


class LinearStatsOptions(RowOptions, CovarianceOptions, SumOptions, total=False):
    pass


class EntropyOptions(LogitOptions, SupportOptions, total=False):
    target: Tensor | None
    logprob_weight: Tensor | None
    inplace: bool


class LinearEntropyOptions(
    LogitOptions, SupportOptions, ProductOptions, HeadOptions, SumOptions, total=False
):
    target: Tensor | None
    logprob_weight: Tensor | None


class DivergenceOptions(LogitOptions, total=False):
    kind: str
    beta: float
    target: Tensor | None
    mask: Tensor | None
    other_temperature: float | Tensor | None
    other_softcap: float | None
    other_logit_scale: float


class LinearDivergenceOptions(DivergenceOptions, total=False):
    bias: Tensor | None
    other_bias: Tensor | None
    allreduce_dgrad: bool
    chunk_tokens: int | None
    logits_dtype: torch.dtype | None
    product_dtype: torch.dtype | None


TEXTS = """
kind: "forward_kl", "reverse_kl" or "js".
beta: the weight of q in the mixture of "js", in [0, 1].
bias, other_bias: (V,) or None, each of its head; added in float32.
other_temperature, other_softcap, other_logit_scale: of the other logits, as those below are of the
    first. None is the same temperature for both; softcap and scale are each side's own.
logprob_weight: (...) constants w; sum w logprob is added to the loss.
inplace: may overwrite the memory of `logits` with their gradient.
target: (...) int64 token ids, for `ignore_index` and `logprob_weight`.
outputs: names of `TokenStats` to compute; nothing else is computed. Where there is no target
    the default is entropy alone; a name that needs one is then an error.
temperature: positive, a float or a tensor of the leading shape; no gradient. It, softcap,
    logit_scale and logit_scale / temperature must be from 1.18e-38 to 8.51e37 in size, for
    float64 logits from 2.23e-308 to 4.49e307: numbers, as their inverses, of what is computed in.
top_k: of the distribution that a sampler drew from, as the next four: how many of the largest z it
    kept, those that tie with the last one too; from 1 on, an int or an int tensor of the
    leading shape; None keeps all, as any number from V on does. What was left out has
    probability 0 and gradient 0; a target that was has logprob -inf, no gradient of it and,
    in a loss, no share by `logprob_weight`: count them by the output `is_kept`. All
    statistics are those of what is kept, `kept_mass` says how much that is. Where entries
    tie at the end of top_p those of higher ids are kept, as a stable sort does.
top_p: in (0, 1], a float or a tensor of the leading shape: the fewest of the largest z that have
    this share of the probability of what top_k left; one at least. Reached is what is
    reached to rounding, 2 eps of the dtype of z.
min_p: in [0, 1], a float or a tensor of the leading shape: those with p_v >= min_p max p.
sampler: the order of the three, after the temperature: "transformers" is top_k, top_p, min_p;
    "vllm" is min_p, top_k, top_p, as vLLM's PyTorch sampler (its fused GPU samplers cut
    ties by their position: give those by `kept`).
kept: in their place the kept sets themselves, (ids, offsets), both int64: row i of the flattened
    leading shape kept ids[offsets[i] : offsets[i + 1]], each once, in any order, one at
    least where the row counts; N + 1 offsets from 0 to len(ids). Values are looked at on a CPU.
softcap: s > 0 or None.
logit_scale: non-zero factor on the logits.
ignore_index: rows with this target are exact zeros, are not computed and get no gradient.
mask: (...) bool or numeric; rows where it is 0 are treated the same way as those with
    `ignore_index`. It does not weigh: a floating mask that holds anything but 0 and 1 is an
    error. Nothing waits for the device to look at it.
valid_vocab: only the first `valid_vocab` entries of a row count (a padded vocabulary).
group: torch.distributed process group between whose ranks the vocabulary is cut. `logits`
    are then this rank's entries, in the order of the ranks and as many as it has, be it
    none; target and valid_vocab count in the whole vocabulary. Everything else, and the
    upstream gradients, must be the same on every rank, and so are the results, bit for bit.
    The ranks compare what they were given, which waits for the device. Logits that are a
    DTensor sharded on the vocabulary bring their own group.
allreduce_dgrad: with a group, whether the gradient of `hidden` is summed over the ranks
    here. False leaves it partial, this rank's share, for a `hidden` whose own backward
    sums it, as that of Megatron's gather_from_sequence_parallel_region (sequence
    parallel) and copy_to_tensor_model_parallel_region does. The same on every rank; the
    name is that of Megatron's ColumnParallelLinear.
impl: "auto", "reference", "cpu", "triton" or "cuda".
lora: (A, B, scaling), a low-rank part of the head, with A (r, D) and B (V, r), of any float
    dtypes: scaling (hidden @ A.T) @ B.T is added to hidden @ weight.T, a chunk at a time, in the
    wider of their dtypes. The merged weight is never made; A and B get their gradients if they
    require them. With a group B is cut as `weight` is, and A is whole.
chunk_tokens: rows per chunk, the one limit of memory: None fits the logits of a chunk into
    160 MiB on a CPU, 1 GiB on a GPU, 256 MiB there where no gradient follows. Where that is
    faster, all rows and some columns of the vocabulary take the place of several chunks, in
    as much memory: for the gradient, for which dW is then never summed in float32, but dX
    is (N, D); on a CPU, without a group and in float32 or float64, for the logits too. On a
    CPU all rows of a loss of bfloat16 `hidden` and `weight` that needs dW, be it on another
    rank of the group, are one chunk while they fit into 160 MiB and the 4 D V bytes of the
    float32 dW that several chunks would sum.
logits_dtype: dtype the product is rounded to: float32 or the one it is made in. None is
    float32 where the device's product gives it out of 16-bit inputs at full speed (CUDA), else
    the one it is made in. float32 is the remedy where logits of 16 bits are too coarse.
product_dtype: dtype in which `hidden` and `weight` are multiplied: None is the wider of the
    two; else that of one of them, or one that holds both. It goes before autocast. `hidden`
    is cast whole, `weight` a piece at a time: there is never a copy of it. The gradients
    come back each in the dtype of its tensor, rounded once.
filter_eps: None is exact, and an exported program always is. Else, in (0, 1), columns of
    the vocabulary are left out of the products of dX and dW, chunk by chunk, where
    |dz| < filter_eps w in every row of the chunk; dz is the gradient of
    hidden @ weight.T, w the largest upstream gradient by magnitude in the chunk. With L
    the columns left out,
        |dX_i - exact| <= filter_eps w sum_{v in L} |weight_v|       for every token i
        |dW_v - exact| <= filter_eps sum_chunks w sum_i |hidden_i|   for every column v
    entry by entry and to rounding; statistics and the gradient of `bias` stay exact.
    Finding the columns waits for the device, once a chunk, and is left out while a CUDA
    graph is captured. It pays where rows are peaked; a row spread over many more than 1 /
    filter_eps words can lose its whole gradient. Of rows of one weight a larger chunk leaves
    out fewer columns: each row keeps its own for all.
accumulate_into: (V, D), contiguous, where the gradient of `weight` is added in the backward pass:
    weight.main_grad or weight.grad, float32, float64 or of the dtype of `weight`, in which it
    is then rounded once a chunk. No other (V, D) is made; autograd gets None for `weight`, a
    leaf, whose hooks see nothing; its `grad_added_to_main_grad`, if there is one, becomes True.
    A loss too makes its gradient in the backward pass then, when the factor that comes is
    known: four products, three for logits kept. No second derivative, not in torch.compile.
keep_logits: bytes of logits that may be kept from the forward to the backward pass, which
    then need not multiply them again: where all N rows fit, N * V entries of the dtype of
    the logits, rows padded to 16 entries, three products in all instead of four.
    Kept are whole chunks of rows, or blocks of columns of all rows, from the first on;
    memory is taken for as many rows as the bytes hold, and held until the graph is freed.
    None keeps as many as a chunk takes anyway, or `chunk_tokens` rows; 0 keeps none, as a
    call without gradient, one whose gradient is made in the forward pass, and an exported
    program. Whatever is kept, the results have the same bits.
fuse_product: True multiplies and reduces in one Triton kernel, which keeps no logits at
    all, only about 12 bytes a token for every 1024 entries of the vocabulary and, where
    rows are left out, a copy of the others; the logits are never rounded. Without
    gradients only, and without `group`, `chunk_tokens` and another `impl`.
entropy_requires_grad: False takes `entropy` as a number only: it has no gradient, which
    with a frozen `weight` and `bias` saves a product. The same on every rank of a group, and
    so is what is frozen. With `filter_eps` no gradient is made in the forward pass.
"""

DEFAULTS: dict[str, Any] = dict(
    kind="forward_kl",
    beta=0.5,
    bias=None,
    other_bias=None,
    other_temperature=None,
    other_softcap=None,
    other_logit_scale=1.0,
    logprob_weight=None,
    inplace=False,
    target=None,
    outputs=("logprob", "entropy"),
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    sampler="transformers",
    kept=None,
    softcap=None,
    logit_scale=1.0,
    ignore_index=IGNORED,
    mask=None,
    valid_vocab=None,
    group=None,
    allreduce_dgrad=True,
    impl="auto",
    lora=None,
    chunk_tokens=None,
    logits_dtype=None,
    product_dtype=None,
    filter_eps=None,
    accumulate_into=None,
    keep_logits=None,
    fuse_product=False,
    entropy_requires_grad=True,
)
"""In the order in which signatures have them."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_options(function: _Function) -> _Function:
    """Give a function that takes `**options: Unpack[...]` its flat signature and the options' text.

    A keyword argument that it does not take is a TypeError, as Python's own.
    """
    signature = _flat_signature(function)
    names = frozenset(signature.parameters)
    called = function.__qualname__.removesuffix(".__init__")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in names:
                _refuse(called, name, names)
        return function(*args, **kwargs)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = _with_texts(function.__doc__ or "", _options_of(function).__annotations__)
    return cast(_Function, call)


def _refuse(function: str, name: str, names: Iterable[str]) -> NoReturn:
    hint = ""
    if not torch.compiler.is_compiling():  # difflib cannot be traced, and its error would be shown
        near = difflib.get_close_matches(name, sorted(names), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


def _options_of(function: Callable[..., Any]) -> Any:
    return get_type_hints(function)["options"].__args__[0]


def _flat_signature(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    types = _options_of(function).__annotations__
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=getattr(types[name], "__forward_arg__", types[name]),
        )
        for name, default in DEFAULTS.items()
        if name in types
    ]
    return signature.replace(parameters=[*own, *shared])


def _with_texts(doc: str, names: Iterable[str]) -> str:
    """The docstring with the texts at the end of its "Args:", but for what it describes itself."""
    before, header, after = inspect.cleandoc(doc).partition("\nArgs:\n")
    header = header or "\n\nArgs:\n"
    own, blank, rest = after.partition("\n\n")
    described, texts = _entries(textwrap.dedent(own)), _entries(TEXTS)
    shared = [texts[name] for name in DEFAULTS if name in names and name not in described]
    shared = list(dict.fromkeys(shared))  # an entry may be of several names
    lines = [own.rstrip()] if own.strip() else []
    lines += [textwrap.indent(text, "    ") for text in shared]
    return (before + header + "\n".join(lines) + blank + rest).lstrip("\n")


def _entries(text: str) -> dict[str, str]:
    """Each entry, which begins at the margin, by the names before its colon."""
    entries = re.split(r"\n(?=\w[\w, ]*:)", text.strip())
    return {name: entry for entry in entries for name in entry.partition(":")[0].split(", ")}
