"""HostStore and its pool: tensors come back, in any order of the streams; budgets; errors."""

import copy
import gc
import pickle

import pytest
import torch

from r1kernels import host_store, pinned_pool
from r1kernels.host_store import HostStore
from r1kernels.pinned_pool import HostMemoryError, available_host_bytes
from tests.ops.fake_streams import EagerStreams, LateStreams

LAYERS = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A tensor of 96 bytes takes two blocks, a slab has four."""
    monkeypatch.setattr(host_store, "SMALL", 16)
    monkeypatch.setattr(host_store, "BLOCK", 64)
    monkeypatch.setattr(pinned_pool, "BLOCK", 64)
    monkeypatch.setattr(pinned_pool, "SLAB", 256)
    monkeypatch.setattr(pinned_pool, "available_host_bytes", lambda: 1 << 40)


def train(streams: LateStreams, device_bytes: int = 0, steps: int = 3) -> HostStore:
    """Forwards that put what each layer takes, and backwards that take it, as a model does."""
    store = HostStore(device_bytes, streams=streams)
    for step in range(steps):
        handles = []
        x = streams.made(10 * step + 1)
        for layer in range(LAYERS):
            handles.append(store.put(x))
            streams.check(x, 10 * step + layer + 1)
            x = streams.made(10 * step + layer + 2)
        del x
        for layer in reversed(range(LAYERS)):
            if layer:
                handles[layer - 1].prefetch()
            again = handles.pop().take()
            streams.made(200)
            streams.check(again, 10 * step + layer + 1)
            del again
    return store


def take_on_another_stream(streams: LateStreams) -> HostStore:
    """One stream puts, another takes what was put before it last waited for the first."""
    store = HostStore(streams=streams)
    handles = [store.put(streams.made(value)) for value in (1, 2)]
    # The copy of the second is let go only now, unseen by the other stream.
    streams.now = "other"
    streams.join("main")
    streams.now = "main"
    handles.append(store.put(streams.made(3)))
    streams.now = "other"
    again = handles[1].take()
    streams.check(again, 2)
    del again, handles[1]
    # The second of these gets the blocks that the other stream's copy has read.
    streams.now = "main"
    handles += [store.put(streams.made(value)) for value in (4, 5)]
    streams.check(handles[0].take(), 1)
    return store


def prefetch_on_one_stream_and_take_on_another(streams: LateStreams) -> HostStore:
    store = HostStore(streams=streams)
    handles = [store.put(streams.made(value)) for value in (1, 2)]
    handles[0].prefetch()
    streams.now = "other"
    again = handles[0].take()
    streams.check(again, 1)
    del again
    return store


def drop_in_between(streams: LateStreams) -> HostStore:
    """Handles go away while their copies are under way."""
    store = HostStore(streams=streams)
    handles = [store.put(streams.made(value)) for value in (1, 2, 3)]
    handles[0].prefetch()
    del handles[0], handles[-1]
    for value in (4, 5):
        handles.append(store.put(streams.made(value)))
        streams.made(100)
    for handle, value in zip(handles, (2, 4, 5), strict=True):
        streams.check(handle.take(), value)
    return store


@pytest.mark.parametrize("device_bytes", [0, 96, 200, 10_000])
def test_training_in_every_order_of_the_streams(device_bytes):
    streams = LateStreams()
    store = train(streams, device_bytes)
    assert streams.worst() == 0
    assert (store.usage().host, store.usage().device) == (0, 0)
    copies = sum(op[0] == "copy" for op in streams.queues["out"])
    assert copies == 3 * 2 * {0: LAYERS, 96: LAYERS - 1, 200: LAYERS - 2, 10_000: 0}[device_bytes]


@pytest.mark.parametrize(
    "program",
    [take_on_another_stream, prefetch_on_one_stream_and_take_on_another, drop_in_between],
)
def test_programs_in_every_order_of_the_streams(program):
    streams = LateStreams()
    store = program(streams)
    assert streams.worst() == 0
    assert store.usage().host == 0


@pytest.mark.parametrize(
    ("program", "forgotten"),
    [
        (train, ("out", "main")),
        (train, ("main", "out")),
        (train, ("back", "main")),
        (train, ("main", "back")),
        (take_on_another_stream, ("back", "out")),
        (take_on_another_stream, ("out", "back")),
        (drop_in_between, ("main", "out")),
        (drop_in_between, ("main", "back")),
    ],
)
def test_no_wait_can_be_left_out(program, forgotten):
    streams = LateStreams(forgotten)
    program(streams)
    assert streams.worst() > 0


def test_sharing_memory_with_another_stream_cannot_be_left_out():
    streams = LateStreams(sharing=False)
    prefetch_on_one_stream_and_take_on_another(streams)
    assert streams.worst() > 0


def random_tensor(shape, dtype):
    x = torch.randn(shape)
    return x.to(dtype) if dtype.is_floating_point else (x > 0).to(dtype)


@pytest.mark.parametrize(
    "x",
    [
        random_tensor((3, 5), torch.float32),
        random_tensor((3, 5), torch.float64).T,
        random_tensor((2, 6, 7), torch.bfloat16).transpose(1, 2),
        random_tensor((65,), torch.bool),
        random_tensor((8, 9), torch.float32)[1:7, 2:8],
        random_tensor((9, 1, 4), torch.float16)[:, :, 1:],
        random_tensor((8,), torch.float64).expand(3, 8),
        random_tensor((4, 3, 5), torch.float32).transpose(0, 2)[1:4],
    ],
    ids=["plain", "transposed", "bfloat16", "bool", "gaps", "unit", "expanded", "both"],
)
def test_values_and_strides_come_back(x):
    store = HostStore(streams=EagerStreams())
    handle, later = store.put(x), store.put(torch.zeros(40))
    assert store.usage().device == later.nbytes
    for _ in range(2):
        again = handle.take()
        assert torch.equal(again, x) and again.dtype == x.dtype
        assert again.stride() == torch.empty_like(x).stride()
        assert again.data_ptr() != x.data_ptr()


def test_the_last_and_the_budget_stay_on_the_device():
    for budget, copied in ((0, 4), (399, 4), (400, 3), (800, 2), (1600, 0)):
        streams = EagerStreams()
        store = HostStore(budget, streams=streams)
        handles = [store.put(torch.full((100,), float(i))) for i in range(4)]
        assert streams.log == ["out"] * copied, budget
        assert store.usage().device == max(budget // 400 + 1, 1) * 400 - 400 * (copied == 0)
        assert store.usage().host == copied * 7 * 64
        assert [float(h.take()[0]) for h in handles] == [0, 1, 2, 3]
        # What was put last is there without a copy back; what was prefetched is not fetched again.
        assert streams.log[copied:] == ["back"] * max(copied - 1, 0)


def test_more_does_not_wait_for_what_it_goes_with():
    store = HostStore(streams=EagerStreams())
    handles = [store.put(torch.zeros(20)), *(store.put(torch.ones(20), more=True) for _ in "ab")]
    assert store.usage().device == 3 * 80
    handles.append(store.put(torch.zeros(20)))
    assert store.usage().device == 80
    # One that stays where it is makes room as well.
    handles.append(store.put(torch.zeros(3)))
    assert store.usage().device == 0


def test_blocks_are_used_again_by_tensors_of_any_size_and_without_the_collector():
    gc.disable()
    try:
        store = HostStore(streams=EagerStreams())
        for floats in (100, 37, 64, 5, 100):
            handles = [store.put(torch.zeros(floats)) for _ in range(3)]
            handles[0].prefetch()
            most = store.usage().pinned
            del handles
            assert store.usage() == (0, 0, 3 * 7 * 64 // 256 * 256 + 256)
            assert most == store.usage().pinned
        store.release()
        assert store.usage() == (0, 0, 0) and store._streams[torch.device("cpu")].log[-1] == "unpin"
    finally:
        gc.enable()


def test_a_host_without_room_is_an_error_that_says_what_to_do(monkeypatch):
    store = HostStore(streams=EagerStreams(), host_bytes=512)
    first = store.put(torch.zeros(50))
    with pytest.raises(HostMemoryError, match=r"1200 bytes needs 1280 bytes more .* and 256 are"):
        store.put(torch.zeros(300))
    with pytest.raises(MemoryError, match=r"host_bytes is 512\): let .* with device_bytes"):
        store.put(torch.zeros(300))
    # The pool is as it was.
    assert store.usage() == (0, 256, 256) and torch.equal(first.take(), torch.zeros(50))

    with monkeypatch.context() as patch:
        patch.setattr(pinned_pool, "available_host_bytes", lambda: pinned_pool.RESERVE + 100)
        with pytest.raises(HostMemoryError, match=r"256 bytes more of .*, and 100 are"):
            HostStore(streams=EagerStreams()).put(torch.zeros(50))

    room = [pinned_pool.RESERVE + 255, pinned_pool.RESERVE + 256]
    with monkeypatch.context() as patch:
        patch.setattr(pinned_pool, "available_host_bytes", lambda: room.pop(0))
        streams = EagerStreams()
        # What torch keeps pinned and unused makes room.
        held = HostStore(streams=streams).put(torch.zeros(50))
        assert streams.log == ["unpin", "out"] and held.nbytes == 200

    class Locked(EagerStreams):
        def pinned(self, nbytes):
            raise RuntimeError("CUDA error: out of memory")

    with pytest.raises(HostMemoryError, match=r"could not be pinned .* out of memory"):
        HostStore(streams=Locked()).put(torch.zeros(50))


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_counts(tmp_path, version):
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "memory"),
        2: ("memory.max", "memory.current", "inactive_file", ""),
    }[version]

    def group(path, limit, used, cache):
        folder = tmp_path / "sys/fs/cgroup" / names[3] / path
        folder.mkdir(parents=True, exist_ok=True)
        texts = str(limit), str(used), f"anon 7\n{names[2]} {cache}"
        for name, text in zip((*names[:2], "memory.stat"), texts, strict=True):
            (folder / name).write_text(text + "\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:  3000 kB\n")
    lines = {1: "3:cpuset:/\n4:cpu,memory:/a/b\n", 2: "0::/a/b\n"}[version]
    (tmp_path / "proc/self/cgroup").write_text(lines)
    assert available_host_bytes(tmp_path) == 3000 * 1024
    group("a/b", "max" if version == 2 else 2**63 - 4096, 900_000, 0)
    assert available_host_bytes(tmp_path) == 3000 * 1024
    group("a", 1_000_000, 900_000, 50_000)
    assert available_host_bytes(tmp_path) == 150_000
    # Inside a container the group's own path is not there.
    (tmp_path / "proc/self/cgroup").write_text(lines.replace("/a/b", "/elsewhere"))
    assert available_host_bytes(tmp_path) == 3000 * 1024
    group(".", 200_000, 100_000, 0)
    assert available_host_bytes(tmp_path) == 100_000


def test_this_machine_says_what_it_has():
    assert 0 < available_host_bytes() < 1 << 50


def test_a_change_in_place_is_an_error():
    store = HostStore(streams=EagerStreams())
    x = torch.zeros(20)
    handle = store.put(x)
    x[0] = 1
    with pytest.raises(RuntimeError, match=r"shape \[20\] was modified in place"):
        handle.take()
    with pytest.raises(RuntimeError, match="modified in place"):
        store.put(torch.zeros(20))


def test_a_cpu_tensor_is_held_and_never_copied():
    x = torch.randn(1 << 18)
    store = HostStore()
    handle = store.put(x)
    handle.prefetch()
    assert handle.take().data_ptr() == x.data_ptr() and store.usage() == (0, 0, 0)
    x += 1
    with pytest.raises(RuntimeError, match="modified in place"):
        handle.take()
    with torch.inference_mode():
        assert store.put(torch.zeros(4)).take().shape == (4,)


def test_a_copy_is_an_empty_store_of_the_same_size():
    store = HostStore(7, host_bytes=900, streams=EagerStreams())
    held = store.put(torch.zeros(50))
    for again in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert (again.device_bytes, again._pool.limit) == (7, 900)
        assert again.usage() == (0, 0, 0)
    assert store.usage().host == 256 and held.nbytes == 200


def test_bad_arguments():
    with pytest.raises(ValueError, match="device_bytes must not be negative, got -1"):
        HostStore(-1)
    with pytest.raises(ValueError, match="host_bytes must not be negative"):
        HostStore(host_bytes=-5)
    with pytest.raises(TypeError, match="tensor must be a tensor, got list"):
        HostStore().put([1.0])

    class Special(torch.Tensor):
        pass

    store = HostStore(streams=EagerStreams())
    with pytest.raises(TypeError, match="plain tensors, got a Special"):
        store.put(torch.zeros(20).as_subclass(Special))
    held = store.put(torch.zeros(50))
    with pytest.raises(RuntimeError, match="256 bytes are still on the host"):
        store.release()
    del held
