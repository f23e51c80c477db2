"""Resident memory of a training step on a CPU against the number of tokens, by provider."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.cpu_suite import verdict
from benchmarks.harness import MIB, Worker, WorkerError, available_bytes, commit, machine
from benchmarks.longseq_problem import SMALL, TINY, Case, decoder
from benchmarks.longseq_providers import PROVIDERS, find
from benchmarks.longseq_rows import empty, line, sizes, timed
from benchmarks.peers import absent

TOKENS = (4096, 8192, 16384, 32768, 65536)
QUICK_TOKENS = (192, 512)
DTYPE = "float32"
# Of the head: small, and the same at every length, so that it is no part of a slope.
WORKSPACE_MB = 16
TIMEOUT = 900.0
# Doubling the tokens makes attention, most of the work, four times as long.
SLOWER = 4.0
SPARE_BYTES = 2**30
# Cores that other processes took while a step was timed: above it the row is marked as busy.
BUSY_CORES = 0.1
# What a large block is for malloc: every tensor worth counting gets pages of its own and gives
# them back, whatever was freed before.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class CpuSuite:
    """One run: asks one process, writes rows."""

    def __init__(self, worker, folder: Path, write, say, common: dict, quick: bool, end: float):
        self.worker, self.folder, self.write, self.say = worker, folder, write, say
        self.common, self.end = common, end
        self.model, self.tokens = (TINY, QUICK_TOKENS) if quick else (SMALL, TOKENS)
        self.shape = decoder(self.model)
        self.truth = str(folder / "truth.pt")
        self.eager: dict | None = None
        self.found: dict[str, dict[int, dict]] = {}
        self.lost: set[str] = set()

    def row(self, row: dict) -> None:
        row |= {"device": "cpu", "dtype": DTYPE} | self.common
        self.write(row)
        self.say(line(row))

    def case(self, tokens: int) -> Case:
        """Few rows in a chunk, since the decoder is small."""
        return Case(
            decoder=self.model,
            layers=self.shape.layers,
            T=tokens,
            dtype=DTYPE,
            workspace_mb=WORKSPACE_MB,
            rows=8 * self.shape.hidden,
        )

    def ask(self, do: str, tokens: int, **request) -> dict:
        case = dataclasses.asdict(self.case(tokens))
        return self.worker.ask({"do": do, "case": case} | request, TIMEOUT)

    def errors(self, spec: str) -> dict:
        """Of the gradients at the shortest length, against float64."""
        return self.ask("errors", self.tokens[0], provider=spec, path=self.truth)["errors"]

    def measure(self, spec: str, tokens: int) -> None:
        """A row of one provider at one length; none where it failed at a shorter one."""
        provider = find(spec)
        if spec in self.lost:
            return
        row = empty("longseq", "train", provider, **sizes(self.model, self.shape), T=tokens)
        row |= {"eager_err_fp64": self.eager}
        row |= {"predicted_mib": provider.predict(self.case(tokens), "cpu")}
        try:
            self._check_room(spec, provider.package, tokens)
            if tokens == self.tokens[0]:
                row["rel_err_fp64"] = self.errors(spec)
                reason = verdict(row["rel_err_fp64"], self.eager, DTYPE, provider.is_ours)
                if reason:
                    self.lost.add(spec)
                    self.row(row | {"status": "refused", "reason": reason})
                    return
            answer = self.ask("turn", tokens, provider=spec, seconds=0.0)
        except WorkerError as error:
            self.lost.add(spec)
            status = "missing" if error.missing else "failed"
            self.row(row | {"status": status, "reason": str(error)})
            return
        row |= {key: answer[key] for key in ("peak_mib", "weights_mib", "others_cores")}
        row |= timed(answer["ms"], tokens) | {"busy": answer["others_cores"] > BUSY_CORES}
        self.found.setdefault(spec, {})[tokens] = row
        self.row(row)

    def _check_room(self, spec: str, package: str, tokens: int) -> None:
        """Raises WorkerError where the time or the memory that is left will not do."""
        if absent(package):
            raise WorkerError(f"{package} is not installed", True)
        before = self.found.get(spec, {}).get(tokens // 2)
        if before is None:
            return
        seconds = SLOWER * before["ms_p50"] / 1e3
        if time.monotonic() + seconds > self.end:
            raise WorkerError(f"no time left: it would take about {seconds:.0f} s", True)
        needs, free = 2 * before["peak_mib"] * MIB, available_bytes() - SPARE_BYTES
        if needs > free:
            text = f"needs about {needs / 2**30:.1f} GiB, {max(0, free) / 2**30:.1f} are free"
            raise WorkerError(text, True)

    def slope(self, spec: str) -> None:
        """A row with the bytes a token costs, where at least three lengths were measured."""
        provider, found = find(spec), self.found.get(spec, {})
        if len(found) < min(3, len(self.tokens)):
            return
        row = empty("longseq_slope", "train", provider, **sizes(self.model, self.shape))
        row |= {"bytes_per_token": fitted({T: r["peak_mib"] for T, r in found.items()})}
        predicted = {T: r["predicted_mib"] for T, r in found.items()}
        known = None not in predicted.values()
        row |= {"predicted_bytes_per_token": fitted(predicted) if known else None}
        self.row(row | {"samples": len(found)})


def fitted(mib: dict[int, float]) -> float:
    """Bytes per token: least squares of a line through the peaks."""
    return statistics.linear_regression(list(mib), [x * MIB for x in mib.values()]).slope


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int,
    quick: bool,
    providers: list[str] | None,
    commit_name: str | None,
    say: Callable[[str], None],
) -> None:
    """Every provider at every length, the shortest first; then the slopes."""
    end = time.monotonic() + 60 * minutes
    chosen = providers or [name for name, p in PROVIDERS.items() if "cpu" in p.suites]
    common = {"commit": commit_name or commit(), "machine": machine(threads)}
    arguments = ["cpu", str(threads), "--forks"]
    log = folder / "longseq.log"
    worker = Worker("benchmarks.longseq_worker", arguments, threads, log, MALLOC)
    try:
        worker.ask({"do": "hello"}, TIMEOUT)
        suite = CpuSuite(worker, folder, write, say, common, quick, end)
        suite.ask("truth", suite.tokens[0], path=suite.truth)
        suite.eager = suite.errors("plain")
        for tokens in suite.tokens:
            for spec in chosen:
                suite.measure(spec, tokens)
        for spec in chosen:
            suite.slope(spec)
    finally:
        worker.close()
