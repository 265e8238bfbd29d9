"""The accuracy study: rows have the H they are built for, and verdicts are what the rows say."""

import math

import pytest
import torch

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy import contenders as contenders_module
from benchmarks.accuracy import study, verdicts
from benchmarks.accuracy.contenders import INTERPRETED_AT, contenders, level_of
from benchmarks.accuracy.inputs import (
    FLOAT32_LOGITS,
    HIDDEN,
    LOGITS,
    ROWS,
    SPREADS,
    Cell,
    make_rows,
    truth,
)
from benchmarks.accuracy.measure import errors, exact_results, measured
from benchmarks.accuracy.picture import draw
from benchmarks.accuracy.rows import QUANTITIES, Row, line_of, load, row_of
from em_kernels.backends.choice import backend

V = 300


def cell(source=LOGITS, dtype=torch.float32, temperature=0.7, entropy=1e-8):
    return Cell(source, dtype, V, temperature, entropy)


# Inputs and truth


@pytest.mark.parametrize("source, dtype", study.SOURCES)
@pytest.mark.parametrize("entropy", (1e-12, 1e-5, 1.0, math.inf))
def test_rows_have_the_entropy_they_are_built_for(source, dtype, entropy):
    rows = make_rows(cell(source, dtype, 1.7, entropy))
    found = truth(rows.logits, rows.logits.argmax(-1), 1.7).entropy
    wanted = min(entropy, math.log(V) - 0.01)
    exact = dtype == torch.float32
    torch.testing.assert_close(
        found, torch.full((ROWS,), wanted).double(), rtol=1e-3 if exact else 0.5, atol=0
    )
    assert all(leaf.dtype == dtype for leaf in rows.leaves)
    if source != LOGITS:
        hidden, weight = rows.leaves
        assert torch.equal(rows.logits, hidden.double() @ weight.double().T)


def test_offsets_and_spreads_are_there():
    logits = make_rows(cell(temperature=1.0, entropy=1.0)).logits
    assert (logits[1::2].median(-1).values - logits[::2].median(-1).values).min() > 11
    assert logits.std(-1)[::2].diff().min() > 0.3 * SPREADS[0]


@pytest.mark.parametrize("rank", (0, 1, 17))
def test_truth_and_its_gradients_are_those_of_the_definition(rank):
    logits = torch.randn(4, 50, dtype=torch.float64).requires_grad_()
    target = logits.topk(rank + 1).indices[:, rank]
    log_p = (logits / 0.7).log_softmax(-1)
    entropy, logprob = -(log_p.exp() * log_p).sum(-1), log_p.gather(-1, target[:, None])[:, 0]
    found = truth(logits.detach(), target, 0.7)
    for result, gradient, expected in (
        (found.entropy, found.grad_entropy, entropy),
        (found.logprob, found.grad_logprob, logprob),
    ):
        torch.testing.assert_close(result, expected.detach())
        grad = torch.autograd.grad(expected.sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(gradient, grad)


def test_truth_keeps_its_digits_where_one_token_is_certain():
    logits = torch.tensor([[40.0, 0.0, -1.0]], dtype=torch.float64)
    found = truth(logits, torch.tensor([0]), 1.0)
    r = math.exp(-40) + math.exp(-41)
    assert found.logprob.item() == pytest.approx(-r, rel=1e-12)
    assert found.grad_logprob[0].tolist() == pytest.approx(
        [r, -math.exp(-40), -math.exp(-41)], rel=1e-12
    )


# Contenders and their errors


@pytest.mark.parametrize("source, dtype", study.SOURCES)
def test_every_contender_measures_and_the_exact_one_is_at_its_rounding(source, dtype):
    given = cell(source, dtype, temperature=0.9, entropy=1.0)
    found = dict(measured(given))
    assert all(isinstance(error, dict) for error in found.values()), found
    assert {"reference", "eager", "-(p log p)"} <= set(found)
    unit = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    exact = found[verdicts.LIMITS[0]]
    assert exact["H"].max() <= 2**-24 and exact["dH"].max() <= unit
    limit = 0.2 if source == HIDDEN and dtype != torch.float32 else max(4 * unit, 1e-4)
    for name in ("H", "logprob", "dH", "dlogprob"):
        assert found["reference"][name].max() < limit, name


def test_errors_are_relative_and_the_worst_is_seen():
    given = cell(entropy=1.0)
    rows = make_rows(given)
    target = rows.logits.argmax(-1)
    exact = exact_results(given, rows, rows.logits, target)
    grad = exact.grad_entropy[0].clone()
    grad[3, 7] += 0.5 * grad[3].abs().max()
    off = exact._replace(entropy=exact.entropy * 1.25, grad_entropy=(grad,))
    found = errors([off], [exact])
    assert found["H"].tolist() == pytest.approx([0.25] * ROWS)
    assert found["dH largest"].tolist() == pytest.approx([0, 0, 0, 0.5, 0, 0, 0, 0])
    assert found["dH"].argmax() == 3 and found["dlogprob"].max() == 0


def test_kernels_are_interpreted_only_where_the_study_says(monkeypatch):
    temperature, vocab = INTERPRETED_AT
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert contenders_module.is_interpreted(cell(temperature=temperature))
    assert not contenders_module.is_interpreted(cell(temperature=1.0))
    assert not contenders_module.is_interpreted(cell()._replace(vocab=vocab + 1))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not any("interpreted" in name for name in contenders(cell(), "cpu")[0])


def test_the_cpu_is_measured_at_each_of_its_levels():
    cpu = pytest.importorskip("em_kernels._C") and backend("cpu", torch.device("cpu"))
    there, before = contenders(cell(temperature=1.0), "cpu")[0], cpu.get_isa()
    for level in cpu.isa_levels():
        assert f"cpu {level}" in there
        with level_of(f"cpu {level}"):
            assert cpu.get_isa() == level
        assert cpu.get_isa() == before


# Rows and verdicts


def test_a_row_survives_its_file_and_nan_is_as_wrong_as_can_be():
    error = torch.tensor([1e-8, float("nan"), 3e-8])
    line = line_of(cell(HIDDEN, entropy=math.inf), "eager", {"H": error, "dH weight": error[:1]})
    row = row_of({name: "" for name in study.COLUMNS} | {k: str(v) for k, v in line.items()})
    assert row.cell == (HIDDEN, V, "float32", 0.7, math.inf) and row.name == "eager"
    assert row.errors == {"H": (3e-8, math.inf), "dH weight": (1e-8, 1e-8)}
    line = line_of(cell(), "TRL", "RuntimeError: no")
    assert line["failure"] == "RuntimeError: no"


def made(name, worst, entropy=1e-8, source=LOGITS, **more):
    errors = {name: (worst / 2, worst) for name in QUANTITIES} | more
    return Row(source, V, "float32", 1.0, entropy, name, errors, "")


def group(ours, peer, limit=1e-8, entropy=1e-8):
    names = {verdicts.LIMITS[0]: limit, "reference": ours, "eager": peer, "TRL": 10 * peer}
    return [made(name, worst, entropy) for name, worst in names.items()]


@pytest.mark.parametrize(
    "ours, peer, limit, entropy, worse, short",
    [
        (1e-7, 1e-4, 1e-8, 1e-8, False, False),  # 1,000 times nearer
        (1e-5, 1e-4, 1e-8, 1e-8, False, True),  # 10 times
        (1e-5, 1e-4, 1e-8, 1.0, False, False),  # which is not asked for there
        (1e-3, 1e-4, 1e-8, 1.0, True, False),
        (1e-3, 1e-4, 8e-4, 1e-8, False, False),  # as good as the dtypes allow
        (2e-7, 1e-9, 1e-9, 1.0, False, False),  # rounding
    ],
)
def test_verdicts(ours, peer, limit, entropy, worse, short):
    found = verdicts.comparisons(group(ours, peer, limit, entropy))
    assert len(found) == 2 * len(QUANTITIES) - sum("weight" in x for x in QUANTITIES)
    assert {c.peer for c in found} == {"eager"}
    assert all(c.is_worse is worse for c in found)
    claimed = [c for c in found if verdicts.is_claimed(c)]
    assert bool(claimed) is (entropy < 1e-4) and all(verdicts.is_short(c) is short for c in claimed)
    assert not any("second" in c.quantity for c in claimed)
    said = verdicts.verdicts(group(ours, peer, limit, entropy))
    assert said.count("**Held**") == 2 - worse - short
    assert ("reference: H" in said) is (worse or short)


def test_a_peer_counts_by_its_better_form_and_interpreted_kernels_apart():
    rows = [
        *group(1e-7, 1e-2),
        made("TRL, given float32", 1e-6),
        made("triton, interpreted", 1.0),
        made("TRL's kernel, interpreted", 1.0)._replace(errors={"H": (1.0, 1.0)}),
        made("cpu avx2", 2e-7),
        made("cpu portable", 3e-7),
    ]
    assert "**Held**: never worse" in verdicts.claims(rows)
    table = verdicts.error_table(rows, below=True).splitlines()
    head = [cell.strip() for cell in table[0].split("|")]
    first = dict(zip(head, (cell.strip() for cell in table[2].split("|"))))
    assert first["TRL"] == "5e-07 / 1e-06" and first["cuda"] == "not yet measured"
    assert first["cpu"].endswith("/ 3e-07") and first["limit"] == "5e-09 / 1e-08"
    assert first["triton, interpreted"] == "5e-01 / 1e+00" and first["Liger"] == "-"
    assert len(verdicts.error_table(rows, below=False).splitlines()) == 2


# The command, and the rows that are shown


def test_the_command_measures_saves_draws_and_judges(tmp_path, monkeypatch, capsys):
    every = list(study.cells(quick=True))
    assert {x.source for x in every} == {LOGITS, HIDDEN, FLOAT32_LOGITS} and len(every) == 16
    monkeypatch.setattr(study, "cells", lambda quick: [x for x in every if x.source == LOGITS][:2])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    threads = torch.get_num_threads()
    try:
        command.main(["--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "logits, float32, V = 300, T = 0.7" in said and "never worse than a peer" in said
    rows = load(tmp_path / "accuracy.csv")
    assert {row.entropy for row in rows} == {1e-8, 1.0} and f"{len(rows)} rows" in said
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000
    command.main(["--drawn", "--out", str(tmp_path), "--picture", str(tmp_path / "again.png")])
    assert (tmp_path / "again.png").exists() and verdicts.verdicts(rows) in said


def test_a_study_that_is_stopped_has_the_rows_until_then(tmp_path, monkeypatch):
    path, asked = tmp_path / "accuracy.csv", []

    def stopped(given, device, done):
        asked.append(set(done))
        yield "eager", {"H": torch.tensor([1e-3])}
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        study.run(path, quick=True, said=lambda text: None)
    assert [row.errors["H"] for row in load(path)] == [(1e-3, 1e-3)] * 2
    path.write_text(path.read_text() + "logits,300,flo")  # the half of a line
    rows = study.run(path, quick=True, resume=True, said=lambda text: None)
    assert asked == [set(), set(), {"eager"}, {"eager"}, *[set()] * 14]
    assert len(rows) == 18 and {row.name for row in rows} == {"eager"}


def test_what_is_done_is_not_measured_again():
    every = [name for name, _ in measured(cell(HIDDEN, entropy=1.0, temperature=1.0))]
    some = set(every[1:-1])
    again = measured(cell(HIDDEN, entropy=1.0, temperature=1.0), done=some)
    assert [name for name, _ in again] == [every[0], every[-1]]
    assert not list(measured(cell(HIDDEN, entropy=1.0, temperature=1.0), done=every))


def test_what_is_committed_covers_what_was_asked(tmp_path):
    from benchmarks.tables import RESULTS

    rows = load(RESULTS / "accuracy.csv")
    there = {row.cell for row in rows}
    wanted = {
        (x.source, x.vocab, str(x.dtype).removeprefix("torch."), x.temperature, x.entropy)
        for x in study.cells()
    }
    assert there == wanted and not [row for row in rows if row.failure]
    assert {"TRL", "Liger", "verl", "eager", "-(p log p)"} <= {row.name for row in rows}
    draw(rows[:200], tmp_path / "part.png")
