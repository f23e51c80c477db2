"""Held-out accuracy of whatever an engine samples from."""

from collections import Counter
from collections.abc import Callable
from statistics import fmean

from r1 import evaluate
from r1.config import Config
from r1.metrics import RunLog
from r1.rewards import Scorer
from r1.rewards.math_text import extract
from r1.rollout import Engine
from r1.stages.rollouts import Dropped, sample, score, warn_of_faults
from r1.tasks import SplitName, Task
from r1.types import Group, Prompt, Sampling

Tokenize = Callable[[list[Prompt]], tuple[list[Prompt], list[Dropped]]]


class Evaluator:
    """The prompts of one split, sampled and scored as [eval] says; the same prompts and seeds every
    time.

    Raises: ValueError when no prompt of the split can be used.
    """

    def __init__(
        self, config: Config, task: Task, split: SplitName, tokenize: Tokenize, log: RunLog
    ):
        self.config, self.split, self.log = config, split, log
        wanted = config.eval.prompts or task.size(split)
        self.prompts, dropped = tokenize(task.prompts(split, min(wanted, task.size(split))))
        warn_of_faults(log, f"split {split!r}", dropped, {})
        if not self.prompts:
            raise ValueError(f"no prompt of split {split!r} can be used: {dropped[0].reason}")
        weights = {"accuracy": 1.0} | config.rl.rewards
        self.scorer = Scorer(
            weights, workers=config.rl.reward_workers, timeout=config.rl.reward_timeout
        )

    def evaluate(self, engine: Engine, step: int) -> dict[str, float]:
        """`eval/<figure>`: pass@1 with its interval, pass@k, cons@k and more; shows completions."""
        groups = self.sample(engine)
        rows = self.config.rl.table_rows
        self.log.samples(step, groups, kind="eval", rows=max(rows, 3), show=rows)
        return {f"eval/{name}": value for name, value in self.figures(groups).items()}

    def sample(self, engine: Engine) -> list[Group]:
        settings = self.config.eval
        sampling = Sampling(
            n=settings.k,
            max_tokens=self.config.rollout.max_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        groups: list[Group] = []
        dropped: list[Dropped] = []
        failures: Counter[str] = Counter()
        for start in range(0, len(self.prompts), settings.batch):
            part = self.prompts[start : start + settings.batch]
            found = score(
                self.scorer,
                sample(engine, part, sampling, self.config.run.seed, f"eval-{self.split}"),
            )
            groups += found.groups
            dropped += found.dropped
            failures.update(found.failures)
        warn_of_faults(self.log, "evaluation", dropped, failures)
        if not groups:
            raise ValueError(
                f"no prompt of split {self.split!r} could be scored: {dropped[0].reason}"
            )
        return groups

    def figures(self, groups: list[Group]) -> dict[str, float]:
        settings = self.config.eval
        completions = [completion for group in groups for completion in group.completions]
        figures = evaluate.summary(
            [[extract(completion.text) for completion in group.completions] for group in groups],
            [[parts["accuracy"] >= 1.0 for parts in group.breakdown] for group in groups],
            pass_at=settings.pass_at,
            bootstrap=settings.bootstrap,
            seed=self.config.run.seed,
        )
        figures["length"] = fmean(len(completion.tokens) for completion in completions)
        figures["truncated"] = fmean(completion.finish == "length" for completion in completions)
        for name in groups[0].breakdown[0]:
            figures[name] = fmean(parts[name] for group in groups for parts in group.breakdown)
        figures["prompts"] = len(groups)
        return figures

    def close(self) -> None:
        self.scorer.close()

    def __enter__(self) -> "Evaluator":
        return self

    def __exit__(self, *raised) -> None:
        self.close()
