"""The gated activation of an MLP on the CPU: one pass over its tiles, in place, in float32."""

import torch
from torch import Tensor

from r1kernels._native.common import CODES, extension, missing, refusal
from r1kernels.reference.glu import ACTIVATIONS


def refuses(gate: Tensor | None = None, *_args: object) -> str | None:
    """Why these tensors cannot be taken, or None."""
    return missing("glu_forward", "glu_backward") or refusal(gate)


def forward_(gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """gate becomes act(gate) * up; both contiguous."""
    extension.glu_forward(**_where(gate_CI, up_CI, activation))


def backward_(dh_CI: Tensor, gate_CI: Tensor, up_CI: Tensor, activation: str) -> None:
    """dh becomes h = act(gate) * up, gate its own gradient, and up its own; all contiguous."""
    extension.glu_backward(dh=dh_CI.data_ptr(), **_where(gate_CI, up_CI, activation))


def _where(gate_CI: Tensor, up_CI: Tensor, activation: str) -> dict[str, int]:
    assert gate_CI.is_contiguous() and up_CI.is_contiguous()
    return {
        "gate": gate_CI.data_ptr(),
        "up": up_CI.data_ptr(),
        "dtype": CODES[gate_CI.dtype],
        "count": gate_CI.numel(),
        "activation": ACTIVATIONS.index(activation),
        "threads": torch.get_num_threads(),
    }
