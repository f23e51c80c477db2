"""Seconds of one RL step: r1 with each of its engines against TRL's GRPOTrainer, interleaved in one
run.

All start from the same 0.9M-parameter model and tokenizer, take 16 prompts x 8 completions of at
most 48 tokens at temperature 1, score them with the same reward, and make one optimizer step for
each rollout.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu_suite import percentile
from benchmarks.harness import Worker, WorkerError, commit, machine
from benchmarks.rl_worker import MAX_TOKENS, PROMPTS, SAMPLES

# provider -> (backend, package)
PROVIDERS = {
    "r1_vllm": ("vllm", "r1"),
    "r1_transformers": ("transformers", "r1"),
    "trl": ("transformers", "trl"),
}
START_TIMEOUT = 240.0
STEP_TIMEOUT = 300.0
WARMUP_STEPS = 2
MAX_ROUNDS = 30


def is_ours(row: dict) -> bool:
    """Whether a row is r1's."""
    return row["package"] == "r1"


def verdict(steps: list[dict]) -> str | None:
    """Why a trainer's steps do not count, or None: the right number of completions.

    Within length, and weights that move.
    """
    for step in steps:
        if step["completions"] != PROMPTS * SAMPLES:
            return f"a step sampled {step['completions']} completions, not {PROMPTS * SAMPLES}"
        if not 0 < step["longest"] <= MAX_TOKENS:
            return f"a completion has {step['longest']} tokens, not 1 to {MAX_TOKENS}"
    return None if steps[-1]["moved"] else "the weights did not move"


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int = 2,
    quick: bool = False,
    providers: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Drive the trainers in turns until the time is over; rows go to `write`.

    `quick` measures one step.
    """
    for name in providers or ():
        if name not in PROVIDERS:
            raise ValueError(f"no provider {name!r}; there are {', '.join(PROVIDERS)}")
    end = time.monotonic() + minutes * 60
    common = {"commit": commit(), "machine": machine(threads)}
    start = folder / "start"
    start.mkdir()
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    steps: dict[str, list[dict]] = {}
    try:
        maker = Worker(
            "benchmarks.rl_worker",
            ["start", str(start), str(folder)],
            threads,
            folder / "start.log",
        )
        workers["start"] = maker
        parameters = maker.ask({"do": "open"}, START_TIMEOUT)["parameters"]
        workers.pop("start").close()
        for name in providers or PROVIDERS:
            worker = Worker(
                "benchmarks.rl_worker",
                [name, str(start), str(folder / name)],
                threads,
                folder / f"{name}.log",
            )
            workers[name] = worker
            try:
                worker.ask({"do": "open"}, START_TIMEOUT)
                steps[name] = []
            except WorkerError as error:
                reasons[name] = str(error)
                workers.pop(name).close()
        rounds = WARMUP_STEPS + (1 if quick else MAX_ROUNDS)
        for index in range(rounds):
            if index > WARMUP_STEPS and time.monotonic() > end:
                break
            for name in list(steps):
                try:
                    step = workers[name].ask({"do": "step"}, STEP_TIMEOUT)
                except WorkerError as error:
                    reasons[name] = str(error)
                    del steps[name]
                    workers.pop(name).close()
                    continue
                if index >= WARMUP_STEPS:
                    steps[name].append(step)
                say(f"step {index - WARMUP_STEPS + 1:2} {name:16} {step['seconds']:6.2f} s")
    finally:
        for worker in workers.values():
            worker.close()

    trl = [step["seconds"] for step in steps.get("trl", ())]
    for name in providers or PROVIDERS:
        backend, package = PROVIDERS[name]
        row = {
            "op": "rl_step",
            "provider": name,
            "backend": backend,
            "package": package,
            "mode": "step",
            "shape": {
                "prompts": PROMPTS,
                "samples": SAMPLES,
                "max_tokens": MAX_TOKENS,
                "parameters": parameters,
            },
            "dtype": "float32",
            "device": "cpu",
            "status": "ok",
            "reason": None,
            "ms_p50": None,
            "ms_min": None,
            "ms_p20": None,
            "ms_p80": None,
            "samples": 0,
            "floor_ms": None,
            "ratio_to_floor": None,
            "ratio_to_trl": None,
            "peak_mib": None,
            "rel_err_fp64": None,
            "parts_ms": None,
            "tokens": None,
            "note": "",
        } | common
        reason = reasons.get(name) or verdict(steps[name])
        if reason:
            write(row | {"status": "missing" if name in reasons else "refused", "reason": reason})
            continue
        ms = [step["seconds"] * 1e3 for step in steps[name]]
        parts = {part for step in steps[name] for part in step["parts"]}
        parts_ms = {
            p: statistics.median(step["parts"].get(p, 0.0) * 1e3 for step in steps[name])
            for p in sorted(parts)
        }
        inside = [sum(step["parts"].values()) for step in steps[name]]
        rest = [step["seconds"] - known for step, known in zip(steps[name], inside, strict=True)]
        row |= {
            "ms_p50": statistics.median(ms),
            "ms_min": min(ms),
            "ms_p20": percentile(ms, 0.2),
            "ms_p80": percentile(ms, 0.8),
            "samples": len(ms),
            "peak_mib": max(s["peak_mib"] for s in steps[name]),
            "parts_ms": parts_ms | {"other": statistics.median(rest) * 1e3},
            "tokens": statistics.median(step["tokens"] for step in steps[name]),
        }
        if trl:
            row["ratio_to_trl"] = row["ms_p50"] / 1e3 / statistics.median(trl)
        write(row)


def summary(rows: list[dict]) -> str:
    """Every row, a line each."""
    return "\n".join(line(row) for row in rows)


def line(row: dict) -> str:
    """One row for a person."""
    if row["status"] != "ok":
        return f"{row['provider']:16} {row['status']}: {row['reason']}"
    ratio = f"{row['ratio_to_trl']:.2f} of TRL" if row["ratio_to_trl"] else ""
    parts = ", ".join(f"{name} {ms / 1e3:.2f}" for name, ms in row["parts_ms"].items())
    head = f"{row['provider']:16} {row['ms_p50'] / 1e3:6.2f} s a step {ratio}"
    return f"{head}  ({parts})  {row['tokens']:.0f} tokens"
