"""Losses of the trainer's objectives as their papers write them, from full logits in float64."""

from __future__ import annotations

import torch
from rl_runs import plain_log_softmax
from torch.nn.functional import logsigmoid

from em_kernels import high_entropy_mask, kl_cov_mask, token_covariance


def plain_statistics(model, tokens):
    """(logprob, entropy) of the counted tokens, from full logits in float64."""
    logp = plain_log_softmax(model, tokens)
    picked = logp.gather(-1, tokens.input_ids.roll(-1, 1)[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return (torch.where(tokens.loss_mask, x, 0) for x in (picked, entropy))


def plain_exact_kl(model, tokens, other):
    """(KL(p || q), KL(q || p)), q the distributions of another model."""
    p = plain_log_softmax(model, tokens)
    ref = plain_log_softmax(other, tokens).detach()
    return (p.exp() * (p - ref)).sum(-1), (ref.exp() * (ref - p)).sum(-1)


def plain_advantage(config, name, logprob, entropy, tokens):
    """As the papers shape it; zeta is that of the first update."""
    a = tokens.advantage.double()
    match None if name == "ppl" else config.setting("advantage_shaping", name):
        case "repo":
            shaped = a - config.repo_zeta * a.abs() * logprob
            return torch.where(shaped * a > 0, shaped, 0)
        case "entropy":
            return a + torch.min(config.shaping_alpha * entropy, a.abs() / config.shaping_kappa)
    return a


def plain_ratio(name, logprob, old, mask):
    """rho, or GSPO's of the sequence."""
    d = logprob - old
    if name.startswith("gspo"):
        s = (d * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        d = s.detach() + d - d.detach() if name == "gspo_token" else s.expand_as(d)
    return d.exp()


def plain_weight(config, name, rho, logprob, old, a, exact):
    """What stands, without gradient, before A log p; None where the loss has another form."""
    if name == "cispo":
        return rho.clamp(1 - config.clip_low, 1 + config.clip_high).detach()
    if name == "dppo":
        moved = logprob.exp() - old.exp()
        d = moved.abs() if config.dppo_divergence == "binary_tv" else exact[1]
        far = torch.where(
            a > 0, (moved > 0) & (d > config.dppo_high), (moved < 0) & (d > config.dppo_low)
        )
        return (rho.clamp(max=config.max_ratio) * ~far).detach()
    return None


def plain_loss(config, name, logprob, entropy, tokens, selected, exact):
    """The loss as its paper writes it, one line an objective."""
    mask, old = tokens.loss_mask, tokens.old_logprob.double()
    a = plain_advantage(config, name, logprob.detach(), entropy.detach(), tokens)
    rho = plain_ratio(name, logprob, old, mask)
    low, high = (config.setting(n, name) for n in ("clip_low", "clip_high"))
    if name == "ppl":
        t = (mask.cumsum(1) - 1).clamp(min=0)
        kl = -logprob if config.ppl_label == "pseudo" else exact[1]
        regret = config.alpha * (config.gamma**t * (-logprob + t * kl) * mask).sum(1)
        regret = regret / mask.sum(1)
        return -logsigmoid(regret[1::2] - regret[0::2]).mean()
    loss = -rho * a if low is None else -torch.min(rho * a, rho.clamp(1 - low, 1 + high) * a)
    weight = plain_weight(config, name, rho, logprob, old, a, exact)
    if weight is not None:
        loss = -weight * a * logprob
    if name == "sapo":
        tau = torch.where(a > 0, config.tau_pos, config.tau_neg)
        loss = -4 / tau * torch.sigmoid(tau * (rho - 1)) * a
    if name == "clip_cov":
        loss = loss * ~selected
    if name == "high_entropy":
        loss = loss * selected
    if name == "kl_cov":
        loss = loss + config.kl_cov_coef * (logprob - old).abs() * selected
    if config.ref_kl:
        kl = exact[0]
        if config.kl_estimator == "k3":
            d = tokens.ref_logprob.double() - logprob
            kl = d.exp() - d - 1
        loss = loss + config.ref_kl * kl
    loss = (loss - config.setting("entropy_coef", name) * entropy) * mask
    reduction = config.setting("reduction", name)
    if reduction == "token_mean":
        return loss.sum() / mask.sum()
    if reduction == "sequence_mean_token_sum_norm":
        loss = loss / config.max_new_tokens
    per_answer = loss.sum(1) / (mask.sum(1) if reduction == "sequence_mean" else 1)
    return per_answer.mean()


def plain_selection(config, name, logprob, entropy, tokens):
    advantage = plain_advantage(config, name, logprob, entropy, tokens)
    cov = token_covariance(logprob, advantage, tokens.loss_mask)
    if name == "kl_cov":
        return kl_cov_mask(cov, tokens.loss_mask, ratio=config.ratio)
    if name == "high_entropy":
        return high_entropy_mask(entropy, tokens.loss_mask, ratio=config.ratio)
    return None
