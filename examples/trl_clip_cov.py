"""TRL: Clip-Cov or KL-Cov in GRPOTrainer, the tokens chosen over the whole batch of answers.

python examples/trl_clip_cov.py [clip_cov | kl_cov]
"""

import sys

import torch
from trl import GRPOTrainer

from em_kernels import objectives


class CovTrainer(GRPOTrainer):
    """`method`, `ratio` and `options` (Clip-Cov's lower and upper) are there to be set."""

    method, ratio, options = "clip_cov", 2e-4, {}

    def score(self, model, batch, **kwargs):
        """(log-probabilities, entropies) of the answers' tokens."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        length = batch["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, length, **kwargs)[:2]

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        size = self.args.per_device_train_batch_size
        with torch.no_grad():
            old = batch["old_per_token_logps"] = self.score(self.model, batch, batch_size=size)[0]
        advantage, mask = batch["advantages"], batch["completion_mask"]
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        settings = dict(ratio=self.ratio, group=group, **self.options)
        if self.method == "clip_cov":
            batch["chosen"] = objectives.clip_cov_selection(old, old, advantage, mask, **settings)
        else:
            batch["chosen"] = objectives.kl_cov_selection(old, advantage, mask, **settings)
        return batch

    def _compute_loss(self, model, inputs):
        logprob, entropy = self.score(model, inputs, compute_entropy=True)
        mask, old = inputs["completion_mask"], inputs["old_per_token_logps"]
        method = getattr(objectives, f"{self.method}_loss")
        loss = method(logprob, old, inputs["advantages"], mask, inputs["chosen"])
        self._metrics["train"]["entropy"].append((entropy * mask).sum().item() / mask.sum().item())
        for name, value in loss.metrics.items():
            self._metrics["train"][name].append(value.item())
        tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes  # of all the answers
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return objectives.aggregate_loss(loss.loss, mask, denominator=tokens.clamp(min=1) * share)


if __name__ == "__main__":
    from trl_grpo import main

    CovTrainer.method = (*sys.argv[1:], "clip_cov")[0]
    CovTrainer.ratio = 0.02  # of a few hundred tokens; a few in ten thousand on a real batch
    for line in main(CovTrainer, num_iterations=2, max_steps=4):  # on-policy KL-Cov does nothing
        print({name: line[name] for name in ("loss", "entropy", "selected_fraction", "policy_kl")})
