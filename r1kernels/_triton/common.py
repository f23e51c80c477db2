"""Device helpers and launch facts shared by the Triton kernels."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Stands for "no value yet" where -inf would turn a difference of two maxima into NaN.
LOWEST = tl.constexpr(-3.0e38)

# Rows of a program that has one number of work per row.
BLOCK_ROWS = 128


def architecture(device: torch.device) -> int:
    """Compute capability as 80, 90, ...; 0 under the interpreter."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_refusal(tensor: Tensor | None) -> str | None:
    """Why no Triton kernel can run on this tensor's device (None: on this machine), or None."""
    if INTERPRETED:
        device = "cpu" if tensor is None else tensor.device.type
        return None if device == "cpu" else "TRITON_INTERPRET is set"
    if tensor is not None and tensor.device.type != "cuda":
        return f"tensor is on {tensor.device.type}"
    if not torch.cuda.is_available():
        return "no GPU"
    arch = architecture(torch.device("cuda") if tensor is None else tensor.device)
    return None if arch >= 80 else f"compute capability {arch / 10} is below 8.0"


def dtype_refusal(tensor: Tensor) -> str | None:
    """Why a tensor's dtype is not supported, or None."""
    return None if tensor.dtype in DTYPES else f"dtype is {tensor.dtype}"


class RowList(NamedTuple):
    """Rows listed on the device, in order: the first `count` entries of `rows`; zeros follow, more
    of them than any kernel reads ahead."""

    rows: Tensor
    count: Tensor

    @classmethod
    def of(cls, mask_C: Tensor) -> "RowList":
        """The rows where mask_C is set; the host does not wait for their number."""
        size = len(mask_C) + 256
        rows = torch.nonzero_static(mask_C, size=size, fill_value=0).squeeze(1)
        return cls(rows, mask_C.sum(dtype=torch.int32))


def inverse_temperature(temperature_T: Tensor | None, like_TX: Tensor) -> Tensor:
    """1 / temperature of each row, contiguous float32; 1 where there is none."""
    if temperature_T is None:
        return torch.ones(like_TX.shape[0], dtype=torch.float32, device=like_TX.device)
    return temperature_T.float().reciprocal().contiguous()


@triton.jit
def tanh(x):
    """tanh to about an ulp: an odd polynomial below 0.6, where the exponential form cancels."""
    a = tl.abs(x)
    y = a * a
    p = 0.002373515060383995
    p = p * y - 0.008412553700501422
    p = p * y + 0.021789107546519956
    p = p * y - 0.053961653375862256
    p = p * y + 0.13333313327847635
    p = p * y - 0.33333333234569307
    decay = tl.exp(-2.0 * a)
    # 1 - small, so that what the quotient loses hardly shows.
    far = 1.0 - 2.0 * (decay / (1.0 + decay))
    magnitude = tl.where(a < 0.6, a + a * (y * p), far)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def transform(z, scale, softcap, per_tau, SOFTCAP: tl.constexpr):
    """Transformed logit l = softcap * tanh(scale z / softcap) * per_tau, and dl/dz without
    the constant scale * per_tau (1 without softcap)."""
    x = z * scale
    slope = 1.0
    if SOFTCAP:
        t = tanh(x / softcap)
        x = softcap * t
        slope = 1.0 - t * t
    return x * per_tau, slope


@triton.jit
def weigh(e, d):
    """e * d with 0 * -inf = 0: a logit of -inf has probability 0 and adds nothing."""
    return tl.where(e > 0.0, e * d, 0.0)


@triton.jit(do_not_specialize=["T"])
def _finish_rows_kernel(sums_ptr, exact_ptr, T, BLOCK_T: tl.constexpr):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < T
    anchor = tl.load(sums_ptr + offs_t, mask=mask_t, other=0.0)
    q = tl.load(sums_ptr + T + offs_t, mask=mask_t, other=0.0)
    s = tl.load(sums_ptr + 2 * T + offs_t, mask=mask_t, other=0.0)
    u = tl.load(sums_ptr + 3 * T + offs_t, mask=mask_t, other=0.0)
    e = tl.exp(q)
    total = s + e
    log_total = tl.log(total)
    # log1p of a small ratio, by the logarithm that is exact where 1 + x rounds.
    ratio = s / e
    grown = 1.0 + ratio
    log1p = tl.where(grown == 1.0, ratio, tl.log(grown) * (ratio / (grown - 1.0)))
    # Far below the anchor e leaves the range of the sums; there nothing cancels.
    logp = tl.where(q > -30.0, -log1p, q - log_total)
    # log S - (u + e q) / S cancels where the target holds most of the mass; its rearrangement
    # around log1p does not.
    peaked = log1p + (q * s - u) / total
    flat = log_total - (u + tl.where(e > 0.0, e * q, 0.0)) / total
    entropy = tl.where(s < e, peaked, flat)
    tl.store(exact_ptr + offs_t, logp, mask=mask_t)
    tl.store(exact_ptr + T + offs_t, tl.where(entropy < 0.0, 0.0, entropy), mask=mask_t)
    tl.store(exact_ptr + 2 * T + offs_t, anchor + log_total, mask=mask_t)


def finish_rows(sums_4T: Tensor) -> Tensor:
    """float64 [3, T] of logp, entropy and lse from float64 anchor, q, s and u per row.

    q is the target's logit above the anchor; s and u are the sums over the other columns of
    exp(l - anchor) and of exp(l - anchor) (l - anchor). Zeros make zeros.
    """
    T = sums_4T.shape[1]
    exact_3T = torch.empty_like(sums_4T[:3])
    if T:
        _finish_rows_kernel[(triton.cdiv(T, BLOCK_ROWS),)](
            sums_4T, exact_3T, T, BLOCK_T=BLOCK_ROWS, num_warps=4, enable_fp_fusion=True
        )
    return exact_3T
