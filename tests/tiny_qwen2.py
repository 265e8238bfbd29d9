"""A random Qwen2 of a few thousand parameters and a tokenizer of characters, made on the spot."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

WORDS = ["<pad>", "<eos>", "<user>", "<assistant>", *"0123456789abcdefghij#", "Ġ"]
TEMPLATE = (
    "{% for message in messages %}<user>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(pad: str = "<pad>", template: str | None = TEMPLATE) -> Qwen2Tokenizer:
    """Of Qwen2's own class: transformers loads no other with a Qwen2 model."""
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(WORDS)},
        merges=[],
        unk_token=None,
        bos_token=None,
        pad_token=pad,
        eos_token="<eos>",
        extra_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    settings = dict(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**{**settings, **changes}))


def save(folder, seed: int = 0) -> str:
    """A model folder as transformers writes it; returns its path."""
    make_model(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def make_bigram_model(follow: dict[str, dict[str, float]]) -> Qwen2ForCausalLM:
    """A model that draws the next word from `follow[this word]`, and goes to <eos> from others."""
    size = len(WORDS)
    model = make_model(hidden_size=64, num_attention_heads=2, tie_word_embeddings=False)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["model.norm.weight"].fill_(1)
    state["model.embed_tokens.weight"][:, :size] = torch.eye(size)
    unit = 64**0.5  # the norm makes one-hot vectors this long
    table = torch.full((size, size), 1e-9)
    for i, word in enumerate(WORDS):
        for after, probability in follow.get(word, {"<eos>": 1.0}).items():
            table[i, WORDS.index(after)] = probability
    state["lm_head.weight"][:, :size] = table.log().T / unit
    model.load_state_dict(state)
    return model
