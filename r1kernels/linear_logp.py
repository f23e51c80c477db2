"""Log-probability and entropy of target tokens from hidden states; logits never stored whole."""

import torch
from torch import Tensor

from r1kernels import chunked_head
from r1kernels.backend import implementation, isolated
from r1kernels.check import IGNORE, describe, device, dtype_in, no_second_derivative, shape
from r1kernels.chunked_head import Gradients, Head, Rows
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import (
    DTYPES,
    Scaling,
    check_targets,
    counted_rows,
    per_row,
    positive,
    scaling,
    spread,
)


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    prior: Tensor | None = None,
    workspace_mb: int | None = None,
) -> Logp:
    """`logp = l[target] - logsumexp(l)` of the logits of a linear head.

    `l = softcap tanh(logit_scale (hidden W^T + bias) / softcap) / temperature`. With a head that
    needs no gradient the forward also makes d logp / d hidden, and any loss on the result costs two
    GEMMs in all. With a trainable head the backward makes the logits again. For a policy loss
    `linear_policy_loss` is cheaper than either.

    Args:
        hidden: [..., D] float32, bfloat16 or float16.
        weight: [V, D], dtype and device of hidden.
        targets: [...] int64 in [0, V), or IGNORE (-100): results 0, no gradient, the row enters no
            product.
        bias: [V], or None.
        temperature: float, or [...] float32 for one per token; > 0. Gets no gradient.
        softcap: > 0, or None.
        logit_scale: > 0.
        entropy: also return the entropy.
        prior: [...] an earlier log-probability of the targets (the sampler's, the old policy's).
            Any value is safe; a close one spares a GPU the redo of its row.
        workspace_mb: MiB for the logits of a chunk; default 256 on the CPU, 1280 on a GPU.

    Returns:
        Logp(logp, entropy | None, lse): [...] float32, in nats. Gradients flow to hidden, weight
        and bias through all three.

    Numerics: float32 logits and exponentials, float64 statistics up to the backward; weight
        gradients accumulate in float32; logp is never above 0. Deterministic.
    Raises: ValueError on shapes, devices, temperatures or targets out of range; TypeError on
        dtypes.
    Source: docs/ops/linear_logp.md.
    """
    leading, options = check_head(
        hidden, weight, targets, bias, temperature, softcap, logit_scale, workspace_mb
    )
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not trains_head
    logp_T, entropy_T, lse_T, *_ = linear_logp_fwd(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        *options,
        per_row("prior", prior, leading, hidden),
        entropy,
        frozen,
        workspace_mb,
    )
    return Logp(
        logp_T.view(leading), entropy_T.view(leading) if entropy else None, lse_T.view(leading)
    )


def check_head(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    temperature: object,
    softcap: object,
    logit_scale: object,
    workspace_mb: object,
) -> tuple[torch.Size, Scaling]:
    """The leading shape and the checked options of a call on a linear head."""
    dtype_in("hidden", hidden, DTYPES)
    dtype_in("weight", weight, (hidden.dtype,))
    if hidden.ndim < 1 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must be [V, D] and hidden [..., D], "
            f"got {describe(weight)} and {describe(hidden)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's width {weight.shape[1]}, got {describe(hidden)}"
        )
    device("weight", weight, hidden.device)
    if bias is not None:
        dtype_in("bias", bias, (hidden.dtype, torch.float32))
        shape("bias", bias, weight.shape[:1], "one per vocabulary entry")
        device("bias", bias, hidden.device)
    if workspace_mb is not None:
        positive("workspace_mb", workspace_mb)
        if not isinstance(workspace_mb, int):
            raise TypeError(f"workspace_mb must be an int, got {workspace_mb!r}")
    leading = hidden.shape[:-1]
    check_targets(targets, leading, hidden)
    return leading, scaling(temperature, softcap, logit_scale, leading, hidden)


@torch.library.custom_op("r1kernels::linear_logp_fwd", mutates_args=())
@isolated
def linear_logp_fwd(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    prior_T: Tensor | None,
    entropy: bool,
    frozen: bool,
    workspace_mb: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy, lse, float64 [3, T] of the same, d logp / d hidden, d entropy / d hidden).

    What was not asked for is empty.
    """
    run = implementation("linear_logp", hidden_TD.device.type, hidden_TD, weight_VD)
    head = Head(weight_VD, bias_V, softcap, logit_scale)
    at = counted_rows(targets_T, weight_VD.shape[0], temperature_T)
    rows = Rows(hidden_TD, targets_T, temperature_T, prior_T)
    rows = rows if at is None else rows.take(at)
    jac_TD = jac_entropy_TD = None
    if frozen:
        stats, jac_TD, jac_entropy_TD = chunked_head.jacobian(
            run.HeadChunk, head, rows, entropy, workspace_mb
        )
    else:
        stats = chunked_head.forward(run.HeadChunk, head, rows, entropy, workspace_mb)
    none = hidden_TD.new_empty(0, dtype=torch.float32)
    exact_3T = torch.stack([stats.lse if x is None else x for x in stats])
    exact_3T = exact_3T if at is None else spread(exact_3T.T, at, len(targets_T)).T.contiguous()
    logp_T, entropy_T, lse_T = exact_3T.float()
    jacobians = (
        none.clone() if x is None else spread(x, at, len(targets_T))
        for x in (jac_TD, jac_entropy_TD)
    )
    return (
        logp_T.clone(),
        entropy_T.clone() if entropy else none,
        lse_T.clone(),
        exact_3T,
        *jacobians,
    )


@linear_logp_fwd.register_fake
def _(
    hidden_TD,
    weight_VD,
    targets_T,
    bias_V,
    temperature_T,
    softcap,
    logit_scale,
    prior_T,
    entropy,
    frozen,
    workspace_mb,
):
    def rows(wanted: bool) -> Tensor:
        return hidden_TD.new_empty(targets_T.shape if wanted else 0, dtype=torch.float32)

    def jacobian(wanted: bool) -> Tensor:
        return hidden_TD.new_empty(hidden_TD.shape if wanted else 0, dtype=torch.float32)

    exact_3T = hidden_TD.new_empty((3, *targets_T.shape), dtype=torch.float64)
    return (
        rows(True),
        rows(entropy),
        rows(True),
        exact_3T,
        jacobian(frozen),
        jacobian(frozen and entropy),
    )


@torch.library.custom_op("r1kernels::linear_logp_bwd", mutates_args=())
@isolated
def linear_logp_bwd(
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor | None,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    bias_V: Tensor | None,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    exact_3T: Tensor,
    needs: list[bool],
    workspace_mb: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias) by recomputation; empty what `needs` does not ask for."""
    run = implementation("linear_logp", hidden_TD.device.type, hidden_TD, weight_VD)
    head = Head(weight_VD, bias_V, softcap, logit_scale)
    at = counted_rows(targets_T, weight_VD.shape[0], temperature_T)
    rows = Rows(hidden_TD, targets_T, temperature_T, None)
    logp_T, entropy_T, lse_T = exact_3T
    stats = Logp(logp_T, None if dentropy_T is None else entropy_T, lse_T)
    if at is not None:
        rows = rows.take(at)
        stats = Logp(*(None if x is None else x[at] for x in stats))
        dlogp_T, dentropy_T, dlse_T = (
            None if x is None else x[at] for x in (dlogp_T, dentropy_T, dlse_T)
        )
    grads = Gradients.zeros(head, *needs)
    dhidden_TD = chunked_head.backward(
        run.HeadChunk, head, rows, stats, dlogp_T, dentropy_T, dlse_T, grads, workspace_mb
    )
    none = hidden_TD.new_empty(0)
    return (
        none if dhidden_TD is None else spread(dhidden_TD, at, len(targets_T)),
        none.clone() if grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype),
        none.clone() if grads.bias_V is None else grads.bias_V.to(bias_V.dtype),
    )


@linear_logp_bwd.register_fake
def _(dlogp_T, dentropy_T, dlse_T, hidden_TD, weight_VD, targets_T, bias_V, *rest):
    needs = rest[-2]
    wanted = zip((hidden_TD, weight_VD, bias_V), needs, strict=True)
    return tuple(x.new_empty(x.shape) if need else hidden_TD.new_empty(0) for x, need in wanted)


def _setup(ctx, inputs, output):
    (
        hidden_TD,
        weight_VD,
        targets_T,
        bias_V,
        temperature_T,
        ctx.softcap,
        ctx.logit_scale,
        _,
        ctx.entropy,
        ctx.frozen,
        ctx.workspace_mb,
    ) = inputs
    _, _, _, exact_3T, jac_TD, jac_entropy_TD = output
    ctx.mark_non_differentiable(exact_3T, jac_TD, jac_entropy_TD)
    # None, not zeros, for an output that the loss does not use: without dlse the Jacobian will do.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden_TD, weight_VD, targets_T, bias_V, temperature_T, exact_3T, jac_TD, jac_entropy_TD
    )


def _grad(ctx, dlogp_T, dentropy_T, dlse_T, *_):
    no_second_derivative("linear_logp")
    hidden_TD, weight_VD, targets_T, bias_V, temperature_T, exact_3T, jac_TD, jac_entropy_TD = (
        ctx.saved_tensors
    )
    dentropy_T = dentropy_T if ctx.entropy else None
    if ctx.frozen and dlse_T is None:
        # Rows that do not count have a Jacobian of 0, and upstream gradients that may be anything.
        counted_T = targets_T != IGNORE
        dhidden_TD = (
            torch.where(counted_T, 0.0 if dlogp_T is None else dlogp_T, 0.0)[:, None] * jac_TD
        )
        if dentropy_T is not None:
            dhidden_TD = (
                dhidden_TD + torch.where(counted_T, dentropy_T, 0.0)[:, None] * jac_entropy_TD
            )
        return dhidden_TD.to(weight_VD.dtype), *(None,) * 10
    if dlogp_T is None:
        dlogp_T = torch.zeros_like(targets_T, dtype=torch.float32)
    wanted = ctx.needs_input_grad
    needs = [wanted[0], wanted[1], bias_V is not None and wanted[3]]
    dhidden_TD, dweight_VD, dbias_V = linear_logp_bwd(
        dlogp_T,
        dentropy_T,
        dlse_T,
        hidden_TD,
        weight_VD,
        targets_T,
        bias_V,
        temperature_T,
        ctx.softcap,
        ctx.logit_scale,
        exact_3T,
        needs,
        ctx.workspace_mb,
    )
    grads = [None] * 11
    for at, grad, need in zip((0, 1, 3), (dhidden_TD, dweight_VD, dbias_V), needs, strict=True):
        grads[at] = grad if need else None
    return tuple(grads)


linear_logp_fwd.register_autograd(_grad, setup_context=_setup)
