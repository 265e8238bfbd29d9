"""Imported by verl in every process that has its name in VERL_USE_EXTERNAL_MODULES.

EM_KERNELS_LOGITS_DTYPE, say float32, is the `logits_dtype` of `apply_to_verl`, and
EM_KERNELS_ENTROPY_REQUIRES_GRAD, 0 or 1, its `entropy_requires_grad`.
"""

import os
from typing import Any

from em_kernels.integrations._arguments import flag_named, logits_dtype_named
from em_kernels.integrations.verl import apply_to_verl

_DTYPE, _FLAG = "EM_KERNELS_LOGITS_DTYPE", "EM_KERNELS_ENTROPY_REQUIRES_GRAD"
settings: dict[str, Any] = {"logits_dtype": logits_dtype_named(os.environ.get(_DTYPE, ""), _DTYPE)}
if flag := os.environ.get(_FLAG):
    settings["entropy_requires_grad"] = flag_named(flag, _FLAG)
apply_to_verl(**settings)
