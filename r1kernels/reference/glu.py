"""The gated activation of an MLP, `act(gate) * up`, and its gradients, as written in a textbook."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The order is that of `Activation` in csrc/cpu/kernels.hpp.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_TANH_IN, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`act(gate) * up`; differentiable by autograd, any dtype and device."""
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def refuses(*_args: object) -> str | None:
    """None: runs anywhere."""
    return None


def forward_(gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """gate becomes act(gate) * up, computed in float32 (float64 for float64), rounded once."""
    gate_CI.copy_(glu(_wide(gate_CI), _wide(up_CI), activation))


def backward_(dh_CI: Tensor, gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """dh becomes h = act(gate) * up, gate its own gradient, and up its own."""
    dh, gate, up = map(_wide, (dh_CI, gate_CI, up_CI))
    act, slope = _act_and_slope(gate, activation)
    h, dgate, dup = act * up, dh * up * slope, dh * act
    for out_CI, x in ((dh_CI, h), (gate_CI, dgate), (up_CI, dup)):
        out_CI.copy_(x)


def _act_and_slope(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and its derivative."""
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if activation == "gelu":
        below = torch.special.ndtr(x)
        return x * below, below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    tanh = torch.tanh(_TANH_IN * (x + _TANH_CUBE * x**3))
    inner = _TANH_IN * (1 + 3 * _TANH_CUBE * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
