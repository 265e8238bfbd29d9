"""Entropy-controlled RL on the embedded model: the arms, their runs, and what is made of them."""
