"""Models, prompts and the files they come from; what is refused and how."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_qwen2 import WORDS, make_model, make_tokenizer, save
from trainer_runs import plain_entropy, run, settings

from em_kernels.lm.chat import encode_prompt
from em_kernels.lm.data import read_jsonl
from em_kernels.lm.heads import read_head
from em_kernels.lm.models import check_causal, hidden_states
from em_kernels.objectives.em import token_mean_weights
from em_kernels.trainer import ModelError, load_model, read_prompts, train
from em_kernels.trainer.batch import Tokens, token_loss

SMALL = dict(
    vocab_size=len(WORDS),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
OTHERS = {
    "gemma2": (transformers.Gemma2Config, dict(final_logit_softcapping=3.0)),
    "granite": (transformers.GraniteConfig, dict(logits_scaling=4.0)),
    "cohere": (transformers.CohereConfig, dict(logit_scale=0.25)),
    "phi": (transformers.PhiConfig, {}),
    "gpt2": (transformers.GPT2Config, dict(n_positions=64, n_embd=32, n_layer=2, n_head=2)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_heads_with_softcap_scale_and_bias_match_the_models_logits(name):
    kind, changes = OTHERS[name]
    torch.manual_seed(0)
    config = kind(**{**SMALL, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    head = read_head(model)
    check_causal(model, head, [5, 6, 7])
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    hidden = hidden_states(model, ids, mask)
    counted = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]])
    entropies = []
    for row, start in ((0, 2), (1, 0)):
        expected = model(input_ids=ids[row : row + 1, start:]).logits[0]
        actual = head.logits(hidden[row, start:])
        assert torch.allclose(actual, expected, atol=1e-4 * expected.abs().max().item())
        entropies.append(plain_entropy(expected, 0.5)[counted[row, start:] > 0])
    batch = Tokens(ids, mask, counted, entropy_weight=token_mean_weights(counted))
    loss = token_loss(model, head, batch, 0.5).loss
    assert loss.item() == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


def test_a_head_that_is_not_linear_is_refused():
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, args, output: output.sin())
    with pytest.raises(ModelError, match="such a head is not supported"):
        run(settings(), model)


def test_a_model_that_sees_later_tokens_is_refused():
    shape = dict(num_hidden_layers=1, num_attention_heads=2, hidden_size=32, intermediate_size=48)
    config = transformers.BertConfig(vocab_size=len(WORDS), is_decoder=False, **shape)
    with pytest.raises(ModelError, match=r"BertLMHeadModel.*not (causal|supported)"):
        run(settings(), transformers.BertLMHeadModel(config))


def test_paths_are_not_taken_for_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("./nothing", "/no/such/folder", "../nothing", "runs/nothing", "a/b/c", "~/x/"):
        with pytest.raises(ModelError, match="no such folder"):
            load_model(name)
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model("runs")
    with pytest.raises(ModelError, match="a model is a folder, got the file"):
        load_model("file")


def test_a_runs_folder_points_to_its_newest_checkpoint(tmp_path):
    run(settings(output=tmp_path, updates=1))
    with pytest.raises(ModelError, match=r"did you mean .*checkpoint-1\?"):
        load_model(str(tmp_path))


def test_a_model_without_a_causal_head_is_refused(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "base")
    make_model(tie_word_embeddings=False).model.save_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"no weights for lm_head.weight"):
        load_model(str(tmp_path / "base"))
    make_tokenizer().save_pretrained(tmp_path / "vision")
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    vision = transformers.ViTModel(transformers.ViTConfig(**shape))
    vision.save_pretrained(tmp_path / "vision")
    with pytest.raises(ModelError, match="cannot load a causal language model"):
        load_model(str(tmp_path / "vision"))
    with pytest.raises(ModelError, match="ViTModel"):
        run(settings(), vision)
    with pytest.raises(ModelError, match="got Linear"):
        run(settings(), torch.nn.Linear(2, 2))


def test_a_device_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="device 'gpu' cannot be used"):
        load_model(save(tmp_path / "model"), device="gpu")


def test_a_damaged_model_file_is_an_error(tmp_path):
    folder = save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(folder)


def test_model_and_tokenizer_come_together():
    with pytest.raises(ValueError, match="must be passed together"):
        train(settings(), make_model())
    with pytest.raises(ValueError, match="model must be given"):
        train(settings())


def test_a_failed_start_leaves_no_run_behind(tmp_path):
    config = settings(model=str(tmp_path / "nothing"), output=tmp_path / "run")
    with pytest.raises(ModelError):
        train(config, progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "1"}\n{"prompt": \n', "line 2: not valid JSON"),
        ('{"prompt": "1"}\n\n["1"]\n', "line 3: not a JSON object but list"),
        ('{"text": "1"}\n', "line 1: no field 'prompt' or 'problem' or 'question', only"),
        ('{"prompt": "1"}\n{"prompt": " "}\n', "line 2: 'prompt' must be text that is not empty"),
        ('{"problem": null}\n', "line 1: 'problem' must be text that is not empty, got None"),
        ('{"prompt": "1"}\n{"prompt": "1 \\ud835"}\n', "line 2: 'prompt' must be Unicode text"),
        ('{"problem": "\\udc00 1"}\n', "line 1: 'problem' must be Unicode .*'.udc00', as char.* 1"),
        ('{"prompt": NaN}\n', "line 1: 'prompt' must be text that is not empty, got nan"),
        ('{"prompt": -Infinity}\n', "line 1: 'prompt' must be text that is not empty, got -inf"),
        ('{"prompt": 1' + "0" * 5000 + "}", "line 1: not valid JSON .*4300"),
        ("[" * 100_000, "line 1: not valid JSON .nested too deeply"),
        ('{"prompt": ' + "[" * 300 + "]" * 300 + "}", "line 1: 'prompt' must be text.{,60}$"),
        ("\n", "no prompts in the file"),
    ],
)
def test_broken_lines_are_named_by_number(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_lines_that_are_not_utf8_are_named_by_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "1"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_prompts(path)
    assert next(read_jsonl(path)) == (1, {"prompt": "1"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_prompts(tmp_path / "nothing.jsonl")


def test_prompts_of_either_field_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "one"}\n{"problem": "two", "answer": 2}\n{"question": 3}\n')
    assert read_prompts(path) == ("one", "two", "3")


def test_a_tokenizer_without_chat_template_takes_the_bare_prompt():
    tokenizer = make_tokenizer(template=None)
    assert encode_prompt(tokenizer, "1a") == [WORDS.index("1"), WORDS.index("a")]
    words = [WORDS[i] for i in encode_prompt(make_tokenizer(), "1 a")]
    assert words == ["<user>", "1", "Ġ", "a", "<assistant>"]
