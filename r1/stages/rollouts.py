"""From prompts to scored groups, and what they say about the policy."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from r1.metrics import RunLog
from r1.rewards import Scorer
from r1.rollout import Engine
from r1.types import Completion, Group, Prompt, Sampling


class Dropped(NamedTuple):
    """A prompt that is left out of a step, and why."""

    prompt: str
    kind: str
    reason: str


class Scored(NamedTuple):
    """`failures`: by reward, the completions whose reward raised, hung or crashed: it counts 0."""

    groups: list[Group]
    dropped: list[Dropped]
    failures: dict[str, int]


def sample(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, seed: int, step: int | str
) -> list[tuple[Prompt, list[Completion]]]:
    """Completions of every prompt, each by a seed of (run seed, step, prompt id, number).

    A prompt that comes again, as the prompts of a small file do, goes on with the numbers.
    """
    if not prompts:
        return []
    drawn: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        first = drawn[prompt.id] * sampling.n
        drawn[prompt.id] += 1
        numbers = range(first, first + sampling.n)
        seeds.append([hash_seed(seed, step, prompt.id, number) for number in numbers])
    return list(zip(prompts, engine.generate(list(prompts), sampling, seeds), strict=True))


def score(scorer: Scorer, sampled: Sequence[tuple[Prompt, list[Completion]]]) -> Scored:
    """Rewarded groups. A group with a gold answer that cannot be read, or a reward that is not
    finite, is dropped whole.
    """
    scores = iter(
        scorer.score_all((prompt, one) for prompt, completions in sampled for one in completions)
    )
    groups, dropped, failures = [], [], {}
    for prompt, completions in sampled:
        found = [next(scores) for _ in completions]
        for one in found:
            for name in one.failed:
                failures[name] = failures.get(name, 0) + 1
        strange = [one for one in found if not isfinite(one.total)]
        if not all(one.valid for one in found):
            dropped.append(
                Dropped(prompt.id, "bad_gold", f"its answer {prompt.answer!r} cannot be read")
            )
        elif strange:
            dropped.append(
                Dropped(prompt.id, "bad_reward", f"a reward is not finite: {strange[0].breakdown}")
            )
        else:
            totals = [one.total for one in found]
            groups.append(Group(prompt, completions, totals, [one.breakdown for one in found]))
    return Scored(groups, dropped, failures)


def statistics(
    groups: Sequence[Group], dropped: Sequence[Dropped], failures: dict[str, int]
) -> dict[str, float]:
    """Rewards, lengths and group spread of a rollout; counts of what was left out."""
    row: dict[str, float] = {"dropped/prompts": len(dropped)}
    for one in dropped:
        row[f"dropped/{one.kind}"] = row.get(f"dropped/{one.kind}", 0) + 1
    for name, count in failures.items():
        row[f"failed/{name}"] = count
    if not groups:
        return row
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [len(completion.tokens) for group in groups for completion in group.completions]
    row |= {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "length/mean": sum(lengths) / len(lengths),
        "length/max": max(lengths),
        "length/sum": sum(lengths),
        "length/truncated": sum(
            one.finish == "length" for group in groups for one in group.completions
        )
        / len(lengths),
        "groups/zero_variance": sum(max(group.rewards) == min(group.rewards) for group in groups)
        / len(groups),
    }
    for name in groups[0].breakdown[0]:
        row[f"reward/{name}"] = sum(
            parts[name] for group in groups for parts in group.breakdown
        ) / len(rewards)
    return row


def warn_of_faults(
    log: RunLog, where: str, dropped: Sequence[Dropped], failures: dict[str, int]
) -> None:
    if dropped:
        first = f"the first, {dropped[0].prompt!r}: {dropped[0].reason}"
        log.warn(f"{where}: {len(dropped)} prompts dropped; {first}")
    for name, count in failures.items():
        log.warn(f"{where}: reward {name!r} failed on {count} completions, which count 0")


def warn_of_skips(log: RunLog, step: int, row: dict[str, float]) -> None:
    if row.get("train/skipped"):
        log.warn(
            f"step {step}: {row['train/skipped']:.0f} updates skipped, loss or gradient not finite"
        )


def hash_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from the texts of `parts`: the same in every process and machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
