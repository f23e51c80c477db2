"""The form of a provider: what is timed, and what its implementations share."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from benchmarks.problem import GPU_MODES, clipped_loss, streams


class Missing(Exception):
    """A provider that is not installed, refuses the case or does not have the feature.

    The message is the reason.
    """


class Result(NamedTuple):
    logp: torch.Tensor | None
    dhidden: torch.Tensor | None
    dweight: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Provider:
    """`make(problem, mode)` returns a callable without arguments that runs one iteration and
    returns a Result. Its attribute `before`, where it has one, runs before each, untimed.

    Those of one family share a worker process on a GPU. `slowness` is a guess of the time over the
    bare GEMMs', for the suite's plan.
    """

    name: str
    make: Callable
    backend: str = "torch"
    package: str = "torch"
    modes: tuple[str, ...] = GPU_MODES
    objective: str = "policy"
    suites: tuple[str, ...] = ("cpu", "gpu")
    family: str = "torch"
    slowness: float = 1.5
    compiles: bool = False
    logit_copies: int = 0
    is_ours: bool = False
    is_floor: bool = False
    note: str = ""

    def op(self, mode: str) -> str:
        if self.objective == "ce":
            return "linear_cross_entropy"
        return "linear_logp" if mode in ("forward", "frozen") else "linear_policy_loss"


def leaves(problem: dict, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    trains = mode != "forward"
    hidden_TD = problem["hidden"].detach().requires_grad_(trains)
    weight_VD = problem["weight"].detach().requires_grad_(trains and mode != "frozen")
    return hidden_TD, weight_VD


def from_logp(
    problem: dict, mode: str, logp_and_entropy: Callable, loss_fn: Callable = clipped_loss
) -> Callable:
    """One iteration of a mode for a provider that gives differentiable (logp, entropy) of every
    token.
    """
    hidden_TD, weight_VD = leaves(problem, mode)
    advantages_B, logp_old_T, mask_T, entropy_coef = streams(problem, mode)

    def run() -> Result:
        hidden_TD.grad = weight_VD.grad = None
        with contextlib.nullcontext() if mode != "forward" else torch.no_grad():
            logp_T, entropy_T = logp_and_entropy(hidden_TD, weight_VD, entropy_coef != 0)
        if mode != "forward":
            loss_fn(logp_T, entropy_T, advantages_B, logp_old_T, mask_T, entropy_coef).backward()
        return Result(logp_T.detach(), hidden_TD.grad, weight_VD.grad)

    return run
