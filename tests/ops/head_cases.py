"""Inputs, eager computation and truth for the ops of the linear head."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.check import IGNORE
from r1kernels.reference.token_logp import Logp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# One row; odd everything; more than one tile of every backend in vocabulary and rows.
SHAPES = [(1, 8, 17), (7, 40, 331), (33, 24, 4400)]
INTERPRETED_SHAPES = [(1, 8, 17), (7, 40, 331), (33, 24, 290)]
OPTIONS = {
    "plain": {},
    "entropy": {"entropy": True},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "all": {
        "entropy": True,
        "softcap": 8.0,
        "logit_scale": 1.3,
        "bias": True,
        "row_temperature": True,
    },
}


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    options: dict

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(
            self.hidden.to(dtype),
            self.weight.to(dtype),
            self.targets,
            None if self.bias is None else self.bias.to(dtype),
            self.options,
        )


def make(
    shape: tuple[int, int, int], dtype: torch.dtype, options: str, peaked: bool = False
) -> Case:
    """Targets in the first and last column, an ignored row, options by name.

    peaked: the target holds nearly all mass in half of the rows.
    """
    T, D, V = shape
    settings = dict(OPTIONS[options])
    hidden = torch.randn(T, D)
    weight = torch.randn(V, D) / D**0.5
    targets = torch.randint(0, V, (T,))
    targets[:1] = V - 1
    if T > 2:
        targets[1] = 0
        targets[2] = IGNORE
    if peaked:
        rows = torch.arange(0, T, 2)
        rows = rows[targets[rows] >= 0]
        weight[targets[rows]] = hidden[rows] * (4 * 3.0 / D**0.5)
    bias = torch.randn(V) if settings.pop("bias", False) else None
    settings["temperature"] = torch.rand(T) + 0.5 if settings.pop("row_temperature", False) else 0.8
    return Case(
        hidden.to(dtype),
        weight.to(dtype),
        targets,
        None if bias is None else bias.to(dtype),
        settings,
    )


def leaves(case: Case, head: bool = True) -> tuple[Tensor, ...]:
    """hidden, weight and bias as leaves that take gradients (hidden alone unless `head`)."""
    hidden = case.hidden.detach().clone().requires_grad_()
    weight = case.weight.detach().clone().requires_grad_(head)
    bias = None if case.bias is None else case.bias.detach().clone().requires_grad_(head)
    return hidden, weight, bias


def eager(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    entropy=False,
) -> Logp:
    """What a trainer writes by hand: logits in the inputs' dtype, softmax in float32 or float64."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    x = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    x = x / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    logps = torch.log_softmax(x, -1)
    counted = targets != IGNORE
    logp = torch.where(counted, logps.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1), 0)
    h = torch.where(counted, -(logps.exp() * logps).sum(-1), 0) if entropy else None
    return Logp(logp, h, torch.where(counted, torch.logsumexp(x, -1), 0))


def gradients(
    outputs: Logp, inputs: tuple[Tensor | None, ...], only: str | None = None
) -> list[Tensor]:
    """Gradients of a fixed random combination of the outputs (of one of them: `only`)."""
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for name, x in outputs._asdict().items():
        if x is not None:
            c = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            if only is None or name == only:
                total = total + (c.to(x.dtype) * x).sum()
    return list(
        torch.autograd.grad(total, [x for x in inputs if x is not None and x.requires_grad])
    )


def supported(backend: str, dtype: torch.dtype) -> bool:
    """triton's interpreter gets bfloat16 dot products wrong, so the backend refuses it there."""
    return not (backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available())


def shape_for(backend: str, index: int) -> tuple[int, int, int]:
    return (
        INTERPRETED_SHAPES if backend == "triton" and not torch.cuda.is_available() else SHAPES
    )[index]
