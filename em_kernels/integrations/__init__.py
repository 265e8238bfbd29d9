"""em_kernels inside other people's trainers; each module needs the package it is named after.

em_kernels.integrations.transformers   per-token statistics from a causal LM without its logits
em_kernels.integrations.trl            TRL's trainers on this package's kernels
em_kernels.integrations.verl           verl's fused head and its policy losses
"""
