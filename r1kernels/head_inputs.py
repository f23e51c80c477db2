"""What every op of the linear head takes: arguments checked and flattened, one list for all."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.backend import implementation
from r1kernels.check import describe, device, dtype_in, shape
from r1kernels.chunked_head import Head, HeadChunk, Rows
from r1kernels.rows import DTYPES, check_targets, counted_rows, per_row, positive, scaling


class HeadInputs(NamedTuple):
    """The first arguments of an op, in its order; what is a tensor may get a gradient."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    bias_V: Tensor | None
    temperature_T: Tensor | None
    softcap: float
    logit_scale: float
    prior_T: Tensor | None

    def wants(self) -> list[bool]:
        """Whether hidden, weight and bias need gradients in a call made now."""
        return [
            x is not None and torch.is_grad_enabled() and x.requires_grad
            for x in (self.hidden_TD, self.weight_VD, self.bias_V)
        ]

    def start(self) -> tuple[type[HeadChunk], Head, Rows, Tensor | None]:
        """The backend's work, the head, the rows that count and their indices (None: all)."""
        run = implementation("linear_logp", self.hidden_TD.device.type, *self[:2])
        head = Head(self.weight_VD, self.bias_V, self.softcap, self.logit_scale)
        at = counted_rows(self.targets_T, self.weight_VD.shape[0], self.temperature_T)
        rows = Rows(self.hidden_TD, self.targets_T, self.temperature_T, self.prior_T)
        return run.HeadChunk, head, rows if at is None else rows.take(at), at


# Of HeadInputs in an op's schema.
SCHEMA = (
    "Tensor hidden_TD, Tensor weight_VD, Tensor targets_T, Tensor? bias_V, Tensor? temperature_T, "
    "float softcap, float logit_scale, Tensor? prior_T"
)
COUNT = len(HeadInputs._fields)


def split(args: tuple) -> tuple[HeadInputs, tuple]:
    """An op's arguments: those of the head, and the rest."""
    return HeadInputs(*args[:COUNT]), args[COUNT:]


def gradients(hidden_TD: object, weight_VD: object, bias_V: object) -> list:
    """The gradients of HeadInputs, None where there is none."""
    none = HeadInputs(*[None] * COUNT)
    return list(none._replace(hidden_TD=hidden_TD, weight_VD=weight_VD, bias_V=bias_V))


def head_inputs(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    temperature: object,
    softcap: object,
    logit_scale: object,
    prior: object,
    workspace_mb: object,
) -> HeadInputs:
    """The arguments of a call on a linear head, checked, the leading shape made one axis.

    Raises: ValueError on shapes, devices and options out of range; TypeError on dtypes.
    """
    dtype_in("hidden", hidden, DTYPES)
    dtype_in("weight", weight, (hidden.dtype,))
    if hidden.ndim < 1 or weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight must be [V, D] and hidden [..., D], "
            f"got {describe(weight)} and {describe(hidden)}"
        )
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must end in weight's width {weight.shape[1]}, got {describe(hidden)}"
        )
    device("weight", weight, hidden.device)
    if bias is not None:
        dtype_in("bias", bias, (hidden.dtype, torch.float32))
        shape("bias", bias, weight.shape[:1], "one per vocabulary entry")
        device("bias", bias, hidden.device)
    if workspace_mb is not None:
        positive("workspace_mb", workspace_mb)
        if not isinstance(workspace_mb, int):
            raise TypeError(f"workspace_mb must be an int, got {workspace_mb!r}")
    leading = hidden.shape[:-1]
    check_targets(targets, leading, hidden)
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        *scaling(temperature, softcap, logit_scale, leading, hidden),
        per_row("prior", prior, leading, hidden),
    )
