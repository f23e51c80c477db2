"""What only a GPU can show of offloading: copies beside the work, memory, exactness under load."""

import gc
import importlib
import statistics
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from r1kernels import HostStore, offloaded_checkpoint, varlen_attention
from r1kernels.host_store import CudaStreams
from r1kernels.pinned_pool import SLAB, HostMemoryError

pytestmark = pytest.mark.gpu

T, D, LAYERS = 16384, 2048, 8
NBYTES = 2 * T * D
torch_checkpoint = partial(checkpoint, use_reentrant=False)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(nn.functional.silu(self.up(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).view(len(x), 3, D // 128, 128).unbind(1)
        offsets = torch.tensor([0, len(x) // 3, len(x)])
        return x + self.out(varlen_attention(*parts, offsets).flatten(1))


@pytest.fixture(scope="module")
def model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer() for _ in range(LAYERS)).to("cuda", torch.bfloat16)


@pytest.fixture(autouse=True)
def empty_cache():
    yield
    torch.cuda.empty_cache()


def forward(layers, how, tokens: int = T) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(tokens, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    hidden = x * 2
    for layer in layers:
        hidden = how(layer, hidden)
    return x, hidden


def gradients(layers, how, wanted=(), tokens: int = T) -> list[Tensor]:
    x, hidden = forward(layers, how, tokens)
    return [hidden.detach(), *torch.autograd.grad(hidden.float().square().sum(), [x, *wanted])]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("device_bytes", [0, 3 * NBYTES, 100 * NBYTES])
def test_gradients_are_those_of_torchs_checkpoint(model, device_bytes):
    store = HostStore(device_bytes)
    wanted = list(model.parameters())
    expected = gradients(model, torch_checkpoint, wanted)
    for _ in range(3):
        found = gradients(model, partial(offloaded_checkpoint, store=store), wanted)
        assert equal(found, expected)
    assert store.usage()[:2] == (0, 0)
    assert (store.usage().pinned == 0) == (device_bytes == 100 * NBYTES)


def test_copies_slower_than_the_work_are_waited_for():
    """Layers of one small kernel: every copy is late, and every block is used again at once."""
    store = HostStore()
    layers = [torch.sin, torch.tanh, torch.cos, torch.sigmoid] * 8
    expected = gradients(layers, torch_checkpoint)
    for _ in range(5):
        assert equal(gradients(layers, partial(offloaded_checkpoint, store=store)), expected)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = gradients(layers, partial(offloaded_checkpoint, store=store))
    side.synchronize()
    assert equal(found, expected)


def test_inputs_are_not_on_the_device(model):
    def measure(how) -> tuple[int, int]:
        gradients(model, how)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        x, hidden = forward(model, how)
        held = torch.cuda.memory_allocated() - before
        torch.autograd.grad(hidden.float().sum(), x)
        return held, torch.cuda.max_memory_allocated() - before

    theirs = measure(torch_checkpoint)
    ours = measure(partial(offloaded_checkpoint, store=HostStore()))
    # Theirs hold x, the last layer's output and every input; ours the first two and one input.
    assert theirs[0] >= (LAYERS + 2) * NBYTES
    assert ours[0] <= 3.1 * NBYTES
    # In the backward at most two inputs are there, that of the layer and the one before it.
    assert ours[1] <= theirs[1] - (LAYERS - 2.1) * NBYTES


def test_attention_comes_from_the_store(monkeypatch):
    torch.manual_seed(0)
    layers = nn.ModuleList(Attention() for _ in range(4)).to("cuda", torch.bfloat16)
    wanted, calls = list(layers.parameters()), []
    module = importlib.import_module("r1kernels.varlen_attention")
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *a, **o: calls.append(1) or attend(*a, **o))
    # Else the backward of attention adds in any order.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        expected = gradients(layers, torch_checkpoint, wanted)
        assert len(calls) == 8
        calls.clear()
        for device_bytes in (0, 100 * NBYTES):
            how = partial(offloaded_checkpoint, store=HostStore(device_bytes), save_attention=True)
            assert equal(gradients(layers, how, wanted), expected)
        assert len(calls) == 8
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_pool_serves_every_length(model):
    store = HostStore()
    how = partial(offloaded_checkpoint, store=store)
    gradients(model, how)
    pinned = store.usage().pinned
    assert LAYERS * NBYTES <= pinned <= LAYERS * NBYTES + SLAB
    for tokens in (T // 2, T - 100, T // 3, T):
        gradients(model, how, tokens=tokens)
        assert store.usage() == (0, 0, pinned)
    store.release()
    assert store.usage() == (0, 0, 0)


class TimedStreams(CudaStreams):
    """Notes when each copy started and ended."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.copies: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def copy(self, stream, pairs) -> None:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record(stream)
        super().copy(stream, pairs)
        end.record(stream)
        self.copies.append((start, end))


def test_copies_run_beside_the_work(model):
    streams = TimedStreams(torch.device("cuda", torch.cuda.current_device()))
    hows = {
        "plain": torch_checkpoint,
        "ours": partial(offloaded_checkpoint, store=HostStore(streams=streams)),
    }
    times: dict[str, list[float]] = {"plain": [], "ours": [], "copies": []}
    for turn in range(7):
        for name, how in hows.items():
            streams.copies.clear()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            gradients(model, how, list(model.parameters()))
            end.record()
            torch.cuda.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
        if turn >= 2:
            times["copies"].append(sum(a.elapsed_time(b) for a, b in streams.copies))
    ms = {name: statistics.median(values) for name, values in times.items()}
    # One after the other would cost all of the copies.
    assert ms["ours"] - ms["plain"] <= ms["copies"] / 4, ms


def test_a_host_without_room_is_an_error_and_no_more(model):
    store = HostStore(host_bytes=SLAB)
    with pytest.raises(HostMemoryError, match=f"host_bytes is {SLAB}"):
        gradients(model, partial(offloaded_checkpoint, store=store))
    # The exception held the graph.
    gc.collect()
    assert store.usage().host == 0
    gradients(model[:1], partial(offloaded_checkpoint, store=store))
