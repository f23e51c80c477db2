"""Log-probability, entropy and log-sum-exp of targets from logits [T, V], on Hopper GPUs.

`fwd` and `bwd` have the contract of `_triton/token_logp.py`. A row is read once into the shared
memory of a cluster of blocks; `fwd_bwd`, for upstream gradients that are known beforehand, writes
its gradient from there: one read and one write for both.
"""

import torch
from torch import Tensor

from r1kernels._cuda.common import address, device_refusal, extension, place, rows_refusal

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CLUSTERS = (1, 2, 4, 8)
# Shared memory of a block up to which the smallest cluster is taken: four share a multiprocessor,
# so that some load while others compute. Above it the largest cluster, up to the block's limit.
SHARE_BYTES, BLOCK_BYTES = 56 * 1024, 227 * 1024


def cluster_size(vocab: int, dtype: torch.dtype) -> int | None:
    """Blocks of a row; None if a row is too long."""
    sizes = {n: extension.row_shared_bytes(vocab, DTYPES[dtype], n) for n in CLUSTERS}
    fit = next((n for n in CLUSTERS if sizes[n] <= SHARE_BYTES), CLUSTERS[-1])
    return fit if sizes[fit] <= BLOCK_BYTES else None


def fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp, entropy or None, lse), each [T] float64; exponentials float32, row sums float64."""
    return _forward(
        logits_TV, None, targets_T, temperature_T, softcap, logit_scale, entropy, None, None, None
    )


def fwd_bwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(logp, entropy or None, lse, dL/dlogits), the last over the logits when `inplace`.

    The logits are read once: upstream gradients that depend on the results have no place here.
    """
    if inplace and logits_TV.stride(1) != 1:
        raise ValueError("in place needs contiguous columns")
    out_TV = logits_TV if inplace else logits_TV.new_empty(logits_TV.shape)
    upstream = (
        None if x is None else x.float().contiguous() for x in (dlogp_T, dentropy_T, dlse_T)
    )
    stats = _forward(
        logits_TV, out_TV, targets_T, temperature_T, softcap, logit_scale, entropy, *upstream
    )
    return *stats, out_TV


def _forward(
    logits_TV, out_TV, targets_T, temperature_T, softcap, logit_scale, entropy, dlogp_T,
    dentropy_T, dlse_T,
):  # fmt: skip
    if logits_TV.stride(1) != 1:
        logits_TV = logits_TV.contiguous()
    T, V = logits_TV.shape
    logp_T, lse_T = (logits_TV.new_empty((T,), dtype=torch.float64) for _ in range(2))
    entropy_T = torch.empty_like(logp_T) if entropy else None
    if T > 0:
        per_tau_T = _per_tau(temperature_T, logits_TV)
        extension.row_forward(
            logits=address(logits_TV),
            out=address(out_TV),
            dtype=DTYPES[logits_TV.dtype],
            rows=T,
            vocab=V,
            stride=logits_TV.stride(0),
            out_stride=0 if out_TV is None else out_TV.stride(0),
            targets=address(targets_T),
            per_tau=address(per_tau_T),
            scale=logit_scale,
            softcap=softcap,
            dlogp=address(dlogp_T),
            dentropy=address(dentropy_T),
            dlse=address(dlse_T),
            logp=address(logp_T),
            entropy=address(entropy_T),
            lse=address(lse_T),
            cluster=cluster_size(V, logits_TV.dtype),
            **place(logits_TV),
        )
    return logp_T, entropy_T, lse_T


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
    out_TV = source_TV if inplace else source_TV.new_empty(source_TV.shape)
    if T == 0:
        return out_TV
    # As row_forward_kernel has it: with anchor = float32(lse), dL/dl_j off the target is
    # exp(l_j - anchor) (alpha + beta (l_j - anchor)).
    anchor_T = lse_T.float()
    lost_T = anchor_T - lse_T
    alpha_T, beta_T = -dlogp_T.double(), torch.zeros_like(lse_T)
    target_T = -dlogp_T * torch.expm1(logp_T)
    if dlse_T is not None:
        alpha_T = alpha_T + dlse_T
        target_T = target_T + dlse_T * logp_T.exp()
    if dentropy_T is not None:
        alpha_T = alpha_T - dentropy_T * (entropy_T + lost_T)
        beta_T = -dentropy_T.double()
        # A target of probability 0 adds nothing; 0 * -inf would be NaN.
        target_T = target_T - dentropy_T * logp_T.exp() * (logp_T.clamp(min=-1e4) + entropy_T)
    factor_T, per_tau_T = lost_T.exp(), _per_tau(temperature_T, logits_TV)
    slope_T = logit_scale * per_tau_T
    if softcap:
        slope_T = slope_T * (1 - ((logp_T + lse_T) / (per_tau_T * softcap)) ** 2)
    terms = [x.float() for x in (factor_T * alpha_T, factor_T * beta_T, slope_T * target_T)]
    extension.row_backward(
        logits=address(source_TV),
        out=address(out_TV),
        dtype=DTYPES[source_TV.dtype],
        rows=T,
        vocab=V,
        stride=source_TV.stride(0),
        out_stride=out_TV.stride(0),
        targets=address(targets_T),
        per_tau=address(per_tau_T),
        scale=logit_scale,
        softcap=softcap,
        anchor=address(anchor_T),
        alpha=address(terms[0]),
        beta=address(terms[1]),
        at_target=address(terms[2]),
        **place(source_TV),
    )
    return logits_TV.copy_(out_TV) if inplace and out_TV is not logits_TV else out_TV


def _per_tau(temperature_T: Tensor | None, logits_TV: Tensor) -> Tensor:
    if temperature_T is None:
        return torch.ones(len(logits_TV), dtype=torch.float32, device=logits_TV.device)
    return temperature_T.float().reciprocal().contiguous()


def refuses(logits: Tensor | None = None, *_args: object) -> str | None:
    """Why these kernels cannot take the logits, or None."""
    reason = device_refusal(logits)
    if reason is not None or logits is None:
        return reason
    if logits.dtype not in DTYPES:
        return f"dtype is {logits.dtype}"
    if cluster_size(logits.shape[1], logits.dtype) is None:
        return f"a row of {logits.shape[1]} logits is too long for the shared memory of 8 blocks"
    return rows_refusal("logits", logits)
