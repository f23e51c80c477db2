"""Log-probability and entropy of target tokens from logits that exist already."""

import torch
from torch import Tensor

from r1kernels.backend import implementation, isolated
from r1kernels.check import IGNORE, describe, dtype_in, no_second_derivative, values_readable
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import DTYPES, check_targets, counted_rows, scaling


def token_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    inplace_backward: bool = False,
) -> Logp:
    """`logp = l[target] - logsumexp(l)` of logits that exist already.

    `l = softcap tanh(logit_scale logits / softcap) / temperature`. One read forward, one read and
    one write backward; no copy is made of rows at equal distances from each other.

    Args:
        logits: [..., V] float32, bfloat16 or float16. -inf is allowed (probability 0). A batch's
            `logits[:, :-1]` is copied: better pass all positions, the last with target IGNORE.
        targets: [...] int64 in [0, V), or IGNORE (-100): results 0, gradient 0, the row is not
            read.
        temperature: float, or [...] float32 for one per token; > 0. Gets no gradient.
        softcap: > 0, or None.
        logit_scale: > 0.
        entropy: also return the entropy.
        inplace_backward: the backward writes the gradient over the logits, which must not be used
            afterwards. Not under torch.compile, and not where rows share memory or were copied.

    Returns:
        Logp(logp, entropy | None, lse): [...] float32, in nats. Gradients flow to logits through
        all three.

    Numerics: float32 exponentials, float64 sums; logp is never above 0. Deterministic.
    Raises: ValueError on shapes, devices, temperatures or targets out of range; TypeError on
        dtypes. No value of a GPU's tensors is waited for: there, a row whose target or temperature
        is out of range is NaN.
    Source: docs/ops/linear_logp.md.
    """
    dtype_in("logits", logits, DTYPES)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have a vocabulary axis, got {describe(logits)}")
    leading = logits.shape[:-1]
    check_targets(targets, leading, logits)
    options = scaling(temperature, softcap, logit_scale, leading, logits)
    flat = logits.reshape(-1, logits.shape[-1])
    logp_T, entropy_T, lse_T, _ = token_logp_fwd(
        flat, targets.reshape(-1), *options, entropy, inplace_backward
    )
    return Logp(
        logp_T.view(leading), entropy_T.view(leading) if entropy else None, lse_T.view(leading)
    )


@torch.library.custom_op("r1kernels::token_logp_fwd", mutates_args=())
@isolated
def token_logp_fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp, entropy or empty, lse, float64 [3, T] of the same, whose low bits gradients need)."""
    if values_readable(targets_T):
        counted_rows(targets_T, logits_TV.shape[1], temperature_T)
    run = implementation("token_logp", logits_TV.device.type, logits_TV)
    # A target below 0 marks a row that is not read.
    found = run.fwd(logits_TV, targets_T.contiguous(), temperature_T, softcap, logit_scale, entropy)
    exact_3T = torch.stack([found[2] if x is None else x for x in found])
    logp_T, entropy_T, lse_T = exact_3T.float()
    return (
        logp_T.clone(),
        entropy_T.clone() if entropy else logp_T.new_empty(0),
        lse_T.clone(),
        exact_3T,
    )


@token_logp_fwd.register_fake
def _(logits_TV, targets_T, temperature_T, softcap, logit_scale, entropy, inplace_backward):
    def rows() -> Tensor:
        return torch.empty(targets_T.shape, dtype=torch.float32, device=targets_T.device)

    exact_3T = torch.empty((3, *targets_T.shape), dtype=torch.float64, device=targets_T.device)
    return rows(), rows() if entropy else rows().new_empty(0), rows(), exact_3T


@torch.library.custom_op("r1kernels::token_logp_bwd", mutates_args=())
def token_logp_bwd(
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor,
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    exact_3T: Tensor,
) -> Tensor:
    """dlogits in the dtype of the logits."""
    return _backward(
        dlogp_T,
        dentropy_T,
        dlse_T,
        logits_TV,
        targets_T,
        temperature_T,
        softcap,
        logit_scale,
        exact_3T,
        False,
    )


@token_logp_bwd.register_fake
def _(dlogp_T, dentropy_T, dlse_T, logits_TV, *_rest):
    return torch.empty(logits_TV.shape, dtype=logits_TV.dtype, device=logits_TV.device)


@isolated
def _backward(
    dlogp_T,
    dentropy_T,
    dlse_T,
    logits_TV,
    targets_T,
    temperature_T,
    softcap,
    logit_scale,
    exact_3T,
    inplace,
) -> Tensor:
    run = implementation("token_logp", logits_TV.device.type, logits_TV)
    # Upstream gradients of rows that do not count may be anything; they are not used.
    counted = targets_T != IGNORE
    dlogp_T, dentropy_T, dlse_T = (
        None if x is None else torch.where(counted, x, 0) for x in (dlogp_T, dentropy_T, dlse_T)
    )
    # Rows that share memory (an expanded tensor's) have a gradient each: no room for it there.
    inplace = inplace and logits_TV.stride(0) >= logits_TV.shape[1]
    scaling = (temperature_T, softcap, logit_scale)
    dlogits_TV = run.bwd(
        dlogp_T, dentropy_T, dlse_T, logits_TV, targets_T.contiguous(), *scaling, *exact_3T, inplace
    )
    if inplace:
        # Written by address: autograd must hear of it, or a second backward would read gradients.
        torch.autograd.graph.increment_version(logits_TV)
    return dlogits_TV


def _setup(ctx, inputs, output):
    logits_TV, targets_T, temperature_T, ctx.softcap, ctx.logit_scale, ctx.entropy, ctx.inplace = (
        inputs
    )
    exact_3T = output[3]
    ctx.mark_non_differentiable(exact_3T)
    ctx.save_for_backward(logits_TV, targets_T, temperature_T, exact_3T)


def _grad(ctx, dlogp_T, dentropy_T, dlse_T, _exact):
    no_second_derivative("token_logp")
    logits_TV, targets_T, temperature_T, exact_3T = ctx.saved_tensors
    dentropy_T = dentropy_T if ctx.entropy else None
    args = (
        dlogp_T,
        dentropy_T,
        dlse_T,
        logits_TV,
        targets_T,
        temperature_T,
        ctx.softcap,
        ctx.logit_scale,
        exact_3T,
    )
    dlogits_TV = _backward(*args, True) if ctx.inplace else token_logp_bwd(*args)
    return dlogits_TV, None, None, None, None, None, None


token_logp_fwd.register_autograd(_grad, setup_context=_setup)
