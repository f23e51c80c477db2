"""Procedural prompts from reasoning_gym, scored by their own datasets."""

from r1.config import Task as TaskConfig
from r1.data import fingerprint
from r1.tasks import (
    SPLITS,
    SplitName,
    check_range,
    nearest,
    question_key,
    split_of,
)
from r1.types import Prompt

MAX_DRAWS = 10_000
"""Draws without a new question after which a split counts as exhausted."""


class GymTask:
    """One reasoning_gym dataset.

    Questions are drawn from the split's seed and kept when their text belongs to the split. A
    held-out split holds each question once; training may meet one again. Prompts are generated
    when asked for.

    Raises:
        ValueError: on an unknown dataset or option (names the nearest) or a refused value.
    """

    def __init__(self, config: TaskConfig) -> None:
        # Imported here: it takes seconds and only this task needs it.
        from r1.tasks import gym_score

        known = gym_score.names()
        if config.dataset not in known:
            raise ValueError(
                f"task.dataset: reasoning_gym has no {config.dataset!r}; "
                f"nearest: {nearest(config.dataset, known)!r}"
            )
        options = gym_score.options(config.dataset)
        for name in config.params:
            if name == "seed":
                raise ValueError("task.params.seed: set the seed of a split, task.train.seed")
            if name not in options:
                raise ValueError(
                    f"task.params.{name}: {config.dataset} has no such option; "
                    f"nearest: {nearest(name, options)!r}"
                )
        self.name = config.dataset
        self._config = config
        self._sizes = {split: getattr(config, split).size for split in SPLITS}
        self._seeds = {split: getattr(config, split).seed for split in SPLITS}
        self._prompts: dict[SplitName, list[Prompt]] = {split: [] for split in SPLITS}
        self._next = dict.fromkeys(SPLITS, 0)
        self._seen: dict[SplitName, set[str]] = {split: set() for split in SPLITS}
        try:
            self._datasets = {
                split: gym_score.dataset(config.dataset, config.params, self._seeds[split])
                for split in SPLITS
            }
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(
                f"task.params: {config.dataset} refuses {config.params}: {error}"
            ) from error
        self.fingerprint = fingerprint(
            "reasoning_gym", gym_score.version(), config.dataset, config.params,
            self._sizes, self._seeds, config.held_out,
        )  # fmt: skip

    def size(self, split: SplitName) -> int:
        return self._sizes[split]

    def describe(self) -> str:
        return f"task {self.name}: " + ", ".join(f"{n} {s}" for s, n in self._sizes.items())

    def prompts(self, split: SplitName, n: int, start: int = 0) -> list[Prompt]:
        check_range(self.name, split, self._sizes.get(split, 0), n, start)
        while len(self._prompts[split]) < start + n:
            self._prompts[split].append(self._draw(split))
        return self._prompts[split][start : start + n]

    def _draw(self, split: SplitName) -> Prompt:
        limit = self._next[split] + MAX_DRAWS
        while self._next[split] < limit:
            index = self._next[split]
            self._next[split] += 1
            try:
                entry = self._datasets[split][index]
            except IndexError:
                break
            question = entry["question"]
            if split_of(question, self._config.held_out) != split:
                continue
            key = question_key(question)
            if split != "train":
                if key in self._seen[split]:
                    continue
                self._seen[split].add(key)
            return self._prompt(split, index, question, str(entry["answer"]))
        raise ValueError(
            f"task.{split}.size: {self.name} gave {len(self._prompts[split])} "
            f"{'' if split == 'train' else 'different '}questions for split {split!r} in "
            f"{self._next[split]} draws, {self._sizes[split]} are asked for"
        )

    def _prompt(self, split: SplitName, index: int, question: str, answer: str) -> Prompt:
        seed = self._seeds[split]
        source = {
            "dataset": self._config.dataset,
            "params": self._config.params,
            "seed": seed,
            "index": index,
        }
        return Prompt(
            f"{self.name}:{seed}:{index}", question, answer, self.name, (), {"gym": source}
        )
