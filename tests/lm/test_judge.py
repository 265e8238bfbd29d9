"""The judge: where the final answer stands, what is no answer, and limits that hold anywhere."""

import importlib.util
import json
import os
import subprocess
import sys
import threading

import pytest
import torch

from em_kernels.evaluator.records import RECORDS, SETTINGS
from em_kernels.evaluator.select import rank_prompts
from em_kernels.evaluator.summary import summarise
from em_kernels.lm.judge import judges as judging
from em_kernels.lm.judge import process
from em_kernels.lm.judge.judges import final_answer, make_judge, marked_answer
from em_kernels.lm.problems import load_problems
from em_kernels.objectives import (
    answer_clusters,
    empo_reward,
    format_reward,
    majority_reward,
    semantic_entropy,
    verified_reward,
)

LONG = "3" * 5000
SLOW = r"\sum_{n=1}^{10^{8}} \frac{1}{n^2}"
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")


def boxed(text):
    return f"\\boxed{{{text}}}"


# --- places ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is 3/4.", "3/4"),
        ("We need 1 1/2 cups", "1 1/2"),
        ("so \u22125 is left", "\u22125"),
        ("It is $2^{10}$.", "2^{10}"),
        ("It is 2^10 in all", "2^10"),
        ("So $x = 2\\pi$.", "2\\pi"),
        ("so x = 5", "5"),
        ("3 + 4 = 7.", "7"),
        ("the line 2x + 3y = 6", "2x + 3y = 6"),
        ("mixed 3:4", "3:4"),
        ("at 3:45 pm", "3:45"),
        ("on 2024-05-03.", "2024-05-03"),
        ("He made 50% more", "50%"),
        ("the angle is 90°.", "90°"),
        ("about 6.02 × 10²³ of them", "6.02 × 10²³"),
        ("2√3 is it", "2√3"),
        ("so x² + 1", "x² + 1"),
        ("1 ½ cups", "1 ½"),
        ("a surface of 30 cm^2.", "30"),
        ("it falls at 9.8 m/s^2", "9.8"),
        ("<b>5</b>", "5"),
        ("No.5", "5"),
        ("$\\therefore x = 5$", "5"),
        ("\\frac{3}{4}", "\\frac{3}{4}"),
        ("0.\\overline{3}", "0.\\overline{3}"),
        ("She paid $5 and got $3 back.", "3"),
        ("It costs $12.50, $6 less", "6"),
        ("roots are $2$ and $3$.", "2, 3"),
        ("the point (2, 3).", "(2, 3)"),
        ("the interval [1, 2)", "[1, 2)"),
        ("100km in 2h", "2"),
        ("It is **14**.", "14"),
        ("5 (see steps 2)", "2"),
        ("a range -5 to -3", "-3"),
        ("where $n$ is prime, 7, for $n$", "7"),
        ("the area is $\\pi$", "\\pi"),
        ("it is $a+b$", "a+b"),
        ("<think>\\boxed{4}</think> The answer is 5.", "5"),
        ("<think>\\boxed{4}</think> Done.", "4"),
        ("\\boxed 5.", "5"),
        ("\\boxed\\frac{1}{2}", "\\frac{1}{2}"),
        ("\\fbox{5}", "5"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\frac{3}{4}", "\\frac{3}{4}"),
        ("with 7 or \\boxed{\\frac{3}{4", "7"),
        ("\\boxed{6} \\boxed{}", "6"),
        ("\\boxed{\\{\\}}", "\\{\\}"),
        ("#### **14**", "**14**"),
        ("#### Final Answer\n14", "14"),
        ("#### Final Answer: 3/4", "3/4"),
        ("#### Answer\nIt is 3/4 in all.", "3/4"),
        ("#### 72\n\n#### Explanation\nfor 3 of them", "72"),
        ("#### Step 1: add\n3\n\n#### Step 2: dou", "3"),
        ("#### 1. Add\nso 3", "3"),
        ("##### 5\nso 6", "6"),
        ("####\n14", "14"),
        ("= 7 #### 7", "7"),
        ("#### Paris", "Paris"),
    ],
)
def test_the_final_answer_is_whole(text, answer):
    assert final_answer(text) == answer


NOTHING = [
    "",
    " ",
    "\\text{}",
    "\\text{ }",
    "?",
    "...",
    "\\ldots",
    "\\,",
    "$$",
    "{}",
    "\\square",
    "\n",
]


@pytest.mark.parametrize("content", NOTHING)
def test_an_empty_box_is_no_answer(content):
    text = boxed(content)
    assert final_answer(text) is marked_answer(text) is None
    assert final_answer("So 7. " + text) == "7" and final_answer(boxed(8) + text) == "8"
    assert format_reward([text]).tolist() == [0]
    for judge in map(make_judge, ("exact", "auto")):
        assert not judge(text, text) and not judge(text, content) and not judge(text, "5")
    texts = [text, text, text, boxed(5), boxed(5)]
    prompt = torch.zeros(5, dtype=torch.long)
    cluster = answer_clusters(texts, prompt)
    assert cluster.tolist() == [-1, -1, -1, 0, 0]
    assert majority_reward(cluster, prompt).tolist() == [0, 0, 0, 1, 1]
    assert empo_reward(cluster, prompt).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.4])


def test_headings_are_no_marked_answers():
    text = "#### Step 1: add\n3 + 4 = 7\n\n#### Step 2: double\n7 * 2 = {0}\n\nThe answer is {0}."
    texts = [text.format(n) for n in (14, 15)]
    assert format_reward([*texts, "#### 14", "#### **14**"]).tolist() == [0, 0, 1, 1]
    assert answer_clusters(texts, [0, 0]).tolist() == [0, 1]
    assert verified_reward(texts, ["14", "14"]).tolist() == [1, 0]


# --- forms -------------------------------------------------------------------------------------


def test_spaces_between_numbers_are_not_removed():
    texts = [
        boxed(text) for text in ("1 1/2", "11/2", "3/2", "2 3", "23", "1\\ 1/2", "-1 1", "-11")
    ]
    assert answer_clusters(texts, [0] * 8).tolist() == [0, 1, 0, 2, 3, 0, 4, 5]


def test_numbers_of_a_problems_file_have_no_exponents(tmp_path):
    numbers = {1e-05: "0.00001", 1e22: "1" + "0" * 22, 2.5e-7: "0.00000025", 2.0: "2.0", -7: "-7"}
    path = tmp_path / "problems.jsonl"
    lines = [{"problem": "?", "answer": n} for n in [*numbers, [1e-05, 2], float("nan")]]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = load_problems(str(path))
    assert [p.answer for p in found.problems] == [*numbers.values(), "0.00001, 2"]
    assert [s.row for s in found.skipped] == [7]
    for number, text in numbers.items():
        assert make_judge("exact")(boxed(repr(number)), text)


@pytest.mark.parametrize("name", ["exact", "auto"])
def test_any_text_is_judged(name):
    judge = make_judge(name)
    long = [LONG, "1/" + LONG, LONG + ".5", "-" + LONG, "1e" + LONG, "0." + LONG, "\u221a" * 3000]
    odd = ["}", "{", "\\", "\x00", "\ud800", "1/0", "\\frac{1}{0}", "1e999999999", "(" * 9999, None]
    for text in [*long, *odd]:
        assert not judge(text, "5") and not judge(boxed(text), "5") and not judge("5", str(text))
        final_answer(boxed(text) + str(text))
    for text in long[:5]:
        assert judge(f"So it is {text}", text) and judge(boxed(text), text)
    assert verified_reward([boxed(5), "It is " + LONG], ["5", "5"]).tolist() == [1, 0]
    assert answer_clusters(["It is " + LONG, "It is 5"], [0, 0]).tolist() == [0, 1]


# --- one judge ---------------------------------------------------------------------------------


@needs_math_verify
def test_clusters_votes_and_selection_share_the_judge(tmp_path):
    texts = [boxed(text) for text in ("x+1", "1+x", "2", "4/2")]
    prompt = torch.zeros(4, dtype=torch.long)
    cluster = answer_clusters(texts, prompt)
    assert cluster.tolist() == [0, 0, 1, 1]
    entropy = semantic_entropy(cluster, prompt)[0].item()
    assert entropy == pytest.approx(0.6931, abs=1e-4)
    write_evaluation(tmp_path, texts, "math-verify")
    assert rank_prompts(tmp_path)[0]["semantic_entropy"] == pytest.approx(entropy, abs=1e-6)
    assert summarise(tmp_path)["temperatures"][0]["majority"]["mean"] == 0.0
    write_evaluation(tmp_path, texts, "exact")
    assert summarise(tmp_path)["temperatures"][0]["majority"]["mean"] == 1.0
    assert rank_prompts(tmp_path)[0]["semantic_entropy"] == pytest.approx(1.0397, abs=1e-4)
    assert answer_clusters(texts, prompt, judge=make_judge("exact")).tolist() == [0, 1, 2, 2]


def write_evaluation(folder, texts, judge):
    config = {"model": "m", "problems": "p", "judge": judge, "labelled": True}
    config |= {"samples": 4, "temperatures": [1.0], "template": "{problem}", "seed": 0}
    config |= {"top_p": 1.0, "max_new_tokens": 64}
    problems = [{"problem": "?", "answer": "2"}]
    settings = {"config": config, "problems": problems, "skipped": [], "too_long": []}
    settings["weights"] = "any"
    (folder / SETTINGS).write_text(json.dumps(settings))
    answers = [
        {"text": t, "tokens": 1, "finished": True, "correct": i > 1} for i, t in enumerate(texts)
    ]
    records = [dict(problem=0, temperature=1.0, sample=i, answer=a) for i, a in enumerate(answers)]
    (folder / RECORDS).write_text("".join(json.dumps(record) + "\n" for record in records))


def test_clusters_take_a_judge_or_same():
    first_letters = answer_clusters(["1 a", "1 b", "2"], [0] * 3, judge=lambda r, a: "1" in r)
    assert first_letters.tolist() == [0, 0, 1]
    with pytest.raises(ValueError, match="same and judge"):
        answer_clusters(["1"], [0], same=str.__eq__, judge=make_judge("exact"))


# --- limits ------------------------------------------------------------------------------------


@pytest.fixture
def fresh_process(monkeypatch, patient_judge):
    """math-verify's process, started here and ended with the test."""
    pool = process._Pool()
    monkeypatch.setattr(process, "_pool", pool)
    judging._by_math_verify.cache_clear()
    yield pool
    pool.end()


@pytest.fixture
def short_limit(fresh_process, monkeypatch):
    """Of a judge, for what takes too long."""
    monkeypatch.setattr(judging, "TIME_LIMIT_SECONDS", 1)


def works(i: int) -> bool:
    return process.equal(f"x + {i}", f"{i} + x", 600)


@needs_math_verify
def test_threads_have_the_limit_each(fresh_process, short_limit):
    judge, verdicts = make_judge("math-verify"), {}

    def ask(i):
        slow = judge(boxed(f"{SLOW} + {i}"), "5")
        verdicts[i] = slow, works(i)

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(1200)
    assert verdicts == {i: (False, True) for i in range(1, 7)}
    assert fresh_process.server is not None


@needs_math_verify
def test_the_process_survives_what_ends_an_answer(fresh_process, short_limit):
    judge = make_judge("math-verify")
    assert works(1)
    server = fresh_process.server
    assert not judge(boxed(SLOW), "5") and not judge(boxed("10^{10^{10}}"), "5")
    assert not fresh_process.lines  # neither was answered
    assert works(2) and fresh_process.server is server
    server.process.kill()
    server.process.wait()
    assert works(3)
    fresh_process.idle.clear()
    assert works(4) and fresh_process.server is not server


@needs_math_verify
@needs_fork
def test_a_fork_has_its_own_process(fresh_process):
    judge = make_judge("math-verify")
    assert judge(boxed("1+x"), "x+1")
    pid = os.fork()
    if pid == 0:
        empty = fresh_process.server is None and not fresh_process.lines
        right = judge(boxed("2+x"), "x+2") and not judge(boxed("3+x"), "x+2")
        fresh_process.end()
        os._exit(0 if right and empty else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert judge(boxed("4+x"), "x+4")


@needs_math_verify
def test_nothing_is_left_of_a_script_from_standard_input():
    script = (
        "from em_kernels.evaluator import make_judge\n"
        "from em_kernels.lm.judge import judges, process\n"
        "judges.TIME_LIMIT_SECONDS = 600\n"
        "assert make_judge('math-verify')('\\\\boxed{x+1}', '1+x')\n"
        "print(process._pool.server.process.pid)\n"
    )
    run = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=True
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(run.stdout), 0)


def test_a_process_that_does_not_start_is_an_error(fresh_process, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match=r"cannot be started .*math_verify.*judge 'exact'"):
        process.equal("1+x", "x+1", 1)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError, match="cannot be started"):
        process.equal("1+x", "x+1", 1)
    assert not fresh_process.lines and fresh_process.server is None
