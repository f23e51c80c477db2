"""pass@1, pass@k and cons@k of a model on held-out prompts, with any engine."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from r1 import chat, checkpoint, kernels, metrics, model, rollout, tasks
from r1.config import Config
from r1.metrics import RunLog, Timer
from r1.stages import Result
from r1.stages.evaluation import Evaluator
from r1.stages.session import device_of, tokenize


def run(config: Config, folder: Path) -> Result:
    """Sample `config.eval.k` completions of every prompt of the split; one row of figures."""
    timer = Timer()
    template = chat.load_template(config.chat.template)
    task = tasks.build(config.task)
    checkpoint.seed_everything(config.run.seed)
    lm = model.load(config.model, device=device_of(config), seed=config.run.seed, template=template)
    rendered = partial(tokenize, lm=lm, template=template, limit=config.rollout.max_prompt_tokens)
    with ExitStack() as stack:
        log = stack.enter_context(
            RunLog(
                folder, step=-1, total=0, tensorboard=config.run.tensorboard, title=config.run.name
            )
        )
        log.say(kernels.told(lm.kernels))
        log.say(task.describe())
        evaluator = Evaluator(config, task, config.eval.split, rendered, log)
        stack.callback(evaluator.close)
        engine = rollout.build(config.rollout, lm, folder / "engine", seed=config.run.seed)
        stack.callback(engine.close)
        timer.spent("startup")
        with timer("eval"):
            figures = evaluator.evaluate(engine, 0)
        log.row(0, figures | metrics.memory() | timer.pop())
        log.say("\n".join(f"{name:24} {value:.4f}" for name, value in figures.items()))
    return Result("eval", folder, 0)
