"""Drift from a base: divergences of known models and of whole logits, and numbers by hand."""

from __future__ import annotations

import gc
import json
import math
import weakref

import numpy as np
import pytest
import torch
from evaluations import by_hand, given, letters, read, save_bigrams, sure, write_rows
from tiny_qwen2 import WORDS, make_bigram_model, make_model, make_tokenizer

from em_kernels import cli
from em_kernels.analysis import tokens as tokens_module
from em_kernels.analysis.drift import drift
from em_kernels.analysis.tokens import Base
from em_kernels.cli import analyze
from em_kernels.evaluator import EvalConfig, run_eval

torch.set_num_threads(1)

ROWS = [{"prompt": "a b", "response": "1 2 3"}, {"text": "c d 4"}, {"prompt": "9", "text": "0"}]


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("rows", [len(WORDS), len(WORDS) + 6])
def test_divergences_are_those_of_the_models_own_logits(rows, tmp_path):
    """In both directions, of models of other sizes, over the vocabulary that they share."""
    model = make_model(3)
    base = make_model(4, hidden_size=48, num_hidden_layers=1, vocab_size=rows)
    texts = given(tmp_path, ROWS)
    file = read(model, texts, tmp_path / "after.jsonl", base=Base(base, "base"))
    alone = read(model, texts, tmp_path / "alone.jsonl")
    assert file.head["base"]["model"] == "base" and "base" not in alone.head
    for text, stats, other in zip(texts, file, alone, strict=True):
        ids = torch.tensor([text.prompt + text.answer])
        first = max(len(text.prompt), 1)
        p, q = (
            m(input_ids=ids).logits[0, first - 1 : -1, : len(WORDS)].double().log_softmax(-1)
            for m in (model, base)
        )
        middle = ((p.exp() + q.exp()) / 2).log()
        assert stats.kl_to_base == pytest.approx(kl(p, q).tolist(), rel=1e-4)
        assert stats.kl_from_base == pytest.approx(kl(q, p).tolist(), rel=1e-4)
        js = (kl(p, middle) + kl(q, middle)) / 2
        assert stats.js_to_base == pytest.approx(js.tolist(), rel=1e-4)
        assert (stats.ids, stats.entropy) == (other.ids, other.entropy)
        assert other.kl_to_base == other.kl_from_base == other.js_to_base == []


def test_the_model_itself_has_not_drifted(tmp_path):
    texts, model = given(tmp_path, ROWS), make_model(3)
    before = read(model, texts, tmp_path / "before.jsonl")
    after = read(model, texts, tmp_path / "after.jsonl", base=Base(model, "model"))
    result = drift(before, after, make_tokenizer())
    for found in result["measures"].values():
        assert abs(found["quantiles"]["1"]) < 1e-6


def test_drift_of_known_models(tmp_path):
    texts = given(tmp_path, [{"prompt": x, "response": y} for x, y in ("a1", "b2", "c9")])
    base, model = (make_bigram_model(sure(share)) for share in (0.6, 0.95))
    before = read(base, texts, tmp_path / "before.jsonl")
    after = read(model, texts, tmp_path / "after.jsonl", base=Base(base, "base"))
    measures = drift(before, after, make_tokenizer())["measures"]
    to_base = 0.95 * math.log(0.95 / 0.6) + 0.05 * math.log(0.05 / 0.4)
    from_base = 0.6 * math.log(0.6 / 0.95) + 0.4 * math.log(0.4 / 0.05)
    assert measures["kl_to_base"]["mean"] == pytest.approx(to_base, rel=1e-4)
    assert measures["kl_from_base"]["mean"] == pytest.approx(from_base, rel=1e-4)


def test_a_stopped_read_goes_on_and_another_base_begins_anew(tmp_path, monkeypatch):
    rows = [{"prompt": x, "response": "1 2 3"[: i % 5 + 1]} for i, x in enumerate("abcabc")]
    texts, path = given(tmp_path, rows), tmp_path / "after.jsonl"
    monkeypatch.setattr(tokens_module, "BATCH_TOKENS", 14)
    model, base = make_model(0), make_model(1)
    whole = list(read(model, texts, path, base=Base(base, "base")))
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert list(read(model, texts, path, base=Base(base, "base"))) == whole
    other = list(read(model, texts, path, base=Base(make_model(2), "base")))
    assert [s.entropy for s in other] == [s.entropy for s in whole]
    assert [s.kl_to_base for s in other] != [s.kl_to_base for s in whole]
    assert not any(s.kl_to_base for s in read(model, texts, path))


def files_by_hand(tmp_path, entropy, kl_to_base, **others):
    """Two texts, of three and two tokens."""
    ids = [[WORDS.index(w) for w in text] for text in ("123", "45")]
    cut = (slice(0, 3), slice(3, 5))
    before = [{"ids": i, "entropy": entropy[s]} for i, s in zip(ids, cut)]
    after = [
        {"ids": i, "entropy": [0.5] * len(i), "kl_to_base": kl_to_base[s]}
        | {"kl_from_base": [0.1] * len(i), "js_to_base": [0.01] * len(i)}
        for i, s in zip(ids, cut)
    ]
    return (
        by_hand(tmp_path / "before.jsonl", before),
        by_hand(tmp_path / "after.jsonl", after, **{"base": {"model": "by hand"}, **others}),
    )


def test_drift_by_hand(tmp_path):
    files = files_by_hand(tmp_path, [0.0, 3.0, 1.0, 4.0, 2.0], [0.0, 2.0, 1.0, 6.0, 1.0])
    # The 0.6 quantile of the entropies is 2.4, so the tokens with 3 and 4 are forks.
    result = drift(*files, make_tokenizer(), ratio=0.4)
    assert result["tau"] == pytest.approx(2.4) and result["entropy"] == [2, 0.5]
    assert (result["tokens"], result["not_finite"]) == (5, 0)
    found = result["measures"]["kl_to_base"]
    assert (found["mean"], found["forks"], found["at_forks"]) == (2, 4, 0.8)
    assert found["elsewhere"] == pytest.approx(2 / 3)
    assert found["quantiles"] == pytest.approx({"0.5": 1, "0.9": 4.4, "0.99": 5.84, "1": 6})
    assert result["measures"]["kl_from_base"]["at_forks"] == pytest.approx(0.4)
    assert [row["tokens"] for row in result["bins"]] == [1] * 5
    assert [row["kl_to_base"] for row in result["bins"]] == [0, 1, 1, 2, 6]
    assert [(r["low"], r["high"], r["entropy"]) for r in result["bins"]][1] == (1, 1, 1)
    first, second = result["moved"][:2]
    assert (first["key"], first["position"], first["token"], first["context"]) == ("1", 0, "4", "")
    assert (second["token"], second["context"], second["entropy_before"]) == ("2", "1", 3)
    assert [row["kl_to_base"] for row in result["moved"]] == [6, 2, 1, 1, 0]
    for counts in result["histogram"]["tokens"].values():
        assert sum(counts) == 5
    assert result["histogram"]["tokens"]["kl_to_base"][0] == 1  # what is below 1e-9
    assert result["texts"][0]["kl_to_base"] == [0, 2, 1]


def test_the_texts_with_the_tokens_that_moved_most_are_shown(tmp_path):
    zeros = dict(kl_from_base=[0.0], js_to_base=[0.0], entropy=[0.0], ids=[WORDS.index("1")])
    texts = [dict(zeros, kl_to_base=[float(i == 7 or i == 8)]) for i in range(30)]
    before = by_hand(tmp_path / "before.jsonl", texts)
    after = by_hand(tmp_path / "after.jsonl", texts, base={"model": "by hand"})
    shown = [text["key"] for text in drift(before, after, make_tokenizer())["texts"]]
    assert {"7", "8"} < set(shown) and len(shown) == 6


def test_entropies_that_are_all_the_same_are_one_bin(tmp_path):
    files = files_by_hand(tmp_path, [1.5] * 5, [0.0, 2.0, 1.0, 6.0, 1.0])
    result = drift(*files, make_tokenizer())
    ((row),) = result["bins"]
    assert (row["tokens"], row["kl_to_base"]) == (5, 2)
    assert result["measures"]["kl_to_base"]["elsewhere"] is None


def test_what_is_not_finite_is_left_out_and_counted(tmp_path):
    files = files_by_hand(tmp_path, [0.0, 3.0, math.nan, 4.0, 2.0], [0.0, math.inf, 1.0, 6.0, 1.0])
    result = drift(*files, make_tokenizer())
    assert (result["tokens"], result["not_finite"]) == (3, 2)
    assert result["measures"]["kl_to_base"]["mean"] == pytest.approx(7 / 3)
    assert len(result["moved"]) == 3
    assert np.isfinite([row["kl_to_base"] for row in result["moved"]]).all()


def test_files_that_do_not_fit_are_named(tmp_path):
    before, after = files_by_hand(tmp_path, [1.0] * 5, [1.0] * 5)
    with pytest.raises(ValueError, match="was read without a base"):
        drift(after, before, make_tokenizer())
    with pytest.raises(ValueError, match="ratio must be in"):
        drift(before, after, make_tokenizer(), ratio=0)
    with pytest.raises(ValueError, match="no token with a finite divergence"):
        drift(*files_by_hand(tmp_path, [math.nan] * 5, [1.0] * 5), make_tokenizer())
    other = by_hand(tmp_path / "other.jsonl", [{"ids": [1], "entropy": [1.0]}])
    with pytest.raises(ValueError, match="must be of the same tokens"):
        drift(other, after, make_tokenizer())


@pytest.fixture
def models(tmp_path) -> list[str]:
    """`analyze tokens` of an evaluation of one, with the other after it."""
    before = save_bigrams(tmp_path / "before", sure(0.6))
    after = save_bigrams(tmp_path / "after", sure(0.95))
    path = write_rows(tmp_path / "problems.jsonl", letters(2))
    run_eval(EvalConfig(before, path, tmp_path / "eval", samples=2), progress=False)
    return ["analyze", "tokens", str(tmp_path / "eval"), "--after", after, "--quiet"]


def test_the_report_tells_of_the_drift(models, tmp_path, capsys):
    assert cli.main(models) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "KL(after ‖ before)" in printed and "share of forks" in printed
    found = json.loads((tmp_path / "eval" / "drift.json").read_text())
    assert found["models"] == [str(tmp_path / "before"), str(tmp_path / "after")]
    assert (tmp_path / "eval" / "drift.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "Texts, coloured by KL(after ‖ before)" in page


@pytest.mark.parametrize("flag, together", [("--drift", True), ("--no-drift", False)])
def test_both_models_are_in_memory_only_for_the_drift(
    flag, together, models, tmp_path, monkeypatch
):
    load, alive, seen = analyze.load_model, [], []

    def load_model(*arguments):
        gc.collect()
        seen.append([model() is not None for model in alive])
        model, tokenizer = load(*arguments)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(analyze, "load_model", load_model)
    assert cli.main([*models, flag]) == 0
    assert seen == [[], [together]]
    assert (tmp_path / "eval" / "drift.json").is_file() == together


@pytest.mark.parametrize("shorter", ["before", "after"])
def test_texts_too_long_for_either_model_are_told_or_left_out(shorter, tmp_path, capsys):
    """Of the model before: left out of both reads. Of the model after: the reads differ."""
    for seed, name in enumerate(("before", "after")):
        room = dict(max_position_embeddings=6) if name == shorter else {}
        make_model(seed, **room).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    texts = write_rows(tmp_path / "t.jsonl", [{"text": "1 2"}, {"text": "1 2 3 4 5 6 7"}])
    names = ["--model", str(tmp_path / "before"), "--after", str(tmp_path / "after")]
    command = ["analyze", "tokens", texts, *names, "--output", str(tmp_path / "out"), "--quiet"]
    code, said = cli.main(command), capsys.readouterr()
    if shorter == "before":
        assert code == 0 and "left out: 1 (too long for the model)" in said.out
        assert json.loads((tmp_path / "out" / "drift.json").read_text())["tokens"] == 2
    else:
        assert code == 2 and "must be of the same tokens: 2 and 1 texts" in said.err
