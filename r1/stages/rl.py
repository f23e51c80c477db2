"""Reinforcement learning on verifiable rewards: R1-Zero, and GRPO's family by its objective.

One step: sample -> score -> advantages -> pack -> old and reference log-probabilities -> minibatch
    updates -> sync -> log.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from r1 import batch, metrics, rollout, tasks
from r1.batch import Minibatch, Pack
from r1.config import RL, Config
from r1.data import PromptStream
from r1.loss import needs_every_sample, objective_of
from r1.rewards import Scorer
from r1.rollout import Engine, parity
from r1.stages import Result
from r1.stages.evaluation import Evaluator
from r1.stages.reference import Reference
from r1.stages.rollouts import (
    hash_seed,
    sample,
    score,
    statistics,
    warn_of_faults,
    warn_of_skips,
)
from r1.stages.session import Session
from r1.types import Group, Prompt, Sampling
from r1kernels import group_advantages

PROBE_PROMPTS = 8
# above these shares a step teaches little, and the settings are the likely cause
WARN_ABOVE = {
    "length/truncated": (
        0.5,
        "of the completions are cut at rollout.max_tokens: they earn nothing, raise it",
    ),
    "groups/zero_variance": (
        0.9,
        "of the groups have equal rewards: they teach nothing, take harder or easier prompts",
    ),
}


def run(config: Config, folder: Path) -> Result:
    """Train `config.model` until `rl.steps`; resumes from the last checkpoint of `folder`."""
    rl = config.rl
    objective = objective_of(rl.objective)
    outputs = rl.prompts_per_step * rl.group_size
    with ExitStack() as stack:
        # before the model, which takes minutes to load: mistakes in these should not
        scorer = stack.enter_context(
            Scorer(rl.rewards, workers=rl.reward_workers, timeout=rl.reward_timeout)
        )
        task = tasks.build(config.task)
        session = Session(
            config,
            folder,
            total=rl.steps,
            optim=rl.optim,
            updates=rl.steps * rl.epochs * math.ceil(outputs / (rl.minibatch_size or outputs)),
            objective=objective,
            temperature=config.rollout.temperature,
            max_skips=rl.max_nonfinite_skips,
        )
        timer = session.timer
        log = stack.enter_context(session.log)
        log.say(task.describe())
        evaluator = stack.enter_context(Evaluator(config, task, "select", session.tokenize, log))
        stream = PromptStream([task], seed=config.run.seed)
        reference = Reference(session, rl.ref_refresh_every) if objective.kl_coef else None
        log.say(f"starting sampler {config.rollout.engine}")
        engine = rollout.build(
            config.rollout, session.model, folder / "engine", seed=config.run.seed
        )
        stack.callback(engine.close)
        if session.state is not None:
            stream.load_state_dict(session.state["stream"])
        session.restore_random()
        if session.checkpoint is None:
            timer.spent("startup")
            row = probe(engine, session, evaluator.prompts, 0)
            with timer("eval"):
                row |= evaluator.evaluate(engine, 0)
            log.row(0, row | metrics.memory() | timer.pop())
        else:
            timer.pop()
        warned: set[str] = set()
        for step in range(session.start + 1, rl.steps + 1):
            drawn = stream.take(rl.prompts_per_step)
            with timer("rollout"):
                prompts, too_long = session.tokenize(drawn)
                sampled = sample(engine, prompts, sampling(config), config.run.seed, step)
            with timer("reward"):
                groups, unscored, failures = score(scorer, sampled)
            row = statistics(groups, too_long + unscored, failures) | {"data/epoch": stream.epoch}
            warn_of_faults(log, f"step {step}", too_long + unscored, failures)
            with timer("pack"):
                parts = minibatches(groups, session, rl)
            # The one update of a rollout starts from the policy that sampled it, so its own forward
            # finds the old log-probabilities; several need them beforehand.
            single = rl.epochs == 1 and len(parts) == 1
            if not single:
                with timer("old_logp"):
                    parts, gaps = with_old_logp(parts, session)
            if reference is not None:
                with timer("ref_logp"):
                    parts = [reference.score(part) for part in parts]
            with timer("train"):
                row |= update(parts, session, rl)
                row |= sampler_gap(parts[0].packs, session.trainer.logps) if single else gaps
            if reference is not None:
                row["policy/reference_age"] = reference.maybe_refresh()
            with timer("sync"):
                engine.sync(session.model.sync_state(), version=step)
            if config.rollout.parity_every and step % config.rollout.parity_every == 0:
                with timer("parity"):
                    row |= probe(engine, session, prompts or evaluator.prompts, step)
            if session.due(step, rl.eval_every):
                with timer("eval"):
                    row |= evaluator.evaluate(engine, step)
            elif groups:
                log.samples(step, groups, kind="train", rows=1)
            row |= metrics.memory() | timer.pop()
            log.row(step, row | speeds(row))
            warn_of_skips(log, step, row)
            for name, (limit, text) in WARN_ABOVE.items():
                if row.get(name, 0) > limit and name not in warned:
                    warned.add(name)
                    log.warn(f"step {step}: {row[name]:.0%} {text}")
            if session.due(step, rl.save_every):
                with timer("save"):
                    state = {
                        "stream": stream.state_dict(),
                        **(reference.state_dict() if reference else {}),
                    }
                    session.save(step, state, reference and reference.save)
    return Result("rl", folder, rl.steps, session.checkpoint)


def sampling(config: Config) -> Sampling:
    return Sampling(
        n=config.rl.group_size,
        max_tokens=config.rollout.max_tokens,
        temperature=config.rollout.temperature,
    )


def minibatches(groups: Sequence[Group], session: Session, rl: RL) -> list[Minibatch]:
    """Advantages inside each group, then one shuffle of all outputs into minibatches of packs."""
    if not groups:
        return []
    rewards = torch.tensor(
        [reward for group in groups for reward in group.rewards], dtype=torch.float64
    )
    sizes = torch.tensor([len(group.rewards) for group in groups])
    ids = torch.repeat_interleave(torch.arange(len(groups)), sizes)
    advantages = group_advantages(rewards, ids, normalize=rl.normalize, ddof=rl.advantage_ddof)
    samples = batch.samples_of(
        groups, advantages.tolist(), keep_zero=needs_every_sample(session.trainer.objective)
    )
    if rl.truncated == "mask":
        finishes = [completion.finish for group in groups for completion in group.completions]
        samples = [one for one, finish in zip(samples, finishes, strict=True) if finish == "stop"]
    return batch.minibatches_of(
        samples,
        size=rl.minibatch_size or rl.prompts_per_step * rl.group_size,
        budget=rl.micro_batch_tokens,
        generator=session.generators["minibatches"],
        share=rl.share_prefix == "auto" and session.model.shares_prefixes,
    )


def with_old_logp(
    parts: Sequence[Minibatch], session: Session
) -> tuple[list[Minibatch], dict[str, float]]:
    """Log-probabilities before the update, on the packs trained on; entropy and sampler gap."""
    packs = [pack for part in parts for pack in (*part.packs, *part.idle)]
    if not packs:
        return list(parts), {}
    scores = session.trainer.score(packs)
    entropy = torch.cat(
        [one.entropy_T[pack.policy_T != 0] for one, pack in zip(scores, packs, strict=True)]
    )
    row = sampler_gap(packs, [one.logp_T for one in scores])
    row["policy/entropy"] = float(entropy.mean())
    found = iter(scores)
    scored = []
    for part in parts:
        live = [pack.with_logp(old=next(found).logp_T) for pack in part.packs]
        idle = [pack.with_logp(old=next(found).logp_T) for pack in part.idle]
        scored.append(Minibatch(packs=live, idle=idle, counts=part.counts))
    return scored, row


def sampler_gap(packs: Sequence[Pack], logps: Sequence[torch.Tensor | None]) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's."""
    pairs = [
        (logp_T.cpu()[pack.policy_T != 0], pack.logp_sampler_T[pack.policy_T != 0])
        for pack, logp_T in zip(packs, logps, strict=True)
        if logp_T is not None
    ]
    if not pairs:
        return {}
    gaps = parity.gap_statistics(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    return {
        f"sampler/gap_{name}" if name in ("mean", "max") else f"sampler/{name}": gap
        for name, gap in gaps.items()
    }


def update(parts: Sequence[Minibatch], session: Session, rl: RL) -> dict[str, float]:
    """One optimizer step per minibatch and epoch; means over the tokens trained on."""
    sums: dict[str, float] = {}
    steps = 0
    for epoch in range(rl.epochs):
        order = (
            torch.randperm(len(parts), generator=session.generators["minibatches"])
            if epoch
            else range(len(parts))
        )
        for index in order:
            for name, value in session.trainer.step(parts[index]).items():
                sums[name] = sums.get(name, 0.0) + value
            steps += 1
    row = {"train/updates": session.trainer.updates, "train/skipped": sums.get("skipped", 0.0)}
    if not steps:
        return row
    tokens = sums.get("tokens", 0.0)
    row |= {
        "train/loss": sums["loss"] / steps,
        "train/grad_norm": sums["grad_norm"] / steps,
        "train/lr": sums["lr"] / steps,
        "train/tokens": tokens,
    }
    if not tokens:
        return row
    names = {
        "ratio": "policy/ratio",
        "kl": "policy/kl",
        "clip_low": "policy/clip_low_fraction",
        "clip_high": "policy/clip_high_fraction",
        "clip_max": "policy/clip_max_fraction",
        "clamped": "policy/clamped_fraction",
        "active": "policy/active_fraction",
        "entropy": "policy/entropy",
        "sampler_capped": "sampler/capped_fraction",
    }
    row |= {key: sums.get(name, 0.0) / tokens for name, key in names.items()}
    row["policy/clip_fraction"] = row["policy/clip_low_fraction"] + row["policy/clip_high_fraction"]
    if not session.trainer.objective.kl_coef:
        del row["policy/kl"]
    return row


def probe(
    engine: Engine, session: Session, prompts: Sequence[Prompt], step: int
) -> dict[str, float]:
    """Sampler against trainer on a few tokens; raises SamplerMismatch when they part."""

    def trainer_logps(contexts, completions):
        samples = [batch.scored_sample(*pair) for pair in zip(contexts, completions, strict=True)]
        pack = batch.pack(samples)
        logp_T = session.trainer.score([pack])[0].logp_T[pack.policy_T != 0]
        return logp_T.split([len(tokens) for tokens in completions])

    rollouts = session.config.rollout
    found = parity.probe(
        engine,
        trainer_logps,
        list(prompts[:PROBE_PROMPTS]),
        temperature=rollouts.temperature,
        max_tokens=min(8, rollouts.max_tokens),
        tolerance=rollouts.parity_tolerance,
        seed=hash_seed(session.config.run.seed, "probe", step) // 2,
    )
    return {"parity/mean": found.mean, "parity/max": found.max, "parity/tokens": found.tokens}


def speeds(row: dict[str, float]) -> dict[str, float]:
    tokens = row.get("length/sum", 0)
    return {
        "speed/tokens_per_second": tokens / row["time/step"],
        "speed/sampled_per_second": tokens / max(row["time/rollout"], 1e-9),
    }
