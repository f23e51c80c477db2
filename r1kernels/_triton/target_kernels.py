"""Kernels of the target column, which the head's GEMMs leave out: one row of the weight per token.

    target_logits(hidden_CD, targets_C, temperature_C, head, low_CR) -> l_y [C]
    add_target_hidden(dhidden_CD, weight_VD, targets_C, coefficient_C)
    add_target_weight(dweight_VD, hidden_TD, targets_T, coefficient_T)

A target of -1 is another vocabulary shard's: its logit is 0 and it adds nothing.

All arithmetic is float32. Memory traffic: 2 T D elements read by the first; T D read and T D
float32 updated by the second; T D read and a float32 row updated per distinct target by the third.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import INTERPRETED, inverse_temperature, transform

# Bandwidth-bound: a program needs several loads in flight, no more.
BLOCK_D = 64 if INTERPRETED else 1024
BLOCK_SEGMENT_T, BLOCK_SEGMENT_D = (16, 32) if INTERPRETED else (16, 128)


@triton.jit
def _target_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, low_logit_ptr, inverse_temperature_ptr,
    out_ptr,
    D, stride_hidden_c, stride_weight_v, scale, softcap, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    width = tl.where(target >= 0, D, 0)
    hidden_ptr += row * stride_hidden_c
    weight_ptr += target * stride_weight_v
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        hidden = tl.load(hidden_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        products += hidden * tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    z = tl.sum(products, axis=0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + target, mask=width > 0, other=0.0).to(tl.float32)
    if HAS_LOW:
        z += tl.load(low_logit_ptr + row, mask=width > 0, other=0.0)
    l, _ = transform(z, scale, softcap, tl.load(inverse_temperature_ptr + row), SOFTCAP)
    tl.store(out_ptr + row, l)


def target_logits(
    hidden_CD: Tensor,
    targets_C: Tensor,
    temperature_C: Tensor | None,
    head,
    low_CR: Tensor | None = None,
) -> Tensor:
    """Transformed logit of each row's target, from one dot product per row; float32.

    low_CR: the other operand of a low-rank term of the head, as its product has it.
    """
    C, D = hidden_CD.shape
    weight_VD, bias_V = head.weight_VD, head.bias_V
    out_C = hidden_CD.new_empty((C,), dtype=torch.float32)
    low_C = out_C
    if low_CR is not None:
        low_C = (low_CR.float() * head.lora_VR[targets_C].float()).sum(1)
    _target_logits_kernel[(C,)](
        hidden_CD,
        weight_VD,
        weight_VD if bias_V is None else bias_V,
        targets_C,
        low_C,
        inverse_temperature(temperature_C, hidden_CD),
        out_C,
        D,
        hidden_CD.stride(0),
        weight_VD.stride(0),
        head.logit_scale,
        head.softcap,
        BLOCK_D=BLOCK_D,
        HAS_BIAS=bias_V is not None,
        HAS_LOW=low_CR is not None,
        SOFTCAP=bool(head.softcap),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out_C


@triton.jit
def _add_target_hidden_kernel(
    dhidden_ptr, weight_ptr, targets_ptr, coefficient_ptr,
    D, stride_dhidden_c, stride_weight_v, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    width = tl.where(target >= 0, D, 0)
    coefficient = tl.load(coefficient_ptr + row)
    dhidden_ptr += row * stride_dhidden_c
    weight_ptr += target * stride_weight_v
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < width
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + offs_d, mask=mask_d, other=0.0)
        tl.store(dhidden_ptr + offs_d, dhidden + coefficient * weight, mask=mask_d)


def add_target_hidden(
    dhidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, coefficient_C: Tensor
) -> None:
    """dhidden_CD (float32) += coefficient_C * weight_VD[targets_C], in place."""
    C, D = dhidden_CD.shape
    _add_target_hidden_kernel[(C,)](
        dhidden_CD,
        weight_VD,
        targets_C,
        coefficient_C,
        D,
        dhidden_CD.stride(0),
        weight_VD.stride(0),
        BLOCK_D=BLOCK_D,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def _add_target_weight_kernel(
    dweight_ptr, hidden_ptr, targets_ptr, order_ptr, ends_ptr, coefficient_ptr,
    D, stride_dweight_v, stride_hidden_t, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program per place in the sorted targets and block of D; the first place of a segment
    sums the whole segment, the others return."""
    first = tl.program_id(0)
    target = tl.load(targets_ptr + first)
    previous = tl.load(targets_ptr + first - 1, mask=first > 0, other=-1)  # -1: nobody's
    if target != previous:
        end = tl.load(ends_ptr + first).to(tl.int32)
        offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(first, end, BLOCK_T):
            place = start + tl.arange(0, BLOCK_T)
            mask_t = place < end
            row = tl.load(order_ptr + place, mask=mask_t, other=0)
            coefficient = tl.load(coefficient_ptr + row, mask=mask_t, other=0.0)
            hidden_ptrs = hidden_ptr + row[:, None] * stride_hidden_t + offs_d[None, :]
            hidden = tl.load(hidden_ptrs, mask=mask_t[:, None] & mask_d[None, :], other=0.0)
            total += tl.sum(coefficient[:, None] * hidden.to(tl.float32), axis=0)
        dweight_ptrs = dweight_ptr + target * stride_dweight_v + offs_d
        tl.store(dweight_ptrs, tl.load(dweight_ptrs, mask=mask_d, other=0.0) + total, mask=mask_d)


def add_target_weight(
    dweight_VD: Tensor, hidden_TD: Tensor, targets_T: Tensor, coefficient_T: Tensor
) -> None:
    """dweight_VD[targets_T] (float32) += coefficient_T * hidden_TD, in place.

    Each row of dweight is touched by one program, over its tokens in order: deterministic, no
    atomics, and no host synchronisation.
    """
    T, D = hidden_TD.shape
    sorted_T, order_T = torch.sort(targets_T, stable=True)
    ends_T = torch.searchsorted(sorted_T, sorted_T, right=True)
    _add_target_weight_kernel[(T, triton.cdiv(D, BLOCK_SEGMENT_D))](
        dweight_VD,
        hidden_TD,
        sorted_T,
        order_T,
        ends_T,
        coefficient_T,
        D,
        dweight_VD.stride(0),
        hidden_TD.stride(0),
        BLOCK_T=BLOCK_SEGMENT_T,
        BLOCK_D=BLOCK_SEGMENT_D,
        num_warps=4,
        enable_fp_fusion=True,
    )
