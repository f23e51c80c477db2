"""A matrix product of fixed tiles, for `batch_invariant`.

    add_product(out_CD, left_CV, right_VD)      out (float32) += left @ right, in place

A row of the result is one sum over V in blocks of BLOCK_V, the same for every number of rows and at
every place; a library picks its tiles, and splits its sums, by shape. Memory traffic: left
C V (D / BLOCK_D) and right V D (C / BLOCK_C) elements, C D float32 read and written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import INTERPRETED

GROUP_C = 8


def tiles(dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """Blocks and launch options, by what the head alone decides.

    Operands that are float32, or whose rows do not start at multiples of 16, go through registers.
    """
    if INTERPRETED:
        return {"BLOCK_C": 16, "BLOCK_D": 32, "BLOCK_V": 32, "num_warps": 1, "num_stages": 1}
    if not aligned or dtype == torch.float32:
        return {"BLOCK_C": 64, "BLOCK_D": 64, "BLOCK_V": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_C": 128, "BLOCK_D": 128, "BLOCK_V": 64, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=["C", "V"])
def _add_product_kernel(
    out_ptr, left_ptr, right_ptr, C, V, D, stride_out_c, stride_left_c, stride_right_v,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_C: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_d = tl.cdiv(D, BLOCK_D)
    group = tl.program_id(0) // (GROUP_C * tiles_d)
    place = tl.program_id(0) % (GROUP_C * tiles_d)
    group_rows = tl.minimum(tiles_c - group * GROUP_C, GROUP_C)
    pid_c = group * GROUP_C + place % group_rows
    pid_d = place // group_rows

    offs_c = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_d = pid_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V).to(tl.int64)
    # Rows and columns past the end wrap round, which keeps their masks out of the loop.
    left_ptrs = left_ptr + (offs_c % C)[:, None] * stride_left_c + offs_v[None, :]
    right_ptrs = right_ptr + offs_v[:, None] * stride_right_v + (offs_d % D)[None, :]
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        inside = offs_v < V - start
        left = tl.load(left_ptrs, mask=inside[None, :], other=0.0)
        right = tl.load(right_ptrs, mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        left_ptrs += BLOCK_V
        right_ptrs += BLOCK_V * stride_right_v.to(tl.int64)
    out_ptrs = out_ptr + offs_c[:, None] * stride_out_c + offs_d[None, :]
    mask = (offs_c < C)[:, None] & (offs_d < D)[None, :]
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + total, mask=mask)


def add_product(out_CD: Tensor, left_CV: Tensor, right_VD: Tensor) -> None:
    """out_CD (float32) += left_CV @ right_VD, in place; operands of one dtype, rows contiguous."""
    (C, V), D = left_CV.shape, right_VD.shape[1]
    aligned = (D | left_CV.stride(0) | right_VD.stride(0)) % 16 == 0
    config = tiles(left_CV.dtype, aligned)
    grid = triton.cdiv(C, config["BLOCK_C"]) * triton.cdiv(D, config["BLOCK_D"])
    _add_product_kernel[(grid,)](
        out_CD, left_CV, right_VD, C, V, D,
        out_CD.stride(0), left_CV.stride(0), right_VD.stride(0),
        GROUP_C=GROUP_C, enable_fp_fusion=True, **config,
    )  # fmt: skip
