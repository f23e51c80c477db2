"""The policy losses in closed form: a call's loss and its derivatives by logp and by entropy.

Plain torch on per-token vectors: no autograd, no host synchronisation, any device. Derivation, with
d = l - l_old, a = w keep c the weight of a surrogate term, and rho the logarithm of the ratio (d,
or its mean over the sequence): a surrogate is f(l, rho), and a KL term kappa(l), times exp(rho)
when corrected. Then

    dL/dl_t = a_t f_l + w_t beta kappa_l [exp(rho)]
              + sum_u (a_u f_rho + w_u beta kappa_u exp(rho)) drho_u / dl_t

where the sum has the one term u = t at token level, and runs over the sequence with drho_u / dl_t =
1 / n at sequence level.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import PolicyInputs, spread_sum

# What may be exponentiated: ratios and k3 stay finite in float32, products of two of them too. A
# clamped exponent has derivative 0, and its token is counted in the metric "clamped".
LOG_RATIO_MAX = 20.0

# Sums and counts over the tokens of nonzero weight.
METRICS = (
    "tokens",  # how many
    "active",  # with a nonzero derivative by logp or entropy
    "policy_loss",  # the loss's surrogate, KL and entropy parts
    "kl_loss",
    "entropy_loss",
    "logp",
    "ratio",
    "clip_low",  # clipped below, A < 0
    "clip_high",  # clipped above (cispo: truncated), A > 0
    "clip_max",  # dual clip, A < 0
    "clamped",  # an exponent left [-LOG_RATIO_MAX, LOG_RATIO_MAX]
    "kl",  # the objective's estimator, neither corrected nor weighted; 0 without logp_ref
    "entropy",  # 0 without entropy
    "entropy_dropped",  # below the entropy quantile
    "off_policy_dropped",
    "sampler_gap",  # |l_old - l_sampler|; 0 without logp_sampler
    "sampler_ratio",  # the correction c, after cap or mask; 1 without
    "sampler_capped",  # truncated or masked by it
)


class PolicyTerms(NamedTuple):
    """loss: 0-d; dlogp_T, dentropy_T: its derivatives; metrics: float64 [len(METRICS)]."""

    loss: Tensor
    dlogp_T: Tensor
    dentropy_T: Tensor | None
    metrics: Tensor


def policy_terms(objective: PolicyObjective, logp_T: Tensor, inputs: PolicyInputs) -> PolicyTerms:
    """Loss, derivatives and metrics of `objective` at logp [T]; see PolicyObjective for formulas.

    float32 inside and out, float64 when logp is; sums over tokens in float64. Deterministic. When
    objective.scope is "token" the terms of any split of the tokens add up to those of the whole.
    """
    dtype = torch.float64 if logp_T.dtype == torch.float64 else torch.float32
    weights_T = inputs.weights_T.to(dtype)
    counted_T = weights_T != 0

    def clean(x_T: Tensor | None) -> Tensor | None:
        # A token of weight 0 may hold NaN or inf, and 0 * NaN is NaN: it goes before anything else.
        return None if x_T is None else torch.where(counted_T, x_T.to(dtype), 0.0)

    logp_T = clean(logp_T)
    advantages_T = clean(inputs.advantages_T)
    logp_old_T = logp_T if inputs.logp_old_T is None else clean(inputs.logp_old_T)
    logp_ref_T = clean(inputs.logp_ref_T)
    logp_sampler_T = clean(inputs.logp_sampler_T)
    entropy_T = clean(inputs.entropy_T)

    def sequence_sum(x_T: Tensor) -> Tensor:
        """For each token the sum over its sequence, float64."""
        return spread_sum(x_T, inputs.sequence_T, inputs.num_sequences)

    # The importance ratio, and the derivative of the sum of v_t rho_t by each logp.
    log_ratio_T = logp_T - logp_old_T
    if objective.ratio_level == "sequence":
        length_T = sequence_sum(counted_T).clamp(min=1)
        log_ratio_T = (sequence_sum(log_ratio_T) / length_T).to(dtype)
    ratio_T, inside_T = clamped_exp(log_ratio_T)
    clamped_T = ~inside_T
    dratio_T = ratio_T * inside_T

    # The surrogate f(l, rho), its partial derivatives, and which bound cut it.
    none_T = torch.zeros_like(counted_T)
    clip_low_T = clip_high_T = clip_max_T = none_T
    zero_T = torch.zeros_like(logp_T)
    by_logp_T = by_log_ratio_T = zero_T
    if objective.surrogate == "clip":
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        clip_low_T = (advantages_T < 0) & (ratio_T < low)
        clip_high_T = (advantages_T > 0) & (ratio_T > high)
        bounded_T = torch.where(advantages_T < 0, ratio_T.clamp(min=low), ratio_T.clamp(max=high))
        if objective.clip_max is not None:
            clip_max_T = (advantages_T < 0) & (ratio_T > objective.clip_max)
            bounded_T = torch.where(clip_max_T, objective.clip_max, bounded_T)
        surrogate_T = -bounded_T * advantages_T
        unclipped_T = ~(clip_low_T | clip_high_T | clip_max_T)
        by_log_ratio_T = -advantages_T * dratio_T * unclipped_T
    elif objective.surrogate == "cispo":
        clip_high_T = (advantages_T > 0) & (ratio_T > objective.clip_max)
        by_logp_T = -ratio_T.clamp(max=objective.clip_max) * advantages_T
        surrogate_T = by_logp_T * logp_T
    elif objective.surrogate == "sapo":
        positive, negative = objective.sapo_temperature
        heat_T = torch.where(advantages_T > 0, positive, negative).to(dtype)
        # torch.sigmoid gives a number other bits in other places of a tensor.
        gate_T = 1 / (1 + torch.exp(heat_T * (1 - ratio_T)))
        surrogate_T = -advantages_T * gate_T * 4 / heat_T
        by_log_ratio_T = -advantages_T * 4 * gate_T * (1 - gate_T) * dratio_T
    elif objective.surrogate == "reinforce":
        by_logp_T = -advantages_T
        surrogate_T = by_logp_T * logp_T
    else:
        assert objective.surrogate == "mirror_descent"
        by_logp_T = -advantages_T
        # At sequence level log_ratio is the mean, so the sum over the sequence is n times it.
        by_log_ratio_T = objective.mirror_tau * log_ratio_T
        if objective.ratio_level == "sequence":
            by_log_ratio_T = (by_log_ratio_T * length_T).to(dtype)
        surrogate_T = by_logp_T * logp_T + by_log_ratio_T * log_ratio_T / 2

    # What multiplies the surrogate: sampler correction, off-policy mask, entropy quantile.
    correction_T, capped_T, gap_T = torch.ones_like(logp_T), none_T, zero_T
    if logp_sampler_T is not None:
        # A token its sampler could not score (NaN) has no correction, as in TRL.
        gap_T = torch.where(logp_sampler_T.isnan(), 0.0, logp_old_T - logp_sampler_T)
        if objective.sampler_correction != "none":
            level, _, action = objective.sampler_correction.partition("_")
            log_correction_T = sequence_sum(gap_T).to(dtype) if level == "sequence" else gap_T
            correction_T, inside_T = clamped_exp(log_correction_T)
            clamped_T = clamped_T | ~inside_T
            capped_T = correction_T > objective.sampler_cap
            kept = objective.sampler_cap if action == "truncate" else 0.0
            correction_T = torch.where(capped_T, kept, correction_T)
    off_policy_T = none_T
    if objective.off_policy_threshold is not None:
        drift_T = logp_old_T - logp_T if logp_sampler_T is None else logp_sampler_T - logp_T
        drift_T = torch.where(drift_T.isnan(), 0.0, drift_T)
        mean_T = sequence_sum(drift_T) / sequence_sum(counted_T).clamp(min=1)
        off_policy_T = (advantages_T < 0) & (mean_T > objective.off_policy_threshold)
    low_entropy_T = none_T
    if objective.top_entropy_quantile < 1:
        floor = masked_quantile(entropy_T, counted_T, 1 - objective.top_entropy_quantile)
        low_entropy_T = entropy_T < floor
    surrogate_weights_T = weights_T * correction_T * ~(off_policy_T | low_entropy_T)

    # KL to the reference.
    kl_T, kl_loss_T = zero_T, zero_T
    dlogp_T = surrogate_weights_T * by_logp_T
    dlog_ratio_T = surrogate_weights_T * by_log_ratio_T
    if logp_ref_T is not None:
        kl_T, dkl_T, inside_T = kl_estimate(objective.kl_estimator, logp_T, logp_ref_T)
        clamped_T = clamped_T | ~inside_T
        if objective.kl_coef != 0:
            kl_weights_T = weights_T * objective.kl_coef
            kl_loss_T = kl_weights_T * kl_T
            if objective.kl_ratio_corrected:
                dlogp_T = dlogp_T + kl_weights_T * dkl_T * ratio_T
                dlog_ratio_T = dlog_ratio_T + kl_loss_T * dratio_T
                kl_loss_T = kl_loss_T * ratio_T
            else:
                dlogp_T = dlogp_T + kl_weights_T * dkl_T

    if objective.ratio_level == "sequence":
        dlog_ratio_T = (sequence_sum(dlog_ratio_T) / length_T).to(dtype)
    dlogp_T = torch.where(counted_T, dlogp_T + dlog_ratio_T, 0.0)
    active_T = dlogp_T != 0

    dentropy_T, entropy_loss_T = None, zero_T
    if objective.entropy_coef != 0:
        dentropy_T = -objective.entropy_coef * weights_T * ~low_entropy_T
        entropy_loss_T = dentropy_T * entropy_T
        active_T = active_T | (dentropy_T != 0)

    policy_loss_T = surrogate_weights_T * surrogate_T
    sums = {
        "tokens": counted_T,
        "active": active_T,
        "policy_loss": policy_loss_T,
        "kl_loss": kl_loss_T,
        "entropy_loss": entropy_loss_T,
        "logp": logp_T,
        "ratio": ratio_T * counted_T,
        "clip_low": clip_low_T,
        "clip_high": clip_high_T,
        "clip_max": clip_max_T,
        "clamped": clamped_T & counted_T,
        "kl": kl_T,
        "entropy": zero_T if entropy_T is None else entropy_T,
        "entropy_dropped": low_entropy_T & counted_T,
        "off_policy_dropped": off_policy_T,
        "sampler_gap": gap_T.abs(),
        "sampler_ratio": correction_T * counted_T,
        "sampler_capped": capped_T & counted_T,
    }
    assert tuple(sums) == METRICS
    metrics = torch.stack([x_T.sum(dtype=torch.float64) for x_T in sums.values()])
    return PolicyTerms(metrics[2:5].sum().to(dtype), dlogp_T, dentropy_T, metrics)


def clamped_exp(x_T: Tensor) -> tuple[Tensor, Tensor]:
    """exp of x clamped to the range, and where x was inside it."""
    return x_T.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).exp(), x_T.abs() <= LOG_RATIO_MAX


def kl_estimate(estimator: str, logp_T: Tensor, logp_ref_T: Tensor) -> tuple[Tensor, ...]:
    """Schulman's k1, k2 or k3, its derivative by logp, and where its exponent was not clamped."""
    x_T = logp_ref_T - logp_T
    inside_T = torch.ones_like(x_T, dtype=torch.bool)
    if estimator == "k1":
        return -x_T, torch.ones_like(x_T), inside_T
    if estimator == "k2":
        return x_T.square() / 2, -x_T, inside_T
    inside_T = x_T.abs() <= LOG_RATIO_MAX
    x_T = x_T.clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX)
    grown_T = x_T.expm1()
    return grown_T - x_T, -grown_T * inside_T, inside_T


def masked_quantile(x_T: Tensor, mask_T: Tensor, q: float) -> Tensor:
    """torch.quantile(x[mask], q), 0-d, without a shape that depends on the mask; NaN-free x."""
    if x_T.shape[0] == 0:
        return x_T.new_zeros(())
    sorted_T = torch.where(mask_T, x_T, torch.inf).sort().values
    place = (mask_T.sum() - 1).clamp(min=0).double() * q
    below = place.floor()
    ends = sorted_T[torch.stack([below, place.ceil()]).long()]
    return torch.lerp(ends[0], ends[1], (place - below).to(x_T.dtype))
