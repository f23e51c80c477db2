"""Linear head and policy loss in one op: gradients are made while the logits are there."""

import torch
from torch import Tensor

from r1kernels import check, chunked_head
from r1kernels.backend import implementation, isolated
from r1kernels.check import IGNORE
from r1kernels.chunked_head import Gradients, Head, Rows, unscaled_dtype
from r1kernels.linear_logp import check_head
from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import PolicyInputs, prepare
from r1kernels.policy_terms import METRICS, policy_terms
from r1kernels.reference.policy_loss import PolicyLoss
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import counted_rows, per_row, spread


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    prior: Tensor | None = None,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
    logp_sampler: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    workspace_mb: int | None = None,
) -> PolicyLoss:
    """`policy_loss` of `linear_logp`'s log-probabilities, with the logits made once.

    Three GEMMs where a row's coefficient needs only the row. Objectives over sequences or the batch
    take a second pass, over the rows with a coefficient, unless all rows fit one chunk. Rows that
    do not count enter no GEMM; on the CPU, rows without a coefficient only the first.

    Args:
        hidden: packed [T, D] or padded [B, S, D], float32, bfloat16 or float16.
        weight, targets, bias, temperature, softcap, logit_scale, workspace_mb: as `linear_logp`.
        advantages, objective, logp_old, logp_ref, logp_sampler, mask, weights, cu_seqlens,
            normalizer: as `policy_loss`.
        entropy: fill metrics["entropy"] even where the objective does not need it.
        prior: as `linear_logp`. Give both calls the same prior (or none), the same workspace_mb
            and the same rows that count: then the ratio of an unchanged policy is exactly 1.

    Returns:
        PolicyLoss(loss, logp, metrics): loss 0-d float32; logp like targets, detached; metrics as
            `policy_loss`.

    Gradients: hidden, weight and bias, once.
    Numerics: as `linear_logp` and `policy_loss`. Deterministic.
    Raises: ValueError and TypeError as both.
    Source: docs/ops/linear_logp.md.
    """
    leading, options = check_head(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, workspace_mb
    )
    counted = targets != IGNORE
    if mask is not None:
        check.shape("mask", mask, leading, "that of the targets")
        check.device("mask", mask, hidden.device)
        counted &= mask.bool()
    inputs = prepare(
        objective,
        leading,
        advantages,
        device=hidden.device,
        logp_old=logp_old,
        logp_ref=logp_ref,
        logp_sampler=logp_sampler,
        mask=counted,
        weights=weights,
        cu_seqlens=cu_seqlens,
        normalizer=normalizer,
        has_entropy=True,
    )
    needs = [
        x is not None and torch.is_grad_enabled() and x.requires_grad
        for x in (hidden, weight, bias)
    ]
    loss, logp_T, metrics, *_ = _linear_policy_loss_fwd(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        # A token that weighs nothing is one that does not count.
        torch.where(inputs.weights_T != 0, targets.reshape(-1), IGNORE),
        bias,
        *options,
        per_row("prior", prior, leading, hidden),
        inputs.advantages_T,
        inputs.logp_old_T,
        inputs.logp_ref_T,
        inputs.logp_sampler_T,
        inputs.weights_T,
        inputs.sequence_T,
        inputs.num_sequences,
        objective.spec,
        entropy or objective.entropy_coef != 0 or objective.top_entropy_quantile < 1,
        needs,
        workspace_mb,
    )
    return PolicyLoss(
        loss, logp_T.detach().view(leading), dict(zip(METRICS, metrics.unbind(), strict=True))
    )


@torch.library.custom_op("r1kernels::linear_policy_loss_fwd", mutates_args=())
@isolated
def _linear_policy_loss_fwd(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    prior_T: Tensor | None,
    advantages_T: Tensor,
    logp_old_T: Tensor | None,
    logp_ref_T: Tensor | None,
    logp_sampler_T: Tensor | None,
    weights_T: Tensor,
    sequence_T: Tensor | None,
    num_sequences: int,
    objective: str,
    entropy: bool,
    needs: list[bool],
    workspace_mb: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, logp, metrics, dhidden, dweight, dbias); those of the head are float32.

    Gradients that `needs` does not ask for are empty.
    """
    run = implementation("linear_logp", hidden_TD.device.type, hidden_TD, weight_VD)
    head = Head(weight_VD, bias_V, softcap, logit_scale)
    terms_of = PolicyObjective.from_spec(objective)
    rows = Rows(hidden_TD, targets_T, temperature_T, prior_T)
    streams = (advantages_T, logp_old_T, logp_ref_T, logp_sampler_T, weights_T, sequence_T)
    at = counted_rows(targets_T, weight_VD.shape[0], temperature_T)
    if at is not None:
        rows = rows.take(at)
        streams = tuple(None if x is None else x[at] for x in streams)
    loss = hidden_TD.new_zeros((), dtype=torch.float64)
    metrics = hidden_TD.new_zeros(len(METRICS), dtype=torch.float64)

    def coefficients(part: slice, stats: Logp) -> tuple[Tensor, Tensor | None]:
        *tensors, weights_C, sequence_C = (None if x is None else x[part] for x in streams)
        inputs = PolicyInputs(*tensors, stats.entropy, weights_C, sequence_C, num_sequences)
        terms = policy_terms(terms_of, stats.logp, inputs)
        loss.add_(terms.loss)
        metrics.add_(terms.metrics)
        return terms.dlogp_T, terms.dentropy_T

    grads = Gradients.zeros(head, *needs)
    stats, dhidden_TD = chunked_head.fused(
        run.HeadChunk,
        head,
        rows,
        entropy,
        terms_of.entropy_coef != 0,
        terms_of.scope != "token",
        coefficients,
        grads,
        workspace_mb,
    )
    none = hidden_TD.new_empty(0, dtype=torch.float32)
    return (
        loss.float(),
        spread(stats.logp.float(), at, len(targets_T)),
        metrics,
        none if dhidden_TD is None else spread(dhidden_TD, at, len(targets_T)),
        none.clone() if grads.weight_VD is None else grads.weight_VD,
        none.clone() if grads.bias_V is None else grads.bias_V,
    )


@_linear_policy_loss_fwd.register_fake
def _(hidden_TD, weight_VD, targets_T, bias_V, *rest):
    hidden_needed, weight_needed, bias_needed = rest[-2]

    def wide(*shape: int) -> Tensor:
        return hidden_TD.new_empty(shape, dtype=torch.float32)

    return (
        wide(),
        wide(*targets_T.shape),
        hidden_TD.new_empty(len(METRICS), dtype=torch.float64),
        hidden_TD.new_empty(hidden_TD.shape, dtype=unscaled_dtype(hidden_TD.dtype))
        if hidden_needed
        else wide(0),
        wide(*weight_VD.shape) if weight_needed else wide(0),
        wide(*bias_V.shape) if bias_needed else wide(0),
    )


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.needs = inputs[-2]
    ctx.dtypes = [None if x is None else x.dtype for x in (inputs[0], inputs[1], inputs[3])]


def _grad(ctx, dloss, *_):
    check.no_second_derivative("linear_policy_loss")
    grads = [None] * 19
    # Looked at only where that stops nobody: on the CPU, and not while torch.compile traces.
    unscaled = type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.item() == 1.0
    for at, grad, dtype, need in zip(
        (0, 1, 3), ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True
    ):
        if need:
            grads[at] = (grad if unscaled else grad * dloss).to(dtype)
    return tuple(grads)


_linear_policy_loss_fwd.register_autograd(_grad, setup_context=_setup)
