"""Every setting of a run: frozen dataclasses, read from TOML, overridden by dotted keys."""

import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from r1 import schema
from r1.config_training import RL, Base, Long, Objective, Optim
from r1.schema import at_least, fraction, positive

__all__ = [
    "RL",
    "Base",
    "Chat",
    "Config",
    "Eval",
    "Long",
    "Model",
    "Objective",
    "Optim",
    "PipelineStage",
    "Rollout",
    "Run",
    "Split",
    "Task",
    "Toy",
    "dumps",
    "from_dict",
    "load",
    "to_dict",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    name: str
    """Name of the run; its files live in dir/name."""
    dir: str = "runs"
    """Folder that holds the runs."""
    seed: int = 0
    """Seed of everything drawn: weights, data order, sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the trainer runs; "auto" takes a GPU when there is one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; older ones are deleted."""
    tensorboard: bool = True
    """Write TensorBoard files when the package is installed."""

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or any(c in self.name for c in "/\\\0"):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")
        at_least(self, 1, "keep_checkpoints")
        at_least(self, 0, "seed")

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    hidden: int = 96
    """Hidden width."""
    layers: int = 2
    """Number of decoder layers."""
    heads: int = 3
    """Attention heads; must divide the hidden width."""
    intermediate: int = 288
    """Width of the MLP."""
    max_positions: int = 256
    """Longest sequence."""
    initializer_range: float = 0.06
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        at_least(self, 1, "hidden", "layers", "heads", "intermediate", "max_positions")
        positive(self, "initializer_range")
        if self.hidden % self.heads:
            raise ValueError(f"heads must divide hidden {self.hidden}, got {self.heads}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    path: str
    """Model folder, run directory (its newest checkpoint) or hub id, or "toy": the embedded one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the weights in forward and backward; float16 for evaluation alone."""
    kernels: Literal["auto", "none"] = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU and flash-attn on a GPU: "auto" takes what is installed."""
    trust_remote_code: bool = False
    """Let transformers run code that comes with the model."""
    toy: Toy = field(default_factory=Toy)
    """Sizes of the embedded model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    size: int
    """Number of prompts."""
    seed: int
    """Seed of the generator; files ignore it."""

    def __post_init__(self) -> None:
        at_least(self, 1, "size")
        at_least(self, 0, "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    name: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    """Where prompts come from."""
    dataset: str = "chain_sum"
    """reasoning_gym: name of the dataset."""
    params: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the dataset's own options."""
    path: str | None = None
    """jsonl: file of training prompts."""
    eval_path: str | None = None
    """jsonl: file of held-out prompts; none carves them out of `path`."""
    question_field: str = "question"
    """jsonl: key of the question."""
    answer_field: str = "answer"
    """jsonl: key of the gold answer."""
    held_out: float = 0.2
    """Share of all questions kept from training, half for selection and half for evaluation."""
    train: Split = field(default_factory=lambda: Split(size=20_000, seed=0))
    """Prompts to train on."""
    select: Split = field(default_factory=lambda: Split(size=256, seed=1))
    """Prompts to choose settings and checkpoints on."""
    eval: Split = field(default_factory=lambda: Split(size=256, seed=2))
    """Prompts to report on."""

    def __post_init__(self) -> None:
        if self.name == "jsonl" and not self.path:
            raise ValueError('path must name a file when task.name is "jsonl", got none')
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    template: str = "r1_zero"
    """A template shipped in r1/templates, or the path of a text file with one {question}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    engine: Literal["vllm", "transformers"] = "vllm"
    """What samples."""
    max_tokens: int = 4096
    """Longest completion."""
    max_prompt_tokens: int = 1024
    """Longest prompt; a longer one is dropped and counted."""
    temperature: float = 1.0
    """Sampling temperature during training; log-probabilities are taken at the same one."""
    batch: int = 256
    """transformers: sequences sampled at once."""
    gpu_memory_utilization: float = 0.4
    """vLLM on a GPU: share of its memory for weights and cache."""
    kv_cache_gib: float = 1.0
    """vLLM on a CPU: size of the key-value cache."""
    enforce_eager: bool = False
    """vLLM: no compilation and no CUDA graphs."""
    parity_every: int = 1
    """Steps between checks that sampler and trainer agree; 0 never."""
    parity_tolerance: float = 0.05
    """Mean absolute gap of log-probabilities, in nats, above which the run stops."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_tokens", "max_prompt_tokens", "batch")
        at_least(self, 0, "parity_every")
        positive(self, "temperature", "gpu_memory_utilization", "kv_cache_gib", "parity_tolerance")
        fraction(self, "gpu_memory_utilization")


@dataclass(frozen=True, slots=True, kw_only=True)
class Eval:
    split: Literal["select", "eval"] = "eval"
    """Which held-out prompts."""
    prompts: int | None = None
    """How many of them; none takes the whole split."""
    k: int = 16
    """Completions of each prompt."""
    temperature: float = 0.6
    """Sampling temperature."""
    top_p: float = 0.95
    """Nucleus of the sampling."""
    batch: int = 256
    """Prompts handed to the engine at once."""
    pass_at: tuple[int, ...] = (1, 4, 16)
    """The k of pass@k and cons@k; those above the completions sampled are left out."""
    bootstrap: int = 1000
    """Resamples of the confidence interval."""

    def __post_init__(self) -> None:
        at_least(self, 1, "prompts", "k", "batch", "bootstrap")
        at_least(self, 0, "temperature")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if any(k < 1 for k in self.pass_at):
            raise ValueError(f"pass_at must hold numbers of at least 1, got {self.pass_at}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStage:
    stage: Literal["base", "rl", "eval"]
    """Which stage runs."""
    name: str = ""
    """Name in the run's folder; empty takes the stage's."""
    overrides: tuple[str, ...] = ()
    """Settings of this stage alone, as section.key=value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    run: Run
    model: Model
    long: Long = field(default_factory=Long)
    task: Task = field(default_factory=Task)
    chat: Chat = field(default_factory=Chat)
    rollout: Rollout = field(default_factory=Rollout)
    base: Base = field(default_factory=Base)
    rl: RL = field(default_factory=RL)
    eval: Eval = field(default_factory=Eval)
    pipeline: tuple[PipelineStage, ...] = ()
    """Stages of `r1 run`, in order."""


def load(
    path: str | os.PathLike[str] | None, overrides: list[str] | tuple[str, ...] = ()
) -> Config:
    """The settings of a TOML file with `section.key=value` overrides on top.

    Args:
        path: TOML file; None starts from the defaults.
        overrides: texts such as "rl.group_size=8", parsed by the type of the field; "none" gives
            None where a field allows it, "a,b" a list.

    Raises:
        ValueError: on bad TOML, an unknown key, a wrong type, a missing required key or a refused
            value; it names the key, the file or override it came from, and the nearest valid key.
        OSError: when the file cannot be read.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{os.fspath(path)} is not valid TOML: {error}") from None
    origins = {schema.set_override(Config, raw, text): f"override {text!r}" for text in overrides}
    base = "the defaults" if path is None else os.fspath(path)

    def where(key: str) -> str:
        parents = {key[:end] for end, c in enumerate(key + ".") if c in ".["}
        return next((origin for k, origin in origins.items() if k in parents), base)

    return schema.build(Config, raw, where)


def from_dict(raw: dict[str, Any], origin: str = "the given values") -> Config:
    """The inverse of `to_dict`; raises as `load` does, naming `origin`."""
    return schema.build(Config, raw, lambda key: origin)


def to_dict(config: Config) -> dict[str, Any]:
    """All settings as JSON-ready dicts and lists."""
    return schema.to_dict(config)


def dumps(config: Config) -> str:
    """All settings, defaults included, as indented JSON: for config.json and --print-config."""
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"
