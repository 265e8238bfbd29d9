"""The command line."""

from em_kernels.cli.app import main

__all__ = ["main"]
