"""A patched model as an object: copied, pickled, saved, compiled; and its outputs."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import error, truth
from tiny_qwen2 import make_model
from torch import nn

from em_kernels.integrations.transformers import (
    TokenStatsOutput,
    apply_em_kernels,
    entropy_loss_func,
    remove_em_kernels,
)
from em_kernels.lm.heads import ModelError

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def patched(**settings):
    return apply_em_kernels(make_model(**settings).double().eval())


def entropy(model):
    return model(input_ids=IDS, em_outputs=("entropy",)).entropy


def right(model):
    return truth(model(input_ids=IDS).logits)["entropy"]


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "torch.save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "copy of a copy": lambda model: saved(copy.deepcopy(model)),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_patched_and_stands_alone(name):
    model = patched()
    twin = COPIES[name](model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    for one in (twin, model):
        assert error(entropy(one), right(one)) < 1e-9
    assert error(entropy(twin), entropy(model)) > 1e-3
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    for one in (twin, model):
        remove_em_kernels(one)
        assert "forward" not in one.__dict__ and "_em_kernels" not in one.__dict__
        assert right(one) is not None


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_model_with_a_loss_function_goes_on_deferring(name):
    model = make_model().double()
    entropy_loss_func(model)
    twin = COPIES[name](model.train())
    assert "logits" not in twin(input_ids=IDS)
    assert twin(input_ids=IDS, labels=IDS).logits is not None


def _work(model, queue):
    queue.put((entropy(model).tolist(), right(model).tolist()))


def test_another_process_gets_a_patched_model():
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    model = patched()
    process = context.Process(target=_work, args=(model, queue))
    process.start()
    ours, theirs = map(torch.tensor, queue.get())
    process.join()
    assert error(ours, theirs) < 1e-6 and error(ours, entropy(model)) < 1e-6


def test_files_are_those_of_the_model_without_the_patch(tmp_path):
    plain, model = make_model(), apply_em_kernels(make_model())
    assert model.state_dict().keys() == plain.state_dict().keys()
    for one, folder in ((plain, "plain"), (model, "patched")):
        one.save_pretrained(tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in names:
        files = [(tmp_path / folder / name).read_bytes() for folder in ("plain", "patched")]
        assert files[0] == files[1], name
    loaded = type(model).from_pretrained(tmp_path / "patched").double().eval()
    assert "_em_kernels" not in loaded.__dict__
    assert error(entropy(apply_em_kernels(loaded)), right(loaded)) < 1e-9


def test_pushing_to_a_hub_uploads_the_model_and_a_card(monkeypatch):
    """All but the network."""
    hub = transformers.utils.hub
    uploaded = []

    def upload(self, folder, repo, **kwargs):
        uploaded.extend(path.name for path in Path(folder).iterdir())

    def no_card(*args, **kwargs):
        raise hub.EntryNotFoundError("none yet")

    created = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(hub, "hf_api", lambda: created)
    monkeypatch.setattr(hub.ModelCard, "load", no_card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    patched().push_to_hub("someone/model", tags=["em"])
    assert {"config.json", "model.safetensors", "README.md"} <= set(uploaded)


def test_the_forward_has_the_models_own_signature_and_is_found_there():
    plain = make_model()
    expected = inspect.signature(plain.forward)
    model = apply_em_kernels(plain)
    assert inspect.signature(model.forward) == expected
    assert inspect.signature(copy.deepcopy(model).forward) == expected
    assert "input_ids" in inspect.signature(model.forward).parameters


def test_a_forward_that_accelerate_has_unwrapped_is_still_patched():
    """It becomes a method, which is given the model, or a copy of it, before the inputs."""
    accelerate = pytest.importorskip("accelerate")
    model = patched()
    model._original_forward = model.forward
    model.forward = accelerate.utils.convert_outputs_to_fp32(model.forward)
    with pytest.raises(ValueError, match="patched again after"):
        remove_em_kernels(model)
    model = accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    expected = right(model)
    assert error(entropy(model), expected) < 1e-9
    twin = copy.deepcopy(model)
    nn.init.normal_(twin.lm_head.weight)
    assert error(entropy(twin), right(twin)) < 1e-9
    assert error(entropy(model), expected) < 1e-9
    assert "forward" not in vars(remove_em_kernels(model))
    assert torch.equal(right(model), expected)


def test_casts_move_with_the_model():
    model = patched()
    for dtype, tolerance in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        model.to(dtype)
        assert error(entropy(model), right(model)) < tolerance


@pytest.mark.parametrize("kind", ["torch.compile", "model.compile"])
def test_a_compiled_model_is_patched_inside(kind):
    model = make_model().double().eval()
    if kind == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.compile(backend="eager")
    expected = right(compiled)
    assert apply_em_kernels(compiled) is compiled
    assert error(entropy(compiled), expected) < 1e-9
    assert error(entropy(model), expected) < 1e-9
    assert error(right(compiled), expected) < 1e-9
    assert remove_em_kernels(compiled) is compiled
    assert "forward" not in model.__dict__


def test_forward_hooks_of_the_model_count_in_the_probe():
    model = make_model().eval()

    def halve(module, args, output):
        output.logits = 0.5 * output.logits

    model.register_forward_hook(halve)
    with pytest.raises(ModelError, match="such a head is not supported"):
        apply_em_kernels(model)


# Outputs


def test_logits_that_were_not_computed_say_so():
    out = patched()(input_ids=IDS, em_outputs=("entropy",))
    said = "the logits were not computed: call the model without em_outputs"
    with pytest.raises(AttributeError, match=said):
        _ = out.logits
    with pytest.raises(KeyError, match=said):
        out["logits"]
    with pytest.raises(AttributeError, match="has no attribute 'perplexity'"):
        _ = out.perplexity
    with pytest.raises(KeyError, match="perplexity"):
        out["perplexity"]
    assert "logits" not in out and not hasattr(out, "logits") and out.get("logits") is None


def test_whatever_a_model_returns_is_taken_over_by_name():
    """Fields that no version of this package or of transformers knows."""
    model = make_model().double().eval()
    own = model.forward

    def forward(*args, **kwargs):
        outputs = own(*args, **kwargs)
        outputs["yet_to_come"] = torch.ones(2)
        return outputs

    model.forward = forward
    apply_em_kernels(model)
    inputs = dict(input_ids=IDS, use_cache=True, output_hidden_states=True)
    plain, out = model(**inputs), model(**inputs, em_outputs=("entropy",))
    assert set(plain) - {"logits"} == set(out) - {"entropy"}
    assert torch.equal(out.yet_to_come, torch.ones(2))
    assert torch.equal(out["hidden_states"][-1], plain.hidden_states[-1])
    assert out.attentions is None and out.logprob is None


def test_outputs_survive_what_is_done_to_a_model_output():
    out = TokenStatsOutput(loss=torch.ones(()), yet_to_come=torch.ones(2), absent=None)
    assert out.absent is None and "absent" not in out and out.entropy is None
    leaves, spec = torch.utils._pytree.tree_flatten(out)
    assert len(leaves) == 2
    rebuilt = torch.utils._pytree.tree_unflatten([leaf + 1 for leaf in leaves], spec)
    for twin in (rebuilt, pickle.loads(pickle.dumps(out)), copy.deepcopy(out), type(out)({**out})):
        assert isinstance(twin, TokenStatsOutput) and list(twin) == ["loss", "yet_to_come"]
        assert twin.yet_to_come.shape == (2,) and twin.loss.shape == ()
        assert [x.shape for x in twin.to_tuple()] == [(), (2,)]
    assert torch.equal(rebuilt.yet_to_come, torch.full((2,), 2.0))
