"""Importance weights between sampler and trainer: the formulas, and verl's on shared inputs.

What verl 0.9.1 gave is written down for where it is not installed.
"""

from __future__ import annotations

import math

import pytest
import torch
import verl_source

from em_kernels.objectives import rollout_difference, rollout_weight
from em_kernels.objectives.rollout_correction import CORRECTIONS


def shared_inputs():
    """(old_logprob, rollout_logprob, mask) in float64, from a formula, not a generator."""
    i = torch.arange(48, dtype=torch.float64).view(6, 8)
    old = -1.5 + 1.4 * torch.sin(1.7 * i)
    mask = torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6]).view(6, 1)
    return old, old + 0.9 * torch.cos(2.3 * i), mask


def by_hand(mode: str, old, rollout, mask, floor: float, cap: float) -> torch.Tensor:
    """Answer by answer and token by token, with the math module."""
    weight = torch.zeros(old.shape, dtype=torch.float64)
    for row, own in enumerate(mask.tolist()):
        places = [t for t, counts in enumerate(own) if counts]
        ratio = {t: math.exp(old[row, t] - rollout[row, t]) for t in places}
        whole = math.prod(ratio.values())
        mean = whole ** (1 / max(len(places), 1))
        for t in places:
            judged = {"token": ratio[t], "sequence": whole, "geometric": mean}
            match mode:
                case "token_tis" | "sequence_tis" | "geometric_tis":
                    value = min(max(judged[mode.removesuffix("_tis")], floor), cap)
                case "icepop" | "token_mask":
                    value = ratio[t] if floor <= ratio[t] <= cap else 0
                case "sequence_mask":
                    value = whole if floor <= whole <= cap else 0
                case "geometric_mask":
                    value = ratio[t] if floor <= mean <= cap else 0
            weight[row, t] = value
    return weight


@pytest.mark.parametrize("bounds", [{}, dict(floor=0.8, cap=1.3)], ids=["source's", "given"])
@pytest.mark.parametrize("mode", CORRECTIONS)
def test_weight_is_the_formula(mode, bounds):
    old, rollout, mask = shared_inputs()
    rule = CORRECTIONS[mode]
    floor, cap = bounds.get("floor", rule.floor), bounds.get("cap", rule.cap)
    expected = by_hand(mode, old, rollout, mask, floor, cap)
    found = rollout_weight(old, rollout, mask, mode=mode, **bounds)
    torch.testing.assert_close(found.weight, expected, rtol=1e-12, atol=0)
    count = mask.sum()
    assert found.metrics["rollout_weight_mean"] == pytest.approx(float(expected.sum() / count))
    single = rollout_weight(old.float(), rollout.float(), mask, mode=mode, **bounds)
    assert single.weight.dtype == torch.float32 and not single.weight.requires_grad
    torch.testing.assert_close(single.weight.double(), expected, rtol=1e-5, atol=0)


def test_bounds_of_the_sources():
    told = {mode: (rule.floor, rule.cap) for mode, rule in CORRECTIONS.items()}
    assert told == {
        "token_tis": (0, 2),
        "sequence_tis": (0, 2),
        "geometric_tis": (0, 2),
        "icepop": (0.5, 5),
        "token_mask": (0, 3),
        "sequence_mask": (0, 3),
        "geometric_mask": (0.5, 5),
    }


SOME_ANSWERS = (18.881335075546588, 273.25292922142137)  # four of the six
VERL = [
    # level, threshold, mode, bounds, sum of weights, sum of weights x place
    ("token", 2.0, "token_tis", {}, 35.667176040823044, 775.5583095186374),
    ("sequence", 2.0, "sequence_tis", {}, 32.381819192451744, 766.9212842243302),
    ("token", "0.5_2.0", "icepop", dict(cap=2.0), 22.60508878974731, 511.877590744822),
    ("token", "0.5_5.0", "icepop", {}, 34.32457958628082, 748.993069400896),
    ("sequence", "0.7_1.3", "sequence_mask", dict(floor=0.7, cap=1.3), *SOME_ANSWERS),
]


@pytest.mark.parametrize(("level", "threshold", "mode", "bounds", "total", "placed"), VERL)
def test_weight_is_the_one_recorded_from_verl(level, threshold, mode, bounds, total, placed):
    weight = rollout_weight(*shared_inputs(), mode=mode, **bounds).weight
    assert weight.sum() == pytest.approx(total, rel=1e-12)
    place = torch.arange(48, dtype=torch.float64).view(6, 8)
    assert (weight * place).sum() == pytest.approx(placed, rel=1e-12)


@pytest.mark.parametrize(("level", "threshold", "mode", "bounds", "total", "placed"), VERL)
def test_weight_is_that_of_verl(level, threshold, mode, bounds, total, placed, monkeypatch):
    verl = verl_source.load(monkeypatch)["verl.trainer.ppo.rollout_corr_helper"]
    old, rollout, mask = shared_inputs()
    theirs, _ = verl.compute_rollout_correction_weights(
        old - rollout, mask.double(), level, threshold
    )
    ours = rollout_weight(old, rollout, mask, mode=mode, **bounds).weight
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_difference_is_the_formula_and_verls():
    old, rollout, mask = shared_inputs()
    found = rollout_difference(old, rollout, mask)
    d = (old - rollout)[mask]
    assert found["rollout_logprob_diff_mean"] == pytest.approx(d.abs().mean().item())
    assert found["rollout_logprob_diff_max"] == pytest.approx(d.abs().max().item())
    assert found["rollout_kl_k1"] == pytest.approx(-0.0022947014730580694, rel=1e-9)
    assert found["rollout_kl_k3"] == pytest.approx(0.2037268093429531, rel=1e-9)


def test_what_is_not_counted_or_not_said_has_no_part():
    old, rollout, mask = shared_inputs()
    whole = rollout_difference(old, rollout, mask)
    outside = rollout.masked_fill(~mask, math.nan)
    for mode in CORRECTIONS:
        same = rollout_weight(old.masked_fill(~mask, -math.inf), outside, mask, mode=mode)
        assert torch.equal(same.weight, rollout_weight(old, rollout, mask, mode=mode).weight)
    assert rollout_difference(old, outside, mask) == whole
    unsaid = rollout.clone()
    unsaid[0, 2] = math.nan
    assert rollout_weight(old, unsaid, mask).weight[0, 2] == 1
    left = mask.clone()
    left[0, 2] = False
    assert rollout_difference(old, unsaid, mask) == rollout_difference(old, rollout, left)
    nothing = torch.zeros_like(mask)
    assert not rollout_weight(old, rollout, nothing, mode="sequence_tis").weight.any()
    assert all(value == 0 for value in rollout_difference(old, rollout, nothing).values())


def test_a_sampler_that_agrees_changes_nothing():
    old, _, mask = shared_inputs()
    for mode in CORRECTIONS:
        found = rollout_weight(old, old, mask, mode=mode)
        assert torch.equal(found.weight, mask.double())
        assert found.metrics["rollout_clipped"] == 0


def test_a_ratio_beyond_all_bounds_stays_finite():
    old, mask = torch.tensor([[0.0, -1.0]]), torch.ones(1, 2).bool()
    far = torch.tensor([[-1e4, -1.0]])
    assert rollout_weight(old, far, mask, mode="token_tis").weight.tolist() == [[2, 1]]
    assert rollout_weight(old, far, mask, mode="icepop").weight.tolist() == [[0, 1]]
    assert rollout_weight(old, far, mask, mode="sequence_mask").weight.tolist() == [[0, 0]]
    found = rollout_weight(old, far, mask, mode="geometric_mask")
    assert found.metrics["rollout_clipped"] == 1
    assert rollout_difference(old, far, mask)["rollout_kl_k3"].isfinite()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(mode="tis"), ValueError, "mode must be one of"),
        (dict(cap=0.0), ValueError, "cap must be above floor=0.0"),
        (dict(floor=3.0), ValueError, "cap must be above floor=3.0"),
        (dict(floor=-1.0), ValueError, "floor must be 0 or more"),
        (dict(cap="2"), TypeError, "cap must be a number"),
        (dict(rollout_logprob=torch.zeros(2, 3)), ValueError, "rollout_logprob must have shape"),
        (dict(old_logprob=torch.zeros(6, 8).long()), TypeError, "old_logprob must be floating"),
        (dict(mask=torch.ones(6, 7)), ValueError, "mask must have shape"),
    ],
)
def test_bad_input_is_named(changes, error, message):
    old, rollout, mask = shared_inputs()
    given = dict(old_logprob=old, rollout_logprob=rollout, mask=mask)
    with pytest.raises(error, match=message):
        rollout_weight(**{**given, **changes})
