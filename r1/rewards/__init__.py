"""Rewards by name, and their weighted sum."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from r1.rewards.accuracy import accuracy, gym_score, settle
from r1.rewards.format import format_reward
from r1.rewards.result import BAD_GOLD, Result
from r1.rewards.workers import Call, Pool
from r1.types import Completion, Prompt

__all__ = ["BAD_GOLD", "Call", "Pool", "Result", "Score", "Scorer", "register"]

Reward = Callable[[Prompt, Completion], Result | Call | float]

_REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "format": format_reward,
    "gym_score": gym_score,
}


@dataclass(frozen=True, slots=True)
class Score:
    """The weighted sum of the rewards of one completion, each reward by name, and why.

    `valid` is false when the gold answer cannot be read: the prompt says nothing about the model
    and is to be dropped with its whole group.
    """

    total: float
    breakdown: dict[str, float]
    status: dict[str, str]

    @property
    def valid(self) -> bool:
        return BAD_GOLD not in self.status.values()

    @property
    def failed(self) -> list[str]:
        """Rewards that raised, hung or crashed: they count 0."""
        return [n for n, s in self.status.items() if s.startswith(("error", "timeout", "crashed"))]


def register(name: str, function: Reward) -> None:
    """Makes `function(prompt, completion)` available as a reward.

    It returns a number or a Result and runs in this process; what may hang returns a Call, which
    a killable worker runs. A reward named "module:function" needs no registration: workers call
    that function with (question, gold answer, completion text) and it returns a number.

    Raises:
        ValueError: when the name is taken or holds a colon.
    """
    if name in _REWARDS or ":" in name:
        raise ValueError(f"reward name {name!r} is taken or holds a colon")
    _REWARDS[name] = function


class Scorer:
    """Scores completions by weighted rewards; slow ones run in killable workers.

    Args:
        weights: reward name -> weight.
        workers: worker processes.
        timeout: seconds one completion may take in a worker; it then scores 0, status "timeout".

    Raises:
        ValueError: on an unknown reward; it names the nearest.
    """

    def __init__(
        self, weights: Mapping[str, float], *, workers: int = 2, timeout: float = 5.0
    ) -> None:
        for name in weights:
            if name not in _REWARDS and ":" not in name:
                near = difflib.get_close_matches(name, _REWARDS, n=1, cutoff=0.0)[0]
                raise ValueError(f"unknown reward {name!r}; nearest: {near!r}")
        self._weights = dict(weights)
        self._pool = Pool(workers, timeout)

    def score(self, prompt: Prompt, completion: Completion) -> Score:
        return self.score_all([(prompt, completion)])[0]

    def score_all(self, items: Iterable[tuple[Prompt, Completion]]) -> list[Score]:
        """The scores of (prompt, completion) pairs, in their order.

        A reward that raises, hangs or crashes gives 0 and the reason in `status`.

        Raises:
            WorkerStartError: when a worker cannot start or import what it is to run.
        """
        items = list(items)
        results = {name: self._results(name, items) for name in self._weights}
        scores = []
        for row in range(len(items)):
            breakdown = {name: results[name][row].value for name in self._weights}
            status = {name: results[name][row].status for name in self._weights}
            total = sum(self._weights[name] * value for name, value in breakdown.items())
            scores.append(Score(total, breakdown, status))
        return scores

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _results(self, name: str, items: Sequence[tuple[Prompt, Completion]]) -> list[Result]:
        first = [_apply(name, prompt, completion) for prompt, completion in items]
        calls = [call for call in first if isinstance(call, Call)]
        outcomes = self._pool.map(calls)
        settled = iter([settle(c, o, self._pool) for c, o in zip(calls, outcomes, strict=True)])
        return [next(settled) if isinstance(result, Call) else result for result in first]


def _apply(name: str, prompt: Prompt, completion: Completion) -> Result | Call:
    if name not in _REWARDS:
        return Call(name, (prompt.question, prompt.answer, completion.text))
    try:
        result = _REWARDS[name](prompt, completion)
        return result if isinstance(result, Result | Call) else Result(float(result))
    except Exception as error:
        # One bad reward must not end a run: it counts 0 and shows in the status.
        return Result(0.0, f"error: {type(error).__name__}: {error}"[:500])
