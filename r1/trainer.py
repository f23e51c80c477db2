"""One optimizer step of whatever the streams of a minibatch say. Knows no algorithm."""

import math
from collections.abc import Mapping
from itertools import chain

import torch
import torch.distributed as dist

from r1.batch import Minibatch, Pack
from r1.config import Optim
from r1.loss import Scores, pack_loss, score
from r1.model import CausalLM
from r1.optim import Optimizer
from r1kernels import PolicyObjective


class TooManySkips(RuntimeError):
    """Step after step had a loss or gradient that is not finite."""


class Trainer:
    """A model, its optimizer, and the step that uses them.

    Args:
        model: its parameters that require a gradient are trained.
        optim: the [optim] section.
        total_updates: optimizer steps the schedule runs over.
        objective: of the policy component; may be left out where no batch has one.
        temperature: the sampler's, which log-probabilities of the policy component are taken at.
        max_skips: consecutive steps with a non-finite loss or gradient that are skipped before the
            run stops.
    """

    def __init__(
        self,
        model: CausalLM,
        optim: Optim,
        total_updates: int,
        *,
        objective: PolicyObjective | None = None,
        temperature: float = 1.0,
        max_skips: int = 10,
    ):
        self.model = model
        self.optimizer = Optimizer(model.module, optim, total_updates)
        self.clip_norm = optim.clip_norm
        self.objective = objective
        self.temperature = temperature
        self.max_skips = max_skips
        # what the last step's forward found, before its update: one tensor for each of its packs
        self.logps: list[torch.Tensor | None] = []
        self.updates = 0
        self.skipped = 0
        self.skipped_in_a_row = 0

    def step(self, minibatch: Minibatch) -> dict[str, float]:
        """Forward, backward and one update. Returns sums and counts over all ranks, with `loss`,
        `grad_norm`, `lr`, `skipped`.

        A loss or gradient that is not finite on any rank leaves the weights and the optimizer as
        they were, on every rank.

        Raises: TooManySkips after more than `max_skips` such steps in a row.
        """
        self.model.module.train()
        self.optimizer.zero_grad()
        counts = all_sum(minibatch.counts)
        sums: dict[str, torch.Tensor] = {}
        self.logps = []
        for pack in minibatch.packs:
            out = pack_loss(
                self.model,
                pack.to(self.model.device),
                counts,
                objective=self.objective,
                temperature=self.temperature,
            )
            out.loss.backward()
            self.logps.append(out.logp_T)
            for name, value in {"loss": out.loss.detach(), **out.metrics}.items():
                sums[name] = sums[name] + value if name in sums else value
        grad_norm = self._reduce_and_clip()
        # one transfer from the device for all of them
        values = torch.stack([value.double() for value in sums.values()]).tolist() if sums else []
        metrics = all_sum({"loss": 0.0, **dict(zip(sums, values, strict=True))})
        metrics |= {"grad_norm": grad_norm, "lr": self.optimizer.lr, "skipped": 0.0}
        if math.isfinite(grad_norm) and math.isfinite(metrics["loss"]):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip(metrics)
        self.updates += 1
        return metrics

    def score(self, packs: list[Pack], model: CausalLM | None = None) -> list[Scores]:
        """Scores of every pack under `model` (the trained one), on the CPU."""
        model = model or self.model
        model.module.eval()
        scores = [score(model, pack.to(model.device), self.temperature) for pack in packs]
        return [Scores(one.logp_T.cpu(), one.entropy_T.cpu()) for one in scores]

    def state_dict(self) -> dict:
        return {
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
        self.skipped = state["skipped"]
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def _reduce_and_clip(self) -> float:
        """Gradients summed over ranks, as the loss is over global counts; norm before clipping."""
        masters = self.optimizer.masters
        for param in masters:
            # a minibatch without live samples still takes its step, with a gradient of zero
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            if distributed():
                dist.all_reduce(param.grad)
        return float(torch.nn.utils.clip_grad_norm_(masters, self.clip_norm or math.inf))

    def _skip(self, metrics: dict[str, float]) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1
        self.skipped_in_a_row += 1
        metrics["skipped"] = 1.0
        if self.skipped_in_a_row > self.max_skips:
            raise TooManySkips(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or gradient "
                f"that is not finite (last: loss {metrics['loss']}, gradient norm "
                f"{metrics['grad_norm']}); the weights are those before them"
            )


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_sum(values: Mapping[str, float]) -> dict[str, float]:
    """Every value summed over the ranks; a name that a rank lacks counts 0 there."""
    if not distributed():
        return dict(values)
    every: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, dict(values))
    return {
        name: sum(one.get(name, 0) for one in every)
        for name in sorted({*chain.from_iterable(every)})
    }
