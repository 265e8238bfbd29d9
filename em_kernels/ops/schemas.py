"""The arguments of the operators: their schemas, and how an implementation takes them apart."""

from __future__ import annotations

from em_kernels.backends.interface import Numbers, RowSpec, read_numbers
from em_kernels.linear.plan import Needs

SPEC = (
    "Tensor? bias, Tensor? target, Tensor? mask, Tensor? temperature_rows, float temperature, "
    "float softcap, float logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, "
    "bool compact, Tensor? index"
)
SAVED = "Tensor max, Tensor log1p_r, Tensor mean_d"
UPSTREAM = "Tensor? g_logprob, Tensor? g_entropy, Tensor? g_lse"
LINEAR = "Tensor hidden, Tensor weight"
CUT = "SymInt? chunk_tokens, ScalarType? logits_dtype, str impl"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias, float? filter_eps"
# Of the gradient that will follow; the defaults are for statistics alone.
LATER = (
    "bool need_hidden=False, bool need_weight=False, bool need_bias=False, float? filter_eps=None, "
    "SymInt? keep_logits=0"
)


def take(kind: type, args: tuple) -> tuple:
    """Split off the leading arguments that make up one NamedTuple."""
    count = len(kind._fields)
    return kind(*args[:count]), args[count:]


def take_spec(args: tuple) -> tuple[RowSpec, tuple]:
    spec, args = take(RowSpec, args)
    return read_numbers(spec), args


def take_needs(spec: RowSpec, args: tuple) -> tuple[Needs, tuple]:
    needs, args = take(Needs, args)
    if spec.numbers is not None:
        eps = Numbers(*spec.numbers.tolist()).filter_eps
        needs = needs._replace(filter_eps=eps or None)
    return needs, args


def take_later(spec: RowSpec, args: tuple) -> tuple[Needs | None, list[int | None]]:
    """(what the gradient that follows needs, None where none does; keep_logits if it is given):
    the dispatcher leaves out arguments that have their default."""
    count = len(Needs._fields)
    needs, _ = take_needs(spec, args[:count])
    return needs if any(needs[:3]) else None, args[count:]
