"""A gated MLP a tile of rows at a time, its backward written out: nothing of size [T, I] is kept.

11 products per tile instead of the 9 of an MLP that keeps everything: the backward makes gate and
up again, but not the down projection, whose value no gradient needs.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.backend import implementation, isolated
from r1kernels.check import choice, describe, dtype_in, local, no_second_derivative
from r1kernels.projection import KEYS, Projection, projection
from r1kernels.reference.glu import ACTIVATIONS
from r1kernels.weight_grads import WeightGrads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# MiB for the three [C, I] buffers of a tile, unless the caller says: on a GPU enough rows that
# adding to the float32 sums of the weight gradients costs less than their products.
WORKSPACE_MB = {"cpu": 32, "cuda": 512}
MIN_ROWS = 64

Lora = tuple[Tensor, Tensor, float]


class Mlp(NamedTuple):
    """`down(act(gate(x)) * up(x))`."""

    gate: Projection
    up: Projection
    down: Projection
    activation: str

    def to(self, dtype: torch.dtype) -> "Mlp":
        return Mlp(*(p.to(dtype) for p in self[:3]), self.activation)

    @property
    def tensors(self) -> dict[str, Tensor | None]:
        """What may get a gradient, by its key in WeightGrads."""
        return {
            f"{name}.{key}": x
            for name, p in zip(self._fields, self[:3], strict=False)
            for key, x in zip(KEYS, p, strict=False)
        }

    @property
    def width(self) -> int:
        return len(self.gate.weight_NK)


def tiled_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    activation: str = "silu",
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_lora: Lora | None = None,
    up_lora: Lora | None = None,
    down_lora: Lora | None = None,
    tile_rows: int | None = None,
) -> Tensor:
    """`(act(x Wg^T) * (x Wu^T)) Wd^T`, the MLP of Llama and its kin, for long sequences.

    Keeps x and the weights. The backward makes each tile of gate and up again, turns it into the
    gradients in place, and adds the weight gradients up in float32; autograd gets each of them
    once, so DDP and FSDP2 see one gradient per parameter. A frozen weight's is not computed.

    Args:
        x: [..., D] float32, bfloat16, float16 or float64; under autocast taken in its dtype.
        gate_weight, up_weight: [I, D], of x's dtype; or float32, a master weight that meets 16-bit
            rows as a copy and gets its gradient unrounded.
        down_weight: [D, I], likewise.
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GeGLU).
        gate_bias, up_bias, down_bias: [I], [I], [D], or None.
        gate_lora, up_lora, down_lora: (A [R, inputs], B [outputs, R], scale): a low-rank term
            scale B A of the weight, of x's dtype or float32; or None. The sum is never made.
        tile_rows: rows of a tile; by default what 32 MiB (GPU: 512) hold of three [rows, I].

    Returns:
        [..., D] like x.

    Gradients: x, weights, biases, A and B.
    Numerics: products as the library makes them; the activation and its gradients in float32,
        rounded once per result. Deterministic where the library's products are.
    Raises: ValueError on shapes, devices, activation or tile_rows; TypeError on dtypes.
    Source: docs/ops/tiled_mlp.md.
    """
    x = autocast_rows(x)
    gate = projection("gate", x, gate_weight, gate_bias, gate_lora, x.shape[-1])
    width = len(gate.weight_NK)
    up = projection("up", x, up_weight, up_bias, up_lora, x.shape[-1], width)
    down = projection("down", x, down_weight, down_bias, down_lora, width, x.shape[-1])
    return run_mlp(x, Mlp(gate, up, down, activation), tile_rows)


def autocast_rows(x: object) -> Tensor:
    """Rows [..., D], checked, in the dtype that a linear layer would take them in."""
    local("x", x)
    dtype_in("x", x, DTYPES)
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., D], got {describe(x)}")
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if cast and x.dtype != torch.float64 else x


def run_mlp(x: Tensor, mlp: Mlp, tile_rows: int | None) -> Tensor:
    """`tiled_mlp` of checked projections."""
    choice("activation", mlp.activation, ACTIVATIONS)
    check_tile_rows(tile_rows)
    scales = (p.scale for p in mlp[:3])
    return tiled_mlp_fwd(x, *mlp.tensors.values(), *scales, mlp.activation, tile_rows)


def check_tile_rows(tile_rows: object) -> None:
    if tile_rows is not None and (isinstance(tile_rows, bool) or not isinstance(tile_rows, int)):
        raise TypeError(f"tile_rows must be an int, got {describe(tile_rows)}")
    if tile_rows is not None and tile_rows < 1:
        raise ValueError(f"tile_rows must be at least 1, got {tile_rows}")


def mlp_chunk(
    x_CD: Tensor, mlp: Mlp, space_XCI: Tensor | None = None, out_CD: Tensor | None = None
) -> Tensor:
    """y of a chunk, written to `out` where that is given; x and the weights have one dtype.

    space_XCI: two [C, I] buffers to work in, or more.
    """
    gate_CI, up_CI = _buffers(2, x_CD, mlp, space_XCI)
    mlp.gate.apply(x_CD, gate_CI)
    mlp.up.apply(x_CD, up_CI)
    _glu(gate_CI).forward_(gate_CI, up_CI, mlp.activation)
    return mlp.down.apply(gate_CI, out_CD)


def mlp_chunk_backward(
    dy_CD: Tensor,
    x_CD: Tensor,
    mlp: Mlp,
    grads: WeightGrads,
    space_XCI: Tensor | None = None,
    out_CD: Tensor | None = None,
    input_grad: bool = True,
) -> Tensor | None:
    """dx of a chunk, written to `out` where that is given, which may be dy; None if not wanted.

    grads: gets the gradients of the parameters it knows, by the keys of `Mlp.tensors`.
    space_XCI: three [C, I] buffers to work in.
    """
    gate_CI, up_CI, dh_CI = _buffers(3, x_CD, mlp, space_XCI)
    mlp.gate.apply(x_CD, gate_CI)
    mlp.up.apply(x_CD, up_CI)
    mlp.down.input_grad(dy_CD, dh_CI)
    _glu(gate_CI).backward_(dh_CI, gate_CI, up_CI, mlp.activation)
    mlp.down.weight_grads("down", dy_CD, dh_CI, grads)
    mlp.gate.weight_grads("gate", gate_CI, x_CD, grads)
    mlp.up.weight_grads("up", up_CI, x_CD, grads)
    if not input_grad:
        return None
    out_CD = mlp.gate.input_grad(gate_CI, out_CD)
    return mlp.up.input_grad(up_CI, out_CD, add=True)


def _buffers(count: int, x_CD: Tensor, mlp: Mlp, space_XCI: Tensor | None) -> tuple[Tensor, ...]:
    if space_XCI is None:
        space_XCI = x_CD.new_empty(count, len(x_CD), mlp.width)
    return space_XCI[:count, : len(x_CD)].unbind(0)


def _glu(gate_CI: Tensor):
    return implementation("glu", gate_CI.device.type, gate_CI)


def _tiles(
    count: int, x_TD: Tensor, mlp: Mlp, tile_rows: int | None
) -> tuple[Tensor, Iterator[slice]]:
    """Space for a tile, and the tiles, alike in forward and backward: the rows of all but the last
    are as many as the caller says, or else nearly as many in each as a workspace holds."""
    T = len(x_TD)
    if tile_rows is None:
        mb = WORKSPACE_MB.get(x_TD.device.type, WORKSPACE_MB["cpu"])
        most = max(MIN_ROWS, mb * 2**20 // (3 * mlp.width * x_TD.element_size()))
        tile_rows = max(1, -(-T // max(1, -(-T // most))))
    space_XCI = x_TD.new_empty(count, min(tile_rows, T), mlp.width)
    return space_XCI, (slice(at, min(at + tile_rows, T)) for at in range(0, T, tile_rows))


_TENSORS = [f"{name}_{key}" for name in Mlp._fields[:3] for key in KEYS]
# An op's arguments: x, the tensors of an Mlp, three scales, activation, rows of a tile.
SCHEMA = "Tensor x, " + ", ".join(
    [f"Tensor{'' if x.endswith('_weight') else '?'} {x}" for x in _TENSORS]
    + [f"float {name}_scale" for name in Mlp._fields[:3]]
    + ["str activation", "int? tile_rows"]
)
COUNT = 1 + len(_TENSORS)


def _split(args: tuple) -> tuple[Tensor, Mlp, int | None]:
    """The rows of x, the MLP with its parameters as they came, and the rows of a tile."""
    x, *tensors = args[:COUNT]
    *scales, activation, tile_rows = args[COUNT:]
    each = zip(range(0, len(tensors), len(KEYS)), scales, strict=True)
    parts = (Projection(*tensors[at : at + len(KEYS)], scale) for at, scale in each)
    return x.reshape(-1, x.shape[-1]), Mlp(*parts, activation), tile_rows


@torch.library.custom_op(
    "r1kernels::tiled_mlp_fwd", mutates_args=(), schema=f"({SCHEMA}) -> Tensor"
)
@isolated
def tiled_mlp_fwd(*args):
    """y [..., D]."""
    x_TD, mlp, tile_rows = _split(args)
    mlp = mlp.to(x_TD.dtype)
    # Of x's shape from the start: FSDP2 warns of a module whose output is a view.
    y = x_TD.new_empty(args[0].shape)
    y_TD = y.view(x_TD.shape)
    space_XCI, tiles = _tiles(2, x_TD, mlp, tile_rows)
    for at in tiles:
        mlp_chunk(x_TD[at], mlp, space_XCI, y_TD[at])
    return y


@tiled_mlp_fwd.register_fake
def _(x, *_rest):
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "r1kernels::tiled_mlp_bwd",
    mutates_args=(),
    schema=f"(Tensor dy, {SCHEMA}, bool[] needs) -> Tensor[]",
)
@isolated
def tiled_mlp_bwd(dy, *args):
    """The gradients that are needed of x and of the tensors of the MLP, in their order."""
    *args, needs = args
    x_TD, given, tile_rows = _split(args)
    dy_TD, mlp = dy.reshape(x_TD.shape), given.to(x_TD.dtype)
    wanted = {
        key: x for (key, x), need in zip(given.tensors.items(), needs[1:], strict=True) if need
    }
    grads = WeightGrads(wanted)
    found = [dy.new_empty(dy.shape)] if needs[0] else []
    dx_TD = found[0].view(x_TD.shape) if needs[0] else None
    space_XCI, tiles = _tiles(3, x_TD, mlp, tile_rows)
    for at in tiles:
        out_CD = None if dx_TD is None else dx_TD[at]
        mlp_chunk_backward(dy_TD[at], x_TD[at], mlp, grads, space_XCI, out_CD, needs[0])
    del space_XCI
    return found + [grads.deliver(key) for key in wanted]


@tiled_mlp_bwd.register_fake
def _(dy, *args):
    *args, needs = args
    return [x.new_empty(x.shape) for x, need in zip(args[:COUNT], needs, strict=True) if need]


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:COUNT])
    ctx.plain = inputs[COUNT:]


def _grad(ctx, dy):
    no_second_derivative("tiled_mlp")
    needs = list(ctx.needs_input_grad[:COUNT])
    found = iter(tiled_mlp_bwd(dy, *ctx.saved_tensors, *ctx.plain, needs))
    return *(next(found) if need else None for need in needs), *[None] * len(ctx.plain)


tiled_mlp_fwd.register_autograd(_grad, setup_context=_setup)
