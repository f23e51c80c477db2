"""Tasks: where prompts come from, split so that no held-out question is ever trained on."""

import difflib
import hashlib
from typing import Literal, Protocol

from r1.config import Task as TaskConfig
from r1.types import Prompt

SplitName = Literal["train", "select", "eval"]
SPLITS: tuple[SplitName, ...] = ("train", "select", "eval")


class Task(Protocol):
    """Prompts of three disjoint splits; `fingerprint` changes whenever the prompts do."""

    name: str
    fingerprint: str

    def size(self, split: SplitName) -> int:
        """Number of prompts of a split."""
        ...

    def describe(self) -> str:
        """What it holds and what was left out, for the log."""
        ...

    def prompts(self, split: SplitName, n: int, start: int = 0) -> list[Prompt]:
        """Prompts start .. start + n - 1 of a split, the same at every call.

        Raises:
            ValueError: when the split does not reach that far or cannot be filled.
        """
        ...


def build(config: TaskConfig) -> Task:
    """The task a configuration names.

    Raises:
        ValueError: on an unknown dataset or option, an unreadable line, or a split without prompts.
        OSError: when a file cannot be read.
    """
    if config.name == "jsonl":
        from r1.tasks.jsonl import JsonlTask

        return JsonlTask(config)
    from r1.tasks.reasoning_gym import GymTask

    return GymTask(config)


def question_key(question: str) -> str:
    """What two spellings of one question share: the text without case and extra white space."""
    return " ".join(question.casefold().split())


def split_of(question: str, held_out: float) -> SplitName:
    """The split a question belongs to, from a hash of its text alone.

    Half of the `held_out` share is for selection, half for evaluation. Neither seeds nor the order
    of the data matter, so a question stays in its split in every run.
    """
    digest = hashlib.blake2b(question_key(question).encode(errors="surrogatepass"), digest_size=8)
    place = int.from_bytes(digest.digest(), "big") / 2**64
    if place < held_out / 2:
        return "eval"
    return "select" if place < held_out else "train"


def nearest(name: str, options: list[str]) -> str:
    return difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]


def check_range(name: str, split: str, size: int, n: int, start: int) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if n < 0 or start < 0 or start + n > size:
        raise ValueError(
            f"task {name!r}: prompts {start} to {start + n} asked of split {split!r} of {size}"
        )
