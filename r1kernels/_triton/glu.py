"""The gated activation of an MLP, `h = act(gate) * up`, forward and backward, in place.

    forward_(gate_CI, up_CI, activation)            gate <- h
    backward_(dh_CI, gate_CI, up_CI, activation)    dh <- h, gate <- dgate, up <- dup

The backward makes h again, which the gradient of the down projection needs, so neither the
activation nor the product is ever stored beside its inputs. Traffic: forward 2 reads and 1 write of
[C, I], backward 3 and 3. Arithmetic is float32, rounded once per result.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import (
    INTERPRETED,
    device_refusal,
    dtype_refusal,
    tanh,
)
from r1kernels.reference.glu import ACTIVATIONS

SILU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(len(ACTIVATIONS)))
# Bandwidth-bound: 8 elements a thread, 16-byte loads of 16-bit types.
NUM_WARPS = 1 if INTERPRETED else 4
BLOCK_N = 8 * 32 * NUM_WARPS

SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi), the normal density at 0
DENSITY = tl.constexpr(0.3989422804014327)
TANH_IN = tl.constexpr(0.7978845608028654)
TANH_CUBE = tl.constexpr(0.044715)
CUBE_SLOPE = tl.constexpr(3 * 0.044715)


@triton.jit
def _act_and_slope(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative."""
    if ACTIVATION == SILU:
        # exp of -x overflows to inf where the sigmoid is 0, which is what 1 / (1 + inf) gives.
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        act = x * sigmoid
        slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    elif ACTIVATION == GELU:
        below = 0.5 + 0.5 * tl.math.erf(x * SQRT_HALF)
        act = x * below
        slope = below + x * tl.exp(-0.5 * x * x) * DENSITY
    else:
        t = tanh((x + x * x * x * TANH_CUBE) * TANH_IN)
        half = 0.5 + 0.5 * t
        act = x * half
        inner = (x * x * CUBE_SLOPE + 1.0) * TANH_IN
        slope = half + 0.5 * x * (1.0 - t * t) * inner
    return act, slope


@triton.jit
def _glu_fwd_kernel(gate_ptr, up_ptr, N, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    gate = tl.load(gate_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(gate, ACTIVATION)
    tl.store(gate_ptr + offs_n, (act * up).to(gate_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _glu_bwd_kernel(dh_ptr, gate_ptr, up_ptr, N, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dh = tl.load(dh_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate, ACTIVATION)
    dtype = gate_ptr.dtype.element_ty
    tl.store(dh_ptr + offs_n, (act * up).to(dtype), mask=mask_n)
    tl.store(gate_ptr + offs_n, (dh * up * slope).to(dtype), mask=mask_n)
    tl.store(up_ptr + offs_n, (dh * act).to(dtype), mask=mask_n)


def forward_(gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """gate becomes act(gate) * up; both contiguous."""
    _launch(_glu_fwd_kernel, (gate_CI, up_CI), activation)


def backward_(dh_CI: Tensor, gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """dh becomes h = act(gate) * up, gate its own gradient, and up its own; all contiguous."""
    _launch(_glu_bwd_kernel, (dh_CI, gate_CI, up_CI), activation)


def _launch(kernel, tensors: tuple[Tensor, ...], activation: str) -> None:
    assert all(x.is_contiguous() for x in tensors)
    count = tensors[0].numel()
    if count:
        kernel[(triton.cdiv(count, BLOCK_N),)](
            *tensors,
            count,
            ACTIVATION=ACTIVATIONS.index(activation),
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )


def refuses(gate: Tensor | None = None, *_args: object) -> str | None:
    """Why these kernels cannot take the tensors, or None."""
    if gate is None:
        return device_refusal(None)
    if INTERPRETED and gate.dtype == torch.bfloat16:
        return "the interpreter truncates where bfloat16 is rounded"
    return device_refusal(gate) or dtype_refusal(gate)
