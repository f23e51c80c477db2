"""The GPU meter's arithmetic, with a stand-in for the device."""

import subprocess
import time
import types

import pytest
import torch

from benchmarks import meter


class FakeCuda:
    """A clock that work moves, and an allocator that counts."""

    def __init__(self):
        self.now, self.allocated, self.peak, self.log = 0.0, 100, 100, []

    def device(self):
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = cuda.now

            def elapsed_time(self, end):
                return end.at - self.at

        def reset():
            self.peak = self.allocated

        return types.SimpleNamespace(
            Event=Event,
            synchronize=lambda: self.log.append("wait"),
            reset_peak_memory_stats=reset,
            memory_allocated=lambda: self.allocated,
            max_memory_allocated=lambda: self.peak,
            empty_cache=lambda: self.log.append("empty"),
        )

    def work(self, ms):
        self.now += ms
        self.log.append("run")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    empty = torch.empty

    def flush_buffer(size, dtype, device):
        assert device == "cuda" and size == meter.FLUSH_BYTES
        buffer = empty(1, dtype=dtype)
        return types.SimpleNamespace(zero_=lambda: (fake.log.append("flush"), buffer.zero_()))

    monkeypatch.setattr(meter.torch, "cuda", fake.device())
    monkeypatch.setattr(meter.torch, "empty", flush_buffer)
    return fake


def test_times_are_between_events_with_the_cache_flushed_before(cuda):
    def run():
        cuda.work(7.0)

    run.before = lambda: cuda.log.append("before")
    assert meter.Cuda().times(run, 0.05, 2, 30) == [7.0] * 7
    one = ["before", "flush", "run"]
    # One iteration says how many fit; the others are queued without a wait in between.
    assert cuda.log == [*one, "wait", *(one * 6), "wait"]


@pytest.mark.parametrize(("ms", "count"), [(1000.0, 2), (0.001, 30)])
def test_counts_stay_in_their_bounds(cuda, ms, count):
    assert len(meter.Cuda().times(lambda: cuda.work(ms), 0.05, 2, 30)) == count


def test_peak_is_above_what_was_allocated_before(cuda):
    def run():
        cuda.peak = cuda.allocated + 3 * 2**20
        return "result"

    assert meter.Cuda().peak(run) == ("result", 3.0)
    meter.Cuda().release()
    assert cuda.log[-1] == "empty"


def test_cpu_times_and_peak():
    ms = meter.Cpu().times(lambda: time.sleep(0.002), 0.01, 2, 30)
    assert 2 <= len(ms) <= 5 and min(ms) >= 2.0
    kept, mib = meter.Cpu().peak(lambda: torch.ones(2**22))
    assert kept.numel() == 2**22 and 12 < mib < 64


def test_gpu_state_is_read_off_nvidia_smi(monkeypatch):
    values = "NVIDIA H200, 580.1, 1980, 3201, 1980, 210.5, 700.00, 41"

    def nvidia_smi(command, **_):
        assert command[0] == "nvidia-smi"
        return types.SimpleNamespace(stdout=values + "\n")

    monkeypatch.setattr(subprocess, "run", nvidia_smi)
    state = meter.gpu_state()
    assert state["name"] == "NVIDIA H200" and state["clocks.sm"] == "1980"
    assert set(state) == set(meter.GPU_FIELDS)


def test_no_nvidia_smi_is_no_state(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert meter.gpu_state() == {}
