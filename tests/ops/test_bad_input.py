"""Bad input raises TypeError or ValueError that names the argument and what was received."""

import pytest
import torch

from em_kernels import (
    EntropyLoss,
    LinearEntropyLoss,
    backends,
    entropy_from_logits,
    entropy_loss,
    linear_entropy_loss,
    linear_softmax_stats,
    linear_token_loss,
    selective_log_softmax_and_entropy,
    softmax_stats,
    token_loss,
)

X = torch.zeros(2, 3, 5)
TARGET = torch.zeros(2, 3, dtype=torch.int64)
ROWS = torch.ones(2, 3)
HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
NUMPY = ROWS.numpy()


def on_logits(**kwargs):
    softmax_stats(**{"logits": X, **kwargs})


def on_hidden(**kwargs):
    linear_softmax_stats(**{"hidden": HIDDEN, "weight": WEIGHT, **kwargs})


def on_token_loss(**kwargs):
    token_loss(**{"logits": X, "entropy_weight": ROWS, **kwargs})


def on_linear_token_loss(**kwargs):
    linear_token_loss(**{"hidden": HIDDEN, "weight": WEIGHT, "entropy_weight": ROWS, **kwargs})


# (arguments, the error, a pattern of its message): one list per kind of argument.
LOGITS = [
    ({"logits": [[1.0]]}, TypeError, "logits must be a tensor, got list"),
    ({"logits": None}, TypeError, "logits must be a tensor, got NoneType"),
    ({"logits": X.long()}, TypeError, r"logits must be float32, .*, got torch.int64"),
    ({"logits": X.to(torch.complex64)}, TypeError, r"logits .*, got torch.complex64"),
    ({"logits": torch.zeros(())}, ValueError, r"logits must be \(\.\.\., V\).*shape \(\)"),
    ({"logits": torch.zeros(3, 0)}, ValueError, r"logits must be .*V >= 1, got shape \(3, 0\)"),
]
OPERANDS = [
    ({"hidden": NUMPY}, TypeError, "hidden must be a tensor, got ndarray"),
    ({"hidden": HIDDEN.int()}, TypeError, "hidden must be float32, .*, got torch.int32"),
    ({"hidden": torch.zeros(())}, ValueError, r"hidden must be .*, got shape \(\)"),
    ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    ({"weight": WEIGHT.T}, ValueError, r"weight must be \(V, D\) with D = 4 .* \(4, 5\)"),
    ({"weight": WEIGHT[0]}, ValueError, r"weight must be \(V, D\) .* got shape \(4,\)"),
    ({"weight": torch.zeros(0, 4)}, ValueError, r"weight must be .*got shape \(0, 4\)"),
    (
        {"weight": WEIGHT.half(), "hidden": HIDDEN.bfloat16()},
        TypeError,
        "weight and hidden .*torch.float16 and torch.bfloat16: .*product_dtype=torch.float32",
    ),
    ({"product_dtype": torch.bfloat16}, ValueError, "product_dtype must .*, got torch.bfloat16"),
    ({"product_dtype": torch.complex64}, ValueError, "product_dtype .*got torch.complex64"),
    ({"product_dtype": "float32"}, ValueError, "product_dtype must .*, got 'float32'"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu, got meta"),
    ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must be \(5,\), got shape \(4,\)"),
    ({"bias": torch.zeros(5, dtype=torch.int8)}, TypeError, "bias .* got torch.int8"),
    ({"bias": torch.zeros(5, device="meta")}, ValueError, "bias must be on cpu, got meta"),
    ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be a positive int or None, got 0"),
    ({"chunk_tokens": 2.0}, ValueError, "chunk_tokens must be a positive int .* got 2.0"),
    ({"chunk_tokens": True}, ValueError, "chunk_tokens must be a positive int .* got True"),
    ({"chunk_tokens": 1 << 63}, ValueError, "chunk_tokens must be .* 64 bits do not hold"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype .*, got torch.float16"),
    ({"logits_dtype": "float32"}, ValueError, "logits_dtype .*, got 'float32'"),
]
SHARED = [
    ({"target": [0]}, TypeError, "target must be a tensor, got list"),
    ({"target": TARGET[0]}, ValueError, r"target .* \(2, 3\), got shape \(3,\)"),
    ({"target": TARGET[..., None, None]}, ValueError, r"target .* got shape \(2, 3, 1, 1\)"),
    ({"target": TARGET.int()}, TypeError, "target must be int64, got torch.int32"),
    ({"target": TARGET.float()}, TypeError, "target must be int64, got torch.float32"),
    ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu, got meta"),
    ({"target": TARGET + 5}, ValueError, r"target must be in \[0, 5\).*, got 5 at token 0"),
    ({"target": TARGET - 1}, ValueError, r"target must be in \[0, 5\).*, got -1 at token 0"),
    ({"target": TARGET + 4, "valid_vocab": 4}, ValueError, r"target must be in \[0, 4\).* got 4"),
    ({"mask": True}, TypeError, "mask must be a tensor, got bool"),
    ({"mask": ROWS.T}, ValueError, r"mask .* \(2, 3\), got shape \(3, 2\)"),
    ({"mask": ROWS.to("meta")}, ValueError, "mask must be on cpu, got meta"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be positive and finite, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be positive .* got nan"),
    ({"temperature": float("inf")}, ValueError, "temperature must be .* finite, got inf"),
    ({"temperature": "hot"}, TypeError, "temperature must be a float or a tensor, got str"),
    ({"temperature": True}, TypeError, "temperature must be a number, got bool"),
    ({"temperature": None}, TypeError, "temperature must be .*, got NoneType"),
    ({"temperature": ROWS[0]}, ValueError, r"temperature .* \(2, 3\), got shape \(3,\)"),
    ({"temperature": ROWS.int()}, TypeError, "temperature must be floating .* torch.int32"),
    ({"temperature": ROWS.to("meta")}, ValueError, "temperature must be on cpu, got meta"),
    ({"temperature": 0 * ROWS}, ValueError, "temperature must be positive .* got 0.0 at token 0"),
    ({"temperature": ROWS / 0}, ValueError, "temperature must be .* finite, got inf at token 0"),
    ({"temperature": 1e39}, ValueError, "temperature must be from 1.18e-38 to 8.51e.37 .* 1e.39"),
    ({"temperature": 1e-40}, ValueError, "temperature must be from .* got 1e-40"),
    (
        {"temperature": 1e39 * ROWS.double()},
        ValueError,
        "temperature .* finite, got inf at token 0",
    ),
    (
        {"temperature": 1e-40 * ROWS},
        ValueError,
        "temperature must be such .* got .*e-41 at token 0",
    ),
    ({"logit_scale": -1e39}, ValueError, "logit_scale must be from .*, got -1e.39"),
    ({"logit_scale": 1e-39}, ValueError, "logit_scale must be from .*, got 1e-39"),
    (
        {"logit_scale": 1e30, "temperature": 1e-20},
        ValueError,
        "temperature: logit_scale / temperature must be from",
    ),
    ({"logit_scale": 1e30, "temperature": 1e-20 * ROWS}, ValueError, "temperature must be such"),
    ({"softcap": 1e39}, ValueError, "softcap must be from .*, got 1e.39"),
    ({"softcap": 1e-39}, ValueError, "softcap must be from .*, got 1e-39"),
    (
        {"temperature": ROWS.clone().requires_grad_()},
        ValueError,
        "temperature must not require grad",
    ),
    ({"softcap": 0.0}, ValueError, "softcap must be positive or None and finite, got 0.0"),
    ({"softcap": -3.0}, ValueError, "softcap must be positive .* got -3.0"),
    ({"softcap": "30"}, TypeError, "softcap must be a number, got str"),
    ({"logit_scale": 0}, ValueError, "logit_scale must be non-zero and finite, got 0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be .* finite, got inf"),
    ({"logit_scale": None}, TypeError, "logit_scale must be a number, got NoneType"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
    ({"ignore_index": -1 - (1 << 63)}, ValueError, "ignore_index must be .* 64 bits do not hold"),
    ({"valid_vocab": 0}, ValueError, r"valid_vocab must be in \[1, 5\] or None, got 0"),
    ({"valid_vocab": 6}, ValueError, r"valid_vocab must be in \[1, 5\] or None, got 6"),
    ({"valid_vocab": 2.5}, TypeError, "valid_vocab must be an int or None, got float"),
    ({"valid_vocab": "5"}, TypeError, "valid_vocab must be an int or None, got str"),
    ({"valid_vocab": True}, TypeError, "valid_vocab must be an int or None, got bool"),
    ({"group": object()}, TypeError, "group must be a torch.distributed .* got object"),
    ({"impl": "numpy"}, ValueError, r"impl must be one of \('auto', .*\), got 'numpy'"),
    ({"impl": None}, ValueError, "impl must be one of .*, got None"),
    ({"outputs": "entropy"}, TypeError, "outputs must be a tuple .* got the string 'entropy'"),
    ({"outputs": None}, TypeError, "outputs must be a tuple of names, got NoneType"),
    ({"outputs": 3}, TypeError, "outputs must be a tuple of names, got int"),
    ({"outputs": ("entropy", "perplexity")}, ValueError, "outputs must be .* got 'perplexity'"),
    ({"outputs": ("is_top1",)}, ValueError, "'is_top1' needs a target, got target=None"),
    ({"outputs": ("entropy_slope",)}, ValueError, "'entropy_slope' needs a target"),
]
WEIGHTS = [
    ({"entropy_weight": None}, ValueError, "entropy_weight or logprob_weight .* got None"),
    ({"entropy_weight": 1.0}, TypeError, "entropy_weight must be a tensor, got float"),
    ({"entropy_weight": ROWS[0]}, ValueError, r"entropy_weight .* got shape \(3,\)"),
    ({"entropy_weight": ROWS.to("meta")}, ValueError, "entropy_weight must be on cpu, got meta"),
    (
        {"entropy_weight": ROWS.clone().requires_grad_()},
        ValueError,
        "entropy_weight must not require grad",
    ),
    ({"logprob_weight": ROWS}, ValueError, "logprob_weight needs a target, got target=None"),
    ({"logprob_weight": 2, "target": TARGET}, TypeError, "logprob_weight must be a tensor"),
    (
        {"logprob_weight": ROWS.T, "target": TARGET},
        ValueError,
        r"logprob_weight .* got shape \(3, 2\)",
    ),
]
CASES = [
    *((on_logits, *case) for case in LOGITS + SHARED),
    *((on_hidden, *case) for case in OPERANDS + SHARED),
    *((on_token_loss, *case) for case in LOGITS + SHARED + WEIGHTS),
    *((on_linear_token_loss, *case) for case in OPERANDS + SHARED + WEIGHTS),
]


def name_of(value):
    if isinstance(value, dict):
        return ",".join(value)
    return value.__name__ if callable(value) else ""


@pytest.mark.parametrize("call, arguments, exception, message", CASES, ids=name_of)
def test_the_message_names_the_argument_and_what_was_received(call, arguments, exception, message):
    with pytest.raises(exception, match=message):
        call(**arguments)


@pytest.mark.parametrize("call", (on_logits, on_hidden, on_token_loss, on_linear_token_loss))
def test_the_same_arguments_without_the_fault_are_good(call):
    call(
        target=TARGET,
        mask=ROWS,
        temperature=ROWS,
        softcap=1.0,
        logit_scale=-1,
        ignore_index=3,
        valid_vocab=4,
        outputs=["entropy"],
    )


def test_the_token_of_a_bad_target_is_named():
    target = TARGET.clone()
    target[1, 0] = 99
    with pytest.raises(ValueError, match="got 99 at token 3"):
        softmax_stats(X, target)


@pytest.mark.parametrize("reduction", ("mean", "none", ""))
def test_unknown_reduction(reduction):
    with pytest.raises(ValueError, match=f"reduction must be one of .*, got '{reduction}'"):
        entropy_loss(X, reduction=reduction)
    with pytest.raises(ValueError, match=f"reduction must be one of .*, got '{reduction}'"):
        linear_entropy_loss(HIDDEN, WEIGHT, reduction=reduction)


@pytest.mark.parametrize("reduction", (1e39, 1e-39))
def test_a_reduction_beyond_float32(reduction):
    for loss, given in ((entropy_loss, (X,)), (linear_entropy_loss, (HIDDEN, WEIGHT))):
        with pytest.raises(ValueError, match="reduction must be from"):
            loss(*given, reduction=reduction)
    wide = X.detach().double().requires_grad_()
    assert entropy_loss(wide, reduction=reduction).isfinite()


@pytest.mark.parametrize("reduction", (0.0, -1, float("inf")))
def test_reduction_by_a_number_that_is_no_normaliser(reduction):
    with pytest.raises(ValueError, match=f"reduction must be positive .*, got {reduction}"):
        entropy_loss(X, reduction=reduction)


@pytest.mark.parametrize("reduction", (None, True, (1,)))
def test_reduction_of_the_wrong_type(reduction):
    with pytest.raises(TypeError, match=r"reduction must be .*, got "):
        entropy_loss(X, reduction=reduction)


def test_losses_check_their_mask():
    for call in (entropy_loss, EntropyLoss()):
        with pytest.raises(ValueError, match=r"mask must have .* \(2, 3\), got shape \(2,\)"):
            call(X, ROWS[:, 0])
    for call in (linear_entropy_loss, LinearEntropyLoss()):
        with pytest.raises(TypeError, match="mask must be a tensor, got list"):
            call(HIDDEN, WEIGHT, [1, 1])


def test_losses_refuse_what_is_no_group():
    with pytest.raises(TypeError, match=r"group must be .* got object"):
        entropy_loss(X, group=object())
    with pytest.raises(TypeError, match=r"group must be .* got int"):
        linear_entropy_loss(HIDDEN, WEIGHT, group=0)


def test_trl_functions_check_their_arguments():
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        entropy_from_logits([1.0])
    with pytest.raises(ValueError, match="target must be in"):
        selective_log_softmax_and_entropy(X, TARGET - 100)
    with pytest.raises(ValueError, match="temperature must be positive"):
        selective_log_softmax_and_entropy(X, TARGET, temperature=0.0)


def test_nothing_is_written_before_the_checks():
    logits = torch.randn(3, 5, requires_grad=True)
    before = logits.detach().clone()
    target = torch.tensor([0, 1, 7])
    with pytest.raises(ValueError, match="got 7 at token 2"):
        token_loss(logits, target, logprob_weight=torch.ones(3), inplace=True)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("impl", ("cpu", "triton", "cuda"))
def test_a_backend_that_cannot_serve_says_why(impl):
    reason = backends()[impl]
    if reason == "available":
        pytest.skip(f"{impl} is available here")
    with pytest.raises(ValueError, match=f"impl='{impl}' cannot be used: ") as raised:
        softmax_stats(X, impl=impl)
    assert reason in str(raised.value)


def test_auto_never_fails_for_want_of_a_backend():
    assert torch.isfinite(softmax_stats(X, impl="auto").entropy).all()


def test_backends_are_all_told_of():
    assert set(backends()) == {"reference", "cpu", "triton", "cuda"}
    assert backends()["reference"] == "available"
