"""em_kernels inside other people's trainers; the first three need the package they are named after.

em_kernels.integrations.transformers   per-token statistics from a causal LM without its logits
em_kernels.integrations.trl            TRL's trainers on this package's kernels
em_kernels.integrations.verl           verl's fused head and its policy losses
em_kernels.integrations.megatron       Megatron-Core's cross entropy of logits cut over ranks
em_kernels.integrations.nemo_rl        NeMo-RL's log-probabilities and entropies of such logits
em_kernels.integrations.slime          slime's
em_kernels.integrations.skyrl          SkyRL's, and those of whole logits
"""
