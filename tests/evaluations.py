"""Models whose answers are known, and evaluations of them, for the tests of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_qwen2 import make_bigram_model, make_tokenizer

from em_kernels.analysis.texts import Texts
from em_kernels.analysis.tokens import TokenFile, read_tokens

NO_MARK = "{% for message in messages %}{{ message.content }}{% endfor %}"


def save_bigrams(folder, follow: dict) -> str:
    """A model folder; `follow[letter]` is what the answer to that letter is drawn from."""
    make_bigram_model(follow).save_pretrained(folder)
    make_tokenizer(template=NO_MARK).save_pretrained(folder)
    return str(folder)


def sure(share: float) -> dict:
    """a is answered with 1, b with 2 and c with 3, each with probability `share`, else with 9."""
    wrong = {"9": 1 - share} if share < 1 else {}
    return {letter: {right: share, **wrong} for letter, right in ("a1", "b2", "c3")}


def write_rows(path: Path, rows: list) -> str:
    """JSON lines of the rows; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def letters(times: int) -> list[dict]:
    """Problems a, b and c, `times` each, all different."""
    return [
        {"problem": f"{i} {x}", "answer": y} for i in range(times) for x, y in ("a1", "b2", "c3")
    ]


def given(tmp_path, rows, **options) -> Texts:
    tokenizer = make_tokenizer(template=NO_MARK)
    return Texts(write_rows(tmp_path / "texts.jsonl", rows), tokenizer, **options)


def read(model, texts, path, **options) -> TokenFile:
    return read_tokens(model, texts, path, name="model", progress=False, **options)


def by_hand(path, texts, temperatures=(), **others):
    """A file as `read_tokens` writes it, of numbers given by hand; `others` are of its head."""
    names = ("key", "ids", "logprob", "entropy", "logit_mean", "logit_var", "logit_skew")
    head = {
        "model": "by hand",
        "source": "x",
        "limit": None,
        "temperatures": list(temperatures),
        **others,
    }
    rows = [
        {**{name: [] for name in names}, "entropy_at": [], "digest": "", "key": str(i), **t}
        for i, t in enumerate(texts)
    ]
    write_rows(path, [{**head, **others}, *rows])
    return TokenFile(path)
