"""Analyses of texts: on bigram models whose statistics are known, and on hand-worked numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from evaluations import by_hand, given, letters, read, save_bigrams, sure, write_rows
from tiny_qwen2 import WORDS, make_bigram_model, make_model, make_tokenizer

from em_kernels import cli
from em_kernels.analysis import tokens as tokens_module
from em_kernels.analysis.forks import forks
from em_kernels.analysis.law import entropy_law, points_of
from em_kernels.analysis.shift import logits_shift, pooled_moments
from em_kernels.analysis.temperature import entropy_at_temperatures
from em_kernels.analysis.texts import Texts
from em_kernels.evaluator import EvalConfig, run_eval

torch.set_num_threads(1)


def entropy_of(p: np.ndarray) -> float:
    p = p / p.sum()
    return float(-(p * np.log(p)).sum())


def row_of(share: float, temperature: float = 1.0) -> np.ndarray:
    """The logits of `sure(share)` after a letter, over the whole vocabulary."""
    p = np.full(len(WORDS), 1e-9)
    p[WORDS.index("1")], p[WORDS.index("9")] = share, 1 - share
    return np.log(p) / temperature


def skewness(z: np.ndarray) -> float:
    d = z - z.mean()
    return float((d**3).mean() / (d**2).mean() ** 1.5)


def test_statistics_are_those_of_the_models_own_logits(tmp_path):
    model = make_model(3)
    rows = [{"prompt": "a b", "response": "1 2 3"}, {"text": "c d 4"}, {"prompt": "9", "text": "0"}]
    texts = given(tmp_path, rows)
    file = read(model, texts, tmp_path / "tokens.jsonl", temperatures=(0.5, 2.0))
    found = list(file)
    assert [s.key for s in found] == ["line 1", "line 2", "line 3"] and not texts.left_out
    for text, stats in zip(texts, found):
        ids = torch.tensor([text.prompt + text.answer])
        first = max(len(text.prompt), 1)
        logits = model(input_ids=ids).logits[0, first - 1 : -1].detach().double()
        assert stats.ids == ids[0, first:].tolist()
        logp = logits.log_softmax(-1)
        target = torch.tensor(stats.ids)
        assert stats.logprob == pytest.approx(logp[range(len(target)), target].tolist(), rel=1e-4)
        for entropy, t in ((stats.entropy, 1), *zip(stats.entropy_at, (0.5, 2.0))):
            scaled = (logits / t).log_softmax(-1)
            assert entropy == pytest.approx((-(scaled.exp() * scaled).sum(-1)).tolist(), rel=1e-4)
        assert stats.logit_mean == pytest.approx(logits.mean(-1).tolist(), abs=1e-5)
        assert stats.logit_var == pytest.approx(logits.var(-1, correction=0).tolist(), rel=1e-4)
        assert stats.logit_skew == pytest.approx([skewness(z) for z in logits.numpy()], rel=1e-3)


def test_a_stopped_read_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    rows = [{"prompt": x, "response": "1 2 3"[: i % 5 + 1]} for i, x in enumerate("abcabcabc")]
    texts, path = given(tmp_path, rows), tmp_path / "tokens.jsonl"
    monkeypatch.setattr(tokens_module, "BATCH_TOKENS", 14)
    model = make_model()
    whole = list(read(model, texts, path))
    written = path.read_text().splitlines(keepends=True)
    read_batch, batches = tokens_module._read_batch, []
    monkeypatch.setattr(
        tokens_module, "_read_batch", lambda *a: batches.append(len(a[2])) or read_batch(*a)
    )
    assert list(read(model, texts, path)) == whole and not batches
    path.write_text("".join(written[:5]) + '{"key": "line 5", "ids": [')
    assert sorted(s.key for s in read(model, texts, path)) == [s.key for s in whole]
    assert sum(batches) == 5 and max(batches) <= 14 // 2
    another = read(model, texts, path, temperatures=(0.5,))
    assert all(s.entropy_at for s in another) and len(list(another)) == 9


def test_numbers_of_other_weights_or_texts_are_not_kept(tmp_path):
    texts, path = given(tmp_path, [{"prompt": "a", "response": "1"}]), tmp_path / "tokens.jsonl"
    (first,) = read(make_model(0), texts, path)
    (other,) = read(make_model(1), texts, path)
    assert other.ids == first.ids and other.entropy != first.entropy
    (prompted,) = read(make_model(1), given(tmp_path, [{"prompt": "b", "response": "1"}]), path)
    assert prompted.ids == other.ids and prompted.entropy != other.entropy


def test_what_cannot_be_read_is_counted(tmp_path):
    rows = [
        "broken",
        {"prompt": "a"},
        {"text": 3},
        {"prompt": "a", "response": ""},
        {"text": "1"},
        {"prompt": "a" * 70, "response": "1"},
        {"prompt": "a", "response": "1"},
        "[]",
        '{"text": "1 \\ud835"}',
        '{"prompt": "\\ud835", "response": "1"}',
    ]
    texts = given(tmp_path, rows, longest=64)
    assert [t.key for t in texts] == ["line 7"]
    counted = {
        "not valid JSON (Expecting value)": 1,
        "no text in 'response' or 'text'": 2,
        "no tokens in the answer": 1,
        "one token and no prompt": 1,
        "too long for the model": 1,
        "not a JSON object but list": 1,
        "half of a surrogate pair": 2,
    }
    assert dict(texts.left_out) == counted
    with pytest.raises(ValueError, match="no text can be read"):
        read(make_model(), given(tmp_path, ["broken"]), tmp_path / "tokens.jsonl")
    with pytest.raises(FileNotFoundError, match="no evaluation and no file of texts"):
        Texts(tmp_path / "nothing", make_tokenizer())
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        given(tmp_path, rows, limit=0)
    with pytest.raises(ValueError, match="temperatures must be positive"):
        read(make_model(), texts, tmp_path / "tokens.jsonl", temperatures=(0,))


def test_answers_of_an_evaluation_are_read_as_the_tokens_they_were(tmp_path):
    model = save_bigrams(tmp_path / "model", sure(0.7))
    path = write_rows(tmp_path / "problems.jsonl", letters(4))
    config = EvalConfig(model, path, tmp_path / "eval", samples=3)
    run_eval(config, progress=False)
    tokenizer = make_tokenizer(template=None)
    assert len(list(Texts(tmp_path / "eval", tokenizer))) == 12 * 4
    texts = Texts(tmp_path / "eval", tokenizer, drawn_at=1)
    assert len(list(texts)) == 12 * 3
    file = read(make_bigram_model(sure(0.7)), texts, tmp_path / "tokens.jsonl")
    for stats in file:
        share = 0.7 if stats.ids[0] != WORDS.index("9") else 0.3
        assert stats.ids[1] == WORDS.index("<eos>")
        assert stats.logprob[0] == pytest.approx(math.log(share), rel=1e-4)
        assert stats.entropy[0] == pytest.approx(entropy_of(np.exp(row_of(0.7))), rel=1e-4)
    other = make_tokenizer()
    other.decode = lambda *_, **__: "something else"
    with pytest.raises(ValueError, match="of a model with other tokens"):
        list(Texts(tmp_path / "eval", other))


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([[0, 0, 3], [1, 1, 1]], (1, 1, 1)),
        ([[0, 2], [4, 6]], (3, 5, 0)),
        ([[0, 0], [0, 6]], (1.5, 6.75, 2 / math.sqrt(3))),
        ([[2, 2], [2, 2]], (2, 0, 0)),
    ],
)
def test_pooled_moments_are_those_of_all_values_at_once(groups, expected):
    z = np.asarray(groups, dtype=float)
    mean, variance = z.mean(1), z.var(1)
    third = ((z - mean[:, None]) ** 3).mean(1)
    skew = np.divide(third, variance**1.5, out=np.zeros_like(third), where=variance > 0)
    assert pooled_moments(mean, variance, skew) == pytest.approx(expected)


def test_pooled_moments_at_random():
    z = np.random.default_rng(0).gamma(2, size=(50, 30)) + np.arange(50)[:, None] / 10
    skews = np.array([skewness(row) for row in z])
    found = pooled_moments(z.mean(1), z.var(1), skews)
    assert found == pytest.approx((z.mean(), z.var(), skewness(z.ravel())), rel=1e-9)


def test_logits_shift_of_known_models(tmp_path):
    texts = given(tmp_path, [{"prompt": x, "response": y} for x, y in ("a1", "b9", "c3")])
    files = [
        read(make_bigram_model(sure(share)), texts, tmp_path / f"{share}.jsonl")
        for share in (0.6, 0.99)
    ]
    result = logits_shift(*files)
    for found, share in zip(result["models"], (0.6, 0.99)):
        z = row_of(share)
        expected = {"mean": z.mean(), "variance": z.var(), "skewness": skewness(z)}
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3)
            # Three rows of the same values: pooling changes nothing.
            assert found["pooled"][name] == pytest.approx(value, rel=1e-3)
        assert found["compat"] == found["pooled"]["skewness"]
        assert (found["tokens"], found["not_finite"]) == (3, 0)
    means = [found["mean"] for found in result["models"]]
    assert result["change"]["mean"] == means[1] - means[0]
    assert [sum(h) for h in result["histogram"]["tokens"]] == [3, 3]
    assert logits_shift(files[0])["change"] is None
    other = given(tmp_path, [{"prompt": "a", "response": "2"}])
    with pytest.raises(ValueError, match="must be of the same tokens: 3 and 1 texts, 0 of them"):
        logits_shift(files[0], read(make_bigram_model(sure(0.6)), other, tmp_path / "x.jsonl"))


def test_forks_by_hand(tmp_path):
    one, two, nine = (WORDS.index(w) for w in "129")
    file = by_hand(
        tmp_path / "tokens.jsonl",
        [
            {"ids": [one, two, one], "entropy": [0.0, 3.0, 1.0]},
            {"ids": [two, nine, nine], "entropy": [4.0, 2.0, math.nan]},
        ],
    )
    # Entropies 0 1 2 3 4: their 0.6 quantile is 2.4, so 3 and 4 are forks.
    result = forks(file, make_tokenizer(), ratio=0.4)
    assert result["tau"] == pytest.approx(2.4) and result["mean"] == 2
    assert (result["tokens"], result["not_finite"]) == (5, 1)
    assert result["share_of_entropy"] == pytest.approx(7 / 10)
    (only,) = result["types"]
    assert only == {"token": "2", "id": two, "count": 2, "forks": 2, "mean_entropy": 3.5}
    everything = forks(file, make_tokenizer(), ratio=1)["types"]
    assert [(t["token"], t["count"], t["forks"]) for t in everything] == [
        ("1", 2, 2),
        ("2", 2, 2),
        ("9", 1, 1),
    ]
    assert result["texts"][0]["pieces"] == ["1", "2", "1"]
    for ratio in (0, 1.5):
        with pytest.raises(ValueError, match="ratio must be in"):
            forks(file, make_tokenizer(), ratio=ratio)
    nothing = by_hand(tmp_path / "no.jsonl", [{"ids": [one], "entropy": [math.nan]}])
    with pytest.raises(ValueError, match="no token with a finite entropy"):
        forks(nothing, make_tokenizer())


def test_entropy_against_temperature_of_a_known_model(tmp_path):
    texts = given(tmp_path, [{"prompt": x, "response": y} for x, y in ("a1", "b2", "c9")])
    model, temperatures = make_bigram_model(sure(0.8)), (2.0, 0.5, 1.0)
    file = read(model, texts, tmp_path / "tokens.jsonl", temperatures=temperatures)
    rows = entropy_at_temperatures(file)["temperatures"]
    assert [row["temperature"] for row in rows] == [0.5, 1, 2]
    for row in rows:
        expected = entropy_of(np.exp(row_of(0.8, row["temperature"])))
        assert row["entropy"] == pytest.approx(expected, rel=1e-4)
        assert (row["tokens"], row["texts"]) == (3, 3)
    # At T = 1/2: odds of 16 to 1.
    assert rows[0]["entropy"] == pytest.approx(math.log(17) - 16 / 17 * math.log(16), rel=1e-4)


def test_means_over_tokens_and_over_texts_differ(tmp_path):
    texts = [{"entropy_at": [[1.0, 1.0, 1.0]]}, {"entropy_at": [[3.0, math.nan]]}]
    (row,) = entropy_at_temperatures(by_hand(tmp_path / "t.jsonl", texts, [2]))["temperatures"]
    assert (row["entropy"], row["tokens"], row["over_texts"]["mean"]) == (1.5, 4, 2)
    with pytest.raises(ValueError, match="at no temperature but 1"):
        entropy_at_temperatures(by_hand(tmp_path / "t.jsonl", texts))


def test_entropy_law():
    points = [(str(h), h, -0.5 * math.exp(h) + 1.25) for h in (0.0, 0.1, 0.4)]
    fit = entropy_law(points)["fit"]
    assert (fit["a"], fit["b"], fit["ceiling"]) == pytest.approx((0.5, 1.25, 0.75))
    assert fit["r2"] == pytest.approx(1)
    alone = entropy_law(points[:1])
    assert alone["fit"] is None and "two of them different" in alone["reason"]


def test_entropy_law_over_the_updates_of_a_run(tmp_path, capsys):
    rows = [
        {"update": u, "mean_entropy": h, "reward_mean": 0.9 - 0.2 * math.exp(h)}
        for u, h in enumerate((1.0, 0.7, 0.2), start=1)
    ]
    write_rows(tmp_path / "metrics.jsonl", [*rows, {"update": 4, "mean_entropy": 0.1}, "broken"])
    assert cli.main(["analyze", "law", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "a = 0.2, b = 0.9, ceiling b - a = 0.7, R2 = 1.000, 3 points" in printed
    assert "1 (no 'mean_entropy' or no 'reward_mean')" in printed
    assert "1 (line 5: not valid JSON (Expecting value))" in printed
    # Accuracy goes before reward where there is both.
    write_rows(tmp_path / "metrics.jsonl", [{**row, "accuracy": 0.5} for row in rows])
    assert [r for *_, r in points_of(tmp_path).points] == [0.5] * 3


def test_analyze_writes_everything(tmp_path, capsys):
    before = save_bigrams(tmp_path / "before", sure(0.6))
    after = save_bigrams(tmp_path / "after", sure(0.95))
    path = write_rows(tmp_path / "problems.jsonl", letters(6))
    folder = tmp_path / "eval"
    run_eval(EvalConfig(before, path, folder, samples=2), progress=False)
    command = ["analyze", "tokens", str(folder), "--after", after, "--quiet"]
    assert cli.main([*command, "--temperatures", "0.5", "1"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for name in ("forks", "temperature", "shift", "drift"):
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["kind"] == name and result["left_out"] == {}
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Tokens that are forks most often" in printed and "T = 0.5" in printed
    assert f"before: {before}; after: {after}" in printed
    html = (folder / "report.html").read_text()
    headings = ("Accuracy", "Logits shift", "Forks", "Entropy against temperature")
    for heading in (*headings, "Drift from the model before"):
        assert f"<h2>{heading}</h2>" in html
    again = tmp_path / "law"
    assert cli.main(["analyze", "law", str(folder), "--output", str(again)]) == 0
    assert "No fit: a fit needs" in capsys.readouterr().out
    ((label, entropy, accuracy),) = points_of(folder).points
    assert label == "eval, T = 1" and accuracy < 1
    assert entropy == pytest.approx(entropy_of(np.exp(row_of(0.6))) / 2, rel=1e-3)
    texts = write_rows(tmp_path / "texts.jsonl", [{"prompt": "a", "response": "1"}])
    assert cli.main(["analyze", "tokens", texts]) == 2
    assert "--output must be given where the texts" in capsys.readouterr().err
