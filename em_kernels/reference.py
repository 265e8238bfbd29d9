"""The definition of every statistic in plain PyTorch: `em_kernels.backends.reference`."""

from em_kernels.backends.reference import *  # noqa: F403
