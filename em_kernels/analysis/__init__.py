"""What entropies and logits say about a model, beyond its accuracy.

`tokens` reads texts once through a model and keeps a few numbers per token; `shift`, `forks` and
`temperature` are computed from those alone. `run_curve` follows a training run through its
checkpoints, `law` fits R = -a exp(H) + b.
"""
