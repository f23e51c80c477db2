"""Launch configurations of the head's GEMMs: data, to be replaced by what a GPU measures.

None has been timed. What is known is what the compiler says (docs/log.md): registers, shared memory
and no spills. `python -m benchmarks.aot` checks every variant on every architecture it is for.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from r1kernels._triton.common import INTERPRETED

ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """A tile and how it is loaded.

    loads: "pointers"; "tma", where the next tile's copies are issued before a tile is finished; or
    "specialized": tma by a warp of its own.
    SPLIT: column parts a tile is finished in, each with partial sums of its own.
    blocks_per_sm: of the persistent grid; 0: one block per tile.
    """

    BLOCK_C: int
    BLOCK_V: int
    BLOCK_D: int
    GROUP_C: int
    num_warps: int
    num_stages: int
    SPLIT: int = 1
    loads: str = "pointers"
    blocks_per_sm: int = 0

    def tiles(self, V: int) -> int:
        """Planes of partial sums of V columns."""
        return triton.cdiv(V, self.BLOCK_V) * self.SPLIT


# By name, with the architectures they compile clean on; 0 is the interpreter.
VARIANTS: dict[str, dict[int, HeadConfig]] = {
    "pointers": {
        0: HeadConfig(16, 64, 32, 2, 1, 1, 2),
        80: HeadConfig(128, 128, 64, 8, 8, 3, 2),
        90: HeadConfig(128, 128, 64, 8, 8, 4, 2),
    },
    "tma": {
        0: HeadConfig(16, 64, 32, 2, 1, 1, 4, "tma", 1),
        90: HeadConfig(128, 256, 64, 8, 8, 3, 4, "tma", 1),
    },
    "tma_four_stages": {90: HeadConfig(128, 256, 64, 8, 8, 4, 4, "tma", 1)},
    "tma_two_blocks": {
        0: HeadConfig(16, 32, 32, 2, 1, 1, 1, "tma", 2),
        90: HeadConfig(128, 128, 64, 8, 4, 3, 4, "tma", 2),
    },
    # Triton 3.6 cannot split a tile here. Calls with softcap or entropy, which would spill, go to
    # "tma", whose bits are others: a variant to time, not to choose.
    "specialized": {
        0: HeadConfig(16, 64, 32, 2, 1, 1, 1, "specialized", 1),
        90: HeadConfig(128, 256, 64, 8, 4, 3, 1, "specialized", 1),
    },
}
# What runs; replace an entry to try another variant. Other architectures: "pointers" of the last
# one before them that has shared memory as small as theirs.
CHOICE = {0: "pointers", 80: "pointers", 90: "tma"}

# Whether GEMMs 2 and 3 run over the rows with a coefficient, listed on the device, in place of the
# library's over all rows. Not measured, so nowhere.
COUNTED = {0: False, 80: False, 90: False}


def launch_config(
    arch: int,
    dtype: torch.dtype,
    aligned: bool = True,
    gradient: bool = False,
    softcap: bool = False,
    entropy: bool = False,
    variant: str | None = None,
) -> HeadConfig:
    """Tile of the GEMM kernel, the same for every number of rows and in both forward modes.

    `aligned`: D is a multiple of BLOCK_D and rows of hidden and weight start at multiples of 16.
    `gradient`: that mode, which no path compares bitwise. `variant`: instead of the choice.
    """
    name = (variant or CHOICE.get(arch, "pointers")) if aligned else "pointers"
    if name == "specialized" and (gradient or softcap or entropy):
        name = "tma"
    pointers = VARIANTS["pointers"][max(key for key in VARIANTS["pointers"] if key <= arch)]
    if arch == 0:
        return VARIANTS[name][0]
    # Element-wise loads need a pointer each (larger tiles spill), and IEEE float32 products run on
    # the ordinary cores, with the operands in registers.
    if not aligned or dtype == torch.float32:
        return HeadConfig(32, 64, 32, 8, 4, 2)
    config = pointers if name == "pointers" else VARIANTS[name][arch]
    # The slope of the softcap beside a gradient spills at the full width, and so does the float32
    # store of float16 inputs, unless the tile is finished in quarters.
    if (gradient and softcap) or (dtype == torch.float16 and config.loads != "tma"):
        return replace(pointers, BLOCK_V=64, SPLIT=1)
    return replace(config, SPLIT=4) if gradient else config


def is_aligned(hidden_CD: Tensor, weight_VD: Tensor) -> bool:
    """Whether the fast tiles may run; 64 is the largest BLOCK_D."""
    strides = hidden_CD.stride(0) | weight_VD.stride(0)
    bases = hidden_CD.data_ptr() | weight_VD.data_ptr()
    return hidden_CD.shape[1] % 64 == 0 and strides % ALIGNMENT == 0 and bases % ALIGNMENT == 0


def device_blocks(tiles: int, device: torch.device, per_sm: int = 1) -> int:
    """Grid of a persistent kernel: what the device holds at a time, if there are as many tiles."""
    cores = 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, per_sm * cores)


def programs(config: HeadConfig, C: int, V: int, device: torch.device, persistent: bool) -> int:
    """Grid of the GEMM kernel."""
    tiles = triton.cdiv(C, config.BLOCK_C) * triton.cdiv(V, config.BLOCK_V)
    per_sm = config.blocks_per_sm or persistent
    return device_blocks(tiles, device, per_sm) if per_sm else tiles
