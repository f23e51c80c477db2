"""Kernels of the linear head: the anchored softmax over hidden @ weight^T, logits never stored.

With the transformed logit l = softcap tanh(scale z / softcap) / temperature of z = h w + b, and
one anchor c per row (the target's logit minus a prior log-probability), a tile of z becomes
E = exp(l - c) in the epilogue of its own GEMM; no maximum and no second read are needed. The
target column is left out (0) and added in float32 by target_kernels.py. docs/ops/linear_logp.md has
the derivation.

    forward_chunk(hidden_CD, targets_C, temperature_C, anchor_C, head, entropy, store_CV)
        -> ChunkSums(s_C, u_C, rounded_C)
    gradient_chunk(hidden_CD, targets_C, temperature_C, stats, dlogp_C, dentropy_C, dlse_C, head,
                   store_CV) -> t_C

head is a `chunked_head.Head`; temperature_C is float32 or None; targets are int64 in [0, V). Every
[C] result is float32.

Memory traffic of a chunk: hidden C D and weight V D once per pass of GEMM tiles (tiles of one
weight column block run side by side and share it in L2), C V elements written when stored, and
4 C (V / BLOCK_V) bytes for each of up to three partial sums. A row's result depends on its own
data and on the tile shape, which is the same for every mode and chunk, so all paths agree bitwise.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import (
    INTERPRETED,
    LOWEST,
    architecture,
    inverse_temperature,
    transform,
    weigh,
)

SUMS = tl.constexpr(0)
STORE = tl.constexpr(1)
GRADIENT = tl.constexpr(2)

# Rows whose s exceeds 2^46 (or is not finite) are redone around their own maximum. log S then stays
# within +-32, the priors being clamped at -8, and the entropy log S - m loses at most
# 32 * 2^-24 = 2e-6 nats to cancellation, what a float32 log-sum-exp of logits near 32 loses too.
SUM_LIMIT = tl.constexpr(2.0**46)

# Stored entries of a row about to be redone are held here, so that no inf is ever written.
STORE_LIMIT = tl.constexpr(2.0**100)

ALIGNMENT = 16
BLOCK_REDUCE = 32
BLOCK_FIX_V, BLOCK_FIX_D, FIX_WARPS = (32, 32, 4) if INTERPRETED else (32, 64, 4)


class ChunkSums(NamedTuple):
    """Row sums over the columns j != y; None for what was not asked for."""

    s_C: Tensor
    u_C: Tensor | None
    rounded_C: Tensor | None


@dataclass(frozen=True, slots=True)
class HeadConfig:
    BLOCK_C: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_C: int
    num_warps: int
    num_stages: int


def launch_config(
    arch: int, dtype: torch.dtype, aligned: bool = True, capped_gradient: bool = False
) -> HeadConfig:
    """Tile of the GEMM kernel, the same for every number of rows and in both forward modes.

    `aligned`: D is a multiple of BLOCK_D and rows of hidden and weight start at multiples of 16.
    `capped_gradient`: gradient mode under softcap.
    """
    if arch == 0:
        return HeadConfig(16, 32, 32, 2, 1, 1)
    # Element-wise loads need a pointer each (larger tiles spill), and IEEE float32 products run on
    # the ordinary cores, with the operands in registers.
    if not aligned or dtype == torch.float32:
        return HeadConfig(64, 64, 32, 8, 8, 2)
    # Compile-time facts only: no spill, 131 KB of shared memory on sm_90, 66 KB on sm_80, which
    # leaves room on the 99 KB parts (sm_86, sm_89). The float32 store of float16 inputs and the
    # slope of the softcap beside a gradient spill at 128 x 128.
    narrow = dtype == torch.float16 or capped_gradient
    return HeadConfig(128, 64 if narrow else 128, 64, 8, 8, 4 if arch >= 90 else 3)


def is_aligned(hidden_CD: Tensor, weight_VD: Tensor) -> bool:
    """Whether the fast tiles may run; 64 is the largest BLOCK_D."""
    strides = hidden_CD.stride(0) | weight_VD.stride(0)
    return hidden_CD.shape[1] % 64 == 0 and strides % ALIGNMENT == 0


def padded(V: int) -> int:
    """Columns of the stored matrix: rows start aligned, whatever V is; the extra ones hold 0."""
    return triton.cdiv(V, ALIGNMENT) * ALIGNMENT


def store_dtype(dtype: torch.dtype) -> torch.dtype:
    """What forward_chunk and gradient_chunk store for inputs of a dtype.

    bfloat16 has float32's exponent range, so it keeps E's relative precision around any anchor.
    float16 does not: exp(l - c) leaves it 11 nats above the anchor, so E stays in float32 and the
    caller divides by S, a number in [0, 1], on the way into the gradient GEMMs.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


@triton.jit(do_not_specialize=["C", "V"])
def _head_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    anchor_ptr,
    inverse_temperature_ptr,
    alpha_ptr,
    beta_ptr,
    centre_ptr,
    out_ptr,
    partial_ptr,
    C,
    V,
    D,
    stride_hidden_c,
    stride_weight_v,
    columns,
    scale,
    softcap,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MODE: tl.constexpr,
):
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    group = tl.program_id(0) // (GROUP_C * tiles_v)
    place = tl.program_id(0) % (GROUP_C * tiles_v)
    group_rows = tl.minimum(tiles_c - group * GROUP_C, GROUP_C)
    pid_c = group * GROUP_C + place % group_rows
    pid_v = place // group_rows

    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_v = pid_v.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    mask_c = offs_c < C
    # Rows and columns past the end wrap round, which keeps masks out of the loop over D.
    hidden_ptrs = hidden_ptr + (offs_c % C)[:, None] * stride_hidden_c + offs_d[None, :]
    weight_ptrs = weight_ptr + (offs_v % V)[None, :] * stride_weight_v + offs_d[:, None]
    z = tl.zeros((BLOCK_C, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            hidden = tl.load(hidden_ptrs)
            weight = tl.load(weight_ptrs)
        else:
            hidden = tl.load(hidden_ptrs, mask=offs_d[None, :] < D - start, other=0.0)
            weight = tl.load(weight_ptrs, mask=offs_d[:, None] < D - start, other=0.0)
        z = tl.dot(hidden, weight, z, input_precision="ieee")
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D

    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
    per_tau = tl.load(inverse_temperature_ptr + offs_c, mask=mask_c, other=1.0)
    l, slope = transform(z, scale, softcap, per_tau[:, None], SOFTCAP)
    d = l - tl.load(anchor_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
    target = tl.load(targets_ptr + offs_c, mask=mask_c, other=-1)
    keep = (offs_v[None, :] < V) & (offs_v[None, :] != target[:, None])
    e = tl.where(keep, tl.exp(d), 0.0)

    partial_ptrs = partial_ptr + pid_v.to(tl.int64) * C + offs_c
    plane = tiles_v.to(tl.int64) * C
    if MODE != GRADIENT:
        tl.store(partial_ptrs, tl.sum(e, axis=1), mask=mask_c)
        partial_ptrs += plane
        if ENTROPY:
            tl.store(partial_ptrs, tl.sum(weigh(e, d), axis=1), mask=mask_c)
            partial_ptrs += plane
    if MODE != SUMS:
        if MODE == GRADIENT:
            alpha = tl.load(alpha_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
            beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
            # Centred before it is scaled: alpha would else hold a large number that beta d cancels.
            centre = tl.load(centre_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
            value = weigh(e * slope, alpha + beta * (d + centre))
        else:
            value = tl.minimum(e, STORE_LIMIT) * slope
        rounded = value.to(out_ptr.dtype.element_ty)
        tl.store(partial_ptrs, tl.sum(value - rounded.to(tl.float32), axis=1), mask=mask_c)
        out_ptrs = out_ptr + offs_c[:, None] * columns + offs_v[None, :]
        tl.store(out_ptrs, rounded, mask=mask_c[:, None] & (offs_v[None, :] < columns))


@triton.jit(do_not_specialize=["C", "tiles"])
def _reduce_kernel(
    partial_ptr, sums_ptr, C, tiles, BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """float64 sum of one plane of partials over the tiles, in an order that depends on them alone.

    The entropy is a difference of two such sums, which may be ten times as large as it.
    """
    offs_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    plane = tl.program_id(1).to(tl.int64)
    partial_ptr += plane * tiles * C
    total = tl.zeros((BLOCK_TILES, BLOCK_C), dtype=tl.float64)
    for start in range(0, tiles, BLOCK_TILES):
        offs_tile = start + tl.arange(0, BLOCK_TILES).to(tl.int64)
        mask = (offs_tile[:, None] < tiles) & mask_c[None, :]
        total += tl.load(
            partial_ptr + offs_tile[:, None] * C + offs_c[None, :], mask=mask, other=0.0
        )
    tl.store(sums_ptr + plane * C + offs_c, tl.sum(total, axis=0), mask=mask_c)


@triton.jit
def _row_logits(
    hidden_ptr, weight_ptr, bias_ptr, offs_v, V, D, stride_weight_v,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Raw logits of one row in the columns offs_v, 0 beyond V."""
    mask_v = offs_v < V
    z = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        hidden = tl.load(hidden_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        weight_ptrs = weight_ptr + offs_v[:, None] * stride_weight_v + offs_d[None, :]
        weight = tl.load(weight_ptrs, mask=mask_v[:, None] & mask_d[None, :], other=0.0)
        z += tl.sum(weight.to(tl.float32) * hidden[None, :], axis=1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
    return z


@triton.jit(do_not_specialize=["C", "V"])
def _fix_rows_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    anchor_ptr,
    inverse_temperature_ptr,
    out_ptr,
    sums_ptr,
    C,
    V,
    D,
    stride_hidden_c,
    stride_weight_v,
    columns,
    scale,
    softcap,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MODE: tl.constexpr,
):
    """One program per row: returns at once unless the row's sum is out of range, else takes the
    row's maximum for its anchor and redoes its sums and its stored entries."""
    row = tl.program_id(0).to(tl.int64)
    # Written so that NaN takes the branch.
    if (tl.load(sums_ptr + row) <= SUM_LIMIT) == 0:
        hidden_ptr += row * stride_hidden_c
        out_ptr += row * columns
        target = tl.load(targets_ptr + row)
        per_tau = tl.load(inverse_temperature_ptr + row)
        top = LOWEST + 0.0
        s = 0.0
        u = 0.0
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
            z = _row_logits(
                hidden_ptr, weight_ptr, bias_ptr, offs_v, V, D, stride_weight_v,
                BLOCK_V, BLOCK_D, HAS_BIAS,
            )  # fmt: skip
            l, slope = transform(z, scale, softcap, per_tau, SOFTCAP)
            l = tl.where(offs_v < V, l, LOWEST)
            new_top = tl.maximum(top, tl.max(l, axis=0))
            e = tl.where((offs_v < V) & (offs_v != target), tl.exp(l - new_top), 0.0)
            decay = tl.exp(top - new_top)
            if ENTROPY:
                u = decay * (u + (top - new_top) * s) + tl.sum(weigh(e, l - new_top), axis=0)
            s = decay * s + tl.sum(e, axis=0)
            top = new_top
        tl.store(anchor_ptr + row, top)
        tl.store(sums_ptr + row, s)
        sums_ptr += C
        if ENTROPY:
            tl.store(sums_ptr + row, u)
            sums_ptr += C
        if MODE == STORE:
            residue = 0.0
            for start in range(0, V, BLOCK_V):
                offs_v = start + tl.arange(0, BLOCK_V).to(tl.int64)
                z = _row_logits(
                    hidden_ptr, weight_ptr, bias_ptr, offs_v, V, D, stride_weight_v,
                    BLOCK_V, BLOCK_D, HAS_BIAS,
                )  # fmt: skip
                l, slope = transform(z, scale, softcap, per_tau, SOFTCAP)
                keep = (offs_v < V) & (offs_v != target)
                value = tl.where(keep, tl.exp(l - top), 0.0) * slope
                rounded = value.to(out_ptr.dtype.element_ty)
                residue += tl.sum(value - rounded.to(tl.float32), axis=0)
                tl.store(out_ptr + offs_v, rounded, mask=offs_v < columns)
            tl.store(sums_ptr + row, residue)


def _launch_head(
    hidden_CD, targets_C, inverse_temperature_C, anchor_C, row_terms, head, entropy, store_CV, mode,
):  # fmt: skip
    """Runs the GEMM kernel in one mode; returns the sums of its planes, [planes, C].

    row_terms: (alpha, beta, centre) of GRADIENT. A pointer that a mode does not read is given any
    tensor of the type it has elsewhere.
    """
    C, D = hidden_CD.shape
    weight_VD, bias_V = head.weight_VD, head.bias_V
    V = weight_VD.shape[0]
    aligned = is_aligned(hidden_CD, weight_VD)
    capped_gradient = mode == GRADIENT.value and bool(head.softcap)
    arch = architecture(hidden_CD.device)
    config = launch_config(arch, hidden_CD.dtype, aligned, capped_gradient)
    tiles_c, tiles_v = triton.cdiv(C, config.BLOCK_C), triton.cdiv(V, config.BLOCK_V)
    planes = (mode != GRADIENT.value) * (1 + entropy) + (mode != SUMS.value)
    partial = hidden_CD.new_empty((planes, tiles_v, C), dtype=torch.float32)
    sums = hidden_CD.new_empty((planes, C), dtype=torch.float64)
    out = partial if store_CV is None else store_CV
    _head_kernel[(tiles_c * tiles_v,)](
        hidden_CD,
        weight_VD,
        weight_VD if bias_V is None else bias_V,
        targets_C,
        anchor_C,
        inverse_temperature_C,
        *(row_terms or (anchor_C, anchor_C, anchor_C)),
        out,
        partial,
        C,
        V,
        D,
        hidden_CD.stride(0),
        weight_VD.stride(0),
        ALIGNMENT if store_CV is None else store_CV.shape[1],
        head.logit_scale,
        head.softcap,
        BLOCK_C=config.BLOCK_C,
        BLOCK_V=config.BLOCK_V,
        BLOCK_D=config.BLOCK_D,
        GROUP_C=config.GROUP_C,
        EVEN_D=aligned,
        HAS_BIAS=bias_V is not None,
        SOFTCAP=bool(head.softcap),
        ENTROPY=entropy,
        MODE=mode,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    _reduce_kernel[(triton.cdiv(C, BLOCK_REDUCE), planes)](
        partial, sums, C, tiles_v, BLOCK_C=BLOCK_REDUCE, BLOCK_TILES=BLOCK_REDUCE, num_warps=4
    )
    return sums


def forward_chunk(
    hidden_CD: Tensor,
    targets_C: Tensor,
    temperature_C: Tensor | None,
    anchor_C: Tensor,
    head,
    entropy: bool,
    store_CV: Tensor | None,
) -> ChunkSums:
    """Row sums of E = exp(l - anchor) over j != y, and E itself where a buffer is given.

    Rows out of range are redone around their maximum, and `anchor_C` (float32, contiguous) is
    updated there: take q = l_y - anchor_C afterwards, never before.

    s_C = sum E, u_C = sum E (l - anchor). store_CV [C, padded(V)] of `store_dtype` receives E,
    times 1 - tanh^2 under softcap, with 0 in the target and padding columns; rounded_C is then s_C
    less what rounding took from the row, for a target coefficient that makes it sum to zero.
    """
    C, D = hidden_CD.shape
    weight_VD, bias_V = head.weight_VD, head.bias_V
    V = weight_VD.shape[0]
    inverse_temperature_C = inverse_temperature(temperature_C, hidden_CD)
    mode = SUMS.value if store_CV is None else STORE.value
    sums = _launch_head(
        hidden_CD, targets_C, inverse_temperature_C, anchor_C, None, head, entropy, store_CV, mode,
    )  # fmt: skip
    # A row of NaN is NaN whatever is done: its anchor says so, and a redo would only take long.
    sums[0].masked_fill_(anchor_C.isnan(), 0.0)
    _fix_rows_kernel[(C,)](
        hidden_CD,
        weight_VD,
        weight_VD if bias_V is None else bias_V,
        targets_C,
        anchor_C,
        inverse_temperature_C,
        anchor_C if store_CV is None else store_CV,
        sums,
        C,
        V,
        D,
        hidden_CD.stride(0),
        weight_VD.stride(0),
        ALIGNMENT if store_CV is None else store_CV.shape[1],
        head.logit_scale,
        head.softcap,
        BLOCK_V=BLOCK_FIX_V,
        BLOCK_D=BLOCK_FIX_D,
        HAS_BIAS=bias_V is not None,
        SOFTCAP=bool(head.softcap),
        ENTROPY=entropy,
        MODE=mode,
        num_warps=FIX_WARPS,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return ChunkSums(
        s_C=sums[0],
        u_C=sums[1] if entropy else None,
        rounded_C=None if store_CV is None else sums[0] - sums[-1],
    )


def gradient_chunk(
    hidden_CD: Tensor,
    targets_C: Tensor,
    temperature_C: Tensor | None,
    stats,
    dlogp_C: Tensor,
    dentropy_C: Tensor | None,
    dlse_C: Tensor | None,
    head,
    store_CV: Tensor,
) -> Tensor:
    """Writes dL/dz into store_CV (0 in the target column) and returns t_C = dL/dz of the target.

    The logits are made again, since they cannot be had from E once it is rounded. stats (logp,
    entropy, lse) are the forward's, float64. t_C makes up for what rounding took from the row.
    """
    anchor_C = stats.lse.float()
    # What float32 takes from the log-sum-exp, half an ulp of a number near 20, is in every p_j.
    lost_C = anchor_C - stats.lse
    per_total_C = lost_C.exp()
    inverse_temperature_C = inverse_temperature(temperature_C, hidden_CD)
    scale_C = head.logit_scale * inverse_temperature_C
    gap_C = dlogp_C if dlse_C is None else dlogp_C - dlse_C
    beta_C = centre_C = torch.zeros_like(gap_C)
    t_C = -gap_C * torch.expm1(stats.logp)
    if dlse_C is not None:
        t_C = t_C + dlse_C
    if dentropy_C is not None:
        beta_C, centre_C = -dentropy_C, stats.entropy + lost_C
        # A target of probability 0 adds nothing; 0 * -inf would be NaN.
        t_C = t_C - dentropy_C * stats.logp.exp() * (stats.logp.clamp(min=-1e4) + stats.entropy)
    if head.softcap:
        t_C = t_C * target_slope(stats.logp + stats.lse, inverse_temperature_C, head.softcap)
    factor_C = scale_C * per_total_C
    sums = _launch_head(
        hidden_CD, targets_C, inverse_temperature_C, anchor_C,
        tuple(x.float() for x in (-gap_C * factor_C, beta_C * factor_C, centre_C)),
        head, False, store_CV, GRADIENT.value,
    )  # fmt: skip
    return (t_C * scale_C + sums[0]).float()


def target_slope(target_logit_C: Tensor, inverse_temperature_C: Tensor, softcap: float) -> Tensor:
    """1 - tanh^2 of the target's logit, from its transformed value."""
    return 1.0 - (target_logit_C / (inverse_temperature_C * softcap)) ** 2
