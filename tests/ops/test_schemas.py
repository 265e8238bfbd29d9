"""The operators' schemas are part of every exported program, and are made from the NamedTuples."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from em_kernels.backends.interface import RowSpec
from em_kernels.linear.plan import Needs
from em_kernels.ops import records
from em_kernels.ops.registry import OPERATORS

# Arguments that came later, at the end and with defaults.
LATER = (
    ", Tensor? truncation=None, Tensor? kept_ids=None, Tensor? kept_rows=None, "
    "Tensor? border=None, bool min_p_first=False, bool whole=False"
)
# As of the first version: a program that was exported with one of these must still load.
RECORDED = (
    "softmax_stats(Tensor logits, Tensor? bias, Tensor? target, Tensor? mask, Tensor? "
    "temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, str[] outputs, "
    "str impl) -> Tensor[]",
    "softmax_grad(Tensor logits, Tensor? bias, Tensor? target, Tensor? mask, Tensor? "
    "temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, Tensor max, "
    "Tensor log1p_r, Tensor mean_d, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_lse, str "
    "impl) -> Tensor[]",
    "softmax_loss(Tensor logits, Tensor? bias, Tensor? target, Tensor? mask, Tensor? "
    "temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, Tensor? "
    "g_logprob, Tensor? g_entropy, Tensor? g_lse, str[] outputs, str impl) -> Tensor[]",
    "softmax_loss_(Tensor(a!) logits, Tensor(b!)[] rows, Tensor? bias, Tensor? target, "
    "Tensor? mask, Tensor? temperature_rows, float temperature, float softcap, float "
    "logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? "
    "index, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_lse, str[] outputs, str impl) -> "
    "()",
    "linear_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? mask, "
    "Tensor? temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, str[] outputs, "
    "SymInt? chunk_tokens, ScalarType? logits_dtype, str impl, bool need_hidden=False, bool "
    "need_weight=False, bool need_bias=False, float? filter_eps=None, SymInt? keep_logits=0, "
    "Tensor? low_hidden=None, Tensor? low_weight=None, bool need_low_hidden=False, bool "
    "need_low_weight=False) -> Tensor[]",
    "linear_stats_fused(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? "
    "mask, Tensor? temperature_rows, float temperature, float softcap, float logit_scale, "
    "SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, str[] "
    "outputs) -> Tensor[]",
    "linear_grad(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? mask, "
    "Tensor? temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, Tensor max, "
    "Tensor log1p_r, Tensor mean_d, Tensor? g_logprob, Tensor? g_entropy, Tensor? g_lse, bool "
    "need_hidden, bool need_weight, bool need_bias, float? filter_eps, SymInt? chunk_tokens, "
    "ScalarType? logits_dtype, str impl, Tensor? kept=None, Tensor? low_hidden=None, Tensor? "
    "low_weight=None, bool need_low_hidden=False, bool need_low_weight=False) -> Tensor[]",
    "linear_grad_(Tensor(a!) into, Tensor(b!)[] results, Tensor hidden, Tensor weight, Tensor? "
    "bias, Tensor? target, Tensor? mask, Tensor? temperature_rows, float temperature, float "
    "softcap, float logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, bool "
    "compact, Tensor? index, Tensor max, Tensor log1p_r, Tensor mean_d, Tensor? g_logprob, "
    "Tensor? g_entropy, Tensor? g_lse, bool need_hidden, bool need_weight, bool need_bias, "
    "float? filter_eps, SymInt? chunk_tokens, ScalarType? logits_dtype, str impl, Tensor? "
    "kept=None, Tensor? low_hidden=None, Tensor? low_weight=None, bool "
    "need_low_hidden=False, bool need_low_weight=False) -> ()",
    "linear_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? mask, "
    "Tensor? temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, Tensor? "
    "g_logprob, Tensor? g_entropy, Tensor? g_lse, bool need_hidden, bool need_weight, bool "
    "need_bias, float? filter_eps, str[] outputs, SymInt? chunk_tokens, ScalarType? "
    "logits_dtype, str impl, Tensor? low_hidden=None, Tensor? low_weight=None, bool "
    "need_low_hidden=False, bool need_low_weight=False) -> Tensor[]",
    "entropy_temperature(Tensor logits, float threshold, float ratio, float minimum, int "
    "iterations, str impl) -> Tensor[]",
    "entropy_descent(Tensor logits, float threshold, float learning_rate, int steps, str "
    "impl) -> Tensor[]",
    "all_reduce(Tensor x, str group) -> Tensor[]",
    "scale_(Tensor(a!) x, Tensor factor, str impl) -> ()",
    "count_tokens(Tensor counted, Tensor? segment_ids, str mode, str? group) -> Tensor[]",
    "gather_alike(Tensor x, str group, str layout) -> Tensor[]",
    "divergence_stats(Tensor logits, Tensor other_logits, Tensor? bias, Tensor? target, "
    "Tensor? mask, Tensor? temperature_rows, float temperature, float softcap, float "
    "logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? "
    "index, Tensor? other_bias, Tensor? other_temperature_rows, float other_temperature, "
    "float other_softcap, float other_logit_scale, Tensor? other_numbers, str kind, float "
    "beta, str[] outputs, str[] other_outputs, str impl) -> Tensor[]",
    "divergence_grad(Tensor logits, Tensor other_logits, Tensor? bias, Tensor? target, "
    "Tensor? mask, Tensor? temperature_rows, float temperature, float softcap, float "
    "logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? "
    "index, Tensor? other_bias, Tensor? other_temperature_rows, float other_temperature, "
    "float other_softcap, float other_logit_scale, Tensor? other_numbers, str kind, float "
    "beta, Tensor max, Tensor log1p_r, Tensor other_max, Tensor other_log1p_r, Tensor gap, "
    "Tensor own_kl, Tensor other_kl, Tensor? upstream, Tensor? other_upstream, str impl) -> "
    "Tensor[]",
    "divergence_loss(Tensor logits, Tensor other_logits, Tensor? bias, Tensor? target, "
    "Tensor? mask, Tensor? temperature_rows, float temperature, float softcap, float "
    "logit_scale, SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? "
    "index, Tensor? other_bias, Tensor? other_temperature_rows, float other_temperature, "
    "float other_softcap, float other_logit_scale, Tensor? other_numbers, str kind, float "
    "beta, Tensor? upstream, Tensor? other_upstream, str[] outputs, str[] other_outputs, str "
    "impl) -> Tensor[]",
    "linear_divergence_stats(Tensor hidden, Tensor weight, Tensor other_hidden, Tensor "
    "other_weight, Tensor? bias, Tensor? target, Tensor? mask, Tensor? temperature_rows, "
    "float temperature, float softcap, float logit_scale, SymInt valid_vocab, str? group, "
    "Tensor? numbers, bool compact, Tensor? index, Tensor? other_bias, Tensor? "
    "other_temperature_rows, float other_temperature, float other_softcap, float "
    "other_logit_scale, Tensor? other_numbers, str kind, float beta, str[] outputs, str[] "
    "other_outputs, SymInt? chunk_tokens, ScalarType? logits_dtype, str impl) -> Tensor[]",
    "linear_divergence_grad(Tensor hidden, Tensor weight, Tensor other_hidden, Tensor "
    "other_weight, Tensor? bias, Tensor? target, Tensor? mask, Tensor? temperature_rows, "
    "float temperature, float softcap, float logit_scale, SymInt valid_vocab, str? group, "
    "Tensor? numbers, bool compact, Tensor? index, Tensor? other_bias, Tensor? "
    "other_temperature_rows, float other_temperature, float other_softcap, float "
    "other_logit_scale, Tensor? other_numbers, str kind, float beta, Tensor max, Tensor "
    "log1p_r, Tensor other_max, Tensor other_log1p_r, Tensor gap, Tensor own_kl, Tensor "
    "other_kl, Tensor upstream, bool need_hidden, bool need_weight, bool need_bias, float? "
    "filter_eps, bool need_other_hidden, bool need_other_weight, bool need_other_bias, "
    "SymInt? chunk_tokens, ScalarType? logits_dtype, str impl) -> Tensor[]",
    "linear_divergence_loss(Tensor hidden, Tensor weight, Tensor other_hidden, Tensor "
    "other_weight, Tensor? bias, Tensor? target, Tensor? mask, Tensor? temperature_rows, "
    "float temperature, float softcap, float logit_scale, SymInt valid_vocab, str? group, "
    "Tensor? numbers, bool compact, Tensor? index, Tensor? other_bias, Tensor? "
    "other_temperature_rows, float other_temperature, float other_softcap, float "
    "other_logit_scale, Tensor? other_numbers, str kind, float beta, Tensor upstream, bool "
    "need_hidden, bool need_weight, bool need_bias, float? filter_eps, bool "
    "need_other_hidden, bool need_other_weight, bool need_other_bias, str[] outputs, str[] "
    "other_outputs, SymInt? chunk_tokens, ScalarType? logits_dtype, str impl) -> Tensor[]",
    "top_logprobs(Tensor logits, Tensor? bias, Tensor? target, Tensor? mask, Tensor? "
    "temperature_rows, float temperature, float softcap, float logit_scale, SymInt "
    "valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, int k, str impl) "
    "-> Tensor[]",
    "linear_top_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? "
    "mask, Tensor? temperature_rows, float temperature, float softcap, float logit_scale, "
    "SymInt valid_vocab, str? group, Tensor? numbers, bool compact, Tensor? index, int k, "
    "SymInt? chunk_tokens, ScalarType? logits_dtype, str impl, Tensor? low_hidden=None, "
    "Tensor? low_weight=None, bool need_low_hidden=False, bool need_low_weight=False) -> "
    "Tensor[]",
)


def test_schemas_are_those_of_programs_exported_before():
    names = [declared.partition("(")[0] for declared in RECORDED]
    assert list(OPERATORS) == names
    found = [str(getattr(torch.ops.em_kernels, name).default._schema) for name in names]
    assert found == [f"em_kernels::{with_later(declared)}" for declared in RECORDED]


def with_later(declared):
    """Those that have a `RowSpec`."""
    before, end = declared.rsplit(") -> ", 1)
    return f"{before}{LATER if 'valid_vocab' in before else ''}) -> {end}"


@records.arguments
class Example(NamedTuple):
    x: Tensor
    spec: RowSpec
    needs: Needs = Needs(weight=True)
    limit: int | None = 3


VALUES = (torch.zeros(2), RowSpec(temperature=0.5), Needs(bias=True), 7)


def test_a_record_is_its_fields_in_a_row_and_back():
    example = Example(*VALUES)
    values = records.flat(example)
    assert len(values) == 1 + len(RowSpec._fields) + len(Needs._fields) + 1
    again = records.unflat(Example, values)
    assert again.x is example.x and again[1:] == example[1:]
    assert type(again.spec) is RowSpec and type(again.needs) is Needs


@pytest.mark.parametrize("left_out", range(12))
def test_arguments_left_out_at_the_end_have_their_defaults(left_out):
    default = Example(*VALUES[:2])
    values = records.flat(default)
    again = records.unflat(Example, values[: len(values) - left_out])
    assert again.x is default.x and again[1:] == default[1:]


def test_schema_of_a_record():
    end = records.schema(Example).partition("index, ")[2]
    assert end == (
        "bool need_hidden=False, bool need_weight=True, bool need_bias=False, "
        f"float? filter_eps=None, int? limit=3{LATER}"
    )
