"""Policy-gradient losses (GRPO and its family) from log-probabilities."""

import torch
from torch import Tensor

from r1kernels import check
from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import PolicyInputs, prepare
from r1kernels.policy_terms import METRICS, policy_terms
from r1kernels.reference.policy_loss import PolicyLoss


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
    """The loss that `objective` names, sum_t w_t term_t, with its gradient in closed form.

    Derivatives are made in the forward and kept, two vectors; PolicyObjective has the formulas.

    Args:
        logp: packed [T] or padded [B, S], a floating dtype: log-probability of each token.
        advantages: like logp, or [B], one per sequence. Where T == B it is read as per token.
        objective: the loss.
        logp_old: like logp: before the update, same weights as the sampler's; None: the detached
            logp, ratio exactly 1.
        logp_ref: like logp: the reference model's; required when objective.kl_coef is not 0.
        logp_sampler: like logp: the sampler's own; required by a sampler_correction. NaN: unknown,
            that token is not corrected.
        entropy: like logp; required by entropy_coef and top_entropy_quantile.
        mask: like logp, bool or number: 0 where a token is not counted. NaN there never spreads.
        weights: like logp: multiplied into the loss after aggregation's own weights.
        cu_seqlens: int32 or int64 [B + 1] of packed tokens; required where sequences matter.
        normalizer: a number or 0-d tensor in place of the local count: of counted tokens for
            aggregation "token_mean", of sequences for the others (objective.counts). Pass the
            global one, and sum the losses, under accumulation and data parallelism. A tensor
            does not recompile under torch.compile.

    Returns:
        PolicyLoss(loss, logp, metrics): loss 0-d, logp like the argument, both float32 (float64
        when logp is); metrics by the names of r1kernels.policy_terms.METRICS, on logp's device.

    Gradients: logp and entropy, once; the other tensors get none.
    Numerics: float32, sums over tokens in float64; log-ratios are clamped to +-20 before exp, with
        derivative 0 beyond, and counted in metrics["clamped"]. Deterministic.
    Raises: TypeError on dtypes; ValueError on shapes, devices, cu_seqlens and missing tensors.
    """
    check.floating("logp", logp)
    inputs = prepare(
        objective,
        logp.shape,
        advantages,
        device=logp.device,
        dtype=torch.float64 if logp.dtype == torch.float64 else torch.float32,
        logp_old=logp_old,
        logp_ref=logp_ref,
        logp_sampler=logp_sampler,
        entropy=entropy,
        mask=mask,
        weights=weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
    )
    return from_inputs(objective, logp, inputs)


def from_inputs(objective: PolicyObjective, logp: Tensor, inputs: PolicyInputs) -> PolicyLoss:
    """`policy_loss` on arguments that `prepare` has checked."""
    logp_T = logp.reshape(-1).to(inputs.weights_T.dtype)
    loss, _, _, metrics = _policy_loss_fwd(logp_T, *inputs, objective.spec)
    seen = torch.where(inputs.weights_T != 0, logp_T.detach(), 0.0).view(logp.shape)
    return PolicyLoss(loss, seen, dict(zip(METRICS, metrics.unbind(), strict=True)))


@torch.library.custom_op("r1kernels::policy_loss_fwd", mutates_args=())
def _policy_loss_fwd(
    logp: Tensor,
    advantages: Tensor,
    logp_old: Tensor | None,
    logp_ref: Tensor | None,
    logp_sampler: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor,
    sequence: Tensor | None,
    num_sequences: int,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = PolicyInputs(
        advantages, logp_old, logp_ref, logp_sampler, entropy, weights, sequence, num_sequences
    )
    terms = policy_terms(PolicyObjective.from_spec(objective), logp, inputs)
    dentropy = terms.dentropy_T if terms.dentropy_T is not None else logp.new_empty(0)
    return terms.loss, terms.dlogp_T, dentropy, terms.metrics


@_policy_loss_fwd.register_fake
def _(
    logp: Tensor,
    advantages: Tensor,
    logp_old: Tensor | None,
    logp_ref: Tensor | None,
    logp_sampler: Tensor | None,
    entropy: Tensor | None,
    weights: Tensor,
    sequence: Tensor | None,
    num_sequences: int,
    objective: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_bonus = PolicyObjective.from_spec(objective).entropy_coef != 0
    return (
        logp.new_empty(()),
        torch.empty_like(logp),
        torch.empty_like(logp) if has_bonus else logp.new_empty(0),
        logp.new_empty(len(METRICS), dtype=torch.float64),
    )


def _setup_context(ctx, inputs, output) -> None:
    _, dlogp, dentropy, metrics = output
    ctx.mark_non_differentiable(dlogp, dentropy, metrics)
    ctx.save_for_backward(dlogp, dentropy)
    ctx.has_entropy = inputs[5] is not None


def _backward(ctx, dloss: Tensor, *_) -> tuple[Tensor | None, ...]:
    check.no_second_derivative("policy_loss")
    dlogp, dentropy = ctx.saved_tensors
    grads = [None] * 10
    grads[0] = dloss * dlogp
    if ctx.has_entropy and dentropy.numel():
        grads[5] = dloss * dentropy
    return tuple(grads)


_policy_loss_fwd.register_autograd(_backward, setup_context=_setup_context)
