"""Train the embedded model from scratch into a weak base: next tokens of the corpus of `r1.toy`."""

from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from r1 import batch, chat, metrics, tasks, toy
from r1.batch import Minibatch, Sample
from r1.config import Config
from r1.rollout.transformers import TransformersEngine
from r1.stages import Result
from r1.stages.evaluation import Evaluator
from r1.stages.rollouts import hash_seed, warn_of_skips
from r1.stages.session import Session

LINES = 50
CAREFUL_PROMPTS = 128


def run(config: Config, folder: Path) -> Result:
    """Train until `config.base.steps`; resumes from the last checkpoint of `folder`.

    Raises: ValueError for a model other than "toy", or a task the corpus does not teach.
    """
    base = config.base
    if config.model.path != "toy":
        raise ValueError(
            'the base stage trains the embedded model: model.path must be "toy", '
            f"got {config.model.path!r}"
        )
    task = tasks.build(config.task)
    held_out = [
        prompt.question
        for split in ("select", "eval")
        for prompt in task.prompts(split, task.size(split))
    ]
    excluded = frozenset(held_out)
    session = Session(config, folder, total=base.steps, optim=base.optim, updates=base.steps)
    render = partial(chat.render, session.template)
    careful = careful_minibatch(session, render, held_out)
    with session.log as log, Evaluator(config, task, "select", session.tokenize, log) as evaluator:
        log.say(task.describe())
        engine = TransformersEngine(session.model, batch=config.rollout.batch)
        session.restore_random()
        session.timer.spent("startup")
        for step in range(session.start, base.steps + 1):
            row = {}
            if step > session.start:
                with session.timer("corpus"):
                    part = minibatch(config, session, render, excluded, step)
                with session.timer("train"):
                    row = update(session, part)
            elif session.checkpoint is not None:
                continue
            if session.due(step, base.eval_every) or step == 0:
                with session.timer("eval"):
                    row |= {"eval/careful": careful_loss(session, careful)}
                    row |= evaluator.evaluate(engine, step)
            row |= metrics.memory() | session.timer.pop()
            row["speed/tokens_per_second"] = row.get("train/tokens", 0) / row["time/step"]
            log.row(step, row, show=step % max(1, base.steps // LINES) == 0 or "eval/pass@1" in row)
            warn_of_skips(log, step, row)
            if step and session.due(step, base.save_every):
                session.save(step, {})
        gate = careful_loss(session, careful)
        verdict = "passed" if gate <= base.gate else "NOT passed: train longer before RL"
        (log.say if gate <= base.gate else log.warn)(
            f"base gate: careful solutions cost {gate:.3f} nats net of the style, "
            f"at most {base.gate:.3f} wanted: {verdict}"
        )
    return Result("base", folder, base.steps, session.checkpoint)


def minibatch(
    config: Config,
    session: Session,
    render: Callable[[str], str],
    held_out: frozenset[str],
    step: int,
) -> Minibatch:
    """The corpus of one step, by (run seed, step) alone, so that a resumed run repeats it."""
    params = config.task.params
    examples = toy.corpus(
        session.model.tokenizer,
        render,
        exclude=held_out,
        seed=hash_seed(config.run.seed, "corpus", step),
        length=config.base.sequence_length,
        min_terms=params.get("min_terms", 2),
        max_terms=params.get("max_terms", 4),
    )
    samples = [
        Sample(tokens=example.tokens, context=example.loss.index(True), cross_entropy=1.0)
        for example in islice(examples, config.base.batch_size)
    ]
    return batch.minibatch_of(samples, config.rl.micro_batch_tokens)


def update(session: Session, part: Minibatch) -> dict[str, float]:
    out = session.trainer.step(part)
    return {
        "loss/cross_entropy": out["cross_entropy"],
        "train/grad_norm": out["grad_norm"],
        "train/lr": out["lr"],
        "train/skipped": out["skipped"],
        "train/tokens": part.counts["cross_entropy_tokens"],
    }


def careful_minibatch(
    session: Session, render: Callable[[str], str], questions: list[str]
) -> Minibatch:
    """Careful solutions of held-out questions, to be scored."""
    examples = [
        toy.careful_example(session.model.tokenizer, render, text)
        for text in questions[:CAREFUL_PROMPTS]
    ]
    cut = [example.loss.index(True) for example in examples]
    samples = [
        batch.scored_sample(example.tokens[:at], example.tokens[at:])
        for example, at in zip(examples, cut, strict=True)
    ]
    return batch.minibatch_of(samples, session.config.rl.micro_batch_tokens)


def careful_loss(session: Session, part: Minibatch) -> float:
    """Mean nats of a careful solution, less what choosing the style costs: what is unknown yet."""
    total = sum(float(score.logp_T.sum()) for score in session.trainer.score(part.packs))
    return -total / part.counts["policy_sequences"] - toy.CAREFUL_NATS
