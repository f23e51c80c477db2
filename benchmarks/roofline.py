"""What a GPU should need for a call: operations over its sustained matrix rate, bytes over its
bandwidth, the larger counts.

The model is the least work of each path of `docs/design.md`: the GEMMs in units of 2 T D V
operations, and device memory traffic of each operand read or written once per chunk of 8192 rows,
the chunk's exponentials (2 bytes each) once per GEMM that touches them. It assumes that neither
launches nor the row work outside the GEMMs cost anything, so a measurement is slower.
"""

from dataclasses import dataclass

from benchmarks.shapes import Shape

CHUNK_ROWS = 8192
DTYPE_BYTES = 2


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card by what it sustains.

    Dense bfloat16 products and memory bandwidth (rates below its data sheet's).
    """

    name: str
    tflops: float
    gb_per_s: float


# Matrix rates are what the best published heads and cuBLAS reach; bandwidths are nine tenths of the
# data sheet's.
GPUS = (
    Gpu("A100 SXM 80GB", tflops=250.0, gb_per_s=1835.0),
    Gpu("H100 SXM", tflops=690.0, gb_per_s=3015.0),
    Gpu("H200", tflops=720.0, gb_per_s=4320.0),
)


@dataclass(frozen=True, slots=True)
class Path:
    """GEMMs and chunk passes of one way to compute a call.

    For all rows and for the rows with a coefficient.
    """

    gemms: int
    active_gemms: int
    stores_chunk: bool
    trains_weight: bool


PATHS = {
    "forward": Path(gemms=1, active_gemms=0, stores_chunk=False, trains_weight=False),
    "frozen": Path(gemms=1, active_gemms=1, stores_chunk=True, trains_weight=False),
    "forward_backward": Path(gemms=1, active_gemms=2, stores_chunk=True, trains_weight=True),
    "recompute": Path(gemms=2, active_gemms=2, stores_chunk=True, trains_weight=True),
}


def flops(shape: Shape, path: str, rows: float = 1.0, active: float = 1.0) -> float:
    """Operations; `rows` is the share of tokens in the loss mask.

    `active` the share of those with a coefficient.
    """
    kind = PATHS[path]
    return 2.0 * shape.T * shape.D * shape.V * rows * (kind.gemms + active * kind.active_gemms)


# Mode of the benchmarks -> path, share of rows in the mask, share of those with a coefficient.
MODES = {
    "forward": ("forward", 1.0, 1.0),
    "forward_backward": ("forward_backward", 1.0, 1.0),
    "frozen": ("frozen", 1.0, 1.0),
    "masked_50": ("forward_backward", 0.5, 1.0),
    "zero_50": ("forward_backward", 1.0, 0.5),
    "zero_80": ("forward_backward", 1.0, 0.2),
    "entropy": ("forward_backward", 1.0, 1.0),
}


def mode_flops(shape: Shape, mode: str) -> float:
    """Operations of the products that no implementation of the mode can do without."""
    path, rows, active = MODES[mode]
    return flops(shape, path, rows, active)


def traffic(shape: Shape, path: str, rows: float = 1.0, active: float = 1.0) -> float:
    """Bytes read from and written to device memory."""
    kind = PATHS[path]
    T = shape.T * rows
    chunks = max(1.0, T / CHUNK_ROWS)
    weight = shape.V * shape.D
    total = DTYPE_BYTES * (T * shape.D + chunks * weight) * kind.gemms
    if kind.stores_chunk:
        total += DTYPE_BYTES * T * shape.V * (1.0 + active * kind.active_gemms)
        total += DTYPE_BYTES * (chunks * weight + T * active * shape.D)
    if kind.trains_weight:
        total += DTYPE_BYTES * T * active * shape.D + 4 * weight * (2.0 * chunks - 1.0)
    return total


def predicted_ms(
    shape: Shape, path: str, gpu: Gpu, rows: float = 1.0, active: float = 1.0
) -> float:
    """Milliseconds of the larger of the two terms."""
    arithmetic = flops(shape, path, rows, active) / (gpu.tflops * 1e12)
    memory = traffic(shape, path, rows, active) / (gpu.gb_per_s * 1e9)
    return 1e3 * max(arithmetic, memory)
