"""The embedded model and its problems, from the generator to "capable but diffuse"."""

import json
import random
import re
import subprocess
import sys
from itertools import islice
from operator import add, mul, sub

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels import tiny_math
from em_kernels.evaluator import evaluate
from em_kernels.tiny_math import problems as gen
from em_kernels.tiny_math.pretrain import (
    HABITS,
    IGNORED,
    RECIPES,
    Recipe,
    arithmetic_batches,
    habit_of,
    mixture_batches,
)
from em_kernels.tiny_math.tokenizer import build_tokenizer

EQUATION = re.compile(r"(?:so )?(\d+)([-+*])(\d+)=(\d+)")

RESULT = {"+": add, "-": sub, "*": mul}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_math.model_path())


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    return AutoModelForCausalLM.from_pretrained(tiny_math.model_path()).eval()


def read_problem(text: str) -> int:
    """Answer of a problem, worked out from its sentences alone."""
    opening, *changes, _ = text.split(". ")
    value = 1
    for factor in re.findall(r"\d+", opening):
        value *= int(factor)
    for sentence in changes:
        amount = int(re.search(r"\d+", sentence)[0]) if "doubles" not in sentence else value
        value += -amount if any(verb in sentence for verb in gen.LOSSES) else amount
    return value


def test_same_seed_same_text_also_in_another_process():
    code = (
        "from em_kernels.tiny_math.problems import make_problems;"
        "print('\\n'.join(p.text for p in make_problems('dev', 50, 3)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]
    assert other == [p.text for p in gen.make_problems("dev", 50, 3)]
    assert other != [p.text for p in gen.make_problems("dev", 50, 4)]


def test_splits_are_disjoint_and_decided_by_the_text():
    texts = {split: {p.text for p in gen.make_problems(split, 1500)} for split in gen.SPLITS}
    for split, found in texts.items():
        assert len(found) == 1500
        assert {gen.split_of(text) for text in found} == {split}
    assert len(set().union(*texts.values())) == 4500


def test_answers_agree_with_the_sentences_and_the_steps():
    for problem in gen.make_problems("heldout", 1000):
        assert read_problem(problem.text) == problem.answer
        assert gen.solve(problem.start, problem.steps) == problem.answer
        assert 0 <= problem.answer <= gen.MAX_VALUE


def test_careful_solutions_are_chains_of_right_equations():
    for problem in gen.make_problems("pretrain", 500):
        *lines, last = gen.write_solution(problem, "careful").split("\n")
        value = problem.start
        for line in lines:
            left, operator, right, result = EQUATION.fullmatch(line).groups()
            assert int(left) == value
            value = int(result)
            assert RESULT[operator](int(left), int(right)) == value
        assert last == f"#### {problem.answer}"


def test_slips_come_at_about_the_rate_asked_and_carry_on():
    rng = random.Random(0)
    wrong = total = 0
    for problem in gen.make_problems("pretrain", 1000):
        *lines, last = gen.write_solution(problem, "sloppy", 0.4, rng).split("\n")
        equations = [EQUATION.fullmatch(line).groups() for line in lines]
        total += len(lines)
        wrong += sum(gen.apply(op, int(a), int(b)) != int(c) for a, op, b, c in equations)
        assert [e[0] for e in equations[1:]] == [e[3] for e in equations[:-1]]
        assert last == f"#### {equations[-1][3]}"
    assert 0.33 < wrong / total < 0.41


def test_direct_writer_gives_the_answer_alone():
    problem = gen.make_problems("dev", 1)[0]
    assert gen.write_solution(problem, "direct") == f"#### {problem.answer}"


def test_restless_writer_goes_on_after_the_answer_to_a_wrong_one():
    rng = random.Random(0)
    for problem in gen.make_problems("dev", 50):
        text = gen.write_solution(problem, "restless", 0.0, rng)
        careful = gen.write_solution(problem, "careful")
        assert text.startswith(careful + "\n")
        equation, last = text.removeprefix(careful + "\n").split("\n")
        left, operator, right, result = EQUATION.fullmatch(equation).groups()
        assert (int(left), operator) == (problem.answer, "+") and int(right) >= 2
        assert int(left) + int(right) == int(result) and last == f"#### {result}"


def test_shares_go_round_the_names():
    recipe = Recipe(shares=((1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0)))
    for problem in gen.make_problems("dev", 100):
        row = gen.NAMES.index(problem.text.split()[0]) % 2
        assert recipe.shares_of(problem) == recipe.shares[row]


def test_habits_are_those_of_the_recipe():
    for problem in gen.make_problems("dev", 100):
        assert RECIPES["habits"].shares_of(problem) == HABITS[habit_of(problem.text)]
    assert habit_of(tiny_math.PROMPT) == "tidy"


def test_the_model_of_habits_is_right_where_it_is_tidy():
    tokenizer = AutoTokenizer.from_pretrained(tiny_math.model_path("habits"))
    model = AutoModelForCausalLM.from_pretrained(tiny_math.model_path("habits")).eval()
    problems = [(p.text, str(p.answer)) for p in gen.make_problems("heldout", 100)]
    result = evaluate(
        model, tokenizer, problems, samples=0, max_new_tokens=64, judge="exact", progress=False
    )
    right = {True: [], False: []}
    for record in result.records:
        right[habit_of(record.problem) == "tidy"].append(record.greedy.correct)
    assert sum(right[True]) > 0.9 * len(right[True])
    assert sum(right[False]) < 0.5 * len(right[False])


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"diffuse, habits.*'large'"):
        tiny_math.model_path("large")


def test_drills_are_right():
    rng = random.Random(0)
    for _ in range(2000):
        question, result = gen.draw_equation(rng)
        left, operator, right, _ = EQUATION.fullmatch(question + result).groups()
        assert RESULT[operator](int(left), int(right)) == int(result) <= gen.MAX_VALUE


def test_bad_arguments_are_named():
    problem = gen.make_problems("dev", 1)[0]
    with pytest.raises(ValueError, match=r"split.*'test'"):
        gen.make_problems("test", 1)
    with pytest.raises(ValueError, match=r"count.*-1"):
        gen.make_problems("dev", -1)
    with pytest.raises(ValueError, match=r"writer.*'lazy'"):
        gen.write_solution(problem, "lazy")
    with pytest.raises(ValueError, match=r"operator.*'/'"):
        gen.apply("/", 1, 2)


def test_problem_files_hold_the_split(tmp_path):
    path = gen.write_problems(tmp_path / "new" / "dev.jsonl", "dev", 20, seed=5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    expected = gen.make_problems("dev", 20, seed=5)
    assert lines == [{"problem": p.text, "answer": str(p.answer)} for p in expected]


def test_tokenizer_gives_every_text_back(tokenizer):
    rng = random.Random(0)
    for problem in gen.make_problems("heldout", 300):
        solutions = [gen.write_solution(problem, w, 0.4, rng) for w in gen.WRITERS]
        for text in (problem.text, *solutions):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text


def test_words_and_digits_are_single_tokens(tokenizer):
    tokens = tokenizer.tokenize("Anna has 12 apples. How many more?\nso 1*2=2\n#### 907")
    words = "Anna|Ġhas|Ġ|1|2|Ġapples|.|ĠHow|Ġmany|Ġmore|?|Ċ|so|Ġ|1|*|2|=|2|Ċ|####|Ġ|9|0|7"
    assert tokens == words.split("|")


def test_text_outside_the_task_survives_as_bytes(tokenizer):
    text = "The wind's velocity V (in 12.8 mph) — é?"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_is_the_one_the_code_builds(tokenizer):
    built = build_tokenizer()
    assert tokenizer.get_vocab() == built.get_vocab()
    assert tokenizer.chat_template == built.chat_template
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_chat_template_ends_the_answer_and_refuses_unknown_roles(tokenizer):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "#### 7"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|bos|><|user|>How many?<|assistant|>#### 7<|eos|>"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")
    with pytest.raises(Exception, match="only user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "How many?"}])


def test_prompts_are_known_and_the_one_of_em_is_no_heldout_problem(tokenizer):
    for prompt in (tiny_math.PROMPT, tiny_math.OUTSIDE_PROMPT):
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt
    assert gen.split_of(tiny_math.PROMPT) == "dev"
    assert read_problem(tiny_math.PROMPT) >= 0


@pytest.mark.parametrize("make", [arithmetic_batches, mixture_batches])
def test_training_labels_are_the_ids_or_ignored(tokenizer, make):
    for ids, labels in islice(make(tokenizer, Recipe(batch=(8, 8))), 4):
        counted = labels != IGNORED
        assert torch.equal(labels[counted], ids[counted])
        assert counted.any(dim=1).all() and not counted[:, 0].any()
        assert not (labels == tokenizer.pad_token_id).any()


def test_asset_is_at_most_6_mb():
    size = sum(f.stat().st_size for f in tiny_math.model_path().rglob("*") if f.is_file())
    assert size <= 6e6


def test_model_is_capable_but_diffuse(model, tokenizer):
    problems = [(p.text, str(p.answer)) for p in gen.make_problems("heldout", 200)]
    result = evaluate(
        model, tokenizer, problems, max_new_tokens=tiny_math.MAX_NEW_TOKENS, judge="exact"
    )
    assert result.greedy_accuracy > 0.85
    assert 0.2 < result.sampled_accuracy < result.greedy_accuracy - 0.2
