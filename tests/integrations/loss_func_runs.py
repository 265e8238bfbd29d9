"""What the processes of test_loss_func_processes.py run: one batch under each wrapper there is.

Two processes share the 8 rows of an update; what it must give is in `whole`, without wrapper, loss
function or kernels. The rows are of unequal length, and one has no token that counts.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from helpers import truth
from tiny_qwen2 import WORDS, make_model
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from em_kernels.integrations.transformers import (
    apply_em_kernels,
    eaft_loss_func,
    entropy_loss_func,
    sft_entropy_loss_func,
)

VOCAB = len(WORDS)
LENGTHS = (9, 3, 2, 7, 12, 4, 5, 8)
PROMPT = 2  # the row of 2 tokens has none to predict
LOSSES = {
    "entropy": (lambda m: entropy_loss_func(m, temperature=0.7), 0.0, 1.0, 0.7),
    "sft": (lambda m: sft_entropy_loss_func(m, entropy_coef=0.3), 1.0, 0.3, 1.0),
    "eaft": (lambda m: eaft_loss_func(m, k=5), 1.0, 0.0, 1.0),
}


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(4, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    return [{"input_ids": row} for row in ids]


def collate(rows: list[dict]) -> dict:
    size = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), size, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, :PROMPT] = -100
    return dict(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels)


def tied():
    return make_model().double()


def untied():
    return make_model(tie_word_embeddings=False).double()


def frozen_head():
    model = untied()
    model.lm_head.requires_grad_(False)
    return model


def only_head():
    model = untied().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def lora():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(1)
    return peft.get_peft_model(untied(), config).double()


def lora_trained_head():
    model = lora()
    model.base_model.model.lm_head.requires_grad_(True)
    return model


def scaled_and_biased():
    """Granite's scale is applied after the bias, here a trained one."""
    model = of_kind("Granite", logits_scaling=4.0, tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB).double())
    return model


def capped():
    return of_kind("Gemma2", final_logit_softcapping=3.0)


def of_kind(kind: str, **changes):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).double()


def single():
    return untied().float()


MODELS = {
    "tied": tied,
    "untied": untied,
    "frozen head": frozen_head,
    "only head": only_head,
    "lora": lora,
    "lora, trained head": lora_trained_head,
    "scaled and biased": scaled_and_biased,
    "capped": capped,
    "float32": single,
}


def whole(model: str, loss: str = "entropy") -> dict:
    """Loss and gradient of the 8 rows by the textbook, in this process."""
    module = MODELS[model]().train()
    _, nll, entropy, temperature = LOSSES[loss]
    inputs = collate(rows())
    target = inputs.pop("labels")[:, 1:]
    logits = module(**inputs).logits[:, :-1]
    stats = truth(logits, target.clamp(min=0), temperature=temperature)
    terms = -nll * stats["logprob"] + entropy * stats["entropy"]
    if loss == "eaft":
        log_p = logits.detach().topk(5).values.log_softmax(-1)
        terms = -(log_p.exp() * log_p).sum(-1) / math.log(5) * terms
    total = (terms * (target != -100)).sum() / (target != -100).sum()
    total.backward()
    return {"loss": total.item(), "gradient": gradient(module)}


def gradient(module) -> torch.Tensor:
    """Of all parameters, in their order, whole; zeros where there is none."""
    parts = []
    with FSDP1.summon_full_params(module, with_grads=True):
        for p in module.parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            parts.append(grad.detach().flatten().clone())
    return torch.cat(parts)


# transformers.Trainer


class Gradients(transformers.TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append(gradient(model))


def trainer_run(model: str, accumulation: int, loss: str, **settings) -> dict:
    """Two updates with learning rate 0."""
    _fresh_accelerate()
    module, seen = MODELS[model](), Gradients()
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4 // accumulation,
        per_device_eval_batch_size=4,  # as many as a rank has: a mean of batches is no other
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=0.0,
        max_grad_norm=1e9,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        **settings,
    )
    trainer = transformers.Trainer(
        module,
        arguments,
        data_collator=collate,
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_loss_func=LOSSES[loss][0](module),
        callbacks=[seen],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    history = trainer.state.log_history

    def logged(name: str) -> list[float]:
        return [line[name] for line in history if name in line]

    losses = logged("loss") + logged("eval_loss")
    return {"losses": losses, "norms": logged("grad_norm"), "gradients": seen.seen}


# Loops without a trainer


def loop_run(model: str, wrap, accumulation: int, loss: str, **options) -> dict:
    """Two updates of a wrapped model by the loss function, the second after an evaluation."""
    module = MODELS[model]().train()
    loss_func = LOSSES[loss][0](module)
    wrapped, pause = wrap(module, **options)

    def loss_of(inputs: dict, count: int) -> torch.Tensor:
        labels = inputs.pop("labels")
        return loss_func(wrapped(**inputs), labels, count)

    first = one_update(wrapped, loss_of, pause, accumulation)
    wrapped.eval()
    with torch.no_grad():
        between = one_update(wrapped, loss_of, pause, accumulation)
    wrapped.train()
    return joined(first, between, one_update(wrapped, loss_of, pause, accumulation))


def statistics_run(model: str, wrap, accumulation: int, **options) -> dict:
    """The loss "sft" out of what model(..., labels=, em_outputs=) returns."""
    module = apply_em_kernels(MODELS[model]().train())
    wrapped, pause = wrap(module, **options)

    def loss_of(inputs: dict, count: int) -> torch.Tensor:
        out = wrapped(**inputs, em_outputs=("entropy",), num_items_in_batch=count)
        return out.loss + 0.3 * out.entropy.sum() / count

    return joined(one_update(wrapped, loss_of, pause, accumulation))


def accelerate_run(model: str, accumulation: int, loss: str) -> dict:
    """A loop of accelerate's own: prepare, accumulate, backward."""
    from accelerate import Accelerator

    _fresh_accelerate()
    module = MODELS[model]().train()
    loss_func = LOSSES[loss][0](module)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    wrapped = accelerator.prepare(module)

    def loss_of(inputs: dict, count: int) -> torch.Tensor:
        labels = inputs.pop("labels")
        return loss_func(wrapped(**inputs), labels, count)

    updates = []
    for _ in range(2):
        pause = lambda on: accelerator.accumulate(wrapped)  # noqa: E731
        backward = lambda loss: accelerator.backward(loss * accumulation)  # noqa: E731
        updates.append(one_update(wrapped, loss_of, pause, accumulation, backward))
    return joined(*updates)


def one_update(wrapped, loss_of, pause, accumulation: int, backward=torch.Tensor.backward) -> dict:
    """This rank's 4 rows in micro-batches; gradients averaged over ranks are those of the loss."""
    world, rank = dist.get_world_size(), dist.get_rank()
    own, size = rows()[rank::world], len(LENGTHS) // world // accumulation
    count = int((collate(rows())["labels"][:, 1:] != -100).sum())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(0, len(own), size):
        with pause(i + size < len(own)):
            loss = loss_of(collate(own[i : i + size]), count)
            if loss.requires_grad:
                backward(loss * world)
        total += loss.detach()
    dist.all_reduce(total)
    result = {"losses": [total.item()]}
    if loss.requires_grad:
        result["gradients"] = [gradient(wrapped)]
        wrapped.zero_grad()
    return result


def joined(*results: dict) -> dict:
    names = ("losses", "gradients")
    return {name: [x for result in results for x in result.get(name, [])] for name in names}


def ddp(module, **options):
    wrapped = DistributedDataParallel(module, **options)
    return wrapped, lambda on: wrapped.no_sync() if on else contextlib.nullcontext()


def fsdp1(module):
    layers, device = ModuleWrapPolicy({type(module.model.layers[0])}), torch.device("cpu")
    wrapped = FSDP1(module, auto_wrap_policy=layers, use_orig_params=True, device_id=device)
    return wrapped, lambda on: wrapped.no_sync() if on else contextlib.nullcontext()


def fsdp2(module, parts: tuple[str, ...] = (), dtype: torch.dtype | None = None, **options):
    """Layers one by one, then `parts`, then the rest."""
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None)
    own = getattr(module, "get_base_model", lambda: module)()
    for part in (*own.model.layers, *(own.get_submodule(name) for name in parts)):
        fully_shard(part, mp_policy=policy)
    fully_shard(module, mp_policy=policy, **options)
    return module, _unsynchronised(module)


def accelerate_fsdp2(module):
    """Sharded as accelerate shards for FSDP2; its plugin itself wants a GPU."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # the layers, as the model names them
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=True,
        device=torch.device("cpu"),
    )
    module = fsdp2_prepare_model(accelerator, module)
    return module, _unsynchronised(module)


def _unsynchronised(module):
    @contextlib.contextmanager
    def pause(on: bool):
        module.set_requires_gradient_sync(not on)
        yield

    return pause


def _fresh_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, world = dist.get_rank(), dist.get_world_size()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(zip(names, map(str, (rank, rank, world, world))))
    os.environ["MASTER_ADDR"] = "localhost"  # asked for, though the group is there
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# name -> (loss, model, what a process runs)
RUNS = {}


def add(name: str, run, model: str, *args, loss: str = "entropy", **options) -> None:
    loss = "sft" if run is statistics_run else loss
    arguments = options if run is statistics_run else {"loss": loss, **options}
    RUNS[f"{name}, {model}"] = (model, loss, lambda: run(model, *args, **arguments))


for accumulation in (1, 2, 4):
    add(f"Trainer, {accumulation}", trainer_run, "untied", accumulation)
    add(f"accelerate, {accumulation}", accelerate_run, "untied", accumulation)
    add(f"DDP, {accumulation}", loop_run, "tied", ddp, accumulation)
    add(f"FSDP2, {accumulation}", loop_run, "untied", fsdp2, accumulation)
add("Trainer, 2", trainer_run, "tied", 2, loss="sft")
add("DDP, eaft", loop_run, "tied", ddp, 2, loss="eaft")
add("FSDP2, eaft", loop_run, "untied", fsdp2, 2, loss="eaft")
add("Trainer, evaluated", trainer_run, "tied", 1, eval_strategy="steps", eval_steps=2)
# Reentrant, DDP finds no unused parameters; so the Trainer asks for none, but of a PEFT model.
for model, reentrant in (("untied", True), ("lora, trained head", False)):
    how = dict(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    add(f"Trainer, {reentrant=}", trainer_run, model, 2, gradient_checkpointing=True, **how)
add("Trainer, bf16", trainer_run, "float32", 2, bf16=True)
for model in MODELS:
    if model != "float32":
        add("DDP, unused found", loop_run, model, ddp, 2, find_unused_parameters=True)
        add("FSDP2, resharded", loop_run, model, fsdp2, 2, reshard_after_forward=True)
for model in ("tied", "untied", "lora"):
    add("FSDP2 by accelerate", loop_run, model, accelerate_fsdp2, 2)
add("DDP, static graph", loop_run, "untied", ddp, 1, static_graph=True)
add("FSDP1", loop_run, "untied", fsdp1, 2)
for model in ("tied", "scaled and biased"):
    add("statistics, DDP", statistics_run, model, ddp, 2, find_unused_parameters=True)
    add("statistics, FSDP2", statistics_run, model, fsdp2, 2)
apart, narrow = dict(parts=("lm_head",)), dict(dtype=torch.bfloat16)
for how in ({}, apart, dict(reshard_after_forward=True)):
    name = ", ".join(("bf16", *how))
    add(f"FSDP2, {name}", loop_run, "float32", fsdp2, 2, **narrow, **how)
    add(f"statistics, FSDP2, {name}", statistics_run, "float32", fsdp2, 2, **narrow, **how)
