"""Errors against float64 on peaked tokens with bfloat16 inputs, beside what others compute.

python -m benchmarks.exactness --json benchmarks/results/exactness.jsonl

Every token is peaked, as most tokens of a trained policy are: probabilities go from 0.02 to
1 - 1e-6. Where logits are rounded to bfloat16, such rows lose most digits. Nothing is timed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import problem as problems
from benchmarks import shapes
from benchmarks.harness import commit, machine
from benchmarks.peers import load
from benchmarks.provider import Missing
from benchmarks.providers import eager_logp, find
from benchmarks.report_text import LABELS, table

NAMES = ("native", "eager", "trl", "liger")
ERRORS = ("logp", "logp_near_one", "entropy", "dhidden", "dweight")
# Ours; and how many times the smallest error of a gradient from bfloat16 logits must be above it.
BARS = {"logp_near_one": 1e-5, "dhidden": 4e-3, "dweight": 4e-3}
TIMES_BETTER = 5


def entropies(name: str, problem: dict) -> torch.Tensor | None:
    """[T] by a provider, or None where it has none."""
    given = problem["hidden"], problem["weight"], problem["targets"]
    if name == "native":
        import r1kernels

        with r1kernels.use_backend("native"):
            return r1kernels.linear_logp(*given, entropy=True, prior=problem["logp_old"]).entropy
    if name == "eager":
        return eager_logp(problem["targets"], *given[:2], True)[1]
    if name == "trl":
        chunk = load("trl", "trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")
        apply = load("trl", "trl.kernels", "ChunkedLogProbFunction").apply
        return apply(given[0], given[1], None, given[2], 1.0, chunk, None, 1.0, ("entropy",))[1]
    return None


def measure(shape: shapes.Shape, write: Callable[[dict], None], threads: int) -> None:
    """One row for each provider."""
    torch.set_num_threads(threads)
    problem = problems.build(shape, "bfloat16", peaked_every=1)
    truth = problems.gradient_truth(problem, "forward_backward", "policy")
    common = {"commit": commit(), "machine": machine(threads)}
    for name in NAMES:
        row = {
            "op": "exactness",
            "provider": name,
            "backend": find(name).backend,
            "mode": "forward_backward",
            "shape": {"T": shape.T, "D": shape.D, "V": shape.V},
            "dtype": "bfloat16",
            "device": "cpu",
            "status": "ok",
            "reason": None,
            "samples": 0,
        } | dict.fromkeys(("ms_p50", "ms_min", "ms_p20", "ms_p80", "floor_ms", "ratio_to_floor"))
        row |= {"peak_mib": None, "rel_err_fp64": None} | common
        try:
            result = find(name).make(problem, "forward_backward")()
            with torch.no_grad():
                entropy_T = entropies(name, problem)
            errors = problems.errors(problem, "forward_backward", truth, *result)
            errors["entropy"] = (
                None
                if entropy_T is None
                else problems.relative_error(entropy_T, problem["truth_entropy"])
            )
            row["rel_err_fp64"] = {key: errors[key] for key in ERRORS}
        except Missing as reason:
            row |= {"status": "missing", "reason": str(reason)}
        write(row)


def missed(rows: list[dict]) -> list[str]:
    """Which bars our errors do not meet."""
    found = {row["provider"]: row["rel_err_fp64"] for row in rows if row["status"] == "ok"}
    ours = found.pop("native", None)
    if ours is None:
        return ["no row of ours"]
    out = [f"{key}: {ours[key]:.1e} > {bar:.0e}" for key, bar in BARS.items() if ours[key] > bar]
    for key in ("dhidden", "dweight"):
        for name, errors in found.items():
            if errors[key] is not None and ours[key] * TIMES_BETTER > errors[key]:
                out.append(f"{key}: {ours[key]:.1e} is over a fifth of {name}'s {errors[key]:.1e}")
    return out


def section(rows: list[dict]) -> str:
    """The table of the README."""
    rows = [row for row in rows if row["op"] == "exactness" and row["status"] == "ok"]
    if not rows:
        return "Exactness on peaked tokens: not measured."
    body = []
    for row in rows:
        errors = row["rel_err_fp64"]
        values = ["-" if errors[key] is None else f"{errors[key]:.1e}" for key in ERRORS]
        body.append([LABELS.get(row["provider"], row["provider"]), *values])
    shape, bars = rows[0]["shape"], missed(rows)
    header = ["", "logp", "logp near 1", "entropy", "dhidden", "dweight"]
    return "\n".join(
        [
            "**Relative error against float64 where every token is peaked** (p from 0.02 to "
            f"1 - 1e-6; T={shape['T']}, D={shape['D']}, V={shape['V']}, bfloat16 inputs, GRPO "
            f"loss, CPU; commit {rows[0]['commit']}):",
            "",
            table(header, body),
            "",
            "Bars: logp near 1 at 1e-5, gradients at 4e-3 and a fifth of those made from bfloat16 "
            "logits: " + ("all met." if not bars else "missed: " + "; ".join(bars) + "."),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exactness", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--json", type=Path, help="file of rows, one JSON object per line; replaced"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    args = parser.parse_args(argv)
    rows: list[dict] = []
    measure(shapes.CPU_QUICK if args.quick else shapes.CPU_BF16, rows.append, args.threads)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(section(rows))


if __name__ == "__main__":
    main()
