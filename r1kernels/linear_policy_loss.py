"""Linear head and policy loss in one op: gradients are made while the logits are there."""

import torch
from torch import Tensor

from r1kernels import check, chunked_head, head_inputs
from r1kernels.backend import isolated
from r1kernels.check import IGNORE
from r1kernels.chunked_head import Gradients, unscaled_dtype
from r1kernels.head_inputs import split
from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import PolicyInputs, prepare
from r1kernels.policy_terms import METRICS, policy_terms
from r1kernels.reference.policy_loss import PolicyLoss
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import spread


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
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
        weight, targets, bias, lora, temperature, softcap, logit_scale, workspace_mb: as
            `linear_logp`.
        advantages, objective, logp_old, logp_ref, logp_sampler, mask, weights, cu_seqlens,
            normalizer: as `policy_loss`.
        entropy: fill metrics["entropy"] even where the objective does not need it.
        prior: as `linear_logp`. Give both calls the same prior (or none), the same workspace_mb
            and the same rows that count: then the ratio of an unchanged policy is exactly 1.

    Returns:
        PolicyLoss(loss, logp, metrics): loss 0-d float32; logp like targets, detached; metrics as
            `policy_loss`.

    Gradients: hidden, weight, bias, A and B, once.
    Numerics: as `linear_logp` and `policy_loss`. Deterministic.
    Raises: ValueError and TypeError as both.
    Source: docs/ops/linear_logp.md.
    """
    call = head_inputs.head_inputs(
        hidden, weight, targets, bias, lora, temperature, softcap, logit_scale, prior, workspace_mb
    )
    leading = targets.shape
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
    # A token that weighs nothing is one that does not count.
    targets_T = torch.where(inputs.weights_T != 0, call.targets_T, IGNORE)
    loss, logp_T, metrics, *_ = _linear_policy_loss_fwd(
        *call._replace(targets_T=targets_T),
        inputs.advantages_T,
        inputs.logp_old_T,
        inputs.logp_ref_T,
        inputs.logp_sampler_T,
        inputs.weights_T,
        inputs.sequence_T,
        inputs.num_sequences,
        objective.spec,
        entropy or objective.entropy_coef != 0 or objective.top_entropy_quantile < 1,
        call.wants(),
        workspace_mb,
    )
    return PolicyLoss(
        loss, logp_T.detach().view(leading), dict(zip(METRICS, metrics.unbind(), strict=True))
    )


@torch.library.custom_op(
    "r1kernels::linear_policy_loss_fwd",
    mutates_args=(),
    schema=f"({head_inputs.SCHEMA}, Tensor advantages_T, Tensor? logp_old_T, Tensor? logp_ref_T, "
    "Tensor? logp_sampler_T, Tensor weights_T, Tensor? sequence_T, int num_sequences, "
    "str objective, bool entropy, bool[] needs, int? workspace_mb) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@isolated
def _linear_policy_loss_fwd(*args):
    """(loss, logp, metrics, dhidden, dweight, dbias, dA, dB); those of the head are float32.

    Gradients that `needs` does not ask for are empty.
    """
    call, (*streams, num_sequences, objective, entropy, needs, workspace_mb) = split(args)
    chunk, head, rows, at = call.start()
    if at is not None:
        streams = tuple(None if x is None else x[at] for x in streams)
    terms_of = PolicyObjective.from_spec(objective)
    loss = call.hidden_TD.new_zeros((), dtype=torch.float64)
    metrics = call.hidden_TD.new_zeros(len(METRICS), dtype=torch.float64)

    def coefficients(part: slice, stats: Logp) -> tuple[Tensor, Tensor | None]:
        *tensors, weights_C, sequence_C = (None if x is None else x[part] for x in streams)
        inputs = PolicyInputs(*tensors, stats.entropy, weights_C, sequence_C, num_sequences)
        terms = policy_terms(terms_of, stats.logp, inputs)
        loss.add_(terms.loss)
        metrics.add_(terms.metrics)
        return terms.dlogp_T, terms.dentropy_T

    grads = Gradients.zeros(head, *needs)
    stats, dhidden_TD = chunked_head.fused(
        chunk,
        head,
        rows,
        entropy,
        terms_of.entropy_coef != 0,
        terms_of.scope != "token",
        coefficients,
        grads,
        workspace_mb,
    )
    none = call.hidden_TD.new_empty(0, dtype=torch.float32)
    total = len(call.targets_T)
    return (
        loss.float(),
        spread(stats.logp.float(), at, total),
        metrics,
        none if dhidden_TD is None else spread(dhidden_TD, at, total),
        *(none.clone() if x is None else x for x in grads.of_head),
    )


@_linear_policy_loss_fwd.register_fake
def _(*args):
    call, (*_, needs, _) = split(args)

    def wide(*shape: int) -> Tensor:
        return call.hidden_TD.new_empty(shape, dtype=torch.float32)

    hidden_TD = call.hidden_TD
    return (
        wide(),
        wide(*call.targets_T.shape),
        hidden_TD.new_empty(len(METRICS), dtype=torch.float64),
        hidden_TD.new_empty(hidden_TD.shape, dtype=unscaled_dtype(hidden_TD.dtype))
        if needs[0]
        else wide(0),
        *(
            wide(*x.shape) if need else wide(0)
            for x, need in zip(call.trained[1:], needs[1:], strict=True)
        ),
    )


def _setup(ctx, inputs, output):
    call, (*_, ctx.needs, _) = split(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.others = len(inputs) - head_inputs.COUNT
    ctx.dtypes = [None if x is None else x.dtype for x in call.trained]


def _grad(ctx, dloss, *_):
    check.no_second_derivative("linear_policy_loss")
    # Looked at only where that stops nobody: on the CPU, and not while torch.compile traces.
    unscaled = type(dloss) is Tensor and dloss.device.type == "cpu" and dloss.item() == 1.0
    found = (
        (grad if unscaled else grad * dloss).to(dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    )
    return *head_inputs.gradients(*found), *[None] * ctx.others


_linear_policy_loss_fwd.register_autograd(_grad, setup_context=_setup)
