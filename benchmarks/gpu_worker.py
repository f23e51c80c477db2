"""One process of the gpu suite: answers the parent's requests about the providers it is asked for.

Nothing is kept between requests but compiled code: a problem is drawn anew from its seed, on the
device, so that idle workers hold no memory and a worker that died is replaced by another.
"""

import argparse
import contextlib
import functools

import torch

from benchmarks import checks, logits_op
from benchmarks import problem as head
from benchmarks.harness import MIB, machine, serve
from benchmarks.meter import gpu_facts, gpu_state, guarded, meter
from benchmarks.poison import poisoned_memory
from benchmarks.provider import Missing
from benchmarks.providers import accumulate, find, variants
from benchmarks.shapes import Shape
from r1kernels.backend import use_backend

VOCAB_CHECKED = 1024


class GpuWorker:
    def __init__(self, device: str, threads: int):
        self.meter = meter(device)
        self.device = device
        self.threads = threads
        self.handlers = {
            name: guarded(self.meter, getattr(self, name))
            for name in ("hello", "variants", "state", "rates", "truth", "turn", "check")
        }

    def hello(self) -> dict:
        self.meter.wait()
        return {"device": self.meter.name(), "machine": machine(self.threads) | gpu_facts()}

    def variants(self) -> dict:
        return {"providers": variants()}

    def state(self) -> dict:
        return gpu_state()

    def rates(self, copy_mib: int, products: list[list[int]], dtype: str) -> dict:
        """GB/s of a copy, bytes read and written; TFLOP/s of [M, K] x [K, N] in `dtype`.

        A product of four numbers, the last not 0, adds [K, M].T x [K, N] to a float32 matrix.
        """
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            x = torch.randn(*size, generator=generator, device=self.device)
            return x.to(getattr(torch, dtype))

        numbers = copy_mib * MIB // getattr(torch, dtype).itemsize
        source, target = normal(numbers), normal(numbers)
        copy = functools.partial(target.copy_, source)
        out = {"copy": {"ms": self._warm_times(copy), "bytes": 2 * numbers * source.itemsize}}
        out["products"] = []
        del source, target, copy
        for M, K, N, sums in products:
            right = normal(K, N)
            if sums:
                result = torch.zeros(M, N, device=self.device)
                run = functools.partial(accumulate, result, normal(K, M).T, right, False)
            else:
                run = functools.partial(torch.mm, normal(M, K), right, out=right.new_empty(M, N))
            out["products"].append({"shape": [M, K, N, sums], "ms": self._warm_times(run)})
        return out

    def _warm_times(self, run) -> list[float]:
        run()
        self.meter.wait()
        return self.meter.times(run, 0.3, 5, 50)

    def truth(self, kind: str, shape: dict, dtype: str, mode: str, files: dict) -> dict:
        """Write what answers are compared with, and eager's errors, where they are not yet there.

        files: {"base": ..., "policy": ..., "ce": ...}; the last two only where wanted.
        """
        if kind == "logits":
            problem = logits_op.build(Shape(**shape), dtype, device=self.device)
            truth = logits_op.truth(problem)
            eager = logits_op.eager_errors(problem, mode, truth)
            torch.save(truth | {"eager": eager}, files["policy"])
            return {"eager": eager}
        if "base" in files["make"]:
            problem = self._head(shape, dtype, None)
            base = tuple(problem[f"truth_{name}"].cpu() for name in ("logp", "lse", "entropy"))
            torch.save({"base": base, "sums": _sums(problem)}, files["base"])
        else:
            problem = self._head(shape, dtype, files["base"])
        eager = None
        for objective in ("policy", "ce"):
            if objective in files["make"]:
                truth = None
                if mode != "forward":
                    truth = head.gradient_truth(problem, mode, objective, VOCAB_CHECKED)
                if objective == "policy":
                    eager = head.eager_errors(problem, mode, truth)
                torch.save(truth, files[objective])
        return {"eager": eager}

    def turn(
        self,
        provider: str,
        kind: str,
        shape: dict,
        dtype: str,
        mode: str,
        files: dict,
        seconds: float,
        check: bool,
        poison: bool = False,
    ) -> dict:
        """Iterations of one provider: a first one untimed; with `check` one for its memory and
        errors; then timed ones for `seconds`, none where that is 0.
        """
        is_head = kind == "head"
        found = find(provider) if is_head or ":" in provider else None
        found = found or logits_op.LOGITS_PROVIDERS[provider]
        if is_head:
            problem = self._head(shape, dtype, files["base"])
        else:
            problem = logits_op.build(Shape(**shape), dtype, device=self.device)
        run = found.make(problem, mode)
        getattr(run, "before", lambda: None)()
        run()
        self.meter.wait()
        out = {}
        if check:
            # What the first iteration left, gradients among it, is not part of the next one's peak.
            run = None
            run = found.make(problem, mode)
            with poisoned_memory() if poison else contextlib.nullcontext():
                result, peak = self.meter.peak(run)
            gradients = [g for g in result[1:] if g is not None and g.ndim == 2]
            # A provider that restores its input writes the gradient there: no memory of this run.
            gradients = [] if hasattr(run, "before") else gradients
            grad_mib = sum(g.numel() * g.element_size() for g in gradients) / MIB
            out = {"peak_mib": max(0.0, peak - grad_mib), "grad_mib": grad_mib, "errors": {}}
            if not found.is_floor:
                truth = torch.load(files[found.objective], map_location=self.device)
                errors = head.errors if is_head else logits_op.errors
                before = (problem, mode, truth) if is_head else (problem, truth)
                out["errors"] = errors(*before, *result)
            del result
        if seconds:
            out["ms"] = self.meter.times(run, seconds, 2, 30)
        return out

    def check(self, name: str, backend: str, arguments: dict) -> dict:
        """A property of `checks.py`, on one of our backends."""
        with use_backend(backend), poisoned_memory():
            try:
                if name in checks.ON_A_PROBLEM:
                    problem = self._head(arguments["shape"], arguments["dtype"], None)
                    found = checks.ON_A_PROBLEM[name](problem)
                else:
                    found = getattr(checks, name)(self.device, **arguments)
            except RuntimeError as error:
                if str(error).startswith("no backend runs"):
                    raise Missing(str(error)) from None
                raise
        self.meter.wait()
        return {"found": found}

    def _head(self, shape: dict, dtype: str, base: str | None) -> dict:
        known = torch.load(base) if base else None
        problem = head.build(
            Shape(**shape),
            dtype,
            device=self.device,
            drawn=shape["T"],
            truth=known and known["base"],
        )
        if known and _sums(problem) != known["sums"]:
            raise RuntimeError("this process drew another problem than the one with the truth")
        return problem


def _sums(problem: dict) -> list[float]:
    """Tells one problem from another: sums of some numbers that do not depend on their order."""
    return [
        problem["hidden"][:8].double().sum().item(),
        problem["weight"][-8:].double().sum().item(),
        float(problem["targets"].sum().item()),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("threads", type=int)
    arguments = parser.parse_args()
    serve(GpuWorker(arguments.device, arguments.threads).handlers)
