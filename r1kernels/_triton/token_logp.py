"""Log-probability, entropy and log-sum-exp of targets from logits [T, V].

    fwd(logits_TV, targets_T, temperature_T, softcap, logit_scale, entropy)
        -> logp_T, entropy_T | None, lse_T
    bwd(dlogp_T, dentropy_T, dlse_T, logits_TV, targets_T, temperature_T, softcap, logit_scale,
        logp_T, entropy_T, lse_T, inplace) -> dlogits_TV

The forward reads each logit once: an online maximum, with the target kept out of the sum, so that
logp = -log1p(s / e) keeps its relative precision near 1. The backward reads and writes each logit
once. Rows whose target is negative (IGNORE) are not read: their outputs and gradients are 0.
Columns of -inf count for nothing. Rows may have any stride; columns are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import (
    INTERPRETED,
    LOWEST,
    device_refusal,
    dtype_refusal,
    inverse_temperature,
    transform,
    weigh,
)

# Bandwidth-bound: a block only has to keep enough bytes in flight (16 elements a thread).
BLOCK_V = 128 if INTERPRETED else 4096
NUM_WARPS = 8


@triton.jit
def _token_logp_fwd_kernel(
    logits_ptr,
    targets_ptr,
    inverse_temperature_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    V,
    stride_logits_t,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    if target < 0:
        tl.store(logp_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
    else:
        logits_ptr += row * stride_logits_t
        per_tau = tl.load(inverse_temperature_ptr + row)
        z_target = tl.load(logits_ptr + target).to(tl.float32)
        l_target, _slope = transform(z_target, scale, softcap, per_tau, SOFTCAP)
        top = tl.maximum(l_target, LOWEST)
        s = 0.0
        u = 0.0
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            z = tl.load(logits_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
            l, _ = transform(z, scale, softcap, per_tau, SOFTCAP)
            l = tl.where(offs_v < V, l, LOWEST)
            new_top = tl.maximum(top, tl.max(l, axis=0))
            e = tl.where((offs_v < V) & (offs_v != target), tl.exp(l - new_top), 0.0)
            decay = tl.exp(top - new_top)
            if ENTROPY:
                u = decay * (u + (top - new_top) * s) + tl.sum(weigh(e, l - new_top), axis=0)
            s = decay * s + tl.sum(e, axis=0)
            top = new_top
        q = l_target - top
        e_target = tl.exp(q)
        total = s + e_target
        # log1p of a small ratio, by the logarithm that is exact where 1 + x rounds.
        ratio = s / e_target
        grown = 1.0 + ratio
        log1p = tl.where(grown == 1.0, ratio, tl.log(grown) * (ratio / (grown - 1.0)))
        # Far below the maximum e_target leaves float32's range; there nothing cancels.
        logp = tl.where(q > -60.0, -log1p, q - tl.log(total))
        tl.store(logp_ptr + row, logp)
        tl.store(lse_ptr + row, top + tl.log(total))
        if ENTROPY:
            mean = (u + weigh(e_target, q)) / total
            tl.store(entropy_ptr + row, tl.log(total) - mean)


def fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp, entropy or None, lse), each [T] float64 by contract, computed in float32."""
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    T, V = logits_TV.shape
    logp_T, entropy_T, lse_T = (
        logits_TV.new_empty((T,), dtype=torch.float32) for _ in ("logp", "entropy", "lse")
    )
    if T > 0:
        _token_logp_fwd_kernel[(T,)](
            logits_TV,
            targets_T,
            inverse_temperature(temperature_T, logits_TV),
            logp_T,
            entropy_T,
            lse_T,
            V,
            logits_TV.stride(0),
            logit_scale,
            softcap,
            BLOCK_V=BLOCK_V,
            SOFTCAP=bool(softcap),
            ENTROPY=entropy,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return logp_T.double(), entropy_T.double() if entropy else None, lse_T.double()


@triton.jit
def _token_logp_bwd_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    lse_ptr,
    inverse_temperature_ptr,
    alpha_ptr,
    beta_ptr,
    target_ptr,
    V,
    stride_logits_t,
    stride_out_t,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    blocks = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_v = (tl.program_id(0) % blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < V
    target = tl.load(targets_ptr + row)
    out_ptrs = out_ptr + row * stride_out_t + offs_v
    if target < 0:
        tl.store(out_ptrs, tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty), mask=mask_v)
    else:
        z = tl.load(logits_ptr + row * stride_logits_t + offs_v, mask=mask_v, other=0.0)
        per_tau = tl.load(inverse_temperature_ptr + row)
        l, slope = transform(z.to(tl.float32), scale, softcap, per_tau, SOFTCAP)
        d = l - tl.load(lse_ptr + row)
        dl = weigh(tl.exp(d), tl.load(alpha_ptr + row) + tl.load(beta_ptr + row) * d)
        dl = tl.where(offs_v == target, tl.load(target_ptr + row), dl)
        dz = dl * slope * (scale * per_tau)
        tl.store(out_ptrs, dz.to(out_ptr.dtype.element_ty), mask=mask_v)


def bwd(
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor | None,
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    logp_T: Tensor,
    entropy_T: Tensor | None,
    lse_T: Tensor,
    inplace: bool,
) -> Tensor:
    """dL/dlogits in logits' dtype; in place, it overwrites the logits."""
    T, V = logits_TV.shape
    source_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    out_TV = source_TV if inplace else torch.empty_like(source_TV)
    if T == 0 or V == 0:
        return out_TV
    # dL/dl_j = p_j (alpha + beta (l_j - lse)) off the target; there, 1 - p_y comes from logp.
    alpha_T = -dlogp_T
    beta_T = torch.zeros_like(logp_T)
    target_T = -dlogp_T * torch.expm1(logp_T)
    if dlse_T is not None:
        alpha_T = alpha_T + dlse_T
        target_T = target_T + dlse_T * logp_T.exp()
    if dentropy_T is not None:
        alpha_T = alpha_T - dentropy_T * entropy_T
        beta_T = -dentropy_T
        # A target of probability 0 adds nothing; 0 * -inf would be NaN.
        target_T = target_T - dentropy_T * logp_T.exp() * (logp_T.clamp(min=-1e4) + entropy_T)
    _token_logp_bwd_kernel[(T * triton.cdiv(V, BLOCK_V),)](
        source_TV,
        out_TV,
        targets_T,
        lse_T.float(),
        inverse_temperature(temperature_T, logits_TV),
        alpha_T.float(),
        beta_T.float(),
        target_T.float(),
        V,
        source_TV.stride(0),
        out_TV.stride(0),
        logit_scale,
        softcap,
        BLOCK_V=BLOCK_V,
        SOFTCAP=bool(softcap),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    return logits_TV.copy_(out_TV) if inplace and out_TV is not logits_TV else out_TV


def refuses(logits: Tensor | None = None, *_args: object) -> str | None:
    """Why these kernels cannot take the logits, or None."""
    if logits is None:
        return device_refusal(None)
    if INTERPRETED and logits.dtype == torch.bfloat16:
        return "the interpreter truncates where bfloat16 is rounded"
    return device_refusal(logits) or dtype_refusal(logits)
