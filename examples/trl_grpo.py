"""TRL: the trainers as they are, their log-probabilities and entropies from em_kernels.

python examples/trl_grpo.py
"""

import tempfile

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from em_kernels import tiny_math
from em_kernels.integrations.trl import apply_to_trl


def right(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for an answer that ends in the right number."""
    return [float(text.split("####")[-1].strip() == a) for text, a in zip(completions, answer)]


def problems(count: int) -> Dataset:
    found = tiny_math.make_problems("dev", count)
    prompts = [f"<|user|>{problem.text}<|assistant|>" for problem in found]
    return Dataset.from_dict({"prompt": prompts, "answer": [str(p.answer) for p in found]})


def main(trainer_class=GRPOTrainer, **more) -> list[dict]:
    apply_to_trl()  # the one line; it serves RLOOTrainer, SFTTrainer and DPOTrainer as well
    folder = tiny_math.model_path()
    settings = dict(
        output_dir=tempfile.mkdtemp(),
        max_steps=3,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=48,
        learning_rate=1e-4,
        top_entropy_quantile=0.2,  # only the most uncertain tokens: TRL's own, on our entropies
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(folder),
        right,
        args=GRPOConfig(**{**settings, **more}),
        train_dataset=problems(16),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "entropy" in line]


if __name__ == "__main__":
    for line in main():
        print({name: round(line[name], 4) for name in ("loss", "reward", "entropy", "grad_norm")})
