"""transformers.Trainer: entropy minimisation, or SFT + lambda H, by `compute_loss_func` alone.

python examples/transformers_trainer.py        # entropy minimisation on sampled answers
python examples/transformers_trainer.py 0.5    # SFT on them + 0.5 H
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from em_kernels import tiny_math
from em_kernels.integrations.transformers import entropy_loss_func, sft_entropy_loss_func


def answers(model, tokenizer, count: int) -> list[dict]:
    """Sampled answers to the one prompt; label -100 where no token counts."""
    chat = [{"role": "user", "content": tiny_math.PROMPT}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**prompt, do_sample=True, num_return_sequences=count, max_new_tokens=48)
    padding = ids == tokenizer.pad_token_id
    labels = ids.masked_fill(padding, -100)
    labels[:, : prompt["input_ids"].shape[1]] = -100
    mask = (~padding).long()
    return [dict(input_ids=i, attention_mask=m, labels=y) for i, m, y in zip(ids, mask, labels)]


def main(coefficient: float | None = None) -> list[float]:
    torch.manual_seed(0)
    folder = tiny_math.model_path()
    model = AutoModelForCausalLM.from_pretrained(folder)
    data = answers(model, AutoTokenizer.from_pretrained(folder), 64)
    if coefficient is None:
        loss = entropy_loss_func(model, temperature=tiny_math.EM_TEMPERATURE)
    else:
        loss = sft_entropy_loss_func(model, entropy_coef=coefficient)
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,  # the loss of an update does not depend on this cut
        learning_rate=tiny_math.EM_LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(model, settings, train_dataset=data, compute_loss_func=loss)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    print("losses:", *(f"{loss:.4f}" for loss in main(*map(float, sys.argv[1:]))))
