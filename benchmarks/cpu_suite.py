"""The linear head on a CPU: ours, its peers and the bare GEMMs, interleaved.

Each checked against float64.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import shapes
from benchmarks.harness import Worker, WorkerError, available_bytes, commit, machine
from benchmarks.problem import MODES
from benchmarks.providers import PROVIDERS, Provider, find

# A provider computes the asked function when its error is below this; ours must also pass the 2x
# rule against eager.
SAME_FUNCTION = {"float32": 1e-4, "bfloat16": 5e-2}
EPS32 = 2.0**-23
PEER_STRIDE = 3
MAX_ROUNDS = 30
STEP_TIMEOUT = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Cases that share a problem, and so the worker processes."""

    shape: shapes.Shape
    dtype: str
    modes: tuple[str, ...]
    providers: tuple[str, ...]
    share: float
    once: bool = False


def plan(quick: bool) -> list[Group]:
    """The groups of the suite, in the order they run."""
    every = tuple(p.name for p in PROVIDERS.values() if "cpu" in p.suites)
    if quick:
        return [
            Group(shape=shapes.CPU_QUICK, dtype="float32", modes=MODES, providers=every, share=0.8),
            Group(
                shape=shapes.CPU_QUICK,
                dtype="bfloat16",
                modes=("forward_backward",),
                providers=every,
                share=0.2,
            ),
        ]
    return [
        Group(
            shape=shapes.CPU_LONG,
            dtype="float32",
            modes=("forward_backward",),
            providers=("floor", "native", "liger"),
            share=0.0,
            once=True,
        ),
        Group(
            shape=shapes.CPU_BF16,
            dtype="bfloat16",
            modes=("forward_backward",),
            providers=("floor", "native", "eager", "trl", "liger"),
            share=0.15,
        ),
        Group(shape=shapes.CPU_MAIN, dtype="float32", modes=MODES, providers=every, share=1.0),
    ]


def verdict(errors: dict, eager: dict | None, dtype: str, is_ours: bool) -> str | None:
    """Why a row is refused, or None. Near p = 1 the relative error is reported and not judged.

    Eager's has no bound.
    """
    known = {name: e for name, e in errors.items() if e is not None and name != "logp_near_one"}
    if not known:
        return "nothing to check: neither a log-probability nor a gradient came back"
    for name, error in known.items():
        if not error <= SAME_FUNCTION[dtype]:
            return (
                f"{name} differs from float64 by {error:.1e}, more than {SAME_FUNCTION[dtype]:.0e}"
            )
        if (
            is_ours
            and eager
            and eager.get(name) is not None
            and not error <= 2 * eager[name] + 4 * EPS32
        ):
            limit = f"more than twice eager's {eager[name]:.1e}"
            return f"{name} differs from float64 by {error:.1e}, {limit}"
    return None


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the two nearest values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


class _Case:
    """One mode of one group: its providers' first answers and times."""

    def __init__(self):
        self.first: dict[str, dict] = {}
        self.times: dict[str, list[float]] = {}
        self.reasons: dict[str, str] = {}


def _open_workers(
    providers: dict[str, Provider], files: tuple[Path, Path], threads: int, folder: Path
) -> tuple[dict[str, Worker], dict[str, str]]:
    request = {"do": "open", "problem": str(files[0]), "tiny": str(files[1])}
    workers, reasons = {}, {}
    for spec, provider in providers.items():
        workers[provider.name] = Worker(
            "benchmarks.harness", ["head"], threads, folder / f"{provider.name}.log"
        )
        workers[provider.name].send(request | {"provider": spec})
    for name in list(workers):
        try:
            workers[name].receive(180.0)
        except WorkerError as error:
            workers.pop(name).close()
            reasons[name] = str(error)
    return workers, reasons


class _Turns:
    """A group's workers, asked in turn; one that fails or dies is left out from then on."""

    def __init__(self, group: Group, providers: list[Provider], workers: dict[str, Worker]):
        self.group, self.providers, self.workers = group, providers, workers
        self.cases = {mode: _Case() for mode in group.modes}

    def first(self, mode: str, truths: dict[str, str | None]) -> None:
        """One iteration of every provider with its peak memory and errors."""
        case = self.cases[mode]
        for provider in self.providers:
            name = provider.name
            if name not in self.workers:
                continue
            if mode not in provider.modes:
                case.reasons[name] = f"no {mode} mode"
                continue
            needs = 4 * provider.logit_copies * self.group.shape.T * self.group.shape.V
            if needs > available_bytes():
                gib = f"{needs / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} are free"
                case.reasons[name] = f"needs about {gib}"
                continue
            answer = self._ask(mode, name, {"do": "first", "truth": truths[provider.objective]})
            if answer:
                case.first[name] = answer
                case.times[name] = [answer["ms"]] if self.group.once else []

    def rounds(self, deadline: float) -> None:
        """Every mode and provider once a round, peers in every third, until the time is over.

        Modes alternate as providers do, so that their times may be compared.
        """
        for index in range(0 if self.group.once else MAX_ROUNDS):
            if index and time.monotonic() > deadline:
                break
            for mode, case in self.cases.items():
                for provider in self.providers:
                    name = provider.name
                    often = provider.is_ours or name == "floor"
                    if name not in case.times or (index % PEER_STRIDE and not often):
                        continue
                    answer = self._ask(mode, name, {"do": "step"})
                    if answer:
                        case.times[name].append(answer["ms"])

    def _ask(self, mode: str, name: str, request: dict) -> dict | None:
        case = self.cases[mode]
        try:
            self.workers[name].ask({"do": "prepare", "mode": mode}, STEP_TIMEOUT)
            return self.workers[name].ask(request, STEP_TIMEOUT)
        except WorkerError as error:
            case.reasons[name] = str(error)
            case.times.pop(name, None)
            if self.workers[name].process.poll() is not None:
                self.workers.pop(name).close()
                for other in self.cases.values():
                    if name not in other.reasons:
                        other.reasons[name] = str(error)
                        other.times.pop(name, None)
        return None


def _rows(
    group: Group, mode: str, providers: list[Provider], case: _Case, common: dict
) -> list[dict]:
    floor = statistics.median(case.times["floor"]) if case.times.get("floor") else None
    whole = statistics.median(case.times["floor_whole"]) if case.times.get("floor_whole") else None
    eager = case.first.get("eager", {}).get("errors")
    shape = dataclasses.asdict(group.shape)
    rows = []
    for provider in providers:
        name = provider.name
        row = {
            "op": provider.op(mode),
            "provider": name,
            "backend": provider.backend,
            "mode": mode,
            "shape": {key: shape[key] for key in "TDV"},
            "dtype": group.dtype,
            "device": "cpu",
            "status": "ok",
            "reason": None,
            "ms_p50": None,
            "ms_min": None,
            "ms_p20": None,
            "ms_p80": None,
            "samples": 0,
            "floor_ms": floor,
            "floor_whole_ms": whole,
            "ratio_to_floor": None,
            "peak_mib": None,
            "grad_mib": None,
            "rel_err_fp64": None,
            "note": provider.note,
        } | common
        rows.append(row)
        if not case.times.get(name):
            reason = case.reasons.get(name, "the run was stopped before its turn")
            row |= {"status": "missing", "reason": reason}
            continue
        first, times = case.first[name], case.times[name]
        row |= {
            "peak_mib": first["peak_mib"],
            "grad_mib": first["grad_mib"],
            "rel_err_fp64": first["errors"],
        }
        if not provider.is_floor:
            reason = verdict(first["errors"], eager, group.dtype, provider.is_ours)
            if reason:
                row |= {"status": "refused", "reason": reason}
                continue
        row |= {
            "ms_p50": statistics.median(times),
            "ms_min": min(times),
            "ms_p20": percentile(times, 0.2),
            "ms_p80": percentile(times, 0.8),
            "samples": len(times),
        }
        if floor:
            row["ratio_to_floor"] = row["ms_p50"] / floor
    return rows


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
    """Run the suite; every row goes to `write` as soon as its mode is done."""
    for mode in modes or ():
        if mode not in MODES:
            raise ValueError(f"no mode {mode!r}; there are {', '.join(MODES)}")
    for name in providers or ():
        find(name)
    end = time.monotonic() + minutes * 60
    common = {"commit": commit(), "machine": machine(threads)}
    for number, group in enumerate(plan(quick)):
        # A choice of providers keeps what the rows need: the floor, and eager for the 2x rule.
        needed = ["floor"] if group.once else ["floor", "eager"]
        names = [*needed, *providers] if providers else group.providers
        specs = {name: find(name) for name in names}
        chosen = list(specs.values())
        group_modes = tuple(mode for mode in group.modes if not modes or mode in modes)
        if not group_modes:
            continue
        files = (folder / f"problem{number}.pt", folder / f"tiny{number}.pt")
        maker = Worker("benchmarks.harness", ["problem"], threads, folder / "problem.log")
        workers: dict[str, Worker] = {}
        try:
            # The worker keeps the last problem it built for the truths to come.
            for path, shape in ((files[1], shapes.CPU_QUICK), (files[0], group.shape)):
                request = {"shape": dataclasses.asdict(shape), "dtype": group.dtype}
                maker.ask({"do": "build", "path": str(path), **request}, STEP_TIMEOUT)
            workers, closed = _open_workers(specs, files, threads, folder)
            turns = _Turns(dataclasses.replace(group, modes=group_modes), chosen, workers)
            group_end = time.monotonic() + group.share * max(0.0, end - time.monotonic())
            try:
                for mode in group_modes:
                    truths: dict[str, str | None] = {}
                    for objective in sorted({p.objective for p in chosen if mode in p.modes}):
                        truths[objective] = None
                        if mode != "forward":
                            path = str(folder / f"truth{number}_{mode}_{objective}.pt")
                            request = {"mode": mode, "objective": objective, "path": path}
                            maker.ask({"do": "truth", **request}, STEP_TIMEOUT)
                            truths[objective] = path
                    turns.first(mode, truths)
                # The truths are checked; its memory goes before the rounds.
                maker.close()
                turns.rounds(group_end)
            finally:
                # A run that is stopped keeps what it has measured.
                for mode, case in turns.cases.items():
                    if any(case.times.values()):
                        case.reasons = closed | case.reasons
                        for row in _rows(group, mode, chosen, case, common):
                            write(row)
                            say(line(row))
        finally:
            for worker in (maker, *workers.values()):
                worker.close()
            for path in folder.glob("*.pt"):
                path.unlink()


def summary(rows: list[dict]) -> str:
    """Every row, a line each."""
    return "\n".join(line(row) for row in rows)


def line(row: dict) -> str:
    """One row for a person."""
    shape = row["shape"]
    head = f"{row['mode']:17} {row['provider']:12} {row['dtype']:9} T={shape['T']:<6}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    ratio = f"{row['ratio_to_floor']:6.2f}x" if row["ratio_to_floor"] else "      -"
    text = f"{head} {row['ms_p50']:9.1f} ms {ratio} of floor, {row['peak_mib']:8.1f} MiB"
    errors = {k: v for k, v in (row["rel_err_fp64"] or {}).items() if v is not None}
    return text + "".join(f"  {name} {value:.1e}" for name, value in errors.items())


def is_ours(row: dict) -> bool:
    """Whether a row is r1kernels'."""
    name = row["provider"].split("@")[0]
    return name in PROVIDERS and PROVIDERS[name].is_ours
