"""Demonstrations: read from rows of problems and of chats, and encoded as answers are drawn."""

import json

import pytest
import torch
from tiny_qwen2 import WORDS, make_model, make_tokenizer

from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.demonstrations import (
    Demonstration,
    EncodedDemonstrations,
    Turn,
    demonstration,
    load_demonstrations,
)
from em_kernels.lm.problems import Source, find_source

USER = {"role": "user", "content": "1+1?"}
ASSISTANT = {"role": "assistant", "content": "It is 2."}
SYSTEM = {"role": "system", "content": "Be brief."}
ONE = Demonstration((Turn("user", "1+1?"),), "It is 2.")


def write(folder, *rows) -> Source:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return find_source(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"problem": "1+1?", "solution": "It is 2.", "answer": "2"},
        {"question": "1+1?", "answer": "It is 2."},
        {"prompt": "1+1?", "completion": "It is 2."},
        {"problem": "1+1?", "solution": None, "response": "It is 2."},
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "completion": "It is 2."},
    ],
)
def test_a_row(row, tmp_path):
    assert load_demonstrations(write(tmp_path, row)) == (ONE,)


def test_turns_before_the_last_are_what_was_said(tmp_path):
    chat = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Sure?"}, ASSISTANT]
    (found,) = load_demonstrations(write(tmp_path, {"messages": chat}))
    assert [role for role, _ in found.turns] == ["system", "user", "assistant", "user"]
    assert found.completion == "It is 2."


def test_fields_and_template_are_those_given(tmp_path):
    source = write(tmp_path, {"task": "1+1?", "worked": "2", "solution": "no"})
    source = find_source(source.path, problem_field="task", template="Solve {problem}!")
    assert load_demonstrations(source, ("worked",)) == (demonstration("Solve 1+1?!", "2"),)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({"problem": "p", "solution": "s"}, {"problem": "p"}), "line 2: no field 'solution'"),
        (({"problem": "p", "solution": " "},), "line 1: 'solution' must be text"),
        (({"solution": "s"},), "line 1: no field 'problem'"),
        (({"messages": [USER]},), "line 1: 'messages' must end with a turn of the assistant"),
        (({"messages": [ASSISTANT]},), "after one that asks"),
        (({"messages": "hello"},), "line 1: 'messages' must be turns"),
        (({"messages": [USER, {"role": "assistant"}]},), "line 1: 'messages' must be turns"),
        (({"messages": [USER, {"role": "assistant", "content": [{"text": "2"}]}]},), "be turns"),
        (({"prompt": [USER], "completion": [USER]},), "'completion' must end with a turn of"),
        ((3,), "line 1: not a JSON object"),
        ((), "no demonstrations"),
    ],
)
def test_a_row_that_is_none_is_named(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_demonstrations(write(tmp_path, *rows))


def encoded(*demonstrations, model=None, tokenizer=None, limit=32) -> EncodedDemonstrations:
    model, tokenizer = model or make_model(), tokenizer or make_tokenizer()
    return EncodedDemonstrations(model, tokenizer, demonstrations, limit)


def test_encoded_as_the_model_would_have_drawn_them():
    tokenizer = make_tokenizer()
    found = encoded(demonstration("12", "34a"), demonstration("5", "6"))
    rollout = found.rollout([1, 0])
    end = WORDS.index("<eos>")
    answers = [ids.tolist() for ids in rollout.answers()]
    assert answers == [[WORDS.index("6"), end], [WORDS.index(c) for c in "34a"] + [end]]
    for row, prompt in zip(range(2), ("5", "12")):
        kept = rollout.attention_mask[row] & ~rollout.response_mask[row]
        assert rollout.input_ids[row][kept].tolist() == encode_prompt(tokenizer, prompt)
    assert rollout.finished.all() and rollout.prompt_width == 4


def test_cut_where_answers_are():
    found = encoded(demonstration("12", "3456789"), limit=3).rollout([0])
    assert [len(ids) for ids in found.answers()] == [3] and not found.finished.any()
    long = encoded(demonstration("1" * 60, "2345"), demonstration("1", "2345"))
    room = make_model().config.max_position_embeddings - 62
    assert [len(ids) for ids in long.rollout([0, 1]).answers()] == [room, room]


def test_without_an_end_token_nothing_is_added():
    model, tokenizer = make_model(eos_token_id=None), make_tokenizer()
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    (ids,) = (
        encoded(demonstration("1", "23"), model=model, tokenizer=tokenizer).rollout([0]).answers()
    )
    assert ids.tolist() == [WORDS.index(c) for c in "23"]


def test_the_tokenizers_end_token_is_taken_if_answers_end_with_it():
    model, tokenizer = make_model(), make_tokenizer()
    model.generation_config.eos_token_id = [3, 1]
    (ids,) = encoded(demonstration("1", "2"), model=model).rollout([0]).answers()
    assert ids[-1] == tokenizer.eos_token_id == 1
    model.generation_config.eos_token_id = [3, 2]
    (ids,) = encoded(demonstration("1", "2"), model=model).rollout([0]).answers()
    assert ids[-1] == 3


def test_a_chat_needs_a_template():
    chat = Demonstration((Turn("system", "1"), Turn("user", "2")), "3")
    assert torch.is_tensor(encoded(chat).rollout([0]).input_ids)
    with pytest.raises(ValueError, match="prompt must be one text for a tokenizer without a chat"):
        encoded(chat, tokenizer=make_tokenizer(template=None))


def test_a_prompt_that_leaves_no_position_is_refused():
    with pytest.raises(ValueError, match="prompt must be shorter than the model's 64 positions"):
        encoded(demonstration("1" * 80, "2"))
