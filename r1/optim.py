"""The optimizer: Muon for hidden matrices, AdamW for the rest, float32 masters, one schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from r1.config import Optim

# quintic Newton-Schulz: steep at zero, lands singular values in about [0.7, 1.2] after five rounds
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_ROUNDS = 5
# root mean square of AdamW's usual update, which Muon's is scaled to, so that both share one lr
UPDATE_RMS = 0.2


def lr_factor(config: Optim, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (0-based) as a share of the peak.

    Linear warm-up, flat, then a decay over the last `decay_fraction` of the steps to `final_lr`;
    "linear" or "cosine" with decay_fraction < 1 is warm-up, stable, decay.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = round(config.decay_fraction * total_steps)
    if config.schedule == "constant" or not decay_steps:
        return warmup
    done = min(1.0, max(0.0, (step + 1 - (total_steps - decay_steps)) / decay_steps))
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return warmup * (config.final_lr + (1 - config.final_lr) * left)


def orthogonalize(matrices_KMN: Tensor) -> Tensor:
    """Replace every matrix's singular values by values near 1, its singular vectors kept.

    Args:
        matrices_KMN: [K, M, N] with M <= N, float32; a zero matrix stays zero.

    Source: Keller Jordan et al. 2024, Muon (quintic Newton-Schulz iteration).
    """
    a, b, c = NS_COEFFICIENTS
    X = matrices_KMN / matrices_KMN.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    for _ in range(NS_ROUNDS):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X


class Optimizer:
    """Steps the parameters of a module; its state makes a resumed run bitwise the same.

    Parameters that are not float32 get a float32 master copy: bfloat16 loses an update of 1e-6.
    Their gradients are added up in the master's, in float32, as the backward passes make them:
    bfloat16 would lose those of later micro-batches.

    Args:
        module: its parameters that require a gradient. With name "muon" the matrices outside of
            embeddings and output head go to Muon, everything else to AdamW. Weight decay acts on
            matrices only.
        config: the [optim] section.
        total_steps: what the schedule runs over.
    """

    def __init__(self, module: nn.Module, config: Optim, total_steps: int):
        self.config = config
        self.total_steps = total_steps
        self.step_count = 0
        params = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not params:
            raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
        self._params = params
        self._masters = {
            n: p if p.dtype == torch.float32 else p.detach().float() for n, p in params.items()
        }
        # what is stepped, one for each parameter; the gradients are theirs
        self.masters = list(self._masters.values())
        for name, param in params.items():
            if self._masters[name] is not param:
                param.register_post_accumulate_grad_hook(partial(_hand_over, self._masters[name]))
        edges = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        head = getattr(module, "get_output_embeddings", lambda: None)()
        edges |= {id(head.weight)} if head is not None else set()
        hidden = [n for n, p in params.items() if p.ndim == 2 and id(p) not in edges]
        self._muon = hidden if config.name == "muon" else []
        self._momentum = {n: torch.zeros_like(self._masters[n]) for n in self._muon}
        rest = [n for n in params if n not in set(self._muon)]
        groups = [
            {
                "params": [self._masters[n] for n in rest if params[n].ndim == 2],
                "weight_decay": config.weight_decay,
            },
            {
                "params": [self._masters[n] for n in rest if params[n].ndim != 2],
                "weight_decay": 0.0,
            },
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = None
        if groups:
            self._adamw = torch.optim.AdamW(
                groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
            )

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.config.lr * lr_factor(self.config, self.step_count, self.total_steps)

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients; a parameter without one is left alone."""
        lr = self.lr
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
        self._muon_step(lr)
        for name, param in self._params.items():
            master = self._masters[name]
            if master is not param:
                param.copy_(master)
        self.step_count += 1

    def _muon_step(self, lr: float) -> None:
        by_shape: dict[tuple[int, int], list[str]] = {}
        for name in self._muon:
            if self._masters[name].grad is not None:
                by_shape.setdefault(tuple(sorted(self._masters[name].shape)), []).append(name)
        for (_, longest), names in by_shape.items():
            updates = []
            for name in names:
                grad, momentum = self._masters[name].grad, self._momentum[name]
                momentum.lerp_(grad, 1 - self.config.momentum)
                update = grad.lerp(momentum, self.config.momentum)
                updates.append(update.mT if update.shape[0] > update.shape[1] else update)
            # an orthogonal M x N matrix with M <= N has root mean square 1 / sqrt(N)
            scale = lr * UPDATE_RMS * math.sqrt(longest)
            for name, update in zip(names, orthogonalize(torch.stack(updates)), strict=True):
                weight = self._masters[name]
                if self.config.weight_decay:
                    weight.mul_(1 - lr * self.config.weight_decay)
                weight.sub_(update.mT if weight.shape[0] > weight.shape[1] else update, alpha=scale)

    def zero_grad(self) -> None:
        for master in self.masters:
            master.grad = None

    def state_dict(self) -> dict[str, Any]:
        masters = {n: m.detach() for n, m in self._masters.items() if m is not self._params[n]}
        return {
            "step": self.step_count,
            "adamw": None if self._adamw is None else self._adamw.state_dict(),
            "momentum": dict(self._momentum),
            "masters": masters,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError when the state is of other parameters or another kind of optimizer."""
        masters = {n for n, m in self._masters.items() if m is not self._params[n]}
        for key, ours in (("momentum", set(self._momentum)), ("masters", masters)):
            if set(state[key]) != ours:
                odd = sorted(set(state[key]) ^ ours)
                raise ValueError(
                    f"optimizer state: {key} does not fit these parameters, e.g. {odd[0]!r}"
                )
        if (state["adamw"] is None) != (self._adamw is None):
            raise ValueError("optimizer state: AdamW state does not fit these parameters")
        for name, tensor in state["momentum"].items():
            self._momentum[name].copy_(tensor)
        for name, tensor in state["masters"].items():
            self._masters[name].copy_(tensor)
        if self._adamw is not None:
            self._adamw.load_state_dict(state["adamw"])
        self.step_count = state["step"]


def _hand_over(master: Tensor, param: Tensor) -> None:
    if master.grad is None:
        master.grad = param.grad.float()
    else:
        master.grad.add_(param.grad)
    param.grad = None
