"""The public functions, the operators below them and their derivatives."""
