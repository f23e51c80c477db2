"""JSON Lines, and the order in which prompts are drawn: seeded, weighted, resumable."""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from r1.types import Prompt


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any], str | None]]:
    """(line number, object, None) for each line that is not blank.

    A line that is not a JSON object gives (line number, {}, what is wrong with it).
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                yield number, {}, f"not JSON: {error}"
                continue
            if isinstance(row, dict):
                yield number, row, None
            else:
                yield number, {}, f"a JSON object is needed, got {type(row).__name__}"


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits of JSON-ready parts."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Source(Protocol):
    """What a stream draws from; every task is one."""

    fingerprint: str

    def size(self, split: str) -> int: ...

    def prompts(self, split: str, n: int, start: int = 0) -> list[Prompt]: ...


class PromptStream:
    """Training prompts without end, in an order that the seed fixes.

    Each task's prompts come in a new permutation every epoch. Draw number i comes from a task
    picked by weight with a generator of its own, so the stream is a function of (seed, position)
    and goes on exactly where its state says.

    Args:
        tasks: where prompts come from.
        weights: share of the draws of each task; equal when not given.
        seed: of order and mixture.

    Raises:
        ValueError: without tasks, or on weights that are not positive, one for each task.
    """

    def __init__(
        self, tasks: Sequence[Source], *, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        weights = [1.0] * len(tasks) if weights is None else list(weights)
        if not tasks or len(weights) != len(tasks) or not all(weight > 0 for weight in weights):
            raise ValueError(f"{len(tasks)} tasks need as many positive weights, got {weights}")
        self._tasks = list(tasks)
        self._weights = weights
        self._seed = seed
        self._drawn = [0] * len(tasks)
        self._orders: dict[int, tuple[int, list[int]]] = {}
        self._fingerprint = fingerprint(seed, weights, [task.fingerprint for task in tasks])

    @property
    def position(self) -> int:
        """Prompts drawn so far."""
        return sum(self._drawn)

    @property
    def epoch(self) -> float:
        """Passes over the task that is furthest."""
        sizes = [task.size("train") for task in self._tasks]
        return max(drawn / size for drawn, size in zip(self._drawn, sizes, strict=True))

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts."""
        return [self._next() for _ in range(n)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready position, with what it belongs to."""
        return {"fingerprint": self._fingerprint, "drawn": list(self._drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to a saved position.

        Raises:
            ValueError: when the state belongs to other data, weights or another seed.
        """
        if state["fingerprint"] != self._fingerprint or len(state["drawn"]) != len(self._tasks):
            raise ValueError(
                "the training data, its mixture or run.seed changed since the checkpoint "
                f"(fingerprint {state['fingerprint']} then, {self._fingerprint} now): "
                "restore them, or start a run with another run.name"
            )
        self._drawn = [int(drawn) for drawn in state["drawn"]]

    def _next(self) -> Prompt:
        source = 0
        if len(self._tasks) > 1:
            generator = random.Random(f"{self._seed}:mix:{self.position}")
            source = generator.choices(range(len(self._tasks)), self._weights)[0]
        task = self._tasks[source]
        epoch, place = divmod(self._drawn[source], task.size("train"))
        if self._orders.get(source, (-1, []))[0] != epoch:
            order = list(range(task.size("train")))
            random.Random(f"{self._seed}:order:{source}:{epoch}").shuffle(order)
            self._orders[source] = epoch, order
        self._drawn[source] += 1
        return task.prompts("train", 1, self._orders[source][1][place])[0]
