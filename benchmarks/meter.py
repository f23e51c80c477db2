"""How a worker measures time and memory on its device, and what it knows of the device."""

import functools
import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from benchmarks.harness import MIB, reset_peak, status_mib
from benchmarks.provider import Missing

FLUSH_BYTES = 256 * MIB
GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


class Cpu:
    """Wall clock and the process's resident memory."""

    kind = "cpu"

    def name(self) -> str:
        return "cpu"

    def times(self, run: Callable, seconds: float, fewest: int, most: int) -> list[float]:
        """Milliseconds of each of as many iterations as fill `seconds`."""
        out: list[float] = []
        while len(out) < fewest or (sum(out) < 1e3 * seconds and len(out) < most):
            getattr(run, "before", _nothing)()
            start = time.perf_counter()
            run()
            out.append((time.perf_counter() - start) * 1e3)
        return out

    def peak(self, run: Callable) -> tuple[object, float]:
        """The result of one iteration and the MiB it took at its peak."""
        getattr(run, "before", _nothing)()
        base = reset_peak()
        result = run()
        return result, status_mib("VmHWM") - base

    def clock(self, run: Callable) -> float:
        """Milliseconds of one iteration that takes long, by the host's clock."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def high_mib(self) -> float:
        """All that was in use at the last `peak`'s peak."""
        return status_mib("VmHWM")

    def wait(self) -> None:
        """All work that was started is done, or its error is raised here."""

    def release(self) -> None:
        """Free memory goes back to the device."""
        gc.collect()


class Cuda(Cpu):
    """Device events, and torch's allocator; other GPU libraries' own allocations are not seen."""

    kind = "cuda"

    def name(self) -> str:
        return torch.cuda.get_device_name()

    def times(self, run: Callable, seconds: float, fewest: int, most: int) -> list[float]:
        """As on a CPU. The L2 cache is overwritten before each iteration; the first one says how
        many fit, and the rest are queued without a wait in between.
        """
        flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

        def queue(count: int) -> list[float]:
            marks = []
            for _ in range(count):
                getattr(run, "before", _nothing)()
                flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                marks.append((start, end))
            torch.cuda.synchronize()
            return [start.elapsed_time(end) for start, end in marks]

        out = queue(1)
        count = min(most, max(fewest, int(1e3 * seconds / max(out[0], 1e-3))))
        return out + queue(count - 1)

    def peak(self, run: Callable) -> tuple[object, float]:
        getattr(run, "before", _nothing)()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - base) / MIB

    def high_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB

    def wait(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def meter(device: str) -> Cpu:
    return Cuda() if device == "cuda" else Cpu()


def gpu_state() -> dict:
    """What nvidia-smi says of the first GPU: names, clocks in MHz, power in W; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in found.stdout.splitlines()[0].split(",")]
    return dict(zip(GPU_FIELDS, values, strict=True))


@functools.cache
def gpu_facts() -> dict:
    """What a GPU time depends on and does not change in a run; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": gpu_state().get("driver_version"),
        "power_limit_w": gpu_state().get("power.limit"),
    }


def guarded(meter: Cpu, handler: Callable) -> Callable:
    """A worker's handler after which it holds no memory; one that ran out of it, or that has not
    what was asked for, is well.
    """

    def answer(**request) -> dict:
        try:
            return handler(**request)
        # The host's may run out too, of what is to be pinned.
        except (torch.OutOfMemoryError, MemoryError) as error:
            reason = "out of memory: " + str(error).split(". ")[0]
        except Missing as error:
            reason = str(error)
        finally:
            meter.release()
        # Raised here, where no traceback keeps the handler's tensors.
        raise Missing(reason)

    return answer


def print_ratios(times: dict[str, list], peaks: dict[str, list], base: str) -> None:
    """A table of milliseconds and MiB by provider, and of both over those of `base`."""
    width = max(len(name) for name in times) + 3
    print(f"{'':<{width}}{'ms':>9}{'of ' + base:>12}{'MiB':>9}{'of ' + base:>12}")
    for name in times:
        # Round by round against the neighbour in time, then the median.
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))
        mib, whole = (statistics.median(peaks[x]) for x in (name, base))
        ms, share = statistics.median(times[name]), mib / whole if whole else math.nan
        print(f"{name:<{width}}{ms:>9.1f}{ratio:>11.2f}x{mib:>9.0f}{share:>11.2f}x")


def _nothing() -> None:
    pass
