"""reasoning_gym's datasets by name, and their scorers; the scorers run in workers."""

import dataclasses
import functools
import json
from typing import Any


def load() -> None:
    """Does the import, which takes seconds: a worker calls this before it has a deadline."""
    import reasoning_gym  # noqa: F401


@functools.lru_cache(maxsize=8)
def _dataset(name: str, params: str, seed: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=seed, **json.loads(params))


def dataset(name: str, params: dict[str, Any], seed: int) -> Any:
    """A dataset; lists become what its options expect by themselves."""
    return _dataset(name, json.dumps(params, sort_keys=True), seed)


def names() -> list[str]:
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def options(name: str) -> list[str]:
    from reasoning_gym.factory import DATASETS

    return [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name != "seed"]


def version() -> str:
    import reasoning_gym

    return reasoning_gym.__version__


def score(
    name: str, params: dict[str, Any], seed: int, index: int, answer: str
) -> tuple[float, str]:
    """The dataset's score of an answer, in [0, 1]: the entry is generated again, not sent."""
    source = dataset(name, params, seed)
    value = float(source.score_answer(answer=answer, entry=source[index]))
    return value, "correct" if value == 1.0 else "wrong"


def correct(
    name: str, params: dict[str, Any], seed: int, index: int, answer: str
) -> tuple[float, str]:
    """1 for a full score, else 0."""
    status = score(name, params, seed, index, answer)[1]
    return float(status == "correct"), status
