"""Policy-gradient losses by their definition: plain formulas, differentiated by autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.objective import PolicyObjective


class PolicyLoss(NamedTuple):
    """loss: 0-d; logp: detached, 0 where not counted; metrics: sums and counts, 0-d float64;
    dropped: with `skip_mass`, the probability left out of each token's gradient."""

    loss: Tensor
    logp: Tensor
    metrics: dict[str, Tensor]
    dropped: Tensor | None = None


def policy_loss(
    logp: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
    logp_sampler: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> PolicyLoss:
    """r1kernels.policy_loss in logp's own dtype; arguments as there, not checked here."""
    shape, device = logp.shape, logp.device
    if logp.ndim == 2:
        lengths = torch.full((shape[0],), shape[1], device=device)
    elif cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
    else:
        lengths = torch.tensor([shape[0]], device=device)
    sequence = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    if advantages.shape != shape:
        advantages = advantages[sequence]

    # Only the counted tokens from here on: the others have no part in anything.
    counted = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
    divisor = _divisor(objective, counted.flatten(), sequence, len(lengths), normalizer)
    kept = counted.flatten() if weights is None else counted.flatten() & (weights.flatten() != 0)
    sequence = sequence[kept]
    weight = 1 / divisor[kept].to(logp.dtype)
    if weights is not None:
        weight = weight * weights.flatten()[kept]

    def tokens(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.flatten()[kept].to(logp.dtype)

    def sequence_sum(x: Tensor) -> Tensor:
        return x.new_zeros(len(lengths)).index_add(0, sequence, x)[sequence]

    lp, A = tokens(logp), tokens(advantages).detach()
    lp_old = lp.detach() if logp_old is None else tokens(logp_old).detach()
    lp_ref, lp_sampler, H = tokens(logp_ref), tokens(logp_sampler), tokens(entropy)
    length = sequence_sum(torch.ones_like(lp))

    clamped = torch.zeros_like(kept[kept])

    def exp(x: Tensor) -> Tensor:
        nonlocal clamped
        clamped = clamped | (x.abs() > 20)
        return x.clamp(-20, 20).exp()

    log_ratio = lp - lp_old
    if objective.ratio_level == "sequence":
        log_ratio = sequence_sum(log_ratio) / length
    r = exp(log_ratio)

    low = high = dual = torch.zeros_like(clamped)
    if objective.surrogate == "clip":
        clipped = r.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        surrogate = -torch.minimum(r * A, clipped * A)
        low = (A < 0) & (r < 1 - objective.clip_low)
        high = (A > 0) & (r > 1 + objective.clip_high)
        if objective.clip_max is not None:
            dual = (A < 0) & (r > objective.clip_max)
            surrogate = torch.where(A < 0, surrogate.clamp(max=-objective.clip_max * A), surrogate)
    elif objective.surrogate == "cispo":
        surrogate = -r.detach().clamp(max=objective.clip_max) * A * lp
        high = (A > 0) & (r > objective.clip_max)
    elif objective.surrogate == "sapo":
        a = torch.where(A > 0, *objective.sapo_temperature).to(lp.dtype)
        surrogate = -A * 4 / a * torch.sigmoid(a * (r - 1))
    elif objective.surrogate == "reinforce":
        surrogate = -A * lp
    elif objective.surrogate == "mirror_descent":
        d = lp - lp_old
        square = d**2 if objective.ratio_level == "token" else sequence_sum(d) ** 2 / length
        surrogate = -A * lp + objective.mirror_tau / 2 * square

    keep_entropy = torch.ones_like(lp)
    if objective.top_entropy_quantile < 1 and len(lp):
        floor = torch.quantile(H.detach(), 1 - objective.top_entropy_quantile)
        keep_entropy = (H.detach() >= floor).to(lp.dtype)
    keep_policy = torch.ones_like(lp)
    if objective.off_policy_threshold is not None:
        behaviour = lp_old if lp_sampler is None else lp_sampler
        drift = sequence_sum(torch.nan_to_num(behaviour - lp.detach())) / length
        keep_policy = ((A >= 0) | (drift <= objective.off_policy_threshold)).to(lp.dtype)
    correction, capped, gap = torch.ones_like(lp), torch.zeros_like(clamped), torch.zeros_like(lp)
    if lp_sampler is not None:
        gap = torch.where(lp_sampler.isnan(), 0.0, lp_old - lp_sampler)
        if objective.sampler_correction != "none":
            is_sequence = objective.sampler_correction.startswith("sequence")
            correction = exp(sequence_sum(gap) if is_sequence else gap)
            capped = correction > objective.sampler_cap
            if objective.sampler_correction.endswith("truncate"):
                correction = correction.clamp(max=objective.sampler_cap)
            else:
                correction = torch.where(capped, 0.0, correction)

    kl = torch.zeros_like(lp)
    if lp_ref is not None:
        if objective.kl_estimator == "k1":
            kl = lp - lp_ref
        elif objective.kl_estimator == "k2":
            kl = (lp - lp_ref) ** 2 / 2
        else:
            kl = exp(lp_ref - lp) - (lp_ref - lp).clamp(-20, 20) - 1

    policy_term = weight * correction * keep_policy * keep_entropy * surrogate
    kl_term = weight * objective.kl_coef * kl * (r if objective.kl_ratio_corrected else 1)
    entropy_term = torch.zeros_like(lp)
    if objective.entropy_coef != 0:
        entropy_term = -weight * objective.entropy_coef * keep_entropy * H

    metrics = {
        "tokens": kept[kept],
        "policy_loss": policy_term,
        "kl_loss": kl_term,
        "entropy_loss": entropy_term,
        "logp": lp,
        "ratio": r,
        "clip_low": low,
        "clip_high": high,
        "clip_max": dual,
        "clamped": clamped,
        "kl": kl,
        "entropy": torch.zeros_like(lp) if H is None else H,
        "entropy_dropped": keep_entropy == 0,
        "off_policy_dropped": keep_policy == 0,
        "sampler_gap": gap.abs(),
        "sampler_ratio": correction,
        "sampler_capped": capped,
    }
    return PolicyLoss(
        (policy_term + kl_term + entropy_term).sum(),
        torch.where(kept.view(shape), logp.detach(), 0.0),
        {name: x.detach().double().sum() for name, x in metrics.items()},
    )


def _divisor(
    objective: PolicyObjective,
    counted: Tensor,
    sequence: Tensor,
    num_sequences: int,
    normalizer: float | Tensor | None,
) -> Tensor:
    """What each token's term is divided by, float64 [T]."""
    counted = counted.double()
    ones = torch.ones_like(counted)
    if objective.aggregation == "token_mean":
        return ones * (counted.sum().clamp(min=1) if normalizer is None else normalizer)
    sequences = ones * (max(num_sequences, 1) if normalizer is None else normalizer)
    if objective.aggregation == "seq_mean_token_mean":
        lengths = counted.new_zeros(num_sequences).index_add(0, sequence, counted)
        return sequences * lengths.clamp(min=1)[sequence]
    if objective.aggregation == "seq_mean_token_sum_norm":
        return sequences * objective.length
    return sequences
