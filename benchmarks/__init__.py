"""Microbenchmarks, one file per operator: `python -m benchmarks --help`."""
