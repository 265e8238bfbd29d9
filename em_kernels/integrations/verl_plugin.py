"""Imported by verl in every process that has its name in VERL_USE_EXTERNAL_MODULES."""

from em_kernels.integrations.verl import apply_to_verl

apply_to_verl()
