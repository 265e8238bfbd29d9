"""Imported by verl in every process that has its name in VERL_USE_EXTERNAL_MODULES.

EM_KERNELS_LOGITS_DTYPE, say float32, is the `logits_dtype` of `apply_to_verl`.
"""

import os

from em_kernels.integrations._arguments import logits_dtype_named
from em_kernels.integrations.verl import apply_to_verl

_VARIABLE = "EM_KERNELS_LOGITS_DTYPE"
apply_to_verl(logits_dtype=logits_dtype_named(os.environ.get(_VARIABLE, ""), _VARIABLE))
