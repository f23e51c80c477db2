"""Command line of the benchmarks.

python -m benchmarks.run --suite cpu --json benchmarks/results/cpu.jsonl
python -m benchmarks.run --suite rl --json benchmarks/results/rl.jsonl
python -m benchmarks.report
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one suite. Returns 1 when a row of ours is missing or was refused."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--suite", choices=("cpu", "rl"), required=True)
    parser.add_argument(
        "--json", type=Path, help="file of rows, one JSON object per line; replaced"
    )
    parser.add_argument(
        "--providers", help="comma-separated; name, or module:attribute for one of your own"
    )
    parser.add_argument("--modes", help="cpu suite: comma-separated modes")
    parser.add_argument("--minutes", type=float, help="wall time to aim at (12 for cpu, 8 for rl)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--quick", action="store_true", help="tiny shapes: checks the benchmark, measures nothing"
    )
    args = parser.parse_args(argv)

    providers = args.providers.split(",") if args.providers else None
    if args.suite == "cpu":
        from benchmarks import cpu_suite as suite

        options = {"modes": args.modes.split(",") if args.modes else None}
    else:
        from benchmarks import rl_suite as suite

        options = {}
    minutes = args.minutes or (1.0 if args.quick else {"cpu": 12.0, "rl": 8.0}[args.suite])
    # A terminated run still ends its workers and removes its files.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    rows: list[dict] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:
        file = args.json.open("w") if args.json else None

        def write(row: dict) -> None:
            rows.append(row)
            if file:
                file.write(json.dumps(row) + "\n")
                file.flush()

        try:
            suite.run(
                folder=Path(folder),
                write=write,
                minutes=minutes,
                threads=args.threads,
                quick=args.quick,
                providers=providers,
                **options,
            )
        finally:
            if file:
                file.close()
    print(
        f"\n{len(rows)} rows in {time.monotonic() - started:.0f} s"
        + (f" -> {args.json}" if args.json else "")
    )
    for row in rows:
        print(suite.line(row))
    return int(any(suite.is_ours(row) and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
