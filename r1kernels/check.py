"""Argument checks: TypeError and ValueError that name the argument and show what came."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORE = -100


def describe(x: object) -> str:
    """A tensor's dtype, shape and device, or anything else's type, for an error text."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)} on {x.device}"
    return f"{type(x).__name__} {x!r}"


def tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(x)}")


def local(name: str, x: object) -> None:
    """Raises: ValueError on a DTensor, whose shards no kernel can see as one matrix."""
    if isinstance(x, Tensor) and type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor with placements {x.placements}: pass "
            f"{name}.full_tensor(grad_placements=[Partial()]), as under FSDP2, where every rank "
            f"has rows of its own, or {name}.to_local() where this rank's part is all there is"
        )


def floating(name: str, x: object) -> None:
    tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must have a floating dtype, got {describe(x)}")


def dtype_in(name: str, x: object, dtypes: Sequence[torch.dtype]) -> None:
    tensor(name, x)
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {describe(x)}")


def shape(name: str, x: object, expected: Sequence[int], what: str = "") -> None:
    tensor(name, x)
    if tuple(x.shape) != tuple(expected):
        note = f" ({what})" if what else ""
        raise ValueError(f"{name} must have shape {list(expected)}{note}, got {describe(x)}")


def device(name: str, x: Tensor, expected: torch.device) -> None:
    if x.device != expected:
        raise ValueError(f"{name} must be on {expected}, got {describe(x)}")


def low_rank(
    name: str, lora: object, like: Tensor, outputs: int, inputs: int
) -> tuple[Tensor, Tensor, float]:
    """(A [R, inputs], B [outputs, R], scale) of a low-rank term, in like's dtype or float32."""
    if not isinstance(lora, tuple) or len(lora) != 3:
        got = f"a tuple of {len(lora)}" if isinstance(lora, tuple) else describe(lora)
        raise TypeError(f"{name} must be (A [R, {inputs}], B [{outputs}, R], scale), got {got}")
    down, up, scale = lora
    for title, x in ((f"{name}'s A", down), (f"{name}'s B", up)):
        local(title, x)
        dtype_in(title, x, (like.dtype, torch.float32))
        device(title, x, like.device)
    rank = down.shape[0] if down.ndim else 0
    if not rank:
        raise ValueError(f"{name}'s A must be [R, {inputs}], got {describe(down)}")
    shape(f"{name}'s A", down, (rank, inputs), "[R, inputs]")
    shape(f"{name}'s B", up, (outputs, rank), "[outputs, R]")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise TypeError(f"{name}'s scale must be a finite number, got {describe(scale)}")
    return down, up, float(scale)


def choice(name: str, value: object, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def no_second_derivative(op: str) -> None:
    """Raises: RuntimeError in a backward with create_graph=True.

    There the gradient would pass for a constant, and the second derivative for less than it is.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} has no second derivative: its backward ran with create_graph")


def values_readable(x: Tensor) -> bool:
    """Whether x's values can be looked at: on the CPU, and not while something traces."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
