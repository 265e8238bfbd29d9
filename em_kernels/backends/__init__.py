"""Where rows of logits become statistics and gradients: one module or folder a backend."""
