"""The plain data that passes between tasks, engines, rewards and the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question: `tokens` is the rendered template, empty until a tokenizer has seen it."""

    id: str
    question: str
    answer: str
    task: str
    tokens: tuple[int, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine samples: `n` completions a prompt, each of at most `max_tokens`."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_tokens < 1:
            raise ValueError(
                f"Sampling needs n >= 1 and max_tokens >= 1, got {self.n} and {self.max_tokens}"
            )
        if not self.temperature >= 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "Sampling needs temperature >= 0 and 0 < top_p <= 1, "
                f"got {self.temperature} and {self.top_p}"
            )


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    `tokens` include the stop token when `finish` is "stop"; `logps` are the sampler's, of every
    token, at its temperature; `version` is that of the weights that sampled it.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: Literal["stop", "length"]
    version: int
    text: str = ""

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.logps):
            raise ValueError(
                f"Completion has {len(self.tokens)} tokens and {len(self.logps)} log-probabilities"
            )


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt with their rewards; `breakdown` has each reward by name."""

    prompt: Prompt
    completions: Sequence[Completion]
    rewards: Sequence[float]
    breakdown: Sequence[dict[str, float]]

    def __post_init__(self) -> None:
        sizes = len(self.completions), len(self.rewards), len(self.breakdown)
        if len(set(sizes)) != 1:
            raise ValueError(
                f"Group of prompt {self.prompt.id!r}: completions, rewards and breakdown have "
                f"lengths {sizes}"
            )
