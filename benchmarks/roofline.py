"""What a GPU should need for a call: a model, no measurement.

Every product of a path takes the longer of its operations over the card's sustained matrix rate and
its bytes over the card's bandwidth. Operands are read and results written once per chunk of rows, a
float32 weight gradient is read and written once per chunk, and chunks have the rows of the default
workspace. That is the floor. Ours adds the row work between the products (passes over [T, D] and
the last one over [V, D]), and at worst the whole epilogue of the first product: an exponential and
a dozen float32 operations a logit, which a kernel may hide behind the next tile's product or not.
Launches cost nothing, nothing is skipped but rows without a mask or a coefficient.
"""

from dataclasses import dataclass

from benchmarks.shapes import Shape

DTYPE_BYTES = 2
WORKSPACE_BYTES = 1280 * 2**20
# Per multiprocessor and clock.
EXPONENTIALS = 16
FLOAT32_OPERATIONS = 128
EPILOGUE_OPERATIONS = 12
# Bytes of [T, D] between the products: float32 dhidden scaled and rounded, hidden times its factor.
ROW_BYTES = 26


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card by what it sustains: dense bfloat16 products, memory bandwidth (below its data
    sheet's), and the clock of its multiprocessors while the matrix units are busy.
    """

    name: str
    tflops: float
    gb_per_s: float
    multiprocessors: int
    ghz: float


# Matrix rates are what the best published heads and cuBLAS reach; bandwidths are nine tenths of the
# data sheet's.
GPUS = (
    Gpu("A100 SXM 80GB", tflops=250.0, gb_per_s=1835.0, multiprocessors=108, ghz=1.3),
    Gpu("H100 SXM", tflops=690.0, gb_per_s=3015.0, multiprocessors=132, ghz=1.6),
    Gpu("H200", tflops=720.0, gb_per_s=4320.0, multiprocessors=132, ghz=1.6),
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
# What ours does where it is not the least: the entropy's gradient makes the logits again.
OUR_PATHS = {"entropy": "recompute"}


def flops(shape: Shape, path: str, rows: float = 1.0, active: float = 1.0) -> float:
    """Operations; `rows` is the share of tokens in the loss mask.

    `active` the share of those with a coefficient.
    """
    kind = PATHS[path]
    return 2.0 * shape.T * shape.D * shape.V * rows * (kind.gemms + active * kind.active_gemms)


def mode_flops(shape: Shape, mode: str) -> float:
    """Operations of the products that no implementation of the mode can do without."""
    path, rows, active = MODES[mode]
    return flops(shape, path, rows, active)


def chunks(shape: Shape, rows: float) -> float:
    """How often the weight is read: rows over what the default workspace holds."""
    held = WORKSPACE_BYTES / (DTYPE_BYTES * shape.V + 4 * shape.D)
    return max(1.0, shape.T * rows / held)


def products(shape: Shape, path: str, rows: float = 1.0, active: float = 1.0) -> list[tuple]:
    """(operations, bytes of device memory) of each product of a path."""
    kind = PATHS[path]
    T, A = shape.T * rows, shape.T * rows * active
    weight = shape.V * shape.D
    read = DTYPE_BYTES * chunks(shape, rows) * weight
    out = []
    for _ in range(kind.gemms):
        stored = DTYPE_BYTES * T * shape.V * kind.stores_chunk
        out.append((2.0 * T * weight, DTYPE_BYTES * T * shape.D + read + stored))
    if kind.active_gemms:
        loaded = DTYPE_BYTES * A * (shape.V + shape.D)
        out.append((2.0 * A * weight, loaded + read))
        if kind.trains_weight:
            sums = 4 * weight * (2.0 * chunks(shape, rows) - 1.0)
            out.append((2.0 * A * weight, loaded + sums))
    return out


def predicted_ms(
    shape: Shape, path: str, gpu: Gpu, rows: float = 1.0, active: float = 1.0
) -> float:
    """Milliseconds of a path's products alone."""
    return sum(
        1e3 * max(operations / (gpu.tflops * 1e12), moved / (gpu.gb_per_s * 1e9))
        for operations, moved in products(shape, path, rows, active)
    )


def epilogue_ms(shape: Shape, gpu: Gpu, rows: float = 1.0) -> float:
    """Milliseconds of the first product's epilogue where nothing hides it."""
    clocks = 1.0 / EXPONENTIALS + EPILOGUE_OPERATIONS / FLOAT32_OPERATIONS
    per_s = gpu.multiprocessors * gpu.ghz * 1e9
    return 1e3 * shape.T * rows * shape.V * clocks / per_s


def row_work_ms(shape: Shape, path: str, gpu: Gpu, rows: float, active: float) -> float:
    """Milliseconds of the passes over [T, D] between the products, and of rounding the weight's
    gradient once.
    """
    if not PATHS[path].active_gemms:
        return 0.0
    moved = ROW_BYTES * shape.T * rows * active * shape.D
    moved += 6 * shape.V * shape.D * PATHS[path].trains_weight
    return 1e3 * moved / (gpu.gb_per_s * 1e9)


def floor_ms(shape: Shape, mode: str, gpu: Gpu) -> float:
    """Milliseconds of the products that the mode cannot do without."""
    path, rows, active = MODES[mode]
    return predicted_ms(shape, path, gpu, rows, active)


def ours_ms(shape: Shape, mode: str, gpu: Gpu) -> tuple[float, float]:
    """(least, most) milliseconds of ours: epilogue hidden, epilogue in full."""
    path, rows, active = MODES[mode]
    path = OUR_PATHS.get(mode, path)
    least = predicted_ms(shape, path, gpu, rows, active)
    least += row_work_ms(shape, path, gpu, rows, active)
    return least, least + PATHS[path].gemms * epilogue_ms(shape, gpu, rows)


def logits_ms(T: int, V: int, passes: int, gpu: Gpu) -> float:
    """Milliseconds of `passes` over bfloat16 logits."""
    return 1e3 * passes * DTYPE_BYTES * T * V / (gpu.gb_per_s * 1e9)


def assumptions() -> str:
    """The model's numbers, for the report."""
    cards = "; ".join(
        f"{card.name} {card.tflops:.0f} TFLOP/s, {card.gb_per_s:.0f} GB/s, {card.multiprocessors} "
        f"multiprocessors at {card.ghz} GHz"
        for card in GPUS
    )
    return (
        f"sustained rates of {cards}; chunks of {WORKSPACE_BYTES >> 20} MiB; an epilogue of one "
        f"exponential ({EXPONENTIALS} a clock) and {EPILOGUE_OPERATIONS} float32 operations "
        f"({FLOAT32_OPERATIONS} a clock) a logit"
    )
