"""transformers: log-probabilities and entropies of answers, without their logits.

python examples/transformers_stats.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels import tiny_math
from em_kernels.integrations.transformers import apply_em_kernels, remove_em_kernels


@torch.no_grad()
def main() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    folder = tiny_math.model_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": tiny_math.PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    apply_em_kernels(model)  # generation and every other call stay as they were
    ids = model.generate(**prompt, do_sample=True, num_return_sequences=8, max_new_tokens=48)
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    labels[:, : prompt["input_ids"].shape[1]] = -100  # only the answers count

    # logits = model(ids).logits[:, :-1].float()
    # log_p = logits.log_softmax(-1)
    # logprob = log_p.gather(-1, ids[:, 1:, None])[..., 0]
    # entropy = -(log_p.exp() * log_p).sum(-1)
    out = model(ids, labels=labels, em_outputs=("logprob", "entropy"))

    for answer in range(3):
        counted = out.logprob[answer] != 0  # position t is scored against labels[t + 1]
        words = tokenizer.convert_ids_to_tokens(ids[answer, 1:][counted[:-1]])
        entropy, logprob = out.entropy[answer][counted], out.logprob[answer][counted]
        unsure = entropy.argsort(descending=True)[:3].tolist()
        shown = ", ".join(f"{words[i]!r} H={entropy[i]:.2f}" for i in unsure)
        print(f"answer {answer}: log p {logprob.sum():.2f}, mean H {entropy.mean():.3f}; {shown}")
    print(f"negative log-likelihood a token: {out.loss:.4f}")
    remove_em_kernels(model)
    return out.logprob, out.entropy


if __name__ == "__main__":
    main()
