"""What the head's GEMM kernels share around their loops: the order of the tiles, the epilogue.

Every kernel finishes its tiles through `finish`, so that all kernels and modes of one tile shape
give the same bits.
"""

import triton
import triton.language as tl

from r1kernels._triton.common import LOWEST, transform, weigh

# Row sums alone, row maxima; from STORE on a matrix is written, in PRODUCT the bare logits.
SUMS = tl.constexpr(0)
TOP = tl.constexpr(1)
STORE = tl.constexpr(2)
GRADIENT = tl.constexpr(3)
PRODUCT = tl.constexpr(4)

# Rows whose s exceeds 2^46 (or is not finite) are redone around their own maximum. log S then stays
# within +-32, the priors being clamped at -8, and the entropy log S - m loses at most
# 32 * 2^-24 = 2e-6 nats to cancellation, what a float32 log-sum-exp of logits near 32 loses too.
SUM_LIMIT = 2.0**46

# Stored entries of a row about to be redone are held here, so that no inf is ever written.
STORE_LIMIT = tl.constexpr(2.0**100)


@triton.jit
def tile_place(tile, tiles_c, tiles_v, GROUP_C: tl.constexpr):
    """Row and column block of a tile; GROUP_C row blocks run side by side and share a column."""
    group = tile // (GROUP_C * tiles_v)
    place = tile % (GROUP_C * tiles_v)
    rows = tl.minimum(tiles_c - group * GROUP_C, GROUP_C)
    return group * GROUP_C + place % rows, place // rows


@triton.jit
def finish(
    z, rows, mask_c, offs_v, partial_ptrs, plane, V, scale, softcap, bias_ptr, targets_ptr,
    anchor_ptr, inverse_temperature_ptr, alpha_ptr, beta_ptr, centre_ptr, dtype: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """What follows the products, the same code for every kernel: writes the sums of the columns
    offs_v to partial_ptrs and the planes behind it; returns what a storing mode stores, as dtype.
    """
    value = z
    if MODE != PRODUCT:
        if HAS_BIAS:
            z += tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)[None, :]
        per_tau = tl.load(inverse_temperature_ptr + rows, mask=mask_c, other=1.0)
        l, slope = transform(z, scale, softcap, per_tau[:, None], SOFTCAP)
        if MODE == TOP:
            top = tl.max(tl.where(offs_v[None, :] < V, l, LOWEST), axis=1)
            tl.store(partial_ptrs, top, mask=mask_c)
        else:
            d = l - tl.load(anchor_ptr + rows, mask=mask_c, other=0.0)[:, None]
            target = tl.load(targets_ptr + rows, mask=mask_c, other=-1)
            keep = (offs_v[None, :] < V) & (offs_v[None, :] != target[:, None])
            e = tl.where(keep, tl.exp(d), 0.0)
            if MODE == GRADIENT:
                alpha = tl.load(alpha_ptr + rows, mask=mask_c, other=0.0)[:, None]
                beta = tl.load(beta_ptr + rows, mask=mask_c, other=0.0)[:, None]
                # Centred before scaled: alpha would else hold a large number that beta d cancels.
                centre = tl.load(centre_ptr + rows, mask=mask_c, other=0.0)[:, None]
                value = weigh(e * slope, alpha + beta * (d + centre))
            else:
                tl.store(partial_ptrs, tl.sum(e, axis=1), mask=mask_c)
                partial_ptrs += plane
                if ENTROPY:
                    tl.store(partial_ptrs, tl.sum(weigh(e, d), axis=1), mask=mask_c)
                    partial_ptrs += plane
                value = tl.minimum(e, STORE_LIMIT) * slope
    rounded = value
    if MODE >= STORE:
        rounded = value.to(dtype)
        if MODE != PRODUCT:
            tl.store(partial_ptrs, tl.sum(value - rounded.to(tl.float32), axis=1), mask=mask_c)
    return rounded


@triton.jit
def halves(x):
    """Left and right half of the columns."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def split(z, SPLIT: tl.constexpr):
    """The column parts in which a tile is finished, so that few of its registers are live."""
    parts = (z,)
    if SPLIT == 2:
        parts = halves(z)
    if SPLIT == 4:
        left, right = halves(z)
        parts = halves(left) + halves(right)
    return parts
