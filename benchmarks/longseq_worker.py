"""A process of the longseq suite: builds a decoder, runs steps of one provider, measures.

On a CPU every measurement is a forked child of this process, which has imported everything and
computed nothing: peaks do not depend on what ran before, and a child that dies is a lost row.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks import longseq_problem as problems
from benchmarks import longseq_step
from benchmarks.harness import MIB, machine, serve
from benchmarks.longseq_providers import find
from benchmarks.meter import gpu_facts, gpu_state, guarded, meter
from benchmarks.provider import Missing

WARM_TOKENS = 256
HANDLERS = ("truth", "errors", "turn", "probe", "step")


class LongWorker:
    def __init__(self, device: str, threads: int, forks: bool):
        self.meter, self.device, self.threads = meter(device), device, threads
        self.handlers = {"hello": self.hello, "state": lambda: gpu_state()}
        for name in HANDLERS:
            handler = getattr(self, name)
            safe = in_child(handler) if forks else guarded(self.meter, handler)
            self.handlers[name] = safe

    def hello(self) -> dict:
        # A child's time is not to hold an import.
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        # What was imported is no garbage: collections between turns need not walk it.
        gc.freeze()
        return {"device": self.meter.name(), "machine": machine(self.threads) | gpu_facts()}

    def truth(self, case: dict, path: str) -> dict:
        """Write float64 gradients to compare with."""
        case, model = self._build(case, "sdpa")
        tokens = problems.build_tokens(case.shape.vocab, case.T, self.device)
        torch.save(problems.truth(model, find("plain").apply(model, None), tokens), path)
        return {}

    def errors(self, provider: str, case: dict, path: str) -> dict:
        """Relative errors of the gradients."""
        step, model = self._ready(provider, case, 0)
        step()
        return {"errors": problems.gradient_errors(model, torch.load(path))}

    def turn(self, provider: str, case: dict, seconds: float) -> dict:
        """Steps, forward and backward, for `seconds`, at least one; the first one's peak memory.

        peak_mib lies above weights, gradients and tokens.
        """
        step, model = self._ready(provider, case, WARM_TOKENS)
        ms: list[float] = []
        all_before, own_before = _cpu_seconds()
        started = time.perf_counter()
        _, peak = self.meter.peak(lambda: ms.append(self.meter.clock(step)))
        all_after, own_after = _cpu_seconds()
        others = (all_after - all_before) - (own_after - own_before)
        others /= time.perf_counter() - started
        while sum(ms) < 1e3 * seconds:
            ms.append(self.meter.clock(step))
        return {
            "ms": ms,
            "peak_mib": max(0.0, peak),
            "weights_mib": 2 * _weights_mib(model),
            "others_cores": max(0.0, others),
        }

    def probe(self, provider: str, case: dict) -> dict:
        """Whether a step of the whole decoder fits: the case's layers compute, and what the others
        keep is taken up. Raises Missing, "out of memory", where it does not.
        """
        whole, held = problems.decoder(case["decoder"]), problems.Case(**case)
        kept = find(provider).kept * held.T * whole.hidden
        numbers = (whole.layers - held.layers) * (2 * whole.layer_params + kept)
        # Written by nobody: a CPU has no pages for it, a GPU's allocator counts it.
        ballast = torch.empty(numbers, dtype=getattr(torch, held.dtype), device=self.device)
        step, _ = self._ready(provider, case, 0)
        self.meter.peak(step)
        self.meter.wait()
        taken = ballast.numel() * ballast.element_size() / MIB
        return {"ballast_mib": taken, "all_mib": self.meter.high_mib()}

    def step(self, provider: str, case: dict) -> dict:
        """One whole GRPO step on given tokens, rollouts aside, after one to warm up.

        Old log-probabilities, loss, backward, clipping, AdamW. Milliseconds by part, and all the
        memory in use at the peak.
        """
        make, attention = longseq_step.STEPS[provider]
        case, model = self._build(case, attention)
        tokens = problems.build_tokens(case.shape.vocab, case.T, self.device)
        parts = Parts(self.meter)
        run = make(model, tokens, parts.part)
        run()
        vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
        before = [vector.detach().clone() for vector in vectors]
        parts.ms.clear()
        ms: list[float] = []
        self.meter.peak(lambda: ms.append(self.meter.clock(run)))
        pairs = zip(before, vectors, strict=True)
        return {
            "ms": ms[0],
            "parts_ms": parts.ms,
            "all_mib": self.meter.high_mib(),
            "moved": any(not torch.equal(old, new) for old, new in pairs),
        }

    def _build(self, case: dict, attention: str) -> tuple:
        """(the case, its model)."""
        torch.set_num_threads(self.threads)
        case = problems.Case(**case)
        longest = max(case.T, WARM_TOKENS)
        model = problems.build_model(case.shape, longest, case.dtype, self.device, attention)
        return case, model

    def _ready(self, provider: str, case: dict, warm: int) -> tuple:
        """(a step as a callable, the model), after one on `warm` tokens, gradients 0."""
        found = find(provider)
        case, model = self._build(case, found.attention)
        if case.packed and not found.packs:
            raise Missing("no packed sequences")
        hidden = found.apply(model, case.rows)
        vocab = case.shape.vocab

        def run(tokens: problems.Tokens) -> None:
            loss = problems.policy_loss(model, hidden(tokens), tokens, case.workspace_mb)
            loss.backward()

        if warm:
            run(problems.build_tokens(vocab, min(warm, case.T), self.device))
        for parameter in model.parameters():
            parameter.grad.zero_()
        tokens = problems.build_tokens(vocab, case.T, self.device, case.packed)
        self.meter.wait()
        return (lambda: run(tokens)), model


class Parts:
    """Milliseconds of a step by part, each closed by a wait for the device."""

    def __init__(self, meter):
        self.meter, self.ms = meter, {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.meter.wait()
        self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3


def in_child(handler: Callable) -> Callable:
    """The handler in a forked child; its answer, or what it raised, comes back through a pipe."""

    def answer(**request) -> dict:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            said = json.dumps(_answer(handler, request)).encode()
            with os.fdopen(write, "wb") as file:
                file.write(said)
            # No exit handlers: they are the parent's.
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as file:
            said = file.read()
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise RuntimeError(f"the measuring process ended with {how}")
        found = json.loads(said)
        if "raised" in found:
            raise (Missing if found["missing"] else RuntimeError)(found["raised"])
        return found

    return answer


def _answer(handler: Callable, request: dict) -> dict:
    try:
        return handler(**request)
    # A child must not return into the parent's loop whatever happens.
    except BaseException as error:
        traceback.print_exc()
        missing = isinstance(error, Missing)
        return {"raised": str(error) if missing else f"{type(error).__name__}: {error}",
                "missing": missing}  # fmt: skip


def _weights_mib(model) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MIB


def _cpu_seconds() -> tuple[float, float]:
    """Core seconds since boot of all processes, and of this one."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    # user, nice, system, and interrupts; not idle, not waiting.
    ticks = sum(int(fields[i]) for i in (0, 1, 2, 5, 6))
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("threads", type=int)
    parser.add_argument("--forks", action="store_true")
    arguments = parser.parse_args()
    serve(LongWorker(arguments.device, arguments.threads, arguments.forks).handlers)
