"""GEMMs 2 and 3 over rows listed on the device, whose number the host never learns.

    add_hidden_rows(out_CD, left_CV, weight_VD, factor_C, listed, kept)
        out_CD[r] += factor_C[r] left_CV[r] @ weight_VD for the listed rows r
    add_weight_rows(out_VD, left_CV, right_CD, listed, kept)
        out_VD += left_CV[r]^T right_CD[r] over the listed rows r

Outputs are float32, operands have one dtype, products accumulate in float32 in an order that the
list alone decides. The grid is persistent and its loops end at the count, so that rows beyond it
cost nothing. `kept` drops tiles of the vocabulary, a block of listed rows at a time: see
`KeptTiles`. Where a loop reads what an address depends on, it reads it an iteration ahead, or the
copies of the operands could not be issued early.

Memory traffic with n listed rows: left n V (D / BLOCK_D) and weight V D (n / BLOCK_C) elements,
n D float32 updated; left n V (D / BLOCK_D) and right n D (V / BLOCK_V), V D float32 updated.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import INTERPRETED, RowList, architecture
from r1kernels._triton.head_configs import device_blocks

# Rows and columns of a block of KeptTiles, and the depth of a step over either.
BLOCK, STEP = (16, 8) if INTERPRETED else (128, 64)
STEPS = BLOCK // STEP
GROUP = 2 if INTERPRETED else 8
WARPS = 1 if INTERPRETED else 8
# Entries past the end of a list of steps that are read ahead of their use.
AHEAD = 2


class KeptTiles(NamedTuple):
    """Which tiles [BLOCK listed rows, BLOCK columns] enter the products, as lists of steps.

    columns: [row blocks, steps of STEP columns + AHEAD] int32, num_columns [row blocks] of them
    count; rows and num_rows: for each block of columns, its steps of STEP listed rows.
    """

    columns: Tensor
    num_columns: Tensor
    rows: Tensor
    num_rows: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> "KeptTiles":
        """From a mask [blocks of listed rows, blocks of columns]."""
        return cls(*_lists(keep), *_lists(keep.T))

    @classmethod
    def of_rows(cls, keep_CS: Tensor, width: int, listed: RowList, V: int) -> "KeptTiles":
        """From a mask per row, in tiles of `width` columns: a block keeps what a row of it does."""
        blocks = triton.cdiv(len(keep_CS), BLOCK)
        place = torch.arange(blocks * BLOCK, device=keep_CS.device)
        keep = keep_CS[listed.rows[: len(place)]] & (place < listed.count)[:, None]
        keep = keep.unflatten(0, (blocks, BLOCK)).any(dim=1)
        return cls.of(keep.repeat_interleave(width // BLOCK, dim=1)[:, : triton.cdiv(V, BLOCK)])


def _lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    steps = keep.repeat_interleave(STEPS, dim=1)
    order = torch.argsort(~steps, dim=1, stable=True)
    padded = torch.nn.functional.pad(order, (0, AHEAD)).int()
    return padded.contiguous(), steps.sum(dim=1, dtype=torch.int32)


@triton.jit(do_not_specialize=["V"])
def _hidden_rows_kernel(
    out_ptr, left_ptr, weight_ptr, factor_ptr, rows_ptr, count_ptr, steps_ptr, num_steps_ptr,
    V, D, stride_out_c, stride_left_c, stride_weight_v, stride_steps,
    BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr).to(tl.int32)
    tiles_c = tl.cdiv(count, BLOCK)
    tiles_d = tl.cdiv(D, BLOCK)
    for tile in range(tl.program_id(0), tiles_c * tiles_d, tl.num_programs(0)):
        pid_c, pid_d = tl.swizzle2d(tile // tiles_d, tile % tiles_d, tiles_c, tiles_d, GROUP)
        place = pid_c * BLOCK + tl.arange(0, BLOCK)
        rows = tl.load(rows_ptr + place)
        offs_d = pid_d * BLOCK + tl.arange(0, BLOCK)
        offs_v = tl.arange(0, STEP).to(tl.int64)
        left_ptrs = left_ptr + rows[:, None] * stride_left_c + offs_v[None, :]
        # Columns past D wrap round, which keeps their mask out of the loop.
        weight_ptrs = weight_ptr + offs_v[:, None] * stride_weight_v + (offs_d % D)[None, :]
        num_steps = tl.cdiv(V, STEP)
        step = 0
        if LISTS:
            num_steps = tl.load(num_steps_ptr + pid_c)
            step = tl.load(steps_ptr + pid_c * stride_steps)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for i in range(0, num_steps):
            start = step * STEP
            left_step = left_ptrs + start
            weight_step = weight_ptrs + start * stride_weight_v.to(tl.int64)
            if EVEN:
                left = tl.load(left_step)
                weight = tl.load(weight_step)
            else:
                left = tl.load(left_step, mask=(offs_v < V - start)[None, :], other=0.0)
                weight = tl.load(weight_step, mask=(offs_v < V - start)[:, None], other=0.0)
            step = tl.load(steps_ptr + pid_c * stride_steps + i + 1) if LISTS else i + 1
            total = tl.dot(left, weight, total, input_precision="ieee")
        mask_c = place < count
        total *= tl.load(factor_ptr + rows, mask=mask_c, other=0.0)[:, None]
        out_ptrs = out_ptr + rows[:, None] * stride_out_c + offs_d[None, :]
        mask = mask_c[:, None] & (offs_d < D)[None, :]
        tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + total, mask=mask)


@triton.jit(do_not_specialize=["V"])
def _weight_rows_kernel(
    out_ptr, left_ptr, right_ptr, rows_ptr, count_ptr, steps_ptr, num_steps_ptr,
    V, D, stride_out_v, stride_left_c, stride_right_c, stride_steps,
    BLOCK: tl.constexpr, STEP: tl.constexpr, GROUP: tl.constexpr, LISTS: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr).to(tl.int32)
    tiles_v = tl.cdiv(V, BLOCK)
    tiles_d = tl.cdiv(D, BLOCK)
    tiles = tl.where(count > 0, tiles_v * tiles_d, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_v, pid_d = tl.swizzle2d(tile // tiles_d, tile % tiles_d, tiles_v, tiles_d, GROUP)
        offs_v = pid_v.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        offs_d = pid_d * BLOCK + tl.arange(0, BLOCK)
        offs_c = tl.arange(0, STEP)
        # Wrapped where its rows end, at a multiple of 16: at V, 16-byte copies would be out.
        left_ptrs = left_ptr + (offs_v % stride_left_c)[None, :]
        right_ptrs = right_ptr + (offs_d % D)[None, :]
        num_steps = tl.cdiv(count, STEP)
        step = 0
        after = 1
        if LISTS:
            steps_ptrs = steps_ptr + pid_v.to(tl.int64) * stride_steps
            num_steps = tl.load(num_steps_ptr + pid_v)
            step = tl.load(steps_ptrs)
            after = tl.load(steps_ptrs + 1)
        place = step * STEP + offs_c
        rows = tl.load(rows_ptr + place)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for i in range(0, num_steps):
            inside = place < count
            left_step = left_ptrs + rows[:, None] * stride_left_c
            right_step = right_ptrs + rows[:, None] * stride_right_c
            left = tl.load(left_step, mask=inside[:, None], other=0.0)
            right = tl.load(right_step, mask=inside[:, None], other=0.0)
            place = after * STEP + offs_c
            rows = tl.load(rows_ptr + place)
            after = tl.load(steps_ptrs + i + 2) if LISTS else i + 2
            total = tl.dot(left.T, right, total, input_precision="ieee")
        out_ptrs = out_ptr + offs_v[:, None] * stride_out_v + offs_d[None, :]
        mask = (offs_v < V)[:, None] & (offs_d < D)[None, :]
        tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + total, mask=mask)


def options(arch: int) -> dict[str, int]:
    """Launch options: what compiles without spills (docs/log.md); not timed on any GPU."""
    stages = 1 if INTERPRETED else 4 if arch == 90 else 3
    return {"num_warps": WARPS, "num_stages": stages}


def add_hidden_rows(
    out_CD: Tensor,
    left_CV: Tensor,
    weight_VD: Tensor,
    factor_C: Tensor,
    listed: RowList,
    kept: KeptTiles | None = None,
) -> None:
    """out_CD[r] += factor_C[r] left_CV[r] @ weight_VD over the listed rows r, in place."""
    (C, D), V = out_CD.shape, weight_VD.shape[0]
    grid = device_blocks(triton.cdiv(C, BLOCK) * triton.cdiv(D, BLOCK), out_CD.device)
    steps, num_steps = (listed.rows, listed.count) if kept is None else kept[:2]
    _hidden_rows_kernel[(grid,)](
        out_CD, left_CV, weight_VD, factor_C, *listed, steps, num_steps, V, D,
        out_CD.stride(0), left_CV.stride(0), weight_VD.stride(0), steps.stride(0),
        BLOCK=BLOCK, STEP=STEP, GROUP=GROUP, EVEN=V % STEP == 0, LISTS=kept is not None,
        enable_fp_fusion=True, **options(architecture(out_CD.device)),
    )  # fmt: skip


def add_weight_rows(
    out_VD: Tensor,
    left_CV: Tensor,
    right_CD: Tensor,
    listed: RowList,
    kept: KeptTiles | None = None,
) -> None:
    """out_VD += left_CV[r]^T right_CD[r] over the listed rows r, in place."""
    V, D = out_VD.shape
    grid = device_blocks(triton.cdiv(V, BLOCK) * triton.cdiv(D, BLOCK), out_VD.device)
    steps, num_steps = (listed.rows, listed.count) if kept is None else kept[2:]
    _weight_rows_kernel[(grid,)](
        out_VD, left_CV, right_CD, *listed, steps, num_steps, V, D,
        out_VD.stride(0), left_CV.stride(0), right_CD.stride(0), steps.stride(0),
        BLOCK=BLOCK, STEP=STEP, GROUP=GROUP, LISTS=kept is not None,
        enable_fp_fusion=True, **options(architecture(out_VD.device)),
    )  # fmt: skip
