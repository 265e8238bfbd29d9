"""Options that functions share: the flat signature and text, names refused, defaults told apart."""

import copy
import inspect
import pickle

import pytest
import torch

import em_kernels as em
from em_kernels.backends.interface import NEEDS_TARGET, OUTPUTS
from em_kernels.ops.options import DEFAULTS, TEXTS, _entries

X, TARGET = torch.zeros(3, 5), torch.tensor([0, 4, 2])
HIDDEN, WEIGHT = torch.zeros(3, 2), torch.zeros(5, 2)
WEIGHTS = torch.ones(3)

# As of the first version, where every function repeated them; a type of `group` was not said.
ROWS = (
    "outputs: 'tuple[str, ...]' = ('logprob', 'entropy'), temperature: 'float | Tensor' = 1.0, "
    "top_k: 'int | Tensor | None' = None, top_p: 'float | Tensor | None' = None, "
    "min_p: 'float | Tensor | None' = None, sampler: 'str' = 'transformers', "
    "kept: 'tuple[Tensor, Tensor] | None' = None, "
    "softcap: 'float | None' = None, logit_scale: 'float' = 1.0, ignore_index: 'int' = -100, "
    "mask: 'Tensor | None' = None, valid_vocab: 'int | None' = None, "
    "group: 'dist.ProcessGroup | None' = None, "
)
CHUNKS = (
    "lora: 'tuple[Tensor, Tensor, float] | None' = None, "
    "chunk_tokens: 'int | None' = None, logits_dtype: 'torch.dtype | None' = None, "
    "product_dtype: 'torch.dtype | None' = None, "
    "filter_eps: 'float | None' = None, accumulate_into: 'Tensor | None' = None"
)
WEIGHED = "entropy_weight: 'Tensor | None' = None, logprob_weight: 'Tensor | None' = None, "
OF_LOGITS = "(logits: 'Tensor', target: 'Tensor | None' = None, *, "
OF_HIDDEN = (
    "(hidden: 'Tensor', weight: 'Tensor', target: 'Tensor | None' = None, *, "
    "bias: 'Tensor | None' = None, "
)
RECORDED = {
    em.softmax_stats: (
        f"{OF_LOGITS}{ROWS}impl: 'str' = 'auto', entropy_requires_grad: 'bool' = True) "
        "-> 'TokenStats'"
    ),
    em.token_loss: (
        f"{OF_LOGITS}{WEIGHED}inplace: 'bool' = False, {ROWS}impl: 'str' = 'auto') -> 'TokenLoss'"
    ),
    em.linear_softmax_stats: (
        f"{OF_HIDDEN}{ROWS}allreduce_dgrad: 'bool' = True, impl: 'str' = 'auto', {CHUNKS}, "
        "keep_logits: 'int | None' = None, fuse_product: 'bool' = False, "
        "entropy_requires_grad: 'bool' = True) -> 'TokenStats'"
    ),
    em.linear_token_loss: (
        f"{OF_HIDDEN}{WEIGHED}{ROWS}allreduce_dgrad: 'bool' = True, impl: 'str' = 'auto', {CHUNKS})"
        " -> 'TokenLoss'"
    ),
}


@pytest.mark.parametrize("function", RECORDED, ids=lambda function: function.__name__)
def test_the_signature_is_the_flat_list(function):
    assert str(inspect.signature(function)) == RECORDED[function]


# Functions that took `**kwargs` for others: what they took is listed, and nothing else is taken.
LISTED = {
    em.entropy_loss: "softcap logit_scale valid_vocab inplace group impl target ignore_index",
    em.EntropyLoss: "reduction temperature softcap valid_vocab inplace group impl",
    em.linear_entropy_loss: "softcap chunk_tokens logits_dtype filter_eps allreduce_dgrad group",
    em.LinearEntropyLoss: "reduction temperature softcap chunk_tokens filter_eps impl",
    em.linear_token_covariance: "bias temperature softcap impl chunk_tokens group vocab_group",
}
ALL = {**RECORDED, **LISTED}


@pytest.mark.parametrize("function", LISTED, ids=lambda function: function.__name__)
def test_the_signature_lists_what_was_handed_on(function):
    parameters = inspect.signature(function).parameters
    assert set(LISTED[function].split()) <= set(parameters)
    assert not [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_help_describes_every_option(function):
    text = inspect.getdoc(function.__init__ if isinstance(function, type) else function)
    described = _entries(inspect.cleandoc(text.partition("Args:\n")[2].partition("\n\n")[0]))
    assert DEFAULTS.keys() & inspect.signature(function).parameters.keys() <= described.keys()


BY_NAME = {name: getattr(em, name) for name in em.__all__}


@pytest.mark.parametrize("name", [name for name, it in BY_NAME.items() if callable(it)])
def test_help_says_nothing_twice(name):
    lines = inspect.getdoc(BY_NAME[name]).partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    entries = [line for line in lines if line[4:5].strip() and ":" in line]
    assert len(entries) == len(set(entries))


def test_every_option_has_a_text_and_a_default():
    assert _entries(TEXTS).keys() == DEFAULTS.keys()


@pytest.mark.parametrize("function", ALL, ids=lambda function: function.__name__)
def test_a_wrong_keyword_is_refused_by_name(function):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\).*'temprature'.*'temperature'"):
        function(temprature=0.5)
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\).*'zzz'$"):
        function(zzz=0)


def test_a_wrong_keyword_is_named_while_compiling():
    compiled = torch.compile(
        lambda x: em.softmax_stats(x, temprature=0.5), fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=r"softmax_stats\(\).*unexpected keyword.*'temprature'"):
        compiled(X)


CALLS = {
    "softmax_stats": lambda target, **o: em.softmax_stats(X, target, **o),
    "linear_softmax_stats": lambda target, **o: em.linear_softmax_stats(
        HIDDEN, WEIGHT, target, **o
    ),
    "token_loss": lambda target, **o: em.token_loss(X, target, entropy_weight=WEIGHTS, **o).stats,
    "linear_token_loss": lambda target, **o: (
        em.linear_token_loss(HIDDEN, WEIGHT, target, entropy_weight=WEIGHTS, **o).stats
    ),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
KINDS = (tuple, list, set, dict.fromkeys, iter, lambda names: (name for name in names))


def given(stats):
    return {name for name, value in stats._asdict().items() if value is not None}


@every_call
def test_the_default_is_what_there_can_be(call):
    assert given(call(None)) == {"entropy"}
    assert given(call(TARGET)) == {"entropy", "logprob"}


@every_call
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(NEEDS_TARGET))
def test_what_is_asked_for_is_never_left_out(call, kind, name):
    for names in ((name, "entropy"), ("entropy", name)):
        with pytest.raises(ValueError, match=f"'{name}' needs a target, got target=None"):
            call(None, outputs=kind(names))
        assert given(call(TARGET, outputs=kind(names))) == {name, "entropy"}


@every_call
def test_the_default_asked_for_by_name_is_a_request(call):
    with pytest.raises(ValueError, match="'logprob' needs a target"):
        call(None, outputs=inspect.signature(em.softmax_stats).parameters["outputs"].default)


@every_call
@pytest.mark.parametrize("kind", KINDS)
def test_any_collection_of_names_is_taken(call, kind):
    assert given(call(TARGET, outputs=kind(OUTPUTS))) == set(OUTPUTS)
    assert given(call(None, outputs=kind(["lse", "max_prob", "lse"]))) == {"lse", "max_prob"}
    assert given(call(None, outputs=kind([]))) == set()


@every_call
@pytest.mark.parametrize(
    "outputs, error, message",
    (
        ("entropy", TypeError, "tuple of names, got the string 'entropy'"),
        (None, TypeError, "tuple of names, got NoneType"),
        (3, TypeError, "tuple of names, got int"),
        (("entropy", "entropie"), ValueError, "must be among .*, got 'entropie'"),
        (("entropy", 3), ValueError, "must be among .*, got 3"),
    ),
)
def test_outputs_that_are_no_names_are_refused(call, outputs, error, message):
    with pytest.raises(error, match=message):
        call(TARGET, outputs=outputs)


@pytest.mark.parametrize("again", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_the_modules_can_be_copied_and_say_what_they_were_given(again):
    loss = again(em.EntropyLoss(reduction="sum", softcap=3.0))
    torch.testing.assert_close(loss(X), em.entropy_loss(X, reduction="sum", softcap=3.0))
    assert repr(loss) == "EntropyLoss(reduction='sum', temperature=1.0, softcap=3.0)"
    linear = again(em.LinearEntropyLoss(chunk_tokens=2))
    torch.testing.assert_close(linear(HIDDEN, WEIGHT), em.linear_entropy_loss(HIDDEN, WEIGHT))
    assert repr(linear) == (
        "LinearEntropyLoss(reduction='token_mean', temperature=1.0, chunk_tokens=2)"
    )
    low_rank = em.LinearEntropyLoss(lora=(torch.zeros(1, 2), torch.zeros(5, 1), 0.5))
    assert "lora=(<(1, 2), torch.float32>, <(5, 1), torch.float32>, 0.5)" in repr(again(low_rank))


@pytest.mark.parametrize("function", [f for f in ALL if not isinstance(f, type)])
def test_the_functions_can_be_pickled(function):
    assert pickle.loads(pickle.dumps(function)) is function
