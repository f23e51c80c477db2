"""`r1 rl RECIPE --dry-run`: what a run would do and need, without weights, tokenizer or sampler."""

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import replace

from r1 import chat, long, tasks
from r1.config import Config
from r1.loss import objective_of
from r1.optim import lr_factor
from r1.rewards import Scorer
from r1.stages.session import device_of
from r1.types import Completion


def run(config: Config, gpu_gib: float | None = None) -> bool:
    """Print a table of checks of the rl stage; true when none failed.

    Args:
        gpu_gib: memory of the GPU to plan for; None takes the device the run would have.
    """
    checks: dict[str, Callable[[], str]] = {
        "settings": lambda: f"run {config.run.name} in {config.run.path}",
        "template": lambda: f"{config.chat.template}, {len(_template(config).split())} words",
        "data": lambda: tasks.build(config.task).describe(),
        "rewards": lambda: _rewards(config),
        "objective": lambda: _objective(config),
        "rollout": lambda: _rollout(config),
        "schedule": lambda: _schedule(config),
        "model": lambda: _model(config),
        "context": lambda: _context(config),
        "memory": lambda: _memory(config, gpu_gib),
    }
    failed = False
    for name, check in checks.items():
        try:
            verdict, text = "ok", check()
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            named = isinstance(error, OSError) and error.filename
            text = f"{error.filename}: {error.strerror}" if named else str(error)
            verdict, failed = "FAILED", True
        print(textwrap.indent(text, " " * 18).replace(" " * 18, f"{name:10} {verdict:7}", 1))
    return not failed


def _template(config: Config) -> str:
    return chat.load_template(config.chat.template)


def _objective(config: Config) -> str:
    """The preset, and the fields that are set."""
    fields = json.loads(objective_of(config.rl.objective).spec)
    kept = (f"{name} {value}" for name, value in fields.items() if value)
    return f"{config.rl.objective.preset}: {', '.join(kept)}"


def _rewards(config: Config) -> str:
    """The rewards' own verdicts on the gold answer of a question in the wanted format."""
    rl = config.rl
    prompt = tasks.build(config.task).prompts("train", 1)[0]
    text = f"<think>so</think><answer>{prompt.answer}</answer>"
    with Scorer(rl.rewards, workers=rl.reward_workers, timeout=rl.reward_timeout) as scorer:
        score = scorer.score(prompt, Completion((0,), (0.0,), "stop", 0, text))
    if score.failed or not score.valid:
        raise ValueError(f"on question {prompt.id!r}: {score.status}")
    parts = [
        f"{weight:g} x {name} {score.breakdown[name]:g}" for name, weight in rl.rewards.items()
    ]
    return f"its own answer to {prompt.id!r} earns {' + '.join(parts)} = {score.total:g}"


def _rollout(config: Config) -> str:
    rl, rollout = config.rl, config.rollout
    outputs = rl.prompts_per_step * rl.group_size
    return (
        f"{rl.prompts_per_step} questions x {rl.group_size} completions of at most "
        f"{rollout.max_tokens:,} tokens: {outputs:,} completions, "
        f"{outputs * rollout.max_tokens:,} tokens at most, by {rollout.engine}"
    )


def _schedule(config: Config) -> str:
    rl = config.rl
    outputs = rl.prompts_per_step * rl.group_size
    updates = math.ceil(outputs / (rl.minibatch_size or outputs)) * rl.epochs
    total = rl.steps * updates
    rates = [lr_factor(rl.optim, step, total) * rl.optim.lr for step in (0, total // 2, total - 1)]
    return (
        f"{rl.steps:,} rollouts x {updates} = {total:,} optimizer steps by {rl.optim.name}\n"
        f"learning rate {rates[0]:.2g} at the first, {rates[1]:.2g} half-way, "
        f"{rates[2]:.2g} at the last\n"
        f"evaluation every {rl.eval_every} rollouts, checkpoint every {rl.save_every}"
    )


def _model(config: Config) -> str:
    shape = long.shape_of(config)
    return (
        f"{shape.params / 1e9:.3g}e9 parameters in {config.model.dtype}: {shape.layers} layers of "
        f"{shape.hidden}, {shape.heads} heads on {shape.kv_heads}, vocabulary {shape.vocab:,}"
    )


def _context(config: Config) -> str:
    limit, wanted = long.shape_of(config).max_positions, long.sequence_tokens(config)
    text = f"prompt and completion {wanted:,} tokens, the model takes "
    if not limit:
        return f"{text}any number"
    return f"{text}{limit:,}" + (": longer completions are cut there" if wanted > limit else "")


def _memory(config: Config, gpu_gib: float | None) -> str:
    """Every mode's prediction, and the one that the run would take."""
    device = device_of(config)
    budget = long.budget(config, device, gpu_gib)
    reference = bool(objective_of(config.rl.objective).kl_coef)
    every = replace(config, long=replace(config.long, mode="auto"))
    shown = long.choose(every, long.shape_of(config), budget, reference=reference)
    lines = [
        f"{peak.device / long.GIB:9.2f} GiB"
        + (f", {peak.host / long.GIB:.2f} of the host" if peak.host else "")
        + f"  {name}"
        for name, peak in shown.peaks.items()
    ]
    choice = long.choose(config, long.shape_of(config), budget, reference=reference)
    if not choice.fits:
        raise ValueError("\n".join([f"nothing fits: {choice.mode}, {choice.why}", *lines]))
    return "\n".join([f"{choice.mode}: {choice.why}", *lines])
