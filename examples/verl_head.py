"""verl: its fused head and policy losses on em_kernels.

    python examples/verl_head.py

In a run of verl this takes no code, only an environment variable for all of its workers:

    export VERL_USE_EXTERNAL_MODULES=em_kernels.integrations.verl_plugin
    python -m verl.trainer.main_ppo actor_rollout_ref.model.use_fused_kernels=True \\
        actor_rollout_ref.model.fused_kernel_options.impl_backend=triton \\
        actor_rollout_ref.actor.policy_loss.loss_mode=clip_cov ...
"""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels import tiny_math
from em_kernels.integrations import verl

# What the loss reads of verl's ActorConfig.
CONFIG = SimpleNamespace(clip_ratio=1.0, clip_ratio_low=None, clip_ratio_high=None)
CONFIG.policy_loss = SimpleNamespace(clip_cov_ratio=0.05, clip_cov_lb=0.1, clip_cov_ub=50.0)
CONFIG.global_batch_info = {}


def main() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    folder = tiny_math.model_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": tiny_math.PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=True, num_return_sequences=8, max_new_tokens=48)
    hidden = model.model(ids).last_hidden_state
    labels = ids.roll(-1, 1)
    logprob, entropy = verl.linear_cross_entropy(hidden, model.lm_head.weight, labels, 1.0, "none")
    logprob, entropy = logprob.view_as(ids)[:, :-1], entropy.view_as(ids)[:, :-1]
    mask = ids[:, 1:] != tokenizer.pad_token_id
    mask[:, : prompt["input_ids"].shape[1] - 1] = False
    print(f"{mask.sum()} tokens, mean entropy {entropy[mask].mean():.4f} nats")
    try:
        verl.apply_to_verl()
    except ImportError as reason:
        print(f"verl cannot be imported ({reason}), so its losses are left out")
        return logprob, entropy
    right = torch.tensor(["#### 78" in text for text in tokenizer.batch_decode(ids)]).float()
    advantage = (right - right.mean())[:, None].expand_as(logprob)
    old = logprob.detach() + 0.1 * torch.randn_like(logprob)
    loss, metrics = verl.policy_loss_clip_cov(old, logprob, advantage, mask, config=CONFIG)
    loss.backward()
    print(f"clip_cov: loss {loss.item():.4f}, {metrics}")
    return logprob, entropy


if __name__ == "__main__":
    main()
