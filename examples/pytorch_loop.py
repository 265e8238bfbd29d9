"""Plain PyTorch: entropy minimisation from hidden states, where the logits were.

    python examples/pytorch_loop.py

Also what to write in place of torch.nn.functional.linear_cross_entropy or Liger's fused loss when
the loss is more than the cross entropy: here SFT + lambda H, in the same three matrix products.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels import linear_entropy_loss, linear_token_loss, tiny_math

UPDATES, ANSWERS = 4, 16


def main() -> list[float]:
    torch.manual_seed(0)
    folder = tiny_math.model_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny_math.EM_LEARNING_RATE)
    chat = [{"role": "user", "content": tiny_math.PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    losses = []
    for update in range(UPDATES):
        ids = model.generate(
            **prompt, do_sample=True, num_return_sequences=ANSWERS, max_new_tokens=48
        )
        hidden = model.model(ids).last_hidden_state[:, :-1]  # position t predicts token t + 1
        mask = ids[:, 1:] != tokenizer.pad_token_id
        mask[:, : prompt["input_ids"].shape[1] - 1] = False

        # logits = model(ids).logits[:, :-1].float()
        # log_p = logits.log_softmax(-1)
        # entropy = -(log_p.exp() * log_p).sum(-1)
        # loss = (entropy * mask).sum() / mask.sum()
        loss = linear_entropy_loss(hidden, model.lm_head.weight, mask)

        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"update {update + 1}: mean entropy {losses[-1]:.4f} nats")

    # loss = F.linear_cross_entropy(hidden, weight, target) + 0.1 * entropy, which it does not give
    weight = mask / mask.sum()
    loss, stats = linear_token_loss(
        hidden.detach(),
        model.lm_head.weight,
        ids[:, 1:],
        logprob_weight=-weight,
        entropy_weight=0.1 * weight,
    )
    print(f"SFT + 0.1 H: {loss.item():.4f}; entropy {(stats.entropy * weight).sum().item():.4f}")
    return losses


if __name__ == "__main__":
    main()
