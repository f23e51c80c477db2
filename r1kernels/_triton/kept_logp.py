"""The head over kept ids: ragged gathered dot products, no GEMM and no [T, V] matrix.

    fwd(head, rows, kept, entropy) -> float64 [3, T], logits_M
    bwd(upstream, head, rows, kept, exact_3T, logits_M, dtypes) -> dhidden, dweight, dbias

as in `r1kernels.reference.kept_logp`. Entries n < N are the ids, the T after them the targets. Each
entry of the forward gathers one row of the weight and one of hidden; dhidden gathers the weight's
rows again, dweight hidden's in the order of sorted ids: one program per distinct id and block of D
sums its entries in order, so no atomics and the same bits in every run. Products and sums are
float32, softmax sums float64. Memory traffic: N + T rows of D elements from each of weight and
hidden forward (those of hidden from cache), and once each backward; 4 (N + T) bytes stay.
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
    finish_rows,
    inverse_temperature,
    transform,
    weigh,
)
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import gradient_terms, ragged_rows

# Bandwidth-bound: 32 bytes a thread in flight. Sets are short, so that the backward's tiles are
# wide and few ids high; the forward's sum along D, and end in one reduction.
BLOCK_LOGITS_N, BLOCK_LOGITS_D = (32, 32) if INTERPRETED else (16, 256)
BLOCK_SUM_N, BLOCK_SUM_D = (16, 32) if INTERPRETED else (4, 1024)
BLOCK_SOFTMAX_N = 32 if INTERPRETED else 256
NUM_WARPS = 8
SOFTMAX_WARPS = 4


@triton.jit(do_not_specialize=["M"])
def _kept_logits_kernel(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    rows_ptr,
    inverse_temperature_ptr,
    values_ptr,
    M,
    D,
    stride_hidden_t,
    stride_weight_v,
    scale,
    softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < M
    id = tl.load(ids_ptr + offs_n, mask=mask_n, other=-1)
    row = tl.load(rows_ptr + offs_n, mask=mask_n, other=0)
    real = id >= 0
    hidden_ptrs = hidden_ptr + row[:, None] * stride_hidden_t
    weight_ptrs = weight_ptr + id.to(tl.int64)[:, None] * stride_weight_v
    products = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask = real[:, None] & (offs_d < D)[None, :]
        hidden = tl.load(hidden_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptrs + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        products += hidden * weight
    z = tl.sum(products, axis=1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + id, mask=real, other=0.0).to(tl.float32)
    per_tau = tl.load(inverse_temperature_ptr + row, mask=mask_n, other=1.0)
    l, _ = transform(z, scale, softcap, per_tau, SOFTCAP)
    tl.store(values_ptr + offs_n, tl.where(real, l, -float("inf")), mask=mask_n)


@triton.jit(do_not_specialize=["N", "T"])
def _kept_softmax_kernel(
    values_ptr, targets_ptr, offsets_ptr, sums_ptr, N, T, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    sums_ptr += row
    counted = tl.load(targets_ptr + row) >= 0
    start = tl.load(offsets_ptr + row)
    end = tl.where(counted, tl.load(offsets_ptr + row + 1), start)
    l_target = tl.where(counted, tl.load(values_ptr + N + row), 0.0)
    tops = tl.full((BLOCK_N,), LOWEST, tl.float32)
    for at in range(start, end, BLOCK_N):
        offs_n = at + tl.arange(0, BLOCK_N)
        l = tl.load(values_ptr + offs_n, mask=offs_n < end, other=-float("inf"))
        tops = tl.maximum(tops, l)
    top = tl.maximum(l_target, tl.max(tops, axis=0))
    s = tl.zeros((BLOCK_N,), dtype=tl.float64)
    u = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for at in range(start, end, BLOCK_N):
        offs_n = at + tl.arange(0, BLOCK_N)
        d = tl.load(values_ptr + offs_n, mask=offs_n < end, other=-float("inf")) - top
        e = tl.exp(d)
        s += e
        u += weigh(e, d)
    tl.store(sums_ptr, top.to(tl.float64))
    tl.store(sums_ptr + T, l_target.to(tl.float64) - top)
    tl.store(sums_ptr + 2 * T, tl.sum(s, axis=0))
    tl.store(sums_ptr + 3 * T, tl.sum(u, axis=0))


def fwd(head, rows, kept: tuple[Tensor, Tensor], entropy: bool) -> tuple[Tensor, Tensor]:
    """See `r1kernels.reference.kept_logp.fwd`; the entropy costs nothing and is always there."""
    hidden_TD, weight_VD, ids_M, rows_M, targets_T = _entries(head, rows, kept)
    (M,), (T, D), N = ids_M.shape, hidden_TD.shape, len(kept[0])
    logits_M = hidden_TD.new_empty((M,), dtype=torch.float32)
    sums_4T = hidden_TD.new_empty((4, T), dtype=torch.float64)
    if T == 0:
        return sums_4T[:3], logits_M
    _kept_logits_kernel[(triton.cdiv(M, BLOCK_LOGITS_N),)](
        hidden_TD,
        weight_VD,
        weight_VD if head.bias_V is None else head.bias_V.contiguous(),
        ids_M,
        rows_M,
        inverse_temperature(rows.temperature_T, hidden_TD),
        logits_M,
        M,
        D,
        hidden_TD.stride(0),
        weight_VD.stride(0),
        head.logit_scale,
        head.softcap,
        BLOCK_N=BLOCK_LOGITS_N,
        BLOCK_D=BLOCK_LOGITS_D,
        HAS_BIAS=head.bias_V is not None,
        SOFTCAP=bool(head.softcap),
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )
    _kept_softmax_kernel[(T,)](
        logits_M,
        targets_T,
        kept[1].contiguous(),
        sums_4T,
        N,
        T,
        BLOCK_N=BLOCK_SOFTMAX_N,
        num_warps=SOFTMAX_WARPS,
        enable_fp_fusion=True,
    )
    return finish_rows(sums_4T), logits_M


@triton.jit(do_not_specialize=["N"])
def _kept_dhidden_kernel(
    weight_ptr,
    ids_ptr,
    offsets_ptr,
    dlogits_ptr,
    out_ptr,
    N,
    D,
    stride_weight_v,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    start = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    sums = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for at in range(start, end, BLOCK_N):
        offs_n = at + tl.arange(0, BLOCK_N)
        id = tl.load(ids_ptr + offs_n, mask=offs_n < end, other=-1)
        d = tl.load(dlogits_ptr + offs_n, mask=offs_n < end, other=0.0)
        weight_ptrs = weight_ptr + id.to(tl.int64)[:, None] * stride_weight_v + offs_d[None, :]
        weight = tl.load(weight_ptrs, mask=(id >= 0)[:, None] & mask_d[None, :], other=0.0)
        sums += d[:, None] * weight.to(tl.float32)
    target = tl.load(ids_ptr + N + row)
    weight_ptrs = weight_ptr + target.to(tl.int64) * stride_weight_v + offs_d
    width = tl.where(target >= 0, D, 0)
    weight = tl.load(weight_ptrs, mask=offs_d < width, other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0) + tl.load(dlogits_ptr + N + row) * weight
    tl.store(out_ptr + row * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit(do_not_specialize=["M"])
def _kept_dweight_kernel(
    hidden_ptr,
    ids_ptr,
    rows_ptr,
    order_ptr,
    starts_ptr,
    dlogits_ptr,
    out_ptr,
    dbias_ptr,
    M,
    D,
    stride_hidden_t,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """One program per segment of equal sorted ids and block of D; -1 and the list's end return."""
    start = tl.load(starts_ptr + tl.program_id(0))
    end = tl.load(starts_ptr + tl.program_id(0) + 1)
    id = tl.load(ids_ptr + start, mask=start < M, other=-1).to(tl.int64)
    if id >= 0:
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        sums = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for at in range(start, end, BLOCK_N):
            offs_n = at + tl.arange(0, BLOCK_N)
            mask_n = offs_n < end
            entry = tl.load(order_ptr + offs_n, mask=mask_n, other=0)
            row = tl.load(rows_ptr + entry, mask=mask_n, other=0)
            d = tl.load(dlogits_ptr + entry, mask=mask_n, other=0.0)
            hidden_ptrs = hidden_ptr + row[:, None] * stride_hidden_t + offs_d[None, :]
            # Rows that do not count have a gradient of 0 and may hold anything: not read.
            mask = (mask_n & (d != 0.0))[:, None] & mask_d[None, :]
            hidden = tl.load(hidden_ptrs, mask=mask, other=0.0)
            sums += d[:, None] * hidden.to(tl.float32)
            bias += d
        total = tl.sum(sums, axis=0)
        tl.store(out_ptr + id * D + offs_d, total.to(out_ptr.dtype.element_ty), mask=mask_d)
        if HAS_BIAS and tl.program_id(1) == 0:
            tl.store(dbias_ptr + id, tl.sum(bias, axis=0))


def bwd(
    upstream: tuple[Tensor, Tensor | None, Tensor],
    head,
    rows,
    kept: tuple[Tensor, Tensor],
    exact_3T: Tensor,
    logits_M: Tensor,
    dtypes: list[torch.dtype | None],
) -> list[Tensor | None]:
    """See `r1kernels.reference.kept_logp.bwd`."""
    hidden_TD, weight_VD, ids_M, rows_M, _ = _entries(head, rows, kept)
    (T, D), V, M = hidden_TD.shape, len(weight_VD), len(ids_M)
    N = M - T
    to_hidden, to_weight, to_bias = dtypes
    dlogits_M = _dlogits(upstream, head, rows, exact_3T, logits_M, rows_M, N)
    blocks_d = triton.cdiv(D, BLOCK_SUM_D)
    blocks = {"BLOCK_N": BLOCK_SUM_N, "BLOCK_D": BLOCK_SUM_D, "num_warps": NUM_WARPS}
    dhidden_TD = None if to_hidden is None else hidden_TD.new_empty((T, D), dtype=to_hidden)
    if dhidden_TD is not None and T > 0:
        _kept_dhidden_kernel[(T, blocks_d)](
            weight_VD,
            ids_M,
            kept[1].contiguous(),
            dlogits_M,
            dhidden_TD,
            N,
            D,
            weight_VD.stride(0),
            **blocks,
            enable_fp_fusion=True,
        )
    if to_weight is None and to_bias is None:
        return [dhidden_TD, None, None]
    dweight_VD = hidden_TD.new_zeros((V, D), dtype=to_weight or head.weight_VD.dtype)
    dbias_V = None if to_bias is None else hidden_TD.new_zeros((V,), dtype=torch.float32)
    if T > 0:
        sorted_M, order_M = ids_M.sort(stable=True)
        first_M = torch.ones_like(sorted_M, dtype=torch.bool)
        first_M[1:] = sorted_M[1:] != sorted_M[:-1]
        # As many segments as there can be, so that their number need not be known: -1 and V ids.
        segments = min(M, V + 1)
        starts = torch.nonzero_static(first_M, size=segments + 1, fill_value=M).squeeze(1)
        _kept_dweight_kernel[(segments, blocks_d)](
            hidden_TD,
            sorted_M,
            rows_M,
            order_M,
            starts,
            dlogits_M,
            dweight_VD,
            dlogits_M if dbias_V is None else dbias_V,
            M,
            D,
            hidden_TD.stride(0),
            **blocks,
            HAS_BIAS=dbias_V is not None,
            enable_fp_fusion=True,
        )
    return [
        dhidden_TD,
        None if to_weight is None else dweight_VD,
        None if dbias_V is None else dbias_V.to(to_bias),
    ]


def _entries(head, rows, kept: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """hidden and weight with rows in one piece; the ids and rows of all entries; the targets."""
    hidden_TD, weight_VD = (
        x if x.stride(1) == 1 else x.contiguous() for x in (rows.hidden_TD, head.weight_VD)
    )
    (ids_N, offsets), targets_T = kept, rows.targets_T.contiguous()
    own_T = torch.arange(len(targets_T), device=targets_T.device)
    rows_M = torch.cat([ragged_rows(offsets, len(ids_N)), own_T])
    return (
        hidden_TD,
        weight_VD,
        torch.cat([ids_N, targets_T.clamp(min=-1).int()]),
        rows_M,
        targets_T,
    )


def _dlogits(upstream, head, rows, exact_3T, logits_M, rows_M, N: int) -> Tensor:
    """dL/dz of every entry, float32: elementwise work on one number per id."""
    terms = gradient_terms(Logp(*exact_3T), *upstream)
    at = {key: None if x is None else x[rows_M] for key, x in terms.items()}
    d_M = (logits_M - at["anchor"]).clamp(min=-1e4)
    coefficient_M = at["logp_grad"]
    if at["ent_grad"] is not None:
        coefficient_M = coefficient_M + at["ent_grad"] * (d_M + at["centre"])
    dl_M = -(d_M + at["shift"]).exp() * coefficient_M
    dl_M[N:] = terms["target_grad"]
    per_tau_T = inverse_temperature(rows.temperature_T, rows.hidden_TD)
    per_tau_M = per_tau_T[rows_M]
    if head.softcap:
        dl_M *= 1.0 - (logits_M / (per_tau_M * head.softcap)) ** 2
    real_M = (rows.targets_T >= 0)[rows_M] & (logits_M > -torch.inf)
    real_M |= logits_M.isnan()
    return torch.where(real_M, dl_M * per_tau_M * head.logit_scale, 0.0)


def refuses(hidden: Tensor | None = None, *_args: object) -> str | None:
    """Why these kernels cannot take the hidden states, or None."""
    if hidden is None:
        return device_refusal(None)
    if INTERPRETED and hidden.dtype == torch.bfloat16:
        return "the interpreter truncates where bfloat16 is rounded"
    return device_refusal(hidden) or dtype_refusal(hidden)
