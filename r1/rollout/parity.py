"""Do sampler and trainer give the same tokens the same probability? What breaks RL first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from r1.types import Prompt, Sampling

if TYPE_CHECKING:
    from r1.rollout import Engine

# (prompts, completions) -> log-probabilities of every completion, at the temperature probed
LogpFn = Callable[
    [list[tuple[int, ...]], list[tuple[int, ...]]], Sequence[Sequence[float] | Tensor]
]

# ratio trainer / sampler: how many tokens lie inside
BANDS = {"in_0.999_1.002": (0.999, 1.002), "in_1pct": (0.99, 1.01), "in_10pct": (0.9, 1.1)}


class SamplerMismatch(RuntimeError):
    """Sampler and trainer disagree about the policy."""


class Parity(NamedTuple):
    """Absolute differences of log-probabilities, in nats, over `tokens` tokens."""

    mean: float
    max: float
    tokens: int


def gap_statistics(logp: Tensor, logp_sampler: Tensor) -> dict[str, float]:
    """Statistics of the gap between trainer and sampler over all given tokens.

    Args:
        logp, logp_sampler: [T] log-probabilities of the same tokens.

    Returns: "mean" and "max" of the absolute gap in nats, and for each of BANDS the share of tokens
        whose probability ratio trainer / sampler lies inside; a gap that is not finite counts as
        outside and makes mean and max not finite. No tokens: gaps 0, shares 1.
    Raises: ValueError on shapes that differ.
    """
    if logp.shape != logp_sampler.shape:
        raise ValueError(
            f"logp {tuple(logp.shape)} and logp_sampler {tuple(logp_sampler.shape)} must agree"
        )
    if logp.numel() == 0:
        return {"mean": 0.0, "max": 0.0, **dict.fromkeys(BANDS, 1.0)}
    gap_T = (logp.double() - logp_sampler.double()).flatten()
    ratio_T = gap_T.exp()
    shares = {
        name: float(((ratio_T >= low) & (ratio_T <= high)).double().mean())
        for name, (low, high) in BANDS.items()
    }
    return {"mean": float(gap_T.abs().mean()), "max": float(gap_T.abs().max()), **shares}


def probe(
    engine: Engine,
    logp_fn: LogpFn,
    prompts: list[Prompt],
    *,
    temperature: float = 1.0,
    max_tokens: int = 8,
    tolerance: float = 0.05,
    seed: int = 0,
) -> Parity:
    """Sample a few tokens of every prompt and compare their log-probabilities with the trainer's.

    Args:
        logp_fn: the trainer's log-probabilities, at the same temperature.
        tolerance: largest mean gap in nats.

    Raises: SamplerMismatch above the tolerance, or when a gap is not finite.
    """
    if not prompts:
        raise ValueError("a parity probe needs at least one prompt")
    sampling = Sampling(n=1, max_tokens=max_tokens, temperature=temperature)
    sampled = engine.generate(prompts, sampling, [[seed + i] for i in range(len(prompts))])
    completions = [row[0] for row in sampled]
    ours = logp_fn([tuple(p.tokens) for p in prompts], [c.tokens for c in completions])
    logp = torch.cat([torch.as_tensor(x, dtype=torch.float64).flatten().cpu() for x in ours])
    theirs = torch.tensor([x for c in completions for x in c.logps], dtype=torch.float64)
    gap = gap_statistics(logp, theirs)
    if not gap["mean"] <= tolerance:
        raise SamplerMismatch(
            f"sampler {engine.name!r} and trainer differ by {gap['mean']:.3g} nats per token "
            f"(max {gap['max']:.3g}, {theirs.numel()} tokens), tolerance {tolerance:.3g}. "
            "Look for: weights not synced (the head needs its own name even when tied), "
            "different data types, a temperature, softcap or logit scale that one side lacks, "
            'top_p < 1. rollout.engine = "transformers" samples with the trainer\'s own model.'
        )
    return Parity(gap["mean"], gap["max"], theirs.numel())
