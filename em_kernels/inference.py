"""Entropy control while generating: processors of logits for transformers' `generate`."""

from em_kernels.lm.inference import AdaptiveTemperature, EntropyDescent

__all__ = ["AdaptiveTemperature", "EntropyDescent"]
