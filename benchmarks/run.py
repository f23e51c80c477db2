"""Command line of the benchmarks.

python -m benchmarks.run --suite cpu --json benchmarks/results/cpu.jsonl
python -m benchmarks.run --suite gpu --minutes 8 --out DIR [--full]
python -m benchmarks.run --suite rl --json benchmarks/results/rl.jsonl
python -m benchmarks.run --suite dropin
python -m benchmarks.run --suite longseq --json benchmarks/results/longseq_cpu.jsonl
python -m benchmarks.run --suite longseq --minutes 8 --out DIR
python -m benchmarks.report
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT

MINUTES = {"cpu": 12.0, "gpu": 8.0, "rl": 8.0, "dropin": 5.0, "longseq": 10.0}
THREADS = {"cpu": 2, "gpu": 4, "rl": 2, "dropin": 2, "longseq": 2}
BUILD_TIMEOUT = 240.0


def main(argv: list[str] | None = None) -> int:
    """Run one suite. Returns 1 when a row of ours failed or was refused.

    Not every backend is built for every GPU: there, a missing row is no failure.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--suite", choices=tuple(MINUTES), required=True)
    parser.add_argument(
        "--json", type=Path, help="file of rows, one JSON object per line; replaced"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the rows' file, which gets the device's name"
    )
    parser.add_argument(
        "--providers", help="comma-separated; name, or module:attribute for one of your own"
    )
    parser.add_argument("--modes", help="all suites but rl: comma-separated modes")
    parser.add_argument("--minutes", type=float, help="wall time: aimed at on a CPU, kept on a GPU")
    parser.add_argument("--threads", type=int, help="of each process (2; gpu 4)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: checks the benchmark, measures nothing"
    )
    parser.add_argument("--full", action="store_true", help="gpu suite: the whole grid of heads")
    parser.add_argument(
        "--skip", type=int, default=0, help="on a GPU: leave out the first cells or parts"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="of a GPU's plan (gpu, longseq; longseq looks for itself): cpu tries it out",
    )
    parser.add_argument("--commit", help="gpu, longseq: what the rows name where no .git is")
    args = parser.parse_args(argv)
    if args.suite == "gpu" and not (args.out or args.json):
        parser.error("--suite gpu needs --out DIR")

    minutes = args.minutes or (1.0 if args.quick else MINUTES[args.suite])
    options: dict = {"threads": args.threads or THREADS[args.suite], "quick": args.quick}
    options["providers"] = args.providers.split(",") if args.providers else None
    if args.suite != "rl":
        options["modes"] = args.modes.split(",") if args.modes else None
    started = time.monotonic()
    if args.suite == "cpu":
        from benchmarks import cpu_suite as suite
    elif args.suite == "rl":
        from benchmarks import rl_suite as suite
    elif args.suite == "dropin":
        from benchmarks import dropin_suite as suite
    elif args.suite == "longseq":
        from benchmarks import longseq_suite as suite

        options |= {"device": args.device or suite.default_device(), "skip": args.skip}
        options["commit_name"] = args.commit
    else:
        from benchmarks import gpu_suite as suite

        options |= {"full": args.full, "skip": args.skip, "device": args.device or "cuda"}
        options["commit_name"] = args.commit
        if options["device"] == "cuda":
            build_extension()
            minutes -= (time.monotonic() - started) / 60
    if args.out:
        if args.suite not in ("gpu", "longseq"):
            parser.error(f"--out is for gpu and longseq; --suite {args.suite} takes --json FILE")
        args.out.mkdir(parents=True, exist_ok=True)
        args.json = args.json or args.out / f"{suite.file_name(options['device'])}.jsonl"
    # A terminated run still ends its workers and removes its files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        file = args.json.open("w") if args.json else None

        def write(row: dict) -> None:
            rows.append(row)
            if file:
                file.write(json.dumps(row) + "\n")
                file.flush()

        try:
            suite.run(folder=Path(folder), write=write, minutes=minutes, **options)
        finally:
            if file:
                file.close()
            if args.out:
                save_logs(Path(folder), args.out / "workers.log")
    print(
        f"\n{len(rows)} rows in {time.monotonic() - started:.0f} s"
        + (f" -> {args.json}" if args.json else "")
    )
    print(suite.summary(rows))
    fine = ("ok", "missing") if options.get("device") else ("ok",)
    return int(
        any(
            row["status"] not in fine
            # cpu_suite's words for what a provider does not offer, which is no failure.
            and row["reason"] != f"no {row['mode']} mode"
            and (suite.is_ours(row) or row["op"] == "environment")
            for row in rows
        )
    )


def build_extension() -> None:
    """The C++ and CUDA extensions in place, for this Python; what cannot be built is said."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=BUILD_TIMEOUT
        )
        said = "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    except subprocess.TimeoutExpired:
        said = f"no end after {BUILD_TIMEOUT:.0f} s"
    print(f"extension: {'built' if not said else 'not built, going on without: ' + said}")


def save_logs(folder: Path, file: Path) -> None:
    """What every worker said, the end of it, in one file."""
    with file.open("w") as out:
        for log in sorted(folder.glob("*.log")):
            out.write(f"==== {log.stem}\n{log.read_text(errors='replace')[-200_000:]}\n")


if __name__ == "__main__":
    sys.exit(main())
