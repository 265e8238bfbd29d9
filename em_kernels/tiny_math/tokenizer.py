"""Tokenizer of the embedded model: whole words, single digits, a chat template for user turns.

It is an ordinary byte-level Qwen2 tokenizer, because transformers loads that class for every Qwen2
model. Its merges are made so that each word of the problems is one token; digits always are. Other
text falls back to bytes, which the model has never seen.
"""

from __future__ import annotations

from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

from em_kernels.tiny_math.problems import GAINS, LOSSES, NAMES, OBJECTS

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
USER, ASSISTANT = "<|user|>", "<|assistant|>"
SPECIAL = (PAD, BOS, EOS, USER, ASSISTANT)

# How the byte-level alphabet writes a space.
_SPACE = "Ġ"
_PHRASES = "has bags of more doubles the number How many does have"
WORDS = (
    *(_SPACE + word for word in (*NAMES, *OBJECTS, *GAINS, *LOSSES, *_PHRASES.split())),
    *("so", *NAMES),
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are known') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _merges() -> list[tuple[str, str]]:
    """Merges that grow every word from its first letter, one letter at a time.

    Words with their space come first: no other merge can then take letters away from them.
    """
    merges = {("#", "#"): None, ("##", "##"): None}
    for word in WORDS:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    return list(merges)


def build_tokenizer() -> Qwen2Tokenizer:
    """Tokenizer whose `decode(encode(text))` gives back every problem and solution exactly."""
    merges = _merges()
    tokens = (*SPECIAL, *sorted(ByteLevel.alphabet()), *(left + right for left, right in merges))
    settings: dict[str, Any] = dict(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=None,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer = Qwen2Tokenizer(**settings)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
