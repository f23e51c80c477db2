"""The loss part of a training step with a library's own functions and with ours in their place.

Each side is a process of its own and they take turns, so a peak of memory is that of one side. A
patched side counts only if its loss and gradient are the original's.
"""

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu_suite import percentile
from benchmarks.harness import (
    MIB,
    Worker,
    WorkerError,
    commit,
    machine,
    reset_peak,
    serve,
    status_mib,
)
from benchmarks.report_text import number, table

CASES = {
    "trl": "TRL: `GRPOTrainer`'s loss and its backward, transformers backbone included",
    "trl_frozen": "the same, head not trained (LoRA below it)",
    "trl_logits": "TRL: `selective_log_softmax_and_entropy` of logits, forward and backward",
    "liger": "Liger: `LigerFusedLinearGRPOLoss`, forward and backward",
    "transformers": "transformers: log-probabilities of a model by its logits and by `return_logp`",
}
SIDES = ("original", "patched")
LIBRARIES = {"trl_frozen": "trl", "trl_logits": "trl"}
# sequences, prompt, completion, width, vocabulary
SHAPE = {"B": 4, "P": 64, "S": 128, "D": 256, "V": 32768}
QUICK = {"B": 2, "P": 3, "S": 5, "D": 16, "V": 97}
START_TIMEOUT = 240.0
STEP_TIMEOUT = 120.0
MAX_ROUNDS = 20
AGREE = 1e-4
# Fields that rows of all suites have and these do not fill.
EMPTY = dict.fromkeys(
    [
        "backend",
        "floor_ms",
        "ratio_to_floor",
        "rel_err_fp64",
        "ratio_to_original",
        "peak_mib",
        "ms_p50",
        "ms_min",
        "ms_p20",
        "ms_p80",
    ]
)


def is_ours(row: dict) -> bool:
    """Whether a row is a patched side's."""
    return row["provider"] == "patched"


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int = 2,
    quick: bool = False,
    providers: list[str] | None = None,
    modes: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Every case for its share of the time, original and patched in turns; rows go to `write`.

    `quick` uses a tiny shape and one round. `providers` names sides, `modes` cases.
    """
    for given, known, what in ((providers, SIDES, "provider"), (modes, CASES, "mode")):
        for name in given or ():
            if name not in known:
                raise ValueError(f"no {what} {name!r}; there are {', '.join(known)}")
    cases, shape = modes or list(CASES), QUICK if quick else SHAPE
    common = {"commit": commit(), "machine": machine(threads)}
    for case in cases:
        end = time.monotonic() + minutes * 60 / len(cases)
        workers, steps, reasons = {}, {}, {}
        try:
            for side in providers or SIDES:
                log = folder / f"{case}_{side}.log"
                args = [case, side, *map(str, shape.values())]
                workers[side] = Worker("benchmarks.dropin_suite", args, threads, log)
                steps[side] = []
            for index in range(2 if quick else MAX_ROUNDS):
                if index > 3 and time.monotonic() > end:
                    break
                for side, worker in workers.items():
                    if side in reasons:
                        continue
                    try:
                        step = worker.ask({"do": "step"}, STEP_TIMEOUT if index else START_TIMEOUT)
                    except WorkerError as error:
                        reasons[side] = str(error)
                        continue
                    # The first step imports and warms up.
                    steps[side] += [step] if index else []
                    say(f"{case:12} {side:8} {step['ms']:8.0f} ms")
        finally:
            for worker in workers.values():
                worker.close()
        for side in workers:
            row = {"op": "dropin", "mode": case, "provider": side, "dtype": "float32"}
            row |= {"device": "cpu", "shape": shape, "status": "ok", "reason": None, **common}
            write({**EMPTY, "samples": 0, **row, **outcome(side, steps, reasons)})


def outcome(side: str, steps: dict[str, list[dict]], reasons: dict[str, str]) -> dict:
    """What one side took, or why it does not count."""
    if side in reasons:
        return {"status": "missing", "reason": reasons[side]}
    mine, theirs = steps[side], steps.get("original") or None
    if side == "patched" and theirs:
        for name in ("loss", "norm"):
            a, b = mine[0][name], theirs[0][name]
            if not math.isclose(a, b, rel_tol=AGREE, abs_tol=1e-7):
                return {"status": "refused", "reason": f"{name} {a:.7g}, the original's {b:.7g}"}
    ms = [step["ms"] for step in mine]
    ratio = statistics.median(s["ms"] for s in theirs) if theirs else None
    return {
        "ms_p50": statistics.median(ms),
        "ms_min": min(ms),
        "ms_p20": percentile(ms, 0.2),
        "ms_p80": percentile(ms, 0.8),
        "samples": len(ms),
        "ratio_to_original": statistics.median(ms) / ratio if ratio else None,
        "peak_mib": max(step["peak_mib"] for step in mine),
        "loss": mine[0]["loss"],
        "norm": mine[0]["norm"],
    }


def summary(rows: list[dict]) -> str:
    """Every row, a line each."""
    return "\n".join(line(row) for row in rows)


def line(row: dict) -> str:
    """One row for a person."""
    head = f"{row['mode']:12} {row['provider']:8}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    ratio = f" ({row['ratio_to_original']:.2f}x)" if row["ratio_to_original"] else ""
    return f"{head} {row['ms_p50']:8.0f} ms{ratio}, peak {row['peak_mib']:6.0f} MiB above inputs"


def section(rows: list[dict]) -> str:
    """The table of the README: which side is the faster and which the smaller one."""
    rows = [row for row in rows if row["op"] == "dropin"]
    if not rows:
        return "Libraries with and without a patch: not measured."
    found = {(row["mode"], row["provider"]): row for row in rows}
    body = []
    for case, what in CASES.items():
        sides = [found.get((case, side)) for side in SIDES]
        if not all(row and row["status"] == "ok" for row in sides):
            why = [row["reason"] for row in sides if row and row["status"] != "ok"]
            body.append([what, *["-"] * 4, "; ".join(why) or "not run"])
            continue
        times = [number(row["ms_p50"], 4) for row in sides]
        peaks = [f"{row['peak_mib']:,.0f}" for row in sides]
        body.append([what, *times, f"{sides[1]['ratio_to_original']:.2f}", *peaks])
    shape, of = rows[0]["shape"], rows[0]["machine"]
    header = ["", "original, ms", "patched, ms", "ratio", "original, MiB", "patched, MiB"]
    return "\n".join(
        [
            "**The same code before and after `r1kernels.patch`**, on a CPU: "
            f"{shape['B']} sequences of {shape['P']} + {shape['S']} positions, D={shape['D']}, "
            f"V={shape['V']}, float32; peaks are above inputs and gradients; the two take turns, "
            "and a patched side is refused unless its loss and gradient norm are the original's "
            f"to {AGREE:g}. {of['cpu']}, {of['threads']} threads; commit {rows[0]['commit']}.",
            "",
            table(header, body),
        ]
    )


class _Side:
    """One case on one side: `step` runs it and says its time, peak memory, loss and gradient."""

    def __init__(self, case: str, side: str, shape: dict):
        self.case, self.side, self.shape = case, side, shape
        self.compute: Callable | None = None

    def step(self) -> dict:
        import torch

        if not self.compute:
            torch.manual_seed(0)
            self.compute = getattr(self, f"_{LIBRARIES.get(self.case, self.case)}")()
        base = reset_peak()
        began = time.perf_counter()
        loss, grads = self.compute()
        ms = (time.perf_counter() - began) * 1e3
        peak = status_mib("VmHWM") - base
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        made = sum(g.numel() * g.element_size() for g in grads) / MIB
        return {
            "ms": ms,
            "peak_mib": max(0.0, peak - made),
            "loss": float(loss.detach()),
            "norm": norm,
        }

    def _patch(self, name: str) -> None:
        import r1kernels

        if self.side == "patched":
            r1kernels.patch(name)

    def _batch(self) -> tuple:
        """Prompts padded on the left, completions on the right, as a trainer has them."""
        import torch

        B, P, S, V = (self.shape[x] for x in "BPSV")
        prompt = torch.arange(P) >= torch.randint(0, P, (B, 1))
        completion = torch.arange(S) < torch.randint(S // 2, S + 1, (B, 1))
        ids = torch.randint(0, V, (B, P + S))
        return ids, prompt.long(), completion.long(), torch.randn(B)

    def _model(self):
        from transformers import Qwen2Config, Qwen2ForCausalLM

        D, V = self.shape["D"], self.shape["V"]
        sizes = {"hidden_size": D, "intermediate_size": 2 * D, "vocab_size": V}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads))

    def _trl(self) -> Callable:
        import torch
        import trl.trainer.grpo_trainer as grpo
        from trl.trainer import utils

        self._patch("trl")
        if self.case == "trl_logits":
            B, S, V = (self.shape[x] for x in "BSV")
            logits = torch.randn(B, S, V, requires_grad=True)
            index = torch.randint(0, V, (B, S))

            def of_logits() -> tuple:
                logp, entropy = utils.selective_log_softmax_and_entropy(logits, index)
                loss = logp.mean() + 0.1 * entropy.mean()
                return loss, torch.autograd.grad(loss, logits)

            return of_logits
        model, trainer = self._model(), grpo_trainer(grpo)
        trainer.model = model
        if self.case == "trl_frozen":
            model.lm_head.weight.requires_grad_(False)
        # As GRPOTrainer.__init__ does.
        grpo.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
        ids, prompt, completion, advantages = self._batch()
        P = prompt.shape[1]
        with torch.no_grad():
            labels = torch.where(torch.cat([prompt, completion], 1).bool(), ids, -100)
            old = model(ids, labels=labels, fused_lm_head=True).log_probs[:, P - 1 :]
        batch = {
            "prompt_ids": ids[:, :P],
            "prompt_mask": prompt,
            "completion_ids": ids[:, P:],
            "completion_mask": completion,
            "advantages": advantages,
            "old_per_token_logps": old + 0.1 * torch.randn_like(old),
            "num_items_in_batch": completion.sum(),
        }
        trained = [p for p in model.parameters() if p.requires_grad]

        def of_trainer() -> tuple:
            loss = trainer._compute_loss(model, batch)
            return loss, torch.autograd.grad(loss, trained)

        return of_trainer

    def _liger(self) -> Callable:
        import liger_kernel.chunked_loss as liger
        import torch

        self._patch("liger")
        ids, _, completion, advantages = self._batch()
        tokens = ids[:, : completion.shape[1]]
        hidden = torch.randn(*tokens.shape, self.shape["D"], requires_grad=True)
        weight = torch.randn(self.shape["V"], self.shape["D"]) / self.shape["D"] ** 0.5
        weight.requires_grad_()
        options = {"beta": 0.0, "use_ref_model": False, "compiled": False, "loss_type": "dapo"}
        loss_fn = liger.LigerFusedLinearGRPOLoss(**options)

        def of_liger() -> tuple:
            loss, _ = loss_fn(hidden, weight, tokens, completion, advantages)
            return loss, torch.autograd.grad(loss, [hidden, weight])

        return of_liger

    def _transformers(self) -> Callable:
        import torch

        model = self._model()
        self._patch("transformers")
        ids, prompt, completion, _ = self._batch()
        mask = torch.cat([prompt, completion], 1)
        trained = list(model.parameters())

        def of_model() -> tuple:
            if self.side == "patched":
                logp = model(ids, attention_mask=mask, return_logp=True).logp
            else:
                logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
                logp = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask[:, 1:]
            loss = -logp.sum() / mask.sum()
            return loss, torch.autograd.grad(loss, trained)

        return of_model


def grpo_trainer(grpo):
    """A GRPOTrainer with what _compute_loss reads, DAPO's loss."""
    from collections import defaultdict
    from types import SimpleNamespace

    trainer = object.__new__(grpo.GRPOTrainer)
    vars(trainer).update(
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        accelerator=SimpleNamespace(
            is_main_process=True,
            num_processes=1,
            autocast=contextlib.nullcontext,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        beta=0.0,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.28,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="dapo",
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("sizes", type=int, nargs=len(SHAPE))
    given = parser.parse_args()
    shape = dict(zip(SHAPE, given.sizes, strict=True))
    serve({"step": _Side(given.case, given.side, shape).step})
