"""How accurate entropy, log-probability and their gradients are: ours, and the peers'."""
