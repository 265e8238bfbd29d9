"""How prompts are put: system turns, what templates read besides, and what they complain of."""

import json
import sys

import pytest
from tiny_qwen2 import TEMPLATE, WORDS, make_tokenizer

from em_kernels.evaluator import EvalConfig
from em_kernels.lm.chat import Chat, Turn, encode_prompt, template_names
from em_kernels.lm.problems import read_prompts
from em_kernels.trainer import RLConfig, TrainConfig

BOTH = (
    "{% for m in messages %}<{{ 'user' if m.role == 'user' else 'assistant' }}>{{ m.content }}"
    "{% endfor %}"
)
NEEDS_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('Begin with a system turn') }}"
    "{% endif %}" + BOTH
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + BOTH
)
THINKS = (
    "{% set thinking = thinking | default(true) %}" + BOTH + "{% if enable_thinking is false %}0"
    "{% endif %}{% if thinking %}1{% endif %}{% generation %}{% endgeneration %}"
)


def words(template: str | None, prompt="a", **chat) -> str:
    tokenizer = make_tokenizer(template=template)
    return "".join(WORDS[i] for i in encode_prompt(tokenizer, prompt, Chat(**chat)))


def test_a_system_turn_comes_before_the_prompt():
    assert words(BOTH) == "<user>a"
    assert words(BOTH, system="b") == words(NEEDS_SYSTEM, system="b") == "<assistant>b<user>a"


def test_a_chat_may_bring_its_own_system_turn():
    own = (Turn("system", "c"), Turn("user", "a"))
    assert words(BOTH, own, system="b") == words(BOTH, own) == "<assistant>c<user>a"
    several = (Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3"))
    assert words(BOTH, several, system="b") == "<assistant>b<user>1<assistant>2<user>3"


def test_what_a_template_complains_of_is_one_line_with_the_setting():
    with pytest.raises(ValueError, match=r"refuses a chat of user: Begin with .* by `system`"):
        words(NEEDS_SYSTEM)
    with pytest.raises(
        ValueError, match=r"of system, user: System role not .* in `template` instead"
    ):
        words(NO_SYSTEM, system="b")
    with pytest.raises(ValueError, match="refuses a chat of user: 'dict object' has no"):
        words("{{ messages[0].nothing.at_all }}")
    with pytest.raises(ValueError, match="chat template refuses a chat of user: unexpected"):
        words("{{ broken")


def test_thinking_is_switched():
    assert words(THINKS) == "<user>a1"
    assert words(THINKS, template_kwargs={"enable_thinking": False}) == "<user>a01"
    assert words(THINKS, template_kwargs={"thinking": False}) == "<user>a"
    assert template_names(THINKS) == {"enable_thinking", "thinking"}


def test_what_the_template_does_not_read_is_refused():
    wrong = {"enable_thinkin": False}
    with pytest.raises(
        ValueError, match=r"'enable_thinkin' is not read .* reads 'enable_thinking', 'thin"
    ):
        words(THINKS, template_kwargs=wrong)
    with pytest.raises(ValueError, match="did you mean enable_thinking"):
        words(THINKS, template_kwargs=wrong)
    for name in ("messages", "tokenize", "add_generation_prompt", "tools", "eos_token"):
        with pytest.raises(
            ValueError, match=f"'{name}' is not read by .*, which reads nothing besides"
        ):
            words(TEMPLATE + "{{ eos_token }}", template_kwargs={name: "x"})


def test_without_a_template_there_is_only_the_prompt():
    for chat, message in (
        (dict(system="b"), "system must be left out with a tokenizer without a chat template"),
        (dict(template_kwargs={"a": 1}), "chat_template_kwargs are for a tokenizer with a chat"),
    ):
        with pytest.raises(ValueError, match=message):
            words(None, **chat)
    with pytest.raises(ValueError, match="without a chat template, got 2 turns"):
        words(None, (Turn("system", "b"), Turn("user", "a")))


def test_no_beginning_of_the_text_is_doubled():
    from tokenizers.processors import TemplateProcessing

    def adding(template):
        tokenizer = make_tokenizer(template=template)
        add = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 0)])
        tokenizer.backend_tokenizer.post_processor = add
        return [WORDS[i] for i in encode_prompt(tokenizer, "a")]

    assert adding(None) == ["<pad>", "a"]
    assert adding("<pad>" + BOTH) == ["<pad>", "<user>", "a"]


def test_jinja_that_is_missing_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"jinja2 cannot be .*pip install em-kernels\[train\]"):
        words(BOTH)


@pytest.mark.parametrize("make", [TrainConfig, lambda **k: EvalConfig("m", "p.jsonl", "o", **k)])
def test_the_settings_of_a_chat(make):
    flags = make(chat_template_kwargs=("enable_thinking=false", "a=True", "b=x", 'c="1"', "d=1"))
    plain = {"enable_thinking": False, "a": True, "b": "x", "c": "1", "d": 1}
    assert flags.chat_template_kwargs == plain == flags.chat.template_kwargs
    assert make(chat_template_kwargs=plain) == flags
    assert make(chat_template_kwargs='{"a": {"b": null}}').chat.template_kwargs == {
        "a": {"b": None}
    }
    with pytest.raises(ValueError, match="must be KEY=VALUE or a JSON object, got 'thinking'"):
        make(chat_template_kwargs=("thinking",))
    with pytest.raises(TypeError, match="chat_template_kwargs must have values of JSON"):
        make(chat_template_kwargs={"a": object()})
    with pytest.raises(ValueError, match="system must not be empty"):
        make(system=" ")
    with pytest.raises(TypeError, match="system must be text, got 3"):
        make(system=3)


CHATS = """\
{"messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "1"}]}
{"prompt": [{"role": "user", "content": "2"}]}
{"prompt": "3"}
"""


def test_a_file_of_prompts_may_hold_chats(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(CHATS)
    prompts = read_prompts(path)
    assert prompts == ((("system", "b"), ("user", "1")), (("user", "2"),), "3")
    config = TrainConfig(prompts=prompts)
    written = json.loads(json.dumps(config.to_dict()))
    assert TrainConfig.from_dict(written) == config
    assert RLConfig(objective="opd", teacher="t", prompts=prompts).prompt_texts == prompts
    with pytest.raises(ValueError, match="'prompts' must be turns"):
        TrainConfig(prompts=[["a", "b"]])
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match="line 1: 'messages' must be turns"):
        read_prompts(path)
