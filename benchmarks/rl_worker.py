"""One trainer of the rl suite in a process of its own.

Held at the start of every step until the parent says go.
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import reset_peak, status_mib

PROMPTS, SAMPLES, MAX_TOKENS = 16, 8, 48
LEARNING_RATE = 1e-4
TEMPLATE = "r1_zero"


class Turns:
    """The end of the pipe.

    `wait` closes the running step and blocks until the next one is asked for.
    """

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.parts: dict[str, float] = defaultdict(float)
        self.facts: dict[str, float] = {}
        self.started: float | None = None
        self.stack: list[float] = []
        self.open = False

    def wait(self) -> None:
        if self.started is not None:
            seconds = time.perf_counter() - self.started
            self._answer(
                {
                    "seconds": seconds,
                    "parts": dict(self.parts),
                    "peak_mib": status_mib("VmHWM"),
                    **self.facts,
                }
            )
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        assert json.loads(line)["do"] == "step"
        self.parts.clear()
        self.started = time.perf_counter()

    def ready(self, answer: dict) -> None:
        """Answer the parent's first request, made before any step."""
        json.loads(sys.stdin.readline())
        self.open = True
        reset_peak()
        self._answer(answer)

    def _answer(self, answer: dict) -> None:
        self.answers.write(json.dumps(answer) + "\n")

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the block's own time to a part of the step, without that of parts inside it."""
        start = time.perf_counter()
        self.stack.append(0.0)
        try:
            yield
        finally:
            total = time.perf_counter() - start
            self.parts[name] += total - self.stack.pop()
            if self.stack:
                self.stack[-1] += total

    def watch(self, owner: object, method: str, name: str) -> None:
        """Replace owner.method by one whose time is added to part `name`."""
        original: Callable = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args, **kwargs):
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)


def make_start(folder: Path) -> int:
    """The model that every trainer starts from, with its tokenizer.

    Returns its number of parameters.
    """
    import torch
    from transformers import Qwen2ForCausalLM

    from r1 import chat, toy
    from r1.config import Toy

    tokenizer = toy.build_tokenizer(chat.load_template(TEMPLATE))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        toy.model_config(Toy(hidden=128, layers=4, heads=4, intermediate=384), tokenizer)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def digit_share(text: str) -> float:
    """The reward of the suite: share of digits, which differs between samples of any model.

    Trained or not.
    """
    return sum(character.isdigit() for character in text) / max(1, len(text))


def questions(count: int) -> list[dict]:
    """Sums of one-digit terms with their answers."""
    import random

    from r1 import toy

    rng = random.Random(0)
    rows = []
    for _ in range(count):
        expression = toy.expression(rng, 2, 4)
        parts = expression.split(" ")
        signed = zip(["+", *parts[1::2]], parts[::2], strict=True)
        total = sum(int(term) if sign == "+" else -int(term) for sign, term in signed)
        rows.append({"question": toy.question(expression), "answer": str(total)})
    return rows


def run_trl(turns: Turns, folder: Path, out: Path) -> None:
    """TRL's GRPOTrainer with transformers generation, one optimizer step for each rollout.

    No gradient checkpointing.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from r1 import chat

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    template = chat.load_template(TEMPLATE)
    prompts = [chat.render(template, row["question"]) for row in questions(1024)]

    class Gate(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            turns.wait()

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_optimizer_step(self, args, state, control, **kwargs):
            turns.parts["train"] += time.perf_counter() - self.began

    def reward(completions, **kwargs):
        return [digit_share(text) for text in completions]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        callbacks=[Gate()],
        args=GRPOConfig(
            output_dir=str(out),
            use_cpu=True,
            bf16=False,
            seed=0,
            report_to="none",
            save_strategy="no",
            per_device_train_batch_size=PROMPTS * SAMPLES,
            num_generations=SAMPLES,
            gradient_accumulation_steps=1,
            max_completion_length=MAX_TOKENS,
            temperature=1.0,
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_steps=10_000,
            num_iterations=1,
            gradient_checkpointing=False,
            logging_steps=1,
            disable_tqdm=True,
        ),
    )
    turns.watch(trainer, "_generate_single_turn", "sample")
    turns.watch(trainer, "_calculate_rewards", "reward")
    turns.watch(trainer, "_generate_and_score_completions", "prepare")
    turns.watch(trainer, "training_step", "train")
    before = model.get_input_embeddings().weight.detach().clone()
    original = trainer._generate_and_score_completions

    def counted(inputs):
        batch = original(inputs)
        mask_BS = batch["completion_mask"]
        moved = not torch.equal(before, model.get_input_embeddings().weight)
        turns.facts = {
            "completions": len(mask_BS),
            "tokens": int(mask_BS.sum()),
            "longest": mask_BS.shape[1],
            "moved": moved,
        }
        return batch

    trainer._generate_and_score_completions = counted
    turns.ready({"package": "trl"})
    trainer.train()


def run_r1(turns: Turns, folder: Path, out: Path, engine: str) -> None:
    """The rl stage as `r1 rl` runs it, parity probe and logging included.

    No evaluation and no checkpoint inside a step.
    """
    import torch

    from r1 import config, data, metrics, rewards, rollout, stages

    out.mkdir()
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(1024)))
    rewards.register("digits", lambda prompt, completion: digit_share(completion.text))
    settings = config.from_dict(
        {
            "run": {"name": "rl", "dir": str(out), "device": "cpu", "tensorboard": False},
            "model": {"path": str(folder), "dtype": "float32"},
            "long": {"mode": "plain"},
            "task": {"name": "jsonl", "path": str(out / "questions.jsonl")},
            "chat": {"template": TEMPLATE},
            "rollout": {"engine": engine, "max_tokens": MAX_TOKENS, "temperature": 1.0},
            "eval": {"prompts": 1, "k": 1},
            "rl": {
                "steps": 10_000,
                "prompts_per_step": PROMPTS,
                "group_size": SAMPLES,
                "epochs": 1,
                "eval_every": 0,
                "save_every": 10_000,
                "rewards": {"digits": 1.0},
                "optim": {"lr": LEARNING_RATE},
                "objective": {"preset": "dapo", "clip_low": 0.2, "clip_high": 0.2},
            },
        }
    )

    timed = metrics.Timer.__call__

    @contextlib.contextmanager
    def heard(timer, name: str) -> Iterator[None]:
        with timed(timer, name), turns.part("sample" if name == "rollout" else name):
            yield

    # The stage's own timers tell the parent too, and the draw of a step's prompts waits for its
    # turn.
    metrics.Timer.__call__ = heard
    take = data.PromptStream.take

    def gated(stream, count: int):
        if not turns.open:
            turns.ready({"package": "r1"})
        turns.wait()
        return take(stream, count)

    data.PromptStream.take = gated
    build = rollout.build

    def built(rollout_config, lm, *args, **kwargs):
        sampler = build(rollout_config, lm, *args, **kwargs)
        before = lm.head_module.weight.detach().clone()
        generate = sampler.generate

        def counted(prompts, sampling, seeds):
            groups = generate(prompts, sampling, seeds)
            if len(prompts) * sampling.n != PROMPTS * SAMPLES:
                return groups
            lengths = [len(completion.tokens) for group in groups for completion in group]
            turns.facts = {
                "completions": len(lengths),
                "tokens": sum(lengths),
                "longest": max(lengths),
                "moved": not torch.equal(before, lm.head_module.weight),
            }
            return groups

        sampler.generate = counted
        return sampler

    rollout.build = built
    stages.run("rl", settings)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("provider", choices=("start", "r1_vllm", "r1_transformers", "trl"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    turns = Turns()
    if args.provider == "start":
        turns.ready({"parameters": make_start(args.folder)})
    elif args.provider == "trl":
        run_trl(turns, args.folder, args.out)
    else:
        run_r1(turns, args.folder, args.out, args.provider.removeprefix("r1_"))


if __name__ == "__main__":
    main()
