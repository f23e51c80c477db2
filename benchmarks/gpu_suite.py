"""The head and the logits op on a GPU: ours, its peers and the bare GEMMs, in turns.

In order: what the machine is, whether every op is right on every backend at real sizes, the rates
of copies and products, then the cells of `gpu_plan.py` while they fit the time. A provider runs in
its family's process: one that crashes or hangs loses its own row. With `device="cpu"` the same
code runs without a GPU, which measures nothing.
"""

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import gpu_plan, roofline
from benchmarks.cpu_suite import is_ours, verdict
from benchmarks.gpu_plan import Cell
from benchmarks.gpu_pool import OutOfTime, Pool
from benchmarks.gpu_rows import EMPTY_ROW, line, quantiles, summary, tdv
from benchmarks.harness import WorkerError, commit
from benchmarks.logits_op import LOGITS_PROVIDERS, PASSES
from benchmarks.meter import gpu_state
from benchmarks.peers import absent
from benchmarks.provider import Provider
from benchmarks.providers import PROVIDERS, find

__all__ = ["file_name", "is_ours", "line", "run", "summary"]

SMOKE_SHARE = 0.25
ROUNDS = 3
# Of a peer; ours and the floor get twice as much, in more rounds.
TURN_SECONDS = 0.5
# Drawing a problem, a first iteration's set-up and the errors, beside the iterations.
TURN_OVERHEAD = 0.8
COMPILE_SECONDS = 25.0
# Float64 products are this much slower than bfloat16 ones.
TRUTH_SLOWNESS = 15.0
ATTEMPTS = 2
BYTES = {"bfloat16": 2, "float32": 4}
# What the plan assumes until the products have been measured.
GUESSED_GEMM_TFLOPS = 600.0


@dataclass(slots=True)
class Found:
    """What is known of one provider in one cell."""

    times: list[float] = field(default_factory=list)
    first: dict = field(default_factory=dict)
    status: str = "missing"
    reason: str = "the run was stopped before its turn"


class Suite:
    """One run: asks the pool, writes rows."""

    def __init__(
        self, pool: Pool, folder: Path, write: Callable, say: Callable, common: dict, quick: bool
    ):
        self.pool, self.folder, self.write, self.say, self.common = pool, folder, write, say, common
        self.rounds, self.turn_seconds = (2, 0.01) if quick else (ROUNDS, TURN_SECONDS)
        self.quick = quick
        self.copy_gb_per_s: float | None = None
        self.gemm_tflops: float | None = None
        self.truths: dict[tuple, dict] = {}
        # By provider: status and reason of its last failure, and how often it came.
        self.refusals: dict[str, tuple[str, str, int]] = {}
        # Measured seconds over the plan's.
        self.slower = 1.0

    def row(self, **fields) -> None:
        row = EMPTY_ROW | fields | self.common
        self.write(row)
        self.say(line(row))

    def rates(self) -> None:
        """A row for a copy and one for each product; the first of them is the GEMM rate."""
        dtype = "float32" if self.quick else "bfloat16"
        # About as many rows as a chunk of the first cell has.
        products = gpu_plan.products(self.quick, 4864)
        request = {"do": "rates", "copy_mib": 2 if self.quick else 4096, "dtype": dtype}
        fields = {"provider": "torch", "dtype": dtype}
        try:
            found = self.pool.ask("bench", request | {"products": products})
        except WorkerError as error:
            self.row(
                op="rates", mode="rates", shape={}, status="failed", reason=str(error), **fields
            )
            return
        moved, ms = found["copy"]["bytes"], found["copy"]["ms"]
        self.copy_gb_per_s = moved / statistics.median(ms) / 1e6
        rate = {"gb_per_s": self.copy_gb_per_s}
        self.row(op="copy", mode="copy", shape={"bytes": moved}, **fields, **rate, **quantiles(ms))
        for product in found["products"]:
            M, K, N, sums = product["shape"]
            rate = {"tflops": 2e-9 * M * K * N / statistics.median(product["ms"])}
            self.gemm_tflops = self.gemm_tflops or rate["tflops"]
            mode = "added in float32" if sums else "product"
            shape = {"M": M, "K": K, "N": N}
            self.row(
                op="gemm", mode=mode, shape=shape, **fields, **rate, **quantiles(product["ms"])
            )

    def smoke(self, backends: list[str], until: float) -> None:
        """A row for every check of every backend; those that find no time say so."""
        for name, arguments in gpu_plan.smoke(self.quick):
            for backend in backends:
                fields = {"op": "smoke", "provider": backend, "backend": backend, "mode": name}
                fields |= {"dtype": arguments.get("dtype", "bfloat16"), "shape": tdv(arguments)}
                try:
                    if time.monotonic() > until:
                        raise WorkerError("no time left for it", True)
                    self.row(**fields | self._checked(name, backend, arguments))
                except WorkerError as error:
                    status = "missing" if error.missing else "failed"
                    self.row(**fields, status=status, reason=str(error))

    def _checked(self, name: str, backend: str, arguments: dict) -> dict:
        """What a check adds to its row."""
        if name not in (*gpu_plan.GPU_MODES, *PASSES):
            sent = dict(arguments)
            if "shape" in sent:
                sent["shape"] = dataclasses.asdict(sent["shape"])
            request = {"do": "check", "name": name, "backend": backend, "arguments": sent}
            return {"rel_err_fp64": self.pool.ask(backend, request)["found"]}
        kind = "logits" if name in PASSES else "head"
        cell = Cell(mode=name, kind=kind, providers=(backend,), **arguments)
        provider = providers_of(cell)[backend]
        files = self.truth(cell, {"policy"})
        answer = self.turn(cell, backend, provider, files, 0.0, check=True, poison=True)
        reason = verdict(answer["errors"], files["eager"], cell.dtype, provider.is_ours)
        return {
            "rel_err_fp64": answer["errors"],
            "eager_err_fp64": files["eager"],
            "peak_mib": answer["peak_mib"],
            "grad_mib": answer["grad_mib"],
            "status": "refused" if reason else "ok",
            "reason": reason,
        }

    def truth(self, cell: Cell, objectives: set[str]) -> dict:
        """Files with what the cell's answers are compared with, and eager's errors."""
        size = (cell.kind, *dataclasses.astuple(cell.shape), cell.dtype)
        base = self.folder / ("_".join(map(str, size)) + ".pt")
        files = self.truths.setdefault((*size, cell.mode), {"base": str(base)})
        make = [name for name in sorted(objectives) if name not in files]
        if make:
            paths = {name: str(base.with_suffix(f".{cell.mode}.{name}.pt")) for name in make}
            request = {"kind": cell.kind, "shape": dataclasses.asdict(cell.shape)}
            request |= {"dtype": cell.dtype, "mode": cell.mode}
            asked = {"base": str(base), "make": make if base.exists() else [*make, "base"]} | paths
            answer = self.pool.ask("bench", {"do": "truth", "files": asked, **request})
            files |= paths | ({"eager": answer["eager"]} if "policy" in make else {})
        return files

    def turn(
        self,
        cell: Cell,
        spec: str,
        provider: Provider,
        files: dict,
        seconds: float,
        check: bool,
        poison: bool = False,
    ) -> dict:
        request = {
            "do": "turn",
            "provider": spec,
            "kind": cell.kind,
            "shape": dataclasses.asdict(cell.shape),
            "dtype": cell.dtype,
            "mode": cell.mode,
            "files": {k: v for k, v in files.items() if k != "eager"},
            "seconds": seconds,
            "check": check,
            "poison": poison,
        }
        return self.pool.ask(provider.family, request)

    def cell(self, cell: Cell) -> bool:
        """Measure one cell and write its rows, or say that it does not fit the time."""
        providers = providers_of(cell)
        left = self.pool.deadline - time.monotonic()
        needs = self.slower * self.estimate(cell, providers)
        if needs > left:
            providers = {k: p for k, p in providers.items() if p.is_ours or p.is_floor}
            needs = self.slower * self.estimate(cell, providers)
        if needs > left:
            self.say(f"{cell.name}: skipped, needs about {needs:.0f} s of the {left:.0f} left")
            return False
        self.say(f"{cell.name}: {len(providers)} providers, about {needs:.0f} s, {left:.0f} s left")
        found = {spec: Found() for spec in providers}
        started = time.monotonic()
        files: dict = {}
        try:
            files |= self.truth(cell, {p.objective for p in providers.values() if not p.is_floor})
            self._rounds(cell, providers, found, files, started + 1.5 * needs)
        except WorkerError as error:
            self.say(f"{cell.name}: no truth to compare with: {error}")
            for one in found.values():
                one.reason = f"no truth to compare with: {error}"
        finally:
            state = self.pool_state()
            for spec, provider in providers.items():
                self._write(cell, spec, provider, found, files.get("eager"), state)
            taken = (time.monotonic() - started) / max(needs / self.slower, 1e-3)
            # Half of it: a cell may have paid for compilations that the next one does not need.
            self.slower = min(2.5, max(0.5, (self.slower + taken) / 2))
        return True

    def variants(self) -> tuple[str, ...]:
        """Our Triton GEMM kernels beside the chosen one."""
        try:
            return tuple(self.pool.ask("triton", {"do": "variants"})["providers"])
        except WorkerError as error:
            self.say(f"no variants: {error}")
            return ()

    def pool_state(self) -> dict:
        """Clocks just after a cell; nothing when there is no time left to ask."""
        try:
            return self.pool.ask("bench", {"do": "state"})
        except (WorkerError, OutOfTime):
            return {}

    def _rounds(self, cell, providers, found, files, until) -> None:
        specs = list(providers)
        for index in range(self.rounds):
            for spec in specs[index:] + specs[:index]:
                provider, one = providers[spec], found[spec]
                now = often(spec, provider) or index == self.rounds - 1
                if index and (not one.times or not now or time.monotonic() > until):
                    continue
                self._one_turn(cell, spec, provider, one, files, index == 0)

    def _one_turn(self, cell, spec, provider, one, files, check) -> None:
        seconds = self.turn_seconds * (1 + often(spec, provider))
        status, reason, times = self.refusals.get(spec, ("missing", "", 0))
        if times >= ATTEMPTS:
            one.status, one.reason = status, f"not asked again: {reason}"
            return
        if absent(provider.package):
            one.reason = f"{provider.package} is not installed"
            return
        try:
            answer = self.turn(cell, spec, provider, files, seconds, check)
        except WorkerError as error:
            one.times.clear()
            one.status = "missing" if error.missing else "failed"
            one.reason = str(error)
            # A smaller cell may fit.
            if error.missing and one.reason.startswith("out of memory"):
                return
            # A crash counts whatever it says; for the rest, the same words twice will not change.
            same = one.status == status and (status == "failed" or reason == one.reason)
            self.refusals[spec] = (one.status, one.reason, times + 1 if same else 1)
            return
        one.times += answer.pop("ms")
        one.first = one.first or answer

    def _write(self, cell, spec, provider, found, eager, state) -> None:
        floor = found.get("floor", Found()).times
        floor_ms = statistics.median(floor) if floor else None
        one = found[spec]
        row = {
            "op": "token_logp" if cell.kind == "logits" else provider.op(cell.mode),
            "provider": provider.name,
            "backend": provider.backend,
            "mode": cell.mode,
            "shape": tdv(cell),
            "dtype": cell.dtype,
            "floor_ms": floor_ms,
            "eager_err_fp64": eager,
            "gpu_state": state,
            "note": provider.note,
        }
        if not one.times:
            self.row(**row, status=one.status, reason=one.reason)
            return
        row |= {
            "peak_mib": one.first["peak_mib"],
            "grad_mib": one.first["grad_mib"],
            "rel_err_fp64": one.first["errors"],
        }
        if not provider.is_floor:
            reason = verdict(one.first["errors"], eager, cell.dtype, provider.is_ours)
            if reason:
                self.row(**row, status="refused", reason=reason)
                return
        row |= quantiles(one.times)
        if floor_ms:
            row["ratio_to_floor"] = row["ms_p50"] / floor_ms
        if cell.kind == "logits":
            moved = (
                PASSES[cell.mode] * cell.shape.T * cell.shape.V * (2 + 2 * (cell.dtype[0] == "f"))
            )
            row["gb_per_s"] = moved / row["ms_p50"] / 1e6
            if self.copy_gb_per_s:
                row["percent_of_copy"] = 100 * row["gb_per_s"] / self.copy_gb_per_s
        else:
            row["tflops"] = roofline.mode_flops(cell.shape, cell.mode) / row["ms_p50"] / 1e9
            if self.gemm_tflops:
                row["percent_of_gemm"] = 100 * row["tflops"] / self.gemm_tflops
        self.row(**row)

    def estimate(self, cell: Cell, providers: dict[str, Provider]) -> float:
        """Seconds that a cell takes if the providers are as slow as they are thought to be."""
        rate = (self.gemm_tflops or GUESSED_GEMM_TFLOPS) * 1e12
        if cell.kind == "logits":
            bytes_per_s = 1e9 * (self.copy_gb_per_s or 1000.0)
            floor = PASSES[cell.mode] * 2 * cell.shape.T * cell.shape.V / bytes_per_s
            total = 40 * floor
        else:
            floor = roofline.mode_flops(cell.shape, cell.mode) / rate
            total = TRUTH_SLOWNESS * roofline.mode_flops(cell.shape, "forward") / rate
        for spec, provider in providers.items():
            once = provider.slowness * floor
            timed = max(self.turn_seconds * (1 + often(spec, provider)), 2 * once)
            turns = self.rounds if often(spec, provider) else 2
            total += turns * (TURN_OVERHEAD + once + timed) + once
            total += COMPILE_SECONDS * provider.compiles
        return total


def often(spec: str, provider: Provider) -> bool:
    """Whether a provider has a turn in every round: what the rows' ratios are made of."""
    return provider.is_floor or spec == provider.backend


def providers_of(cell: Cell) -> dict[str, Provider]:
    """A cell's providers that have its mode, by what a worker finds them by."""

    def one(spec: str) -> Provider:
        return LOGITS_PROVIDERS[spec] if cell.kind == "logits" and ":" not in spec else find(spec)

    found = {spec: one(spec) for spec in cell.providers}
    return {spec: provider for spec, provider in found.items() if cell.mode in provider.modes}


def with_variants(cell: Cell, others: tuple[str, ...]) -> Cell:
    """The cell with those of our other products that it asks for."""
    counted = [name for name in others if name == "triton@counted"]
    kernels = [name for name in others if name != "triton@counted"]
    more = {"": [], "kernels": kernels, "counted": counted, "all": others}[cell.variants]
    more = more if "triton" in cell.providers else []
    return dataclasses.replace(cell, providers=(*cell.providers, *more))


def file_name(device: str) -> str:
    """The GPU's name as a file may be called; what stands for it without one."""
    name = gpu_state().get("name", "gpu") if device == "cuda" else "dry-run"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def chosen(cell: Cell, device: str, providers: list[str] | None) -> Cell:
    """The cell with the providers asked for and the floor; ours are those of the device."""
    ours = ("native",) if device == "cpu" else ("triton", "cuda")
    known = LOGITS_PROVIDERS if cell.kind == "logits" else PROVIDERS

    def runs(spec: str) -> bool:
        here = known.get(spec)
        return here is not None and (not here.is_ours or here.backend in ours)

    asked = ["floor", *providers] if providers else cell.providers
    specs = [spec for spec in asked if ":" in spec or runs(spec)]
    dtype = "float32" if device == "cpu" else cell.dtype
    return dataclasses.replace(cell, providers=tuple(dict.fromkeys(specs)), dtype=dtype)


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int = 4,
    quick: bool = False,
    full: bool = False,
    skip: int = 0,
    device: str = "cuda",
    commit_name: str | None = None,
    providers: list[str] | None = None,
    modes: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Run the suite; rows go to `write` as they are known, logs of the workers into `folder`."""
    started = time.monotonic()
    deadline = started + 60 * minutes - 5.0
    cells = [chosen(cell, device, providers) for cell in gpu_plan.cells(quick, full)]
    cells = [cell for cell in cells if not modes or cell.mode in modes][skip:]
    if not cells:
        raise ValueError(f"no cell is left of mode {modes or 'any'} after the first {skip}")
    backends = [
        name for name in ("native", "triton", "cuda", "reference")
        if (name == "native") <= (device == "cpu") and not (providers and name not in providers)
    ]  # fmt: skip
    pool = Pool(device, threads, folder, deadline)
    try:
        found = [p for cell in cells for p in providers_of(cell).values()]
        families = [p.family for p in found if not absent(p.package)]
        pool.start(list(dict.fromkeys(["bench", *backends, *families])))
        hello = pool.hello("bench")
        common = {
            "device": hello["device"],
            "commit": commit_name or commit(),
            "machine": hello["machine"],
        }
        suite = Suite(pool, folder, write, say, common, quick)
        suite.row(op="environment", provider="torch", mode="environment", shape={},
                  gpu_state=suite.pool_state())  # fmt: skip
        # Cells are skipped by a run that goes on where another, with its checks, ended.
        suite.smoke(
            [] if skip else backends, deadline if quick else started + SMOKE_SHARE * 60 * minutes
        )
        suite.rates()
        others = suite.variants() if any("triton" in cell.providers for cell in cells) else ()
        for cell in cells:
            suite.cell(with_variants(cell, others))
    except OutOfTime:
        say("out of time: what was measured is written")
    except WorkerError as error:
        say(f"the run cannot go on: {error}")
        common = {"device": device, "commit": commit_name or commit(), "machine": {}}
        fields = {"op": "environment", "provider": "torch", "mode": "environment", "shape": {}}
        write(EMPTY_ROW | fields | {"status": "failed", "reason": str(error)} | common)
    finally:
        pool.close()
