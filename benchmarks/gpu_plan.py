"""What the gpu suite runs, the most telling first: checks, products, cells."""

from dataclasses import dataclass, replace

from benchmarks import checks
from benchmarks.peers import PEERS
from benchmarks.problem import GPU_MODES
from benchmarks.shapes import Shape

# The head of the figures published for an H100.
LLAMA = {"D": 4096, "V": 131072}
QWEN_8B = {"D": 4096, "V": 151936}
QWEN_1B = {"D": 1536, "V": 151936}
QWEN_7B = {"D": 3584, "V": 152064}

OURS = ("triton", "cuda", "native")
EVERY_PEER = tuple(p.name for p in PEERS if "gpu" in p.suites)
QUICK_PEERS = ("trl", "liger_sm90", "liger_cutile", "cce")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One mode at one size: the providers of a cell take turns and share their data."""

    shape: Shape
    mode: str
    providers: tuple[str, ...]
    kind: str = "head"
    dtype: str = "bfloat16"
    # Of our Triton products beside the chosen ones: "kernels" (of GEMM 1), "counted" rows, "all".
    variants: str = ""

    @property
    def name(self) -> str:
        shape = self.shape
        return f"{self.mode} T={shape.T} D={shape.D} V={shape.V}"


def tokens(T: int, D: int, V: int) -> Shape:
    """Eight sequences."""
    return Shape(T=T, D=D, V=V, S=T // 8)


def head_cell(T: int, head: dict, mode: str, peers: tuple[str, ...]) -> Cell:
    return Cell(shape=tokens(T, **head), mode=mode, providers=("floor", *OURS, *peers))


def logits_cells(T: int, V: int) -> list[Cell]:
    return [
        Cell(
            shape=Shape(T=T, D=1, V=V, S=T),
            mode=mode,
            kind="logits",
            providers=("floor", *OURS, "eager", "compile", "trl"),
        )
        for mode in ("logits_step", "logits_forward")
    ]


def cells(quick: bool = False, full: bool = False) -> list[Cell]:
    """The suite's cells in their order."""
    if quick:
        tiny = tokens(64, 16, 512)
        providers = ("floor", *OURS, "eager", "compile", *EVERY_PEER)
        return [
            *(Cell(shape=tiny, mode=mode, providers=providers) for mode in GPU_MODES),
            *(replace(cell, shape=Shape(64, 1, 512, 64)) for cell in logits_cells(64, 512)),
        ]
    whole = ("floor_whole", "triton_invariant", "eager", "compile", *EVERY_PEER)
    some = ("eager", *QUICK_PEERS)
    dense = "forward_backward"
    found = [
        replace(head_cell(32768, LLAMA, dense, whole), variants="all"),
        replace(
            head_cell(32768, LLAMA, "forward", ("floor_whole", *some)),
            variants="kernels",
        ),
        head_cell(32768, LLAMA, "frozen", some),
        head_cell(8192, QWEN_8B, dense, (*some, "liger_flce", "torch_lce")),
        logits_cells(8192, QWEN_8B["V"])[0],
        head_cell(32768, QWEN_1B, dense, some),
        head_cell(32768, QWEN_7B, dense, some),
        head_cell(32768, LLAMA, "masked_50", ("trl", "cce")),
        replace(head_cell(32768, LLAMA, "zero_50", ()), variants="counted"),
        replace(head_cell(32768, LLAMA, "zero_80", ("trl", "cce")), variants="counted"),
        head_cell(2048, LLAMA, dense, some),
        head_cell(131072, LLAMA, dense, ("liger_sm90", "cce", "trl")),
        head_cell(32768, LLAMA, "entropy", ("trl", "liger_sm90")),
        replace(head_cell(32768, QWEN_1B, "forward", ("eager",)), variants="kernels"),
        head_cell(8192, LLAMA, dense, some),
        logits_cells(8192, QWEN_8B["V"])[1],
        head_cell(2048, LLAMA, "forward", ()),
        head_cell(131072, LLAMA, "forward", ()),
    ]
    if full:
        done = {cell.name for cell in found}
        grid = [
            head_cell(T, {"D": D, "V": V}, mode, ("eager", "liger_sm90", "cce"))
            for mode in ("forward_backward", "forward", "frozen")
            for T in (32768, 8192, 131072, 2048)
            for D in (4096, 1536, 3584, 2048, 5120, 896)
            for V in (151936, 131072, 128256)
        ]
        found += [cell for cell in grid if cell.name not in done]
    return found


def smoke(quick: bool) -> list[tuple[str, dict]]:
    """(name of a check, its arguments); a mode of the head or of the logits is checked as a cell
    is before it is timed.
    """
    if quick:
        head, dtype = tokens(64, 16, 512), "float32"
        beyond = {"T": 128, "D": 16, "V": 512, "workspace_mb": 1}
    else:
        head, dtype = tokens(4096, 1536, 151936), "bfloat16"
        beyond = {"T": 16384, "D": 512, "V": 151936, "workspace_mb": 8192}
    problem = {"shape": head, "dtype": dtype}
    logits = {"shape": Shape(T=head.T, D=1, V=head.V, S=head.T), "dtype": dtype}
    return [
        *((mode, problem) for mode in GPU_MODES),
        *((mode, logits) for mode in ("logits_forward", "logits_step")),
        *((name, problem) for name in checks.ON_A_PROBLEM),
        ("beyond_int32", beyond),
    ]


def products(quick: bool, rows: int) -> list[list[int]]:
    """[M, K, N, sums]: a cube, and the three products of the first cell's chunks of `rows`."""
    if quick:
        return [[64, 64, 64, 0], [64, 16, 512, 0], [512, 64, 16, 1]]
    D, V = LLAMA["D"], LLAMA["V"]
    return [[8192, 8192, 8192, 0], [rows, D, V, 0], [rows, V, D, 0], [V, rows, D, 1]]
