"""Time and memory of a gated MLP, forward and backward: `python -m benchmarks.mlp [T D I DTYPE]`.

Providers take turns in one process, so that what else the machine does hits all alike: read the
ratios. Memory is the peak of the process above what it held before the call.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.meter import meter, print_ratios
from r1kernels import tiled_mlp, use_backend

DEFAULT = ("4096", "512", "1536", "float32")
ROUNDS = 9


def untiled(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def checkpointed(*tensors: Tensor) -> Tensor:
    return checkpoint(untiled, *tensors, use_reentrant=False)


def plain_torch(*tensors: Tensor) -> Tensor:
    with use_backend("reference"):
        return tiled_mlp(*tensors)


def liger() -> Callable:
    """Liger's tiling with its default number of tiles, around torch's operators: its own run on
    GPUs only. Gradients are summed by autograd, tile by tile."""
    from liger_kernel.ops import apply_tiled_mlp

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return apply_tiled_mlp(lambda _, rows: untiled(rows, *weights), None, x)

    return run


def providers() -> dict[str, Callable]:
    found = {
        "untiled": untiled,
        "checkpointed": checkpointed,
        "tiled_mlp": tiled_mlp,
        "tiled_mlp, reference": plain_torch,
    }
    try:
        found["liger tiling"] = liger()
    except ImportError as error:
        print(f"liger tiling: {error}", file=sys.stderr)
    return found


def same_gradients(steps: dict[str, Callable], leaves: list[Tensor]) -> None:
    """Raises: RuntimeError unless all compute one function; a time of another means nothing."""
    steps["untiled"]()
    expected = [x.grad for x in leaves]
    for name, once in steps.items():
        once()
        for x, truth in zip(leaves, expected, strict=True):
            error = float((x.grad - truth).norm() / truth.norm())
            if not error < 0.02:
                raise RuntimeError(f"{name} differs from the untiled MLP by {error:.2e}")


def main() -> None:
    T, D, I, dtype = (*sys.argv[1:], *DEFAULT[len(sys.argv) - 1 :])
    T, D, I, dtype = int(T), int(D), int(I), getattr(torch, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = ((T, D), (I, D), (I, D), (D, I))
    leaves = [
        (torch.randn(*size) * size[1] ** -0.5).to(device, dtype).requires_grad_() for size in sizes
    ]
    dy, watch = torch.randn(T, D).to(device, dtype), meter(device)

    def step(run: Callable) -> Callable:
        def once() -> None:
            for x in leaves:
                x.grad = None
            run(*leaves).backward(dy)

        return once

    steps = {name: step(run) for name, run in providers().items()}
    same_gradients(steps, leaves)
    times = {name: [] for name in steps}
    peaks = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name, once in steps.items():
            ms = watch.times(once, 0, 1, 1)
            if turn:  # the first round warms up
                times[name] += ms
            for x in leaves:
                x.grad = None
            peaks[name].append(watch.peak(once)[1])
    print(f"T={T} D={D} I={I} {dtype} on {watch.name()}, {torch.get_num_threads()} threads")
    print_ratios(times, peaks, "untiled")


if __name__ == "__main__":
    main()
