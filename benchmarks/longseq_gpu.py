"""Training steps of large decoders on a GPU: memory, speed, the longest that fits, a GRPO step.

The plan's parts come the most telling first. What does not fit the minutes is said, not measured.
With `device="cpu"` the same code runs on tiny decoders, which measures nothing.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.cpu_suite import verdict
from benchmarks.gpu_pool import OutOfTime, Pool
from benchmarks.harness import MIB, WorkerError, available_bytes, commit
from benchmarks.longseq_problem import QWEN_1B, QWEN_7B, TINY, Case, decoder, step_flops
from benchmarks.longseq_providers import LongProvider, find
from benchmarks.longseq_rows import empty, line, sizes, timed
from benchmarks.longseq_step import OUR_PARTS, STEPS
from benchmarks.peers import absent

# Dense bfloat16 operations of the data sheets, in 10^12 a second: what utilisation is a share of.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}
# Of it, what the plan's estimates assume that a step reaches, recomputation included.
ASSUMED_SHARE = 0.35
RECOMPUTED = 4 / 3
# Building a model, warming up and compiling; starting a process.
START_SECONDS = {QWEN_1B: 8.0, QWEN_7B: 16.0, TINY: 0.0}
WORKER_SECONDS = 12.0
# Beyond it a model is timed with two and with three layers, and the difference multiplied.
WHOLE_TOKENS = 131072
FEW_LAYERS = (2, 3)
# The gradients' check: several chunks, and a float64 truth that fits beside the rest.
CHECKED = {"T": 3000, "layers": 2, "rows": 1024}
CHECKED_QUICK = {"T": 70, "layers": 2, "rows": 32}
TURN_SECONDS = 2.0
TURN_TIMEOUT = 240.0
# The longest length: sequences of the packed probes, how near the ends must be, and when to stop.
PROBED = {"layers": 2, "packed": 32768, "step": 8192}
PROBED_QUICK = {"layers": 2, "packed": 64, "step": 32}
NEAR = 1.05
PROBES = 8
HOST_SHARE = 0.85

EVERY = ("stream", "offload", "checkpoint", "transformers", "transformers_offload", "liger")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One step of the plan; a largest length has no `tokens`."""

    kind: str
    model: str
    tokens: int = 0
    providers: tuple[str, ...]


def plan(quick: bool) -> list[Part]:
    """The parts in their order."""

    def train(model: str, tokens: int, providers: tuple[str, ...]) -> Part:
        return Part(kind="train", model=model, tokens=tokens, providers=providers)

    if quick:
        return [
            train(TINY, 96, EVERY),
            Part(kind="step", model=TINY, tokens=96, providers=tuple(STEPS)),
            train(TINY, 256, EVERY),
            Part(kind="largest", model=TINY, providers=("stream",)),
        ]
    first, rest = ("stream", "transformers"), ("offload", "liger")
    return [
        train(QWEN_1B, 32768, (*first, *rest)),
        Part(kind="step", model=QWEN_1B, tokens=32768, providers=("stream", "trl")),
        train(QWEN_7B, 32768, first),
        Part(kind="largest", model=QWEN_1B, providers=first),
        train(QWEN_1B, 131072, first),
        train(QWEN_7B, 131072, ("stream",)),
        train(QWEN_1B, 524288, ("stream",)),
        Part(kind="largest", model=QWEN_7B, providers=first),
        train(QWEN_7B, 524288, ("stream",)),
        train(QWEN_1B, 8192, (*first, *rest)),
        train(QWEN_7B, 8192, (*first, *rest)),
        train(QWEN_1B, 131072, rest),
        train(QWEN_7B, 32768, rest),
        Part(kind="step", model=QWEN_1B, tokens=32768, providers=("checkpoint",)),
        train(QWEN_1B, 32768, ("checkpoint", "stream_device", "transformers_offload")),
        train(QWEN_7B, 131072, ("transformers", *rest)),
        Part(kind="largest", model=QWEN_1B, providers=("offload", "liger")),
        train(QWEN_1B, 524288, ("offload", "transformers_offload")),
    ]


TRL = LongProvider(
    name="trl", apply=None, package="trl", note="GRPOTrainer's loss, transformers' checkpointing"
)


class Refused(WorkerError):
    """What came back is wrong: it has no figures."""


class LongSuite:
    """One run: asks the pool, writes rows."""

    def __init__(self, pool, folder: Path, write, say, common: dict, quick: bool, peak: float):
        self.pool, self.folder, self.write, self.say = pool, folder, write, say
        self.common, self.quick, self.peak_flops = common, quick, peak
        self.dtype = "float32" if quick else "bfloat16"
        self.checked = CHECKED_QUICK if quick else CHECKED
        self.probed = PROBED_QUICK if quick else PROBED
        self.whole_tokens = 128 if quick else WHOLE_TOKENS
        self.memory_mib = 1024 * common["machine"].get("gpu_memory_gib", 0.0)
        self.eager: dict[str, dict] = {}
        # By model and provider: errors of its gradients, and why it has no rows.
        self.errors: dict[tuple, dict] = {}
        self.refused: dict[tuple, tuple[str, str]] = {}
        # Measured seconds over the plan's.
        self.slower = 1.0

    def row(self, row: dict) -> None:
        row |= {"dtype": self.dtype} | self.common
        self.write(row)
        self.say(line(row))

    def family(self, provider: str) -> str:
        """Its process; without a GPU there is no context to lose, and one is enough."""
        return "all" if self.pool.device == "cpu" else provider

    def ask(self, name: str, do: str, case: Case | None = None, **request) -> dict:
        request |= {"case": asdict(case)} if case else {}
        return self.pool.ask(self.family(name), {"do": do} | request, TURN_TIMEOUT)

    def case(self, part: Part, **fields) -> Case:
        """A part's decoder, whole and on its tokens unless said otherwise."""
        whole = {"layers": decoder(part.model).layers, "T": part.tokens}
        return Case(**{"decoder": part.model, "dtype": self.dtype} | whole | fields)

    def part(self, part: Part) -> None:
        """Every provider of a part that fits the time that is left."""
        # Their processes start at once; those of a longest length are alone on the GPU.
        if part.kind != "largest":
            names = [name for name in part.providers if not absent(known(name).package)]
            self.pool.start([self.family(name) for name in names])
        for name in part.providers:
            row = self.start(part, name)
            try:
                needs = self.estimate(part)
                if time.monotonic() + needs > self.pool.deadline:
                    left = max(0.0, self.pool.deadline - time.monotonic())
                    text = f"would take about {needs:.0f} s, {left:.0f} s are left"
                    raise WorkerError(text, True)
                if absent(known(name).package):
                    raise WorkerError(f"{known(name).package} is not installed", True)
                started = time.monotonic()
                found = getattr(self, part.kind)(part, name)
                if needs and not self.quick:
                    taken = (time.monotonic() - started) / (needs / self.slower)
                    self.slower = min(3.0, max(0.5, (self.slower + taken) / 2))
                self.row(row | found)
            except WorkerError as error:
                status = "missing" if error.missing else "failed"
                status = "refused" if isinstance(error, Refused) else status
                self.row(row | {"status": status, "reason": str(error)})

    def start(self, part: Part, name: str) -> dict:
        """The row of a provider that has not been run."""
        shape = sizes(part.model, decoder(part.model))
        shape |= {"T": part.tokens} if part.tokens else {}
        op = "longseq" if part.kind == "train" else f"longseq_{part.kind}"
        return empty(op, part.kind, known(name), **shape)

    def estimate(self, part: Part) -> float:
        """Seconds that one provider of a part takes if it is as slow as it is thought to be."""
        shape = decoder(part.model)
        start = START_SECONDS[part.model] + WORKER_SECONDS
        if self.quick:
            return 0.0
        if part.kind == "largest":
            return self.slower * (start + 10.0)
        rate = ASSUMED_SHARE * (self.peak_flops or 6e14)
        once = RECOMPUTED * step_flops(shape, [part.tokens]) / rate
        if part.tokens > self.whole_tokens:
            return self.slower * (2 * start + once * sum(FEW_LAYERS) / shape.layers)
        # A step of GRPO is run twice, and has one more forward.
        times = 2 * RECOMPUTED if part.kind == "step" else 1 + min(1.0, TURN_SECONDS / once)
        return self.slower * (start + once * times)

    def check(self, part: Part, name: str) -> dict:
        """Errors of a provider's gradients. Raises WorkerError where they are wrong."""
        key, case = (part.model, name), self.case(part, **self.checked)
        path = str(self.folder / f"{part.model}.pt")
        if part.model not in self.eager:
            self.ask("plain", "truth", case, path=path)
            plain = self.ask("plain", "errors", case, provider="plain", path=path)
            self.eager[part.model] = plain["errors"]
        if key not in self.errors:
            found = self.ask(name, "errors", case, provider=name, path=path)
            self.errors[key] = found["errors"]
        reason = verdict(self.errors[key], self.eager[part.model], self.dtype, find(name).is_ours)
        if reason:
            raise Refused(f"its gradients are wrong: {reason}", True)
        return {"rel_err_fp64": self.errors[key], "eager_err_fp64": self.eager[part.model]}

    def train(self, part: Part, name: str) -> dict:
        """Peak memory and time of a step; of a long one by two and by three layers."""
        errors = self.check(part, name)
        shape, lengths = decoder(part.model), [part.tokens]
        if part.tokens <= self.whole_tokens:
            answer = self.turn(part, name, shape.layers)
        else:
            few = {layers: self.turn(part, name, layers) for layers in FEW_LAYERS}
            answer = extrapolated(few, shape.layers)
            answer["weights_mib"] = self.weights_mib(part.model)
            needs = answer["peak_mib"] + answer["weights_mib"]
            if self.memory_mib and needs > self.memory_mib:
                text = f"out of memory: would need {needs / 1024:.0f} GiB, extrapolated from layers"
                raise WorkerError(text, True)
        found = errors | {"extrapolated": part.tokens > self.whole_tokens}
        found |= {key: answer[key] for key in ("peak_mib", "weights_mib")}
        found |= timed(answer["ms"], part.tokens) | {"gpu_state": self.state(name)}
        found["predicted_mib"] = find(name).predict(self.case(part), self.pool.device)
        if self.peak_flops:
            flops = step_flops(shape, lengths) / part.tokens
            found["mfu"] = flops * found["tokens_per_s"] / self.peak_flops
        return found

    def turn(self, part: Part, name: str, layers: int) -> dict:
        seconds = 0.0 if self.quick or part.tokens > self.whole_tokens else TURN_SECONDS
        case = self.case(part, layers=layers)
        return self.ask(name, "turn", case, provider=name, seconds=seconds)

    def step(self, part: Part, name: str) -> dict:
        """One whole GRPO step: all memory in use, seconds by part, and what share is ours."""
        answer = self.ask(name, "step", self.case(part), provider=name)
        if not answer["moved"]:
            raise Refused("the step moved no weight", True)
        ours = sum(answer["parts_ms"][key] for key in OUR_PARTS.get(name, ()))
        return timed([answer["ms"]], part.tokens) | {
            "peak_mib": answer["all_mib"],
            "parts_ms": answer["parts_ms"],
            "share_ours": ours / answer["ms"],
            "gpu_state": self.state(name),
        }

    def largest(self, part: Part, name: str) -> dict:
        """The most tokens that fit: probes of a few layers beside what the others would hold."""
        provider, shape = find(name), decoder(part.model)
        self.check(part, name)
        self.pool.only(self.family(name))
        unit, packed = self.probed["step"], self.probed["packed"]
        host = host_limit(provider, shape, self.dtype)
        guess = self.guess(part, provider)
        until = min(self.pool.deadline - 20.0, time.monotonic() + self.budget())

        def fits(tokens: int) -> bool:
            packs = packed if provider.packs and tokens > packed else None
            case = self.case(part, T=tokens, layers=self.probed["layers"], packed=packs)
            try:
                self.ask(name, "probe", case, provider=name)
            except WorkerError as error:
                if error.missing and str(error).startswith("out of memory"):
                    return False
                raise
            return True

        low, high, probes = bisect(fits, guess or 8 * unit, unit, host, until)
        if not low:
            raise WorkerError(f"nothing fits down to {high} tokens", True)
        return {
            "largest_tokens": low,
            "fails_tokens": high,
            "predicted_tokens": guess,
            "host_tokens": host,
            "probes": probes,
            "packed": packed if provider.packs and low > packed else None,
        }

    def budget(self) -> float:
        """Seconds for one longest length."""
        return 1e9 if self.quick else 45.0

    def guess(self, part: Part, provider: LongProvider) -> int | None:
        """The most tokens by the memory model, None where it has no model of the provider."""
        unit = self.probed["step"]
        space = self.memory_mib - self.weights_mib(part.model)

        def needs(count: int) -> float | None:
            return provider.predict(self.case(part, T=count * unit), self.pool.device)

        if space <= 0 or needs(1) is None:
            return None
        count = 1
        while needs(2 * count) <= space:
            count *= 2
        for bit in (count >> shift for shift in range(1, count.bit_length())):
            if needs(count + bit) <= space:
                count += bit
        return count * unit

    def weights_mib(self, model: str) -> float:
        """Of a whole decoder's weights and gradients."""
        return 2 * decoder(model).params * (4 if self.dtype == "float32" else 2) / MIB

    def state(self, name: str) -> dict:
        """Clocks just after a turn; nothing when there is no time left to ask."""
        try:
            return self.ask(name, "state")
        except (WorkerError, OutOfTime):
            return {}


def known(name: str) -> LongProvider:
    return TRL if name == "trl" else find(name)


def extrapolated(few: dict[int, dict], layers: int) -> dict:
    """Peak and time of `layers` layers, on the line through those of two numbers of layers."""
    (a, first), (b, second) = sorted(few.items())

    def line(key: Callable) -> float:
        slope = (key(second) - key(first)) / (b - a)
        return key(second) + slope * (layers - b)

    return {
        "ms": [line(lambda x: statistics.median(x["ms"]))],
        "peak_mib": line(lambda x: x["peak_mib"]),
    }


def bisect(
    fits: Callable[[int], bool], guess: int, unit: int, limit: int | None, until: float
) -> tuple[int, int | None, list]:
    """(the most tokens known to fit, the fewest known not to or None, probes), in whole units.

    From the guess outwards by a quarter, then inwards, until the two are near, `PROBES` probes are
    made or the time is over. Never above `limit`.
    """
    low, high, probes = 0, None, []
    at = max(unit, guess // unit * unit)
    while len(probes) < PROBES and (not probes or time.monotonic() < until):
        at = min(at, limit // unit * unit) if limit else at
        if at <= low or at < unit or (high and at >= high):
            break
        probes.append([at, fits(at)])
        low, high = (at, high) if probes[-1][1] else (low, at)
        if high is None:
            at = at * 5 // 4 // unit * unit + unit
        elif high <= NEAR * low:
            break
        else:
            # Nothing fitted yet: three quarters, else the middle.
            at = (low + high if low else high * 3 // 2) // 2 // unit * unit
    return low, high, probes


def host_limit(provider, shape, dtype: str) -> int | None:
    """Tokens that the host's memory holds, of a provider that keeps something there."""
    numbers = shape.layers * provider.host_width(shape)
    size = 4 if dtype == "float32" else 2
    return int(HOST_SHARE * available_bytes() / (numbers * size)) if numbers else None


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int,
    quick: bool,
    skip: int,
    device: str,
    providers: list[str] | None,
    modes: list[str] | None,
    commit_name: str | None,
    say: Callable[[str], None],
) -> None:
    """Run the plan, or what it has after its first `skip` parts; rows go to `write`."""
    for mode in modes or ():
        if mode not in ("train", "step", "largest"):
            raise ValueError(f"no mode {mode!r}; there are train, step, largest")
    deadline = time.monotonic() + 60 * minutes - 5.0
    # Segments that grow keep a peak from being one of fragments.
    env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    pool = Pool(device, threads, folder, deadline, "benchmarks.longseq_worker", env)
    name = commit_name or commit()
    try:
        family = "all" if device == "cpu" else "plain"
        hello = pool.hello(family)
        common = {"device": hello["device"], "commit": name, "machine": hello["machine"]}
        peak = next((1e12 * x for card, x in PEAK_TFLOPS.items() if card in hello["device"]), 0.0)
        suite = LongSuite(pool, folder, write, say, common, quick, peak)
        row = empty("environment", "environment", find("plain"))
        suite.row(row | {"gpu_state": suite.state("plain")})
        for number, part in enumerate(plan(quick)):
            chosen = [p for p in part.providers if not providers or p in providers]
            if number >= skip and (not modes or part.kind in modes):
                say(f"part {number}: {part.kind} {part.model} {part.tokens or ''}")
                suite.part(replace(part, providers=(*chosen,)))
    except OutOfTime:
        say("out of time: what was measured is written")
    except WorkerError as error:
        say(f"the run cannot go on: {error}")
        common = {"device": device, "commit": name, "machine": {}}
        row = empty("environment", "environment", find("plain"))
        write(row | {"status": "failed", "reason": str(error)} | common)
    finally:
        pool.close()
