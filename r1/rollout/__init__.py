"""Sampling engines behind one protocol."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from r1.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from r1.config import Rollout
    from r1.model import CausalLM


class Engine(Protocol):
    """What samples. Weights are those of the last `sync`, or of the start before the first one."""

    name: str

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, seeds: list[list[int]]
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions of every prompt.

        Args:
            prompts: P prompts with their tokens.
            sampling: no stop tokens given means the model's own end of sequence. A completion ends
                earlier than max_tokens when the model's context is full.
            seeds: [P][n], one private generator each: what else is in the batch changes nothing
                but rounding.

        Returns: [P][n] completions in the order of the seeds.
        Raises: ValueError for a prompt that is empty or fills the context, and for seeds that do
            not fit; before anything is sampled.
        """
        ...

    def sync(self, state_dict: dict[str, Tensor], version: int) -> None:
        """Take over weights named as by CausalLM.sync_state; completions then carry `version`."""
        ...

    def close(self) -> None:
        """Release memory. The engine cannot be used afterwards."""
        ...


def build(
    config: Rollout, lm: CausalLM, folder: str | os.PathLike[str], *, seed: int = 0
) -> Engine:
    """Start the engine that `config.engine` names, with the weights of `lm`.

    Args:
        folder: scratch folder; vLLM starts from a model folder written there.
        seed: of the engine's own generator; completions depend on their seeds alone.

    Raises: RuntimeError when vLLM is missing or does not start; it names the cause.
    """
    if config.engine == "transformers":
        from r1.rollout.transformers import TransformersEngine

        return TransformersEngine(lm, batch=config.batch)
    from r1.rollout.vllm import VllmEngine

    return VllmEngine(config, lm, folder, seed=seed)


def check_request(
    prompts: list[Prompt], sampling: Sampling, seeds: list[list[int]], max_length: int
) -> None:
    """Raise ValueError on requests that no engine can serve, naming the first of them."""
    if len(seeds) != len(prompts) or any(len(row) != sampling.n for row in seeds):
        shape = f"{len(seeds)} rows of {sorted({len(row) for row in seeds})}"
        raise ValueError(f"seeds must be [{len(prompts)}][{sampling.n}], got {shape}")
    for prompt in prompts:
        if not prompt.tokens:
            raise ValueError(f"prompt {prompt.id!r} has no tokens: render its template first")
        if len(prompt.tokens) >= max_length:
            raise ValueError(
                f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens, which leaves no room for a "
                f"completion in {max_length}"
            )


def stop_tokens(lm: CausalLM, sampling: Sampling) -> tuple[int, ...]:
    """The tokens that end a completion: the request's, else every one that the model names."""
    if sampling.stop_token_ids:
        return sampling.stop_token_ids
    named = getattr(lm.module.generation_config, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return tuple(dict.fromkeys([lm.tokenizer.eos_token_id, *named]))


def completion(
    lm: CausalLM, tokens: list[int], logps: list[float], stops: tuple[int, ...], version: int
) -> Completion:
    """A Completion with its text; it ended by itself when its last token is a stop token."""
    finish = "stop" if tokens and tokens[-1] in stops else "length"
    text = lm.tokenizer.decode(
        tokens[:-1] if finish == "stop" else tokens, skip_special_tokens=True
    )
    return Completion(tuple(tokens), tuple(logps), finish, version, text)
