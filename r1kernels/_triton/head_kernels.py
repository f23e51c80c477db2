"""Kernels of the linear head: the anchored softmax over hidden @ weight^T, logits never stored.

With the transformed logit l = softcap tanh(scale z / softcap) / temperature of z = h w + b, and
one anchor c per row (the target's logit minus a prior log-probability), a tile of z becomes
E = exp(l - c) in the epilogue of its own GEMM; no maximum and no second read are needed. The
target column is left out (0) and added in float32 by target_kernels.py. docs/ops/linear_logp.md has
the derivation.

    forward_chunk(hidden_CD, targets_C, temperature_C, anchor_C, head, entropy, store_CV, low_CR)
        -> ChunkSums(s_C, u_C, rounded_C)
    gradient_chunk(hidden_CD, targets_C, temperature_C, stats, dlogp_C, dentropy_C, dlse_C, head,
                   store_CV, low_CR) -> t_C

With a low-rank term of the head, low_CR and head.lora_VR are a second pair of operands, whose width
is a multiple of RANK_BLOCK, for a second short loop into the same tile.

head is a `head_contract.Head`; temperature_C is float32 or None; targets are int64 in [0, V). Every
[C] result is float32.

Memory traffic of a chunk: hidden C D and weight V D once per pass of GEMM tiles (tiles of one
weight column block run side by side and share it in L2), C V elements written when stored, and
4 C (V / BLOCK_V) bytes for each of up to three partial sums. A row's result depends on its own
data and on the tile shape, which is the same for every mode and chunk, so all paths agree bitwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from r1kernels._triton.common import LOWEST, RowList, architecture, inverse_temperature
from r1kernels._triton.head_configs import ALIGNMENT, is_aligned, launch_config, programs
from r1kernels._triton.head_tiles import (
    GRADIENT,
    PRODUCT,
    STORE,
    SUM_LIMIT,
    SUMS,
    TOP,
    finish,
    split,
    tile_place,
)
from r1kernels.head_contract import Head

BLOCK_REDUCE = 32
# Every BLOCK_D divides it.
RANK_BLOCK = 64


class ChunkSums(NamedTuple):
    """Row sums over the columns j != y; None for what was not asked for."""

    s_C: Tensor
    u_C: Tensor | None
    rounded_C: Tensor | None


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
    low_ptr,
    lora_ptr,
    out_ptr,
    bias_ptr,
    targets_ptr,
    anchor_ptr,
    inverse_temperature_ptr,
    alpha_ptr,
    beta_ptr,
    centre_ptr,
    partial_ptr,
    rows_ptr,
    count_ptr,
    R,
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
    SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    LISTED: tl.constexpr,
    MODE: tl.constexpr,
):
    """Tiles loaded through pointers. LISTED: of the rows in a list whose length is read here;
    partial sums are then at their places in the list."""
    BLOCK_PART: tl.constexpr = BLOCK_V // SPLIT
    count = C
    if LISTED:
        count = tl.load(count_ptr).to(tl.int32)
    tiles_c = tl.cdiv(count, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    for tile in range(tl.program_id(0), tiles_c * tiles_v, tl.num_programs(0)):
        pid_c, pid_v = tile_place(tile, tiles_c, tiles_v, GROUP_C)
        place = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        offs_v = pid_v.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        offs_d = tl.arange(0, BLOCK_D)
        mask_c = place < count
        # Rows and columns past the end wrap round, which keeps masks out of the loop over D.
        rows = place % C
        if LISTED:
            rows = tl.load(rows_ptr + place, mask=mask_c, other=0)
        hidden_ptrs = hidden_ptr + rows[:, None] * stride_hidden_c + offs_d[None, :]
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
        if HAS_LOW:
            low_ptrs = low_ptr + rows[:, None] * R + offs_d[None, :]
            lora_ptrs = lora_ptr + (offs_v % V)[None, :] * R + offs_d[:, None]
            for _start in range(0, R, BLOCK_D):
                z = tl.dot(tl.load(low_ptrs), tl.load(lora_ptrs), z, input_precision="ieee")
                low_ptrs += BLOCK_D
                lora_ptrs += BLOCK_D

        parts = split(z, SPLIT)
        for part in tl.static_range(SPLIT):
            tile_v = pid_v.to(tl.int64) * SPLIT + part
            offs_v = tile_v * BLOCK_PART + tl.arange(0, BLOCK_PART)
            rounded = finish(
                parts[part], rows, mask_c, offs_v, partial_ptr + tile_v * C + place,
                tiles_v.to(tl.int64) * SPLIT * C, V, scale, softcap, bias_ptr, targets_ptr,
                anchor_ptr, inverse_temperature_ptr, alpha_ptr, beta_ptr, centre_ptr,
                out_ptr.dtype.element_ty, HAS_BIAS, SOFTCAP, ENTROPY, MODE,
            )  # fmt: skip
            if MODE >= STORE:
                out_ptrs = out_ptr + rows[:, None] * columns + offs_v[None, :]
                tl.store(out_ptrs, rounded, mask=mask_c[:, None] & (offs_v[None, :] < columns))


@triton.jit(do_not_specialize=["C", "V"])
def _head_tma_kernel(
    hidden,
    weight,
    out,
    bias_ptr,
    targets_ptr,
    anchor_ptr,
    inverse_temperature_ptr,
    alpha_ptr,
    beta_ptr,
    centre_ptr,
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
    SPLIT: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MODE: tl.constexpr,
):
    """Tiles copied by the bulk tensor engine, which puts zeros past the end; a persistent grid.
    hidden, weight and out are descriptors, or pointers where SPECIALIZED makes them here."""
    BLOCK_PART: tl.constexpr = BLOCK_V // SPLIT
    if SPECIALIZED:
        hidden = tl.make_tensor_descriptor(hidden, [C, D], [stride_hidden_c, 1], [BLOCK_C, BLOCK_D])
        weight = tl.make_tensor_descriptor(weight, [V, D], [stride_weight_v, 1], [BLOCK_V, BLOCK_D])
        if MODE != SUMS:
            out = tl.make_tensor_descriptor(out, [C, columns], [columns, 1], [BLOCK_C, BLOCK_PART])
    dtype: tl.constexpr = tl.float32 if MODE == SUMS else out.dtype
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    first = tl.program_id(0)
    step = tl.num_programs(0)
    # A counter of its own for the epilogue: with one for both, the flattened loop keeps the
    # addresses of two tiles alive.
    done = first - step
    for tile in tl.range(
        first, tiles_c * tiles_v, step, flatten=not SPECIALIZED, warp_specialize=SPECIALIZED
    ):
        pid_c, pid_v = tile_place(tile, tiles_c, tiles_v, GROUP_C)
        z = tl.zeros((BLOCK_C, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            left = hidden.load([pid_c * BLOCK_C, start])
            right = weight.load([pid_v * BLOCK_V, start])
            z = tl.dot(left, right.T, z, input_precision="ieee")

        done += step
        pid_c, pid_v = tile_place(done, tiles_c, tiles_v, GROUP_C)
        rows = pid_c.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        parts = split(z, SPLIT)
        for part in tl.static_range(SPLIT):
            tile_v = pid_v * SPLIT + part
            offs_v = tile_v.to(tl.int64) * BLOCK_PART + tl.arange(0, BLOCK_PART)
            rounded = finish(
                parts[part], rows, rows < C, offs_v, partial_ptr + tile_v.to(tl.int64) * C + rows,
                (tiles_v * SPLIT).to(tl.int64) * C, V, scale, softcap, bias_ptr, targets_ptr,
                anchor_ptr, inverse_temperature_ptr, alpha_ptr, beta_ptr, centre_ptr, dtype,
                HAS_BIAS, SOFTCAP, ENTROPY, MODE,
            )  # fmt: skip
            if MODE != SUMS:
                out.store([pid_c * BLOCK_C, tile_v * BLOCK_PART], rounded)


@triton.jit(do_not_specialize=["C", "tiles"])
def _reduce_kernel(
    partial_ptr, sums_ptr, rows_ptr, count_ptr, C, tiles,
    BLOCK_C: tl.constexpr, BLOCK_TILES: tl.constexpr, LISTED: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One plane of partials over the tiles, in an order that depends on them alone: their maximum
    in TOP, else their sum in float64.

    The entropy is a difference of two such sums, which may be ten times as large as it.
    """
    count = C
    if LISTED:
        count = tl.load(count_ptr).to(tl.int32)
    place = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = place < count
    if tl.program_id(0) * BLOCK_C < count:
        rows = place
        if LISTED:
            rows = tl.load(rows_ptr + place, mask=mask_c, other=0)
        plane = tl.program_id(1).to(tl.int64)
        partial_ptr += plane * tiles * C
        dtype: tl.constexpr = sums_ptr.dtype.element_ty
        total = tl.full((BLOCK_TILES, BLOCK_C), LOWEST if MODE == TOP else 0.0, dtype)
        for start in range(0, tiles, BLOCK_TILES):
            offs_tile = start + tl.arange(0, BLOCK_TILES).to(tl.int64)
            mask = (offs_tile[:, None] < tiles) & mask_c[None, :]
            partial_ptrs = partial_ptr + offs_tile[:, None] * C + place[None, :]
            if MODE == TOP:
                total = tl.maximum(total, tl.load(partial_ptrs, mask=mask, other=LOWEST))
            else:
                total += tl.load(partial_ptrs, mask=mask, other=0.0)
        result = tl.max(total, axis=0) if MODE == TOP else tl.sum(total, axis=0)
        tl.store(sums_ptr + plane * C + rows, result, mask=mask_c)


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch_head(
    hidden_CD, targets_C, inverse_temperature_C, anchor_C, row_terms, head, entropy, store_CV, mode,
    sums, listed=None, variant=None, low_CR=None, gemm=None,
):  # fmt: skip
    """Runs the GEMM kernel in one mode and reduces its planes into sums, [planes, C].

    row_terms: (alpha, beta, centre) of GRADIENT. A pointer that a mode does not read is given any
    tensor of the type it has elsewhere.
    gemm: runs in place of the kernel, except over listed rows and with a low-rank term: takes what
    stands before `sums`, writes store_CV and returns the planes of partial sums, [planes, tiles, C]
    float32: SUMS s, u with entropy; STORE also what rounding took; GRADIENT that alone.
    """
    C, D = hidden_CD.shape
    weight_VD, bias_V = head.weight_VD, head.bias_V
    V = weight_VD.shape[0]
    aligned = is_aligned(hidden_CD, weight_VD)
    device = hidden_CD.device
    config = launch_config(
        architecture(device), hidden_CD.dtype, aligned, mode == GRADIENT.value, bool(head.softcap),
        entropy, variant if listed is None and low_CR is None else "pointers",
    )  # fmt: skip
    rows_C, count = (targets_C, targets_C) if listed is None else listed
    if gemm is not None and listed is None and low_CR is None:
        partial = gemm(
            hidden_CD, targets_C, inverse_temperature_C, anchor_C, row_terms, head, entropy,
            store_CV, mode,
        )  # fmt: skip
        _reduce(partial, sums, rows_C, count, False, mode)
        return
    planes, tiles = len(sums), config.tiles(V)
    partial = hidden_CD.new_empty((planes, tiles, C), dtype=torch.float32)
    # Any matrix whose rows a descriptor may describe, where none is written.
    out = weight_VD if store_CV is None else store_CV
    columns = ALIGNMENT if store_CV is None else store_CV.shape[1]
    vectors = (
        weight_VD if bias_V is None else bias_V, targets_C, anchor_C, inverse_temperature_C,
        *(row_terms or (anchor_C, anchor_C, anchor_C)), partial,
    )  # fmt: skip
    sizes = (
        C, V, D, hidden_CD.stride(0), weight_VD.stride(0), columns, head.logit_scale, head.softcap
    )  # fmt: skip
    constants = dict(
        BLOCK_C=config.BLOCK_C,
        BLOCK_V=config.BLOCK_V,
        BLOCK_D=config.BLOCK_D,
        GROUP_C=config.GROUP_C,
        SPLIT=config.SPLIT,
        HAS_BIAS=bias_V is not None,
        SOFTCAP=bool(head.softcap),
        ENTROPY=entropy,
        MODE=mode,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    grid = (programs(config, C, V, device, persistent=listed is not None),)
    if config.loads == "pointers":
        second = (hidden_CD, weight_VD) if low_CR is None else (low_CR, head.lora_VR)
        # Two loops of float32 products with unmasked loads spill on sm_90.
        aligned = aligned and (low_CR is None or hidden_CD.dtype != torch.float32)
        _head_kernel[grid](
            hidden_CD, weight_VD, *second, out, *vectors, rows_C, count, second[0].shape[1], *sizes,
            EVEN_D=aligned, LISTED=listed is not None, HAS_LOW=low_CR is not None, **constants,
        )  # fmt: skip
    else:
        matrices = hidden_CD, weight_VD, out
        if config.loads == "tma":
            blocks = (
                [config.BLOCK_C, config.BLOCK_D],
                [config.BLOCK_V, config.BLOCK_D],
                [config.BLOCK_C, config.BLOCK_V // config.SPLIT],
            )
            matrices = map(TensorDescriptor.from_tensor, matrices, blocks)
        else:
            # Per thread, and autograd has threads of its own.
            triton.set_allocator(_allocate)
        _head_tma_kernel[grid](
            *matrices, *vectors, *sizes, SPECIALIZED=config.loads == "specialized", **constants,
        )  # fmt: skip
    if planes:
        _reduce(partial, sums, rows_C, count, listed is not None, mode)


def _reduce(partial, sums, rows_C, count, listed: bool, mode) -> None:
    planes, tiles, C = partial.shape
    _reduce_kernel[(triton.cdiv(C, BLOCK_REDUCE), planes)](
        partial, sums, rows_C, count, C, tiles, BLOCK_C=BLOCK_REDUCE, BLOCK_TILES=BLOCK_REDUCE,
        LISTED=listed, MODE=mode, num_warps=4,
    )  # fmt: skip


def forward_chunk(
    hidden_CD: Tensor,
    targets_C: Tensor,
    temperature_C: Tensor | None,
    anchor_C: Tensor,
    head,
    entropy: bool,
    store_CV: Tensor | None,
    low_CR: Tensor | None = None,
    gemm=None,
) -> ChunkSums:
    """Row sums of E = exp(l - anchor) over j != y, and E itself where a buffer is given.

    Rows out of range are redone around their maximum, and `anchor_C` (float32, contiguous) is
    updated there: take q = l_y - anchor_C afterwards, never before.

    s_C = sum E, u_C = sum E (l - anchor). store_CV [C, padded(V)] of `store_dtype` receives E,
    times 1 - tanh^2 under softcap, with 0 in the target and padding columns; rounded_C is then s_C
    less what rounding took from the row, for a target coefficient that makes it sum to zero.
    """
    inverse_temperature_C = inverse_temperature(temperature_C, hidden_CD)
    mode = SUMS.value if store_CV is None else STORE.value
    planes = 1 + entropy + (store_CV is not None)
    sums = hidden_CD.new_empty((planes, len(hidden_CD)), dtype=torch.float64)
    operands = hidden_CD, targets_C, inverse_temperature_C, anchor_C, None, head, entropy, store_CV
    _launch_head(*operands, mode, sums, low_CR=low_CR, gemm=gemm)
    # Written so that NaN is out of range. A row whose anchor is NaN stays so whatever is done.
    again = RowList.of(~(sums[0] <= SUM_LIMIT) & ~anchor_C.isnan())
    # Two more products over the rows out of range, of which there normally are none, by the same
    # kernel in every mode: the maximum becomes the anchor.
    _launch_head(*operands[:-2], False, None, TOP.value, anchor_C[None], again, low_CR=low_CR)
    _launch_head(*operands, mode, sums, again, low_CR=low_CR)
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
    low_CR: Tensor | None = None,
    listed: RowList | None = None,
    gemm=None,
) -> Tensor:
    """Writes dL/dz into store_CV (0 in the target column) and returns t_C = dL/dz of the target.

    `listed`: only those rows of store_CV are written; the others have no gradient.

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
    sums = torch.zeros((1, len(hidden_CD)), dtype=torch.float64, device=hidden_CD.device)
    _launch_head(
        hidden_CD, targets_C, inverse_temperature_C, anchor_C,
        tuple(x.float() for x in (-gap_C * factor_C, beta_C * factor_C, centre_C)),
        head, False, store_CV, GRADIENT.value, sums, listed, low_CR=low_CR, gemm=gemm,
    )  # fmt: skip
    rounding_C = sums[0]
    if head.shard is not None and store_CV.dtype != torch.float32:
        rounding_C = head.shard.in_order(rounding_C)
    return (t_C * scale_C + rounding_C).float()


def target_slope(target_logit_C: Tensor, inverse_temperature_C: Tensor, softcap: float) -> Tensor:
    """1 - tanh^2 of the target's logit, from its transformed value."""
    return 1.0 - (target_logit_C / (inverse_temperature_C * softcap)) ** 2


def product(
    hidden_CD: Tensor, weight_VD: Tensor, out_CV: Tensor, variant: str | None = None
) -> None:
    """out_CV = hidden weight^T by a variant's tile and loop, with nothing after it: what that loop
    can do, for a benchmark to set the whole kernel against. out_CV has hidden's dtype."""
    any_C = torch.zeros(len(hidden_CD), dtype=torch.float32, device=hidden_CD.device)
    _launch_head(
        hidden_CD, any_C.long(), any_C, any_C, None, Head(weight_VD, None, 0.0, 1.0), False, out_CV,
        PRODUCT.value, any_C[:0], variant=variant,
    )  # fmt: skip
