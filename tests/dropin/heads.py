"""The linear head in three computations: a library's, the drop-in's, and the truth in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.numerics import assert_no_worse


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None


def make(rows, D, V, dtype, bias=False, peak=3.0) -> Inputs:
    """Every third target is the most likely token, the rest are drawn at random."""
    hidden = torch.randn(*rows, D)
    weight = torch.randn(V, D) * (peak / D**0.5)
    targets = torch.randint(0, V, rows)
    best = (hidden.to(dtype).float() @ weight.to(dtype).float().T).argmax(-1)
    targets.view(-1)[::3] = best.view(-1)[::3]
    offset = torch.randn(V).to(dtype) if bias else None
    return Inputs(hidden.to(dtype), weight.to(dtype), targets, offset)


def evaluate(fn: Callable, inputs: Inputs, dtype: torch.dtype | None = None, frozen=False) -> dict:
    """fn's outputs by name, and the gradients of a fixed random combination of those that have one.

    fn: (hidden, weight, targets, bias) -> dict of tensors.
    """
    hidden, weight, targets, bias = (
        x if x is None or not x.is_floating_point() or dtype is None else x.to(dtype)
        for x in inputs
    )
    leaves = {"hidden": hidden.detach().clone(), "weight": weight.detach().clone()}
    if bias is not None:
        leaves["bias"] = bias.detach().clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == "hidden" or not frozen)
    out = fn(leaves["hidden"], leaves["weight"], targets, leaves.get("bias"))
    generator = torch.Generator().manual_seed(7)
    total = 0.0
    for x in out.values():
        if x.requires_grad:
            c = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            total = total + (c * x.double()).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(total, list(wanted.values()))
    found = {name: x.detach() for name, x in out.items()}
    return found | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def assert_each_no_worse(ours: dict, theirs: dict, truth: dict) -> None:
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, value in truth.items():
        if value.dtype == torch.bool:
            assert torch.equal(ours[name], value), name
        else:
            assert_no_worse(ours[name], theirs[name], value, name=name)


def full(temperature=1.0, softcap=None, logit_scale=1.0, wanted=("logp", "entropy")) -> Callable:
    """The whole distribution by hand, in the dtype of the inputs (float32 after bfloat16)."""

    def fn(hidden, weight, targets, bias):
        z = hidden @ weight.T
        z = z if bias is None else z + bias
        x = (z if z.dtype == torch.float64 else z.float()) * logit_scale
        x = softcap * torch.tanh(x / softcap) if softcap else x
        x = x / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
        logps = x.log_softmax(-1)
        out = {
            "logp": logps.gather(-1, targets[..., None]).squeeze(-1),
            "entropy": -(logps.exp() * logps).sum(-1),
            "log_sum_sq_probs": torch.logsumexp(2 * logps, -1).detach(),
            "mean_logits": x.mean(-1).detach(),
            "is_top1": x.argmax(-1) == targets,
        }
        return {name: out[name] for name in wanted}

    return fn
