"""Log-probability, entropy and log-sum-exp of targets from logits [T, V].

    fwd(logits_TV, targets_T, temperature_T, softcap, logit_scale, entropy)
        -> logp_T, entropy_T | None, lse_T
    bwd(dlogp_T, dentropy_T, dlse_T, logits_TV, targets_T, temperature_T, softcap, logit_scale,
        logp_T, entropy_T, lse_T, inplace) -> dlogits_TV

The forward reads each logit once, the backward reads and writes each once; nothing else of size V
is touched. A thread of the forward keeps a maximum and sums of its own, over 16-byte loads, and the
row is reduced once, at its end: warps never wait for one another while they read, and registers
leave room for as many as an SM holds. The target stays out of the sums, so that
logp = -log1p(s / e) keeps its relative precision near 1.

Both kernels cut a row at its first 16-byte boundary: whole blocks from there take neither masks nor
unaligned loads, whatever V and the row stride are, and what is left at both ends is one short
gather; under `batch_invariant` a row of odd length is not cut, and its loads are slower.
Exponentials are base 2: with y the logit before the temperature and k its factor times
log2 e, exp(l - c) = 2^(k (y - c')); the difference comes first, as it loses nothing near the top.

Rows whose target is IGNORE are not read: their outputs and gradients are 0. A target outside
[0, V), or a temperature that is not positive and finite, makes its row NaN. Columns of -inf count
for nothing. Rows may have any stride; columns are contiguous.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import (
    INTERPRETED,
    LOWEST,
    device_refusal,
    dtype_refusal,
    finish_rows,
    inverse_temperature,
    tanh,
)
from r1kernels.backend import is_batch_invariant
from r1kernels.check import IGNORE as _IGNORE

IGNORE = tl.constexpr(_IGNORE)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# In place of an exponent of -inf, which a factor of 0 would turn into NaN.
FAR = tl.constexpr(-1.0e30)

# Bandwidth-bound: 16 elements a thread and block, and as many again on their way.
NUM_WARPS = 1 if INTERPRETED else 8
LANES = 32 * NUM_WARPS


def tile(dtype: torch.dtype, softcap: float) -> dict[str, int]:
    """A block of 16 elements a thread (8 under a softcap, whose tanh takes registers), in 16-byte
    loads."""
    vector = 16 // dtype.itemsize
    return {"LOADS": (8 if softcap else 16) // vector, "LANES": LANES, "VECTOR": vector}


@triton.jit
def _cut(
    base, V, LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, CUT: tl.constexpr
):
    """Of a row that starts at element `base`: elements before a 16-byte boundary (with CUT), whole
    blocks after them, and the places within a block."""
    head = tl.minimum((VECTOR - base % VECTOR) % VECTOR if CUT else 0, V).to(tl.int32)
    blocks = (V - head) // (LOADS * LANES * VECTOR)
    return head, blocks, tl.arange(0, LOADS * LANES * VECTOR)


@triton.jit
def _boundary(base, VECTOR: tl.constexpr):
    """The first multiple of VECTOR from `base` on, which the compiler can see is one."""
    return (base + (VECTOR - 1)) // VECTOR * VECTOR


@triton.jit
def _cap(z, scale, softcap, SOFTCAP: tl.constexpr):
    """y of the logit: l = y * factor / temperature, and dl/dz without constants."""
    y = z.to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        t = tanh(y * (scale / softcap))
        y = softcap * t
        slope = 1.0 - t * t
    return y, slope


@triton.jit
def _fold(
    y, k, tops, s, u,
    LOADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """A block's y into each lane's maximum and sums [LANES]."""
    # The shape of its loads, which puts all of a lane's elements into one thread.
    y = tl.reshape(y, (LOADS, LANES, VECTOR))
    new = tl.maximum(tops, tl.max(tl.max(y, axis=2), axis=0))
    d = y - new[None, :, None]
    e = tl.exp2(d * k)
    decay = tl.exp2((tops - new) * k)
    if ENTROPY:
        weighted = tl.sum(tl.sum(e * tl.maximum(d, FAR), axis=2), axis=0)
        u = decay * (u + tl.maximum(tops - new, FAR) * s) + weighted
    s = decay * s + tl.sum(tl.sum(e, axis=2), axis=0)
    return new, s, u


@triton.jit(do_not_specialize=["stride_logits_t"])
def _token_logp_fwd_kernel(
    logits_ptr,
    targets_ptr,
    inverse_temperature_ptr,
    sums_ptr,
    T,
    V,
    stride_logits_t,
    scale,
    softcap,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    CUT: tl.constexpr,
):
    BLOCK_V: tl.constexpr = LOADS * LANES * VECTOR
    row = tl.program_id(0).to(tl.int64)
    sums_ptr += row
    given = tl.load(targets_ptr + row)
    in_range = (given >= 0) & (given < V)
    target = tl.where(in_range, given, 0).to(tl.int32)
    if given == IGNORE:
        for plane in tl.static_range(4):
            tl.store(sums_ptr + plane * T, 0.0)
    else:
        base = row * stride_logits_t
        head, blocks, place = _cut(base, V, LOADS, LANES, VECTOR, CUT)
        body_ptrs = logits_ptr + (_boundary(base, VECTOR) if CUT else base) + place
        logits_ptr += base
        per_tau = tl.load(inverse_temperature_ptr + row)
        good = in_range & (per_tau > 0.0) & (per_tau < float("inf"))
        factor = tl.where(good, per_tau, float("nan"))
        if not SOFTCAP:
            factor *= scale
        k = factor * LOG2E
        z_target = tl.load(logits_ptr + target)
        tops = tl.full((LANES,), LOWEST, tl.float32)
        s = tl.zeros((LANES,), dtype=tl.float32)
        u = tl.zeros((LANES,), dtype=tl.float32)
        # The target's block, which alone needs a comparison per element, is left for later.
        inside = (target >= head) & (target < head + blocks * BLOCK_V)
        skip = tl.where(inside, (target - head) // BLOCK_V, blocks)
        for block in range(0, tl.where(inside, blocks - 1, blocks)):
            at_block = tl.where(block >= skip, block + 1, block)
            z = tl.load(body_ptrs + at_block.to(tl.int64) * BLOCK_V)
            y, _ = _cap(z, scale, softcap, SOFTCAP)
            tops, s, u = _fold(y, k, tops, s, u, LOADS, LANES, VECTOR, ENTROPY)
        if inside:
            z = tl.load(body_ptrs + skip.to(tl.int64) * BLOCK_V)
            y, _ = _cap(z, scale, softcap, SOFTCAP)
            y = tl.where(place == target - head - skip * BLOCK_V, -float("inf"), y)
            tops, s, u = _fold(y, k, tops, s, u, LOADS, LANES, VECTOR, ENTROPY)
        rest = V - blocks * BLOCK_V
        for start in range(0, rest, BLOCK_V):
            offs = start + place
            at = tl.where(offs < head, offs, offs + blocks * BLOCK_V)
            z = tl.load(logits_ptr + at, mask=offs < rest, other=0.0)
            y, _ = _cap(z, scale, softcap, SOFTCAP)
            y = tl.where((offs < rest) & (at != target), y, -float("inf"))
            tops, s, u = _fold(y, k, tops, s, u, LOADS, LANES, VECTOR, ENTROPY)
        y_target, _ = _cap(z_target, scale, softcap, SOFTCAP)
        top = tl.maximum(tl.max(tops, axis=0), y_target)
        decay = tl.exp2((tops - top) * k)
        tl.store(sums_ptr, top.to(tl.float64) * factor)
        tl.store(sums_ptr + T, (y_target.to(tl.float64) - top) * factor)
        tl.store(sums_ptr + 2 * T, tl.sum((decay * s).to(tl.float64), axis=0))
        if ENTROPY:
            u = decay * (u + tl.maximum(tops - top, FAR) * s)
            tl.store(sums_ptr + 3 * T, tl.sum(u.to(tl.float64), axis=0) * factor)


def fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp, entropy or None, lse), each [T] float64: exponentials and a lane's sums are float32,
    the row's sums and what follows from them float64."""
    T, V = logits_TV.shape
    blocks = tile(logits_TV.dtype, softcap)
    # Where a row is cut decides the order of its sums, and must not depend on the row's place.
    cut = not (is_batch_invariant() and V % blocks["VECTOR"])
    apart = logits_TV.stride(0) * logits_TV.itemsize | logits_TV.data_ptr()
    if logits_TV.stride(1) != 1 or (is_batch_invariant() and cut and apart % 16):
        logits_TV = logits_TV.clone(memory_format=torch.contiguous_format)
    sums_4T = logits_TV.new_empty((4, T), dtype=torch.float64)
    if T > 0:
        _token_logp_fwd_kernel[(T,)](
            logits_TV,
            targets_T,
            inverse_temperature(temperature_T, logits_TV),
            sums_4T,
            T,
            V,
            logits_TV.stride(0),
            logit_scale,
            softcap,
            **blocks,
            SOFTCAP=bool(softcap),
            ENTROPY=entropy,
            CUT=cut,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    logp_T, entropy_T, lse_T = finish_rows(sums_4T)
    return logp_T, entropy_T if entropy else None, lse_T


@triton.jit
def _dlogits(
    z, at, target, target_grad, a, b, entropy, k, anchor, shift, scale, softcap,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """dL/dz = p (a + b (log p + entropy)) times the softcap's slope; at the target, its own."""
    y, slope = _cap(z, scale, softcap, SOFTCAP)
    log2p = (y - anchor) * k + shift
    if ENTROPY:
        log2p = tl.maximum(log2p, FAR, propagate_nan=tl.PropagateNan.ALL)
        a += b * (log2p * LN2 + entropy)
    return tl.where(at == target, target_grad, tl.exp2(log2p) * a) * slope


@triton.jit
def _token_logp_bwd_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    inverse_temperature_ptr,
    dlogp_ptr,
    dentropy_ptr,
    dlse_ptr,
    exact_logp_ptr,
    exact_entropy_ptr,
    exact_lse_ptr,
    V,
    stride_logits_t,
    stride_out_t,
    scale,
    softcap,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    SAME_CUT: tl.constexpr,
):
    BLOCK_V: tl.constexpr = LOADS * LANES * VECTOR
    parts = tl.cdiv(V, BLOCK_V)
    row = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    base = row * stride_logits_t
    head, blocks, place = _cut(base, V, LOADS, LANES, VECTOR, True)
    # Of the rest of the row, which may take two parts
    offs = (part - blocks) * BLOCK_V + place
    rest = V - blocks * BLOCK_V
    out = row * stride_out_t
    out_start = _boundary(out, VECTOR) if SAME_CUT else out + head
    target = tl.load(targets_ptr + row).to(tl.int32)
    if target == IGNORE:
        zero = tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty)
        if part < blocks:
            tl.store(out_ptr + out_start + (part * BLOCK_V + place), zero)
        else:
            at = tl.where(offs < head, offs, offs + blocks * BLOCK_V)
            tl.store(out_ptr + out + at, zero, mask=offs < rest)
    else:
        per_tau = tl.load(inverse_temperature_ptr + row)
        factor = per_tau if SOFTCAP else scale * per_tau
        k = factor * LOG2E
        lse = tl.load(exact_lse_ptr + row) / factor
        anchor = lse.to(tl.float32)
        # What float32 takes from a log-sum-exp near 20 is in every p.
        shift = ((anchor.to(tl.float64) - lse) * k).to(tl.float32)
        factor = scale * per_tau
        logp = tl.load(exact_logp_ptr + row).to(tl.float32)
        dlogp = tl.load(dlogp_ptr + row)
        dlse = tl.load(dlse_ptr + row)
        # 1 - p of the target, which keeps its digits near p = 1
        t = tanh(-0.5 * logp)
        p = tl.exp(logp)
        target_grad = dlogp * (2.0 * t / (1.0 + t)) + dlse * p
        a = (dlse - dlogp) * factor
        b = 0.0
        entropy = 0.0
        if ENTROPY:
            entropy = tl.load(exact_entropy_ptr + row).to(tl.float32)
            dentropy = tl.load(dentropy_ptr + row)
            b = -dentropy * factor
            # A target of probability 0 adds nothing; 0 * -inf would be NaN.
            target_grad -= dentropy * p * (tl.maximum(logp, FAR) + entropy)
        target_grad *= factor
        if part < blocks:
            place += part * BLOCK_V
            z = tl.load(logits_ptr + _boundary(base, VECTOR) + place)
            dz = _dlogits(
                z, place, target - head, target_grad, a, b, entropy, k, anchor, shift, scale,
                softcap, SOFTCAP, ENTROPY,
            )  # fmt: skip
            tl.store(out_ptr + out_start + place, dz.to(out_ptr.dtype.element_ty))
        else:
            at = tl.where(offs < head, offs, offs + blocks * BLOCK_V)
            z = tl.load(logits_ptr + base + at, mask=offs < rest, other=0.0)
            dz = _dlogits(
                z, at, target, target_grad, a, b, entropy, k, anchor, shift, scale, softcap,
                SOFTCAP, ENTROPY,
            )  # fmt: skip
            tl.store(out_ptr + out + at, dz.to(out_ptr.dtype.element_ty), mask=offs < rest)


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
    """dL/dlogits in logits' dtype; in place, it overwrites the logits. One launch."""
    T, V = logits_TV.shape
    source_TV = logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
    out_TV = source_TV if inplace else torch.empty_like(source_TV)
    if T == 0 or V == 0:
        return out_TV
    blocks = tile(source_TV.dtype, softcap)
    parts = triton.cdiv(V, math.prod(blocks.values()))
    upstream = [x if x is None else x.float().contiguous() for x in (dlogp_T, dentropy_T, dlse_T)]
    _token_logp_bwd_kernel[(T * parts,)](
        source_TV,
        out_TV,
        targets_T,
        inverse_temperature(temperature_T, logits_TV),
        upstream[0],
        upstream[0] if upstream[1] is None else upstream[1],
        torch.zeros_like(upstream[0]) if upstream[2] is None else upstream[2],
        logp_T,
        logp_T if entropy_T is None else entropy_T,
        lse_T,
        V,
        source_TV.stride(0),
        out_TV.stride(0),
        logit_scale,
        softcap,
        **blocks,
        SOFTCAP=bool(softcap),
        ENTROPY=dentropy_T is not None,
        SAME_CUT=(source_TV.stride(0) - out_TV.stride(0)) % blocks["VECTOR"] == 0,
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
