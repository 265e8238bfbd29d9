"""Rows of logits out of hidden states, a chunk at a time."""
