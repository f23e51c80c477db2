"""benchmarks/results/*.jsonl -> the tables of the README and PNG plots: no number in them is typed
by hand.

python -m benchmarks.report [--results DIR] [--readme FILE]
"""

import argparse
import json
import os
from pathlib import Path

from benchmarks import dropin_suite, exactness, report_cpu, report_gpu, report_longseq
from benchmarks.harness import ROOT

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
REQUIRED = (
    "op",
    "provider",
    "backend",
    "mode",
    "shape",
    "dtype",
    "device",
    "status",
    "reason",
    "ms_p50",
    "ms_min",
    "ms_p20",
    "ms_p80",
    "samples",
    "floor_ms",
    "ratio_to_floor",
    "peak_mib",
    "rel_err_fp64",
    "commit",
    "machine",
)


def load(folder: Path) -> list[dict]:
    """Every row of every file; a dry run of a GPU's plan measured nothing and is left out.

    Raises ValueError on a row that lacks a field or has a time without a passed check.
    """
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        if path.name.startswith("dry-run"):
            continue
        for number, text in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(text)
            lacking = [key for key in REQUIRED if key not in row]
            if lacking:
                raise ValueError(f"{path.name}:{number} lacks {', '.join(lacking)}")
            if row["status"] != "ok" and row["ms_p50"] is not None:
                raise ValueError(
                    f"{path.name}:{number} has a time and the status {row['status']!r}"
                )
            rows.append(row)
    return rows


def block(rows: list[dict], plots: dict[str, str]) -> str:
    """The README's section between its markers; plots maps captions to paths."""
    figures = [f"![{caption}]({path})" for caption, path in plots.items()]
    parts = [
        report_cpu.head_time(rows),
        report_cpu.head_memory(rows),
        report_cpu.head_errors(rows),
        exactness.section(rows),
        report_cpu.rl_step(rows),
        dropin_suite.section(rows),
        *report_gpu.block(rows),
        *report_longseq.block(rows),
        *figures,
    ]
    regenerate = (
        "Regenerate on a quiet machine: `python -m benchmarks.run --suite cpu --json "
        "benchmarks/results/cpu.jsonl`, "
        "`python -m benchmarks.exactness --json benchmarks/results/exactness.jsonl`, "
        "`python -m benchmarks.run --suite rl --json benchmarks/results/rl.jsonl`, "
        "`python -m benchmarks.run --suite dropin --json benchmarks/results/dropin.jsonl`, "
        "on a GPU `python -m benchmarks.run --suite gpu --minutes 8 --out benchmarks/results`; "
        "`python -m benchmarks.run --suite longseq --out benchmarks/results` on either; "
        "then `python -m benchmarks.report`."
    )
    return "\n\n".join([BEGIN, *parts, regenerate, END])


def replace_block(text: str, new: str) -> str:
    """`text` with what stands between the markers, and the markers, replaced by `new`."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"the file must hold {BEGIN} and {END} once each, in this order")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--readme",
        type=Path,
        default=ROOT / "README.md",
        help="its marked block is replaced; created if absent",
    )
    args = parser.parse_args(argv)
    rows = load(args.results)
    folder = args.readme.resolve().parent
    plots = {}
    for module in (report_cpu, report_gpu, report_longseq):
        plots |= module.plot(rows, args.results)
    figures = {caption: os.path.relpath(path.resolve(), folder) for caption, path in plots.items()}
    new = block(rows, figures)
    text = args.readme.read_text() if args.readme.exists() else f"{BEGIN}\n{END}\n"
    args.readme.write_text(replace_block(text, new))
    print(f"{len(rows)} rows -> {args.readme}")


if __name__ == "__main__":
    main()
