"""What every op of the linear head takes: arguments checked and flattened, one list for all."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import shards
from r1kernels.backend import implementation, is_batch_invariant
from r1kernels.check import describe, device, dtype_in, local, low_rank, shape
from r1kernels.chunked_head import chunk_rows
from r1kernels.head_contract import Head, HeadChunk, Rows
from r1kernels.rows import (
    DTYPES,
    beside,
    check_targets,
    counted_rows,
    per_row,
    positive,
    scaling,
)


class HeadInputs(NamedTuple):
    """The first arguments of an op, in its order; what is a tensor may get a gradient."""

    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    bias_V: Tensor | None
    lora_RD: Tensor | None
    lora_VR: Tensor | None
    temperature_T: Tensor | None
    prior_T: Tensor | None
    weight_grad_VD: Tensor | None
    softcap: float
    logit_scale: float
    lora_scale: float
    group: str = ""  # of the ranks that hold the other slices of the vocabulary

    @property
    def trained(self) -> tuple[Tensor | None, ...]:
        """What may get a gradient, in the order of `Gradients`."""
        return self.hidden_TD, self.weight_VD, self.bias_V, self.lora_RD, self.lora_VR

    def wants(self) -> list[bool]:
        """Which of `trained` need gradients in a call made now."""
        return [x is not None and torch.is_grad_enabled() and x.requires_grad for x in self.trained]

    def start(
        self,
        workspace_mb: int | None,
        agreed: tuple = (),
        counted_T: Tensor | None = None,
        count: int | None = None,
    ) -> "Work":
        """What a path of `chunked_head` starts from; a backward knows which rows count.

        agreed: what else a group's ranks must call with alike, tensors per token too.
        """
        # A float32 master weight meets 16-bit hidden states as a copy in their dtype.
        weight_VD, lora_VR = (
            None if x is None else x.to(self.hidden_TD.dtype)
            for x in (self.weight_VD, self.lora_VR)
        )
        with shards.refusals_told(self.group):
            run = implementation(
                "linear_logp", self.hidden_TD.device.type, self.hidden_TD, weight_VD, lora_VR
            )
        head = Head(
            weight_VD,
            self.bias_V,
            self.softcap,
            self.logit_scale,
            self.lora_RD,
            lora_VR,
            self.lora_scale,
        )
        temperature_T, vocab = self.temperature_T, len(weight_VD)
        if self.group:
            rank = None if self.lora_RD is None else len(self.lora_RD)
            same = (
                run.__name__,
                is_batch_invariant(),
                self.hidden_TD.dtype,
                self.bias_V is None,
                rank,
            )
            agreed = *same, self.targets_T, temperature_T, self.prior_T, *self[TENSORS:], *agreed
            size = chunk_rows(run.HeadChunk, head, workspace_mb)
            head = replace(head, shard=shards.join(self.group, vocab, size, self.hidden_TD, agreed))
            vocab = head.shard.vocab
        if counted_T is None:
            counted_T, count, temperature_T = counted_rows(self.targets_T, vocab, temperature_T)
            counted_T = beside(counted_T, self.hidden_TD)
        targets_T = beside(self.targets_T, self.hidden_TD)
        targets_T = targets_T if head.shard is None else head.shard.local(targets_T)
        rows = Rows(self.hidden_TD, targets_T, temperature_T, self.prior_T)
        if count < len(targets_T):
            rows = rows.take(torch.nonzero_static(counted_T, size=count).squeeze(1))
        return Work(run.HeadChunk, head, rows, counted_T, count)


class Work(NamedTuple):
    """A backend's class, the head, the rows that count, and which of the call's and how many."""

    chunk: type[HeadChunk]
    head: Head
    rows: Rows
    counted_T: Tensor
    count: int


# Of HeadInputs in an op's schema.
SCHEMA = (
    "Tensor hidden_TD, Tensor weight_VD, Tensor targets_T, Tensor? bias_V, Tensor? lora_RD, "
    "Tensor? lora_VR, Tensor? temperature_T, Tensor? prior_T, Tensor? weight_grad_VD, "
    "float softcap, float logit_scale, float lora_scale, str group"
)
COUNT = len(HeadInputs._fields)
# The tensors come first.
TENSORS = HeadInputs._fields.index("softcap")


def split(args: tuple) -> tuple[HeadInputs, tuple]:
    """An op's arguments: those of the head, and the rest."""
    return HeadInputs(*args[:COUNT]), args[COUNT:]


def gradients(
    hidden_TD: object, weight_VD: object, bias_V: object, lora_RD: object, lora_VR: object
) -> list:
    """The gradients of HeadInputs from those of `trained`."""
    found = [hidden_TD, weight_VD, None, bias_V, lora_RD, lora_VR]
    return found + [None] * (COUNT - len(found))


def head_inputs(
    hidden: object,
    weight: object,
    targets: object,
    bias: object,
    lora: object,
    temperature: object,
    softcap: object,
    logit_scale: object,
    prior: object,
    workspace_mb: object,
    weight_grad: object,
    group: object,
) -> HeadInputs:
    """The arguments of a call on a linear head, checked, the leading shape made one axis.

    Raises: ValueError on shapes, devices and options out of range; TypeError on dtypes.
    """
    weight, bias, group = shards.local_head(weight, bias, group)
    for name, x in (("hidden", hidden), ("weight", weight)):
        local(name, x)
    dtype_in("hidden", hidden, DTYPES)
    dtype_in("weight", weight, (hidden.dtype, torch.float32))
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
    lora_RD, lora_VR, lora_scale = (
        (None, None, 1.0) if lora is None else low_rank("lora", lora, hidden, *weight.shape)
    )
    if weight_grad is not None:
        dtype_in("weight_grad", weight_grad, (torch.float32,))
        shape("weight_grad", weight_grad, weight.shape, "that of the weight")
        device("weight_grad", weight_grad, hidden.device)
        if not weight_grad.is_contiguous() or weight_grad.requires_grad or not weight.requires_grad:
            raise ValueError(
                "weight_grad must be contiguous and take no gradient itself, and weight must "
                f"require one, got strides {weight_grad.stride()}, weight_grad.requires_grad="
                f"{weight_grad.requires_grad}, weight.requires_grad={weight.requires_grad}"
            )
    leading = hidden.shape[:-1]
    check_targets(targets, leading, hidden, host=True)
    options = scaling(temperature, softcap, logit_scale, leading, hidden)
    return HeadInputs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        bias,
        lora_RD,
        lora_VR,
        options.temperature_T,
        per_row("prior", prior, leading, hidden),
        weight_grad,
        options.softcap,
        options.logit_scale,
        lora_scale,
        group,
    )


def check_skip_mass(skip_mass: object, entropy_grad: bool, kept: object, group: object) -> float:
    """Raises: TypeError unless a number; ValueError outside [0, 1) or where it cannot be had."""
    if isinstance(skip_mass, bool) or not isinstance(skip_mass, int | float):
        raise TypeError(f"skip_mass must be a number, got {describe(skip_mass)}")
    if not 0.0 <= skip_mass < 1.0:
        raise ValueError(f"skip_mass must lie in [0, 1), got {skip_mass!r}")
    if skip_mass and entropy_grad:
        raise ValueError("skip_mass does not go with a gradient of the entropy: nothing bounds it")
    if skip_mass and kept is not None:
        raise ValueError("skip_mass does not go with kept: nothing is left to leave out")
    if skip_mass and group is not None:
        raise ValueError("skip_mass does not go with group: no rank has the mass of a whole row")
    if skip_mass and is_batch_invariant():
        raise ValueError("skip_mass does not go with batch_invariant: what is left out varies")
    return float(skip_mass)
