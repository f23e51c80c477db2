"""Packed sequences with per-token streams, and their division into minibatches and micro-batches.

A sample is one sequence with the weight its tokens have in each loss component. A pack is samples
laid end to end, no padding. The packs of a rollout are made once: old and reference
log-probabilities are computed on the very packs that are trained on, so the ratio of an unchanged
policy is exactly 1. Where it pays, samples with the same context are a unit: a pack of units has
that context once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from r1.types import Group
from r1kernels.balance import pack_by_budget
from r1kernels.shared_prefixes import WORTH_SHARING, SharedPrefixes, share_prefixes, token_ratio

IGNORE = -100
# tokens that a unit must save: on a CPU each costs an attention call of its own per layer
LEAST_SAVED = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence: `context` leading tokens without loss, then tokens with these weights."""

    tokens: Sequence[int]
    context: int = 1
    policy: float = 0.0
    cross_entropy: float = 0.0
    advantage: float = 0.0
    logp_sampler: Sequence[float] = ()
    live: bool = True

    def __post_init__(self):
        if not 1 <= self.context <= len(self.tokens):
            raise ValueError(
                f"context: expected 1 to {len(self.tokens)} (the tokens), got {self.context}"
            )
        if self.policy and len(self.logp_sampler) != len(self.tokens) - self.context:
            raise ValueError(
                f"logp_sampler: {len(self.logp_sampler)} values for "
                f"{len(self.tokens) - self.context} sampled tokens"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A micro-batch. Row t predicts `targets_T[t]`, IGNORE where no component has weight.

    With a `layout` the context that samples share is in `tokens_T` once, and the streams and
    `cu_seqlens` have a row for each token after the contexts, `layout.rows` of the tokens' rows.
    """

    tokens_T: Tensor
    targets_T: Tensor
    sequence_T: Tensor
    policy_T: Tensor
    cross_entropy_T: Tensor
    advantages_T: Tensor
    logp_sampler_T: Tensor
    cu_seqlens: Tensor
    logp_old_T: Tensor | None = None
    logp_ref_T: Tensor | None = None
    layout: SharedPrefixes | None = None

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    def to(self, device: torch.device | str) -> "Pack":
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Pack(
            **{name: value if value is None else value.to(device) for name, value in moved.items()}
        )

    def with_logp(self, *, old: Tensor | None = None, ref: Tensor | None = None) -> "Pack":
        return replace(self, logp_old_T=old, logp_ref_T=ref)


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one optimizer step sees.

    `idle` packs hold the samples that cannot produce a gradient; they count in the denominators and
    are not trained on.
    """

    packs: list[Pack]
    idle: list[Pack]
    counts: dict[str, int]


def samples_of(
    groups: Sequence[Group], advantages: Sequence[float], *, keep_zero: bool
) -> list[Sample]:
    """The samples of scored groups, in order; `advantages` has one value per completion.

    With `keep_zero` false a sample of advantage 0 is not live: without a KL or entropy term it has
    no gradient.
    """
    completions = [
        (group.prompt, completion) for group in groups for completion in group.completions
    ]
    return [
        Sample(
            tokens=(*prompt.tokens, *completion.tokens),
            context=len(prompt.tokens),
            policy=1.0,
            advantage=advantage,
            logp_sampler=completion.logps,
            live=keep_zero or advantage != 0,
        )
        for (prompt, completion), advantage in zip(completions, advantages, strict=True)
    ]


def scored_sample(context: Sequence[int], tokens: Sequence[int]) -> Sample:
    """A sample whose `tokens` are to be scored after `context`, not trained on."""
    return Sample(
        tokens=(*context, *tokens),
        context=len(context),
        policy=1.0,
        logp_sampler=(0.0,) * len(tokens),
    )


def pack(samples: Sequence[Sample]) -> Pack:
    """Lay the samples end to end."""
    if not samples:
        raise ValueError("samples: expected at least one, got none")
    lengths = [len(sample.tokens) for sample in samples]
    lengths_B = torch.tensor(lengths)
    starts_B = torch.tensor([0, *accumulate(lengths)])
    tokens_T = torch.tensor(list(chain.from_iterable(sample.tokens for sample in samples)))
    sequence_T = torch.repeat_interleave(torch.arange(len(samples)), lengths_B)
    positions_T = torch.arange(len(tokens_T)) - starts_B[sequence_T]
    context_T = torch.tensor([sample.context for sample in samples])[sequence_T]
    counted_T = (positions_T >= context_T - 1) & (positions_T < lengths_B[sequence_T] - 1)
    return Pack(
        tokens_T=tokens_T,
        cu_seqlens=starts_B.to(torch.int32),
        **_streams(samples, tokens_T.roll(-1), sequence_T, counted_T),
    )


def pack_units(units: Sequence[Sequence[Sample]]) -> Pack:
    """Lay units end to end, the context of each once; every sample has a token after it."""
    if not units:
        raise ValueError("units: expected at least one, got none")
    groups = [
        (unit[0].tokens[: unit[0].context], [sample.tokens[sample.context :] for sample in unit])
        for unit in units
    ]
    tokens_T, layout = share_prefixes(groups)
    samples = list(chain.from_iterable(units))
    targets = chain.from_iterable(chain.from_iterable(rest for _, rest in groups))
    rows_B = layout.row_cu_seqlens.diff().long()
    sequence_T = torch.repeat_interleave(torch.arange(len(samples)), rows_B)
    counted_T = torch.ones_like(sequence_T, dtype=torch.bool)
    return Pack(
        tokens_T=tokens_T,
        cu_seqlens=layout.row_cu_seqlens,
        layout=layout,
        **_streams(samples, torch.tensor(list(targets)), sequence_T, counted_T),
    )


def _streams(
    samples: Sequence[Sample], next_T: Tensor, sequence_T: Tensor, counted_T: Tensor
) -> dict[str, Tensor]:
    """A pack's streams from each row's next token, its sample, and whether it counts."""

    def stream(values: list[float]) -> Tensor:
        return torch.where(counted_T, torch.tensor(values, dtype=torch.float32)[sequence_T], 0.0)

    policy_T = stream([sample.policy for sample in samples])
    cross_entropy_T = stream([sample.cross_entropy for sample in samples])
    logp_sampler_T = torch.zeros(len(next_T))
    sampled = list(chain.from_iterable(sample.logp_sampler for sample in samples if sample.policy))
    logp_sampler_T[policy_T != 0] = torch.tensor(sampled, dtype=torch.float32)
    weighted_T = (policy_T != 0) | (cross_entropy_T != 0)
    return {
        "targets_T": torch.where(weighted_T, next_T, IGNORE),
        "sequence_T": sequence_T,
        "policy_T": policy_T,
        "cross_entropy_T": cross_entropy_T,
        "advantages_T": stream([sample.advantage for sample in samples]),
        "logp_sampler_T": logp_sampler_T,
    }


def units_of(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """Samples that share a context, together where that saves enough tokens; the others alone.

    All are alone where the units together save too little. A unit of several has at most `budget`
    tokens. Samples without a token after their context have no rows and are left out.
    """
    by_context: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        if len(sample.tokens) > sample.context:
            context = tuple(sample.tokens[: sample.context])
            by_context.setdefault(context, []).append(sample)
    units = []
    for context, members in by_context.items():
        parts: list[list[Sample]] = []
        room = 0
        for sample in members:
            length = len(sample.tokens) - len(context)
            if length > room:
                parts.append([])
                room = budget - len(context)
            parts[-1].append(sample)
            room -= length
        for part in parts:
            pays = token_ratio([_lengths(part)]) >= WORTH_SHARING
            pays &= (len(part) - 1) * len(context) >= LEAST_SAVED
            units += [part] if pays else [[sample] for sample in part]
    if not units or token_ratio(map(_lengths, units)) >= WORTH_SHARING:
        return units
    return [[sample] for unit in units for sample in unit]


def _lengths(unit: Sequence[Sample]) -> tuple[int, list[int]]:
    """Tokens of the context, tokens of every sample after it."""
    context = unit[0].context
    return context, [len(sample.tokens) - context for sample in unit]


def packs_of(samples: Sequence[Sample], budget: int, share: bool = False) -> list[Pack]:
    """Packs of at most `budget` tokens; with `share`, contexts that pay for it are there once."""
    units = units_of(samples, budget) if share else [[sample] for sample in samples]
    lengths = [context + sum(rest) for context, rest in map(_lengths, units)]
    packs = []
    for content in pack_by_budget(lengths, budget):
        chosen = [units[index] for index in content]
        plain = all(len(unit) == 1 for unit in chosen)
        packs.append(pack([unit[0] for unit in chosen]) if plain else pack_units(chosen))
    return packs


def minibatch_of(samples: Sequence[Sample], budget: int, share: bool = False) -> Minibatch:
    """One optimizer step's samples in packs of at most `budget` tokens, as `packs_of` has them."""
    packs = packs_of([sample for sample in samples if sample.live], budget, share)
    idle = packs_of([sample for sample in samples if not sample.live], budget, share)
    every = [*packs, *idle]
    return Minibatch(
        packs=packs,
        idle=idle,
        counts={
            "policy_tokens": sum(int((one.policy_T != 0).sum()) for one in every),
            "policy_sequences": sum(
                sample.policy != 0 and len(sample.tokens) > sample.context for sample in samples
            ),
            "cross_entropy_tokens": sum(int((one.cross_entropy_T != 0).sum()) for one in every),
        },
    )


def minibatches_of(
    samples: Sequence[Sample],
    *,
    size: int,
    budget: int,
    generator: torch.Generator,
    share: bool = False,
) -> list[Minibatch]:
    """The samples in random order, in ceil(len / size) minibatches of even size, each once.

    `share` as `packs_of`. Which samples meet does not depend on it.
    """
    if size < 1:
        raise ValueError(f"size: expected at least 1 sample per minibatch, got {size}")
    if not samples:
        return []
    order = torch.randperm(len(samples), generator=generator)
    parts = order.tensor_split(-(-len(samples) // size))
    return [
        minibatch_of([samples[index] for index in part.tolist()], budget, share) for part in parts
    ]
