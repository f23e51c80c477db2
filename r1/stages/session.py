"""What training stages share: a model that starts or resumes, its trainer, log, checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from r1 import chat, checkpoint, kernels, long, model, rundir
from r1.config import Config, Optim, to_dict
from r1.metrics import RunLog, Timer
from r1.model import CausalLM
from r1.stages.rollouts import Dropped, hash_seed
from r1.trainer import Trainer
from r1.types import Prompt
from r1kernels import PolicyObjective


class Session:
    """A training run between `start` (the step it goes on from, 0 for a new one) and `total` steps.

    `state` is what the checkpoint kept of the stage itself, None for a new run. Random generators
    are restored by `restore_random`, which a stage calls last: starting an engine may change the
    global ones.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        *,
        total: int,
        optim: Optim,
        updates: int,
        objective: PolicyObjective | None = None,
        temperature: float = 1.0,
        max_skips: int = 10,
    ):
        self.config, self.folder, self.total = config, folder, total
        self.root = folder / "checkpoints"
        self.timer = Timer()
        self.template = chat.load_template(config.chat.template)
        self.generators = {
            "minibatches": torch.Generator().manual_seed(hash_seed(config.run.seed, "minibatches"))
        }
        warnings: list[str] = []
        checkpoint.remove_partial(self.root)
        self.checkpoint = checkpoint.newest(self.root, warnings.append)
        if config.model.dtype == "float16":
            raise ValueError(
                'model.dtype = "float16" is for evaluation: without loss scaling, which is not '
                'there yet, its gradients round to zero. Train in "bfloat16"'
            )
        if self.checkpoint is None and rundir.read_done(folder):
            raise ValueError(
                f"{folder} is a finished run whose checkpoints are gone. "
                "--restart moves it aside and starts anew"
            )
        kept = checkpoint.load_training(self.checkpoint) if self.checkpoint else None
        self.start = kept["step"] if kept else 0
        self.log = RunLog(
            folder,
            step=self.start if kept else -1,
            total=total,
            tensorboard=config.run.tensorboard,
            title=config.run.name,
        )
        for text in warnings:
            self.log.warn(text)
        checkpoint.seed_everything(config.run.seed)
        device = device_of(config)
        budget = long.budget(config, device)
        source = replace(config.model, path=str(self.checkpoint or config.model.path))
        self.log.say(f"loading model {source.path} in {source.dtype} on {device}")
        self.model = model.load(
            source,
            device=device,
            seed=config.run.seed,
            template=self.template,
        )
        self.log.say(kernels.told(self.model.kernels))
        self._choose_long(budget, reference=bool(objective and objective.kl_coef))
        self.trainer = Trainer(
            self.model,
            optim,
            updates,
            objective=objective,
            temperature=temperature,
            max_skips=max_skips,
        )
        self.state = None
        self._random = None
        if kept:
            self.trainer.load_state_dict(kept["trainer"])
            self.state, self._random = kept["stage"], kept["random"]
            self.log.say(f"resuming from {self.checkpoint}, step {self.start} of {total}")

    def _choose_long(self, budget: long.Budget, *, reference: bool) -> None:
        """Say, write down and set how the model's hidden states are computed."""
        settings, began = self.config.long, rundir.read_facts(self.folder).get("long", {})
        without: dict[str, str] = {}
        while True:
            choice = long.choose(
                self.config,
                self.model.text_config,
                budget,
                fused_layers=not self.model.kernels["Liger"].startswith("none"),
                reference=reference,
                # what a resumed run began with gives the same numbers to the last bit
                first=began.get("mode") if self.checkpoint and settings.mode == "auto" else None,
                without=without,
            )
            try:
                self.model.use(choice.mode, settings)
                break
            except ValueError as error:
                way = choice.mode.partition("+")[0]
                if settings.mode != "auto" or way != "stream":
                    raise
                without[way] = str(error)
        if choice.mode.startswith("stream") and not self.model.kernels["Liger"].startswith("none"):
            self.model.kernels["Liger"] += " in sampling alone: stream has its own"
        (self.log.say if choice.fits else self.log.warn)(
            f"long.mode {settings.mode}: {choice.mode}, {choice.why}"
        )
        facts = choice.record() | {"asked": settings.mode}
        rundir.add_facts(self.folder, long=facts, kernels=self.model.kernels)

    def restore_random(self) -> None:
        """Global and private generators as the checkpoint has them; as seeded in a new run."""
        if self._random is None:
            checkpoint.seed_everything(self.config.run.seed)
        else:
            checkpoint.set_random_state(self._random, self.generators)

    def save(self, step: int, state: Mapping, write: Callable[[Path], None] | None = None) -> Path:
        """Checkpoint `step` with the stage's own `state`; `write` may add files."""

        def everything(folder: Path) -> None:
            self.model.save(folder)
            kept = {
                "step": step,
                "trainer": self.trainer.state_dict(),
                "random": checkpoint.random_state(self.generators),
                "stage": dict(state),
            }
            checkpoint.save_training(folder, kept)
            if write is not None:
                write(folder)

        self.log.sync()
        self.checkpoint = checkpoint.save(
            self.root,
            step,
            everything,
            keep=self.config.run.keep_checkpoints,
            config=to_dict(self.config),
        )
        return self.checkpoint

    def tokenize(self, prompts: list[Prompt]) -> tuple[list[Prompt], list[Dropped]]:
        return tokenize(prompts, self.model, self.template, self.config.rollout.max_prompt_tokens)

    def due(self, step: int, every: int) -> bool:
        """Whether something done every `every` steps (0: only at the end) is due after `step`."""
        return step == self.total or (every > 0 and step % every == 0)


def tokenize(
    prompts: list[Prompt], lm: CausalLM, template: str, limit: int
) -> tuple[list[Prompt], list[Dropped]]:
    """The prompts with tokens, without those too long for `limit` or the model."""
    limit = min(limit, lm.max_length - 1)
    kept, dropped = [], []
    for prompt in prompts:
        tokens = tuple(lm.tokenizer.encode(chat.render(template, prompt.question)))
        if 0 < len(tokens) <= limit:
            kept.append(replace(prompt, tokens=tokens))
        else:
            dropped.append(
                Dropped(prompt.id, "too_long", f"{len(tokens)} tokens, 1 to {limit} fit")
            )
    return kept, dropped


def device_of(config: Config) -> torch.device:
    """Raises: ValueError when the settings ask for a GPU and there is none."""
    wanted = config.run.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError('run.device is "cuda" and torch sees no GPU')
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
