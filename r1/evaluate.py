"""pass@1, pass@k and cons@k of sampled answers: pure functions on lists.

Everywhere `correct[p][i]` says whether sample i of prompt p is right, and `answers[p][i]` is its
final answer, None without one.
"""

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean

from r1.rewards.math_text import equal_fast, normalise

Equal = Callable[[str, str], bool]


def same_answer(left: str, right: str) -> bool:
    """Equality that needs no algebra: notation, spacing, exact numbers."""
    left, right = normalise(left), normalise(right)
    return left == right or equal_fast(left, right) is True


def pass_at_1(correct: Sequence[Sequence[bool]]) -> float:
    """The mean over prompts of the share of correct samples (DeepSeek-R1, section 3).

    Raises:
        ValueError: without prompts, or on a prompt without samples.
    """
    return fmean(_rates(correct))


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right, over all prompts.

    Raises:
        ValueError: on k < 1 or a prompt with fewer than k samples.
    """
    _rates(correct)
    return fmean(codex_pass_at_k(len(row), sum(map(bool, row)), k) for row in correct)


def codex_pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k) for c correct of n samples, as a product that cannot overflow.

    Source: Chen et al. 2021, arXiv:2107.03374, section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def majority(
    answers: Sequence[str | None], correct: Sequence[bool], equal: Equal = same_answer
) -> float:
    """Whether the most frequent answer is right; a tie gives the share of right tied classes.

    Samples that are right form one class, whatever their notation; the others are sorted by
    `equal`. None has no vote; without votes the result is 0.
    """
    if len(answers) != len(correct):
        raise ValueError(f"{len(answers)} answers, {len(correct)} verdicts")
    return _tally(classes(answers, correct, equal))


def classes(
    answers: Sequence[str | None], correct: Sequence[bool], equal: Equal = same_answer
) -> list[int | None]:
    """The class of each answer: 0 for right ones, 1, 2, ... for wrong ones, None for None."""
    heads: list[str] = []
    result: list[int | None] = []
    for answer, right in zip(answers, correct, strict=True):
        if answer is None:
            result.append(None)
            continue
        if right:
            result.append(0)
            continue
        found = next((i for i, head in enumerate(heads) if equal(head, answer)), len(heads))
        if found == len(heads):
            heads.append(answer)
        result.append(found + 1)
    return result


def cons_at_k(
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]],
    k: int,
    *,
    equal: Equal = same_answer,
    subsets: int = 100,
    seed: int = 0,
) -> float:
    """The mean over prompts of `majority` among k samples.

    A prompt with more than k samples is averaged over all its subsets of size k, or over `subsets`
    random ones when there are more.

    Raises:
        ValueError: on k < 1, a prompt with fewer than k samples, or lists of different lengths.
    """
    _rates(correct)
    if len(answers) != len(correct):
        raise ValueError(f"answers of {len(answers)} prompts, verdicts of {len(correct)}")
    generator = random.Random(seed)
    values = []
    for row, verdicts in zip(answers, correct, strict=True):
        if not 1 <= k <= len(row) or len(row) != len(verdicts):
            raise ValueError(
                f"cons@k needs 1 <= k <= samples, got k={k}, {len(row)} answers, "
                f"{len(verdicts)} verdicts"
            )
        votes = classes(row, verdicts, equal)
        draws = [votes] if k == len(votes) else _subsets(votes, k, subsets, generator)
        values.append(fmean(map(_tally, draws)))
    return fmean(values)


def bootstrap_ci(
    correct: Sequence[Sequence[bool]], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of pass@1, prompts drawn with replacement.

    Raises:
        ValueError: without prompts or samples, on resamples < 1 or a level outside (0, 1).
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(
            f"bootstrap needs resamples >= 1 and 0 < level < 1, got {resamples} and {level}"
        )
    rates = _rates(correct)
    generator = random.Random(seed)
    means = sorted(fmean(generator.choices(rates, k=len(rates))) for _ in range(resamples))
    tail = (1.0 - level) / 2
    low, high = (min(int(q * resamples), resamples - 1) for q in (tail, 1.0 - tail))
    return means[low], means[high]


def summary(
    answers: Sequence[Sequence[str | None]],
    correct: Sequence[Sequence[bool]],
    *,
    pass_at: Sequence[int],
    bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """All figures by name: pass@1 with its interval, pass@k and cons@k for each k there is."""
    samples = min(map(len, correct), default=0)
    low, high = bootstrap_ci(correct, resamples=bootstrap, seed=seed)
    figures = {"pass@1": pass_at_1(correct), "pass@1/low": low, "pass@1/high": high}
    for k in sorted(k for k in set(pass_at) if 1 < k <= samples):
        figures[f"pass@{k}"] = pass_at_k(correct, k)
        figures[f"cons@{k}"] = cons_at_k(answers, correct, k, seed=seed)
    return figures


def _rates(correct: Sequence[Sequence[bool]]) -> list[float]:
    if not correct:
        raise ValueError("there are no prompts to evaluate")
    if not all(correct):
        raise ValueError(f"prompt {[bool(row) for row in correct].index(False)} has no samples")
    return [sum(map(bool, row)) / len(row) for row in correct]


def _tally(votes: Sequence[int | None]) -> float:
    counts: dict[int, int] = {}
    for vote in votes:
        if vote is not None:
            counts[vote] = counts.get(vote, 0) + 1
    if not counts:
        return 0.0
    top = max(counts.values())
    return (counts.get(0, 0) == top) / sum(count == top for count in counts.values())


def _subsets(
    votes: Sequence[int | None], k: int, count: int, generator: random.Random
) -> list[list[int | None]]:
    if math.comb(len(votes), k) > count:
        return [generator.sample(votes, k) for _ in range(count)]
    return [list(subset) for subset in combinations(votes, k)]
