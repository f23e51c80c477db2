"""Stand-ins for a GPU's streams and memory, for a HostStore on a CPU."""

import itertools
import random
import weakref

import numpy as np
import torch
from torch import Tensor

POISON = 0xEE
SLOT = 128
STREAMS = ("main", "other", "out", "back")


class EagerStreams:
    """Copies are done at once; what the store asked for is in `log`."""

    out, back = "out", "back"

    def __init__(self):
        self.log: list[str] = []

    def current(self) -> str:
        return "main"

    def record(self, stream: str) -> object:
        return object()

    def wait(self, stream: str, event: object) -> None:
        pass

    def copy(self, stream: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.log.append(stream)
        for target, source in pairs:
            target.copy_(source)

    def empty(self, size, stride, dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    def share(self, tensor: Tensor, stream: str) -> None:
        pass

    def pinned(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def unpin_unused(self) -> None:
        self.log.append("unpin")

    def synchronize(self) -> None:
        pass


class LateStreams:
    """Nothing runs before `run`, which then interleaves the streams in any order that waits allow.

    Device memory that nobody holds is used again at once: by a write of POISON on the stream that
    it belongs to. A `check` that sees another value than it should, and a copy of memory that is
    somebody else's by then, are errors. Waits of the first stream in `forgotten` for the second are
    left out.
    """

    out, back = "out", "back"

    def __init__(self, forgotten: tuple[str, str] | None = None, sharing: bool = True):
        self.now, self.forgotten, self.sharing = "main", forgotten, sharing
        self.queues: dict[str, list[tuple]] = {name: [] for name in STREAMS}
        self.memory = np.zeros(64 * SLOT, np.uint8)
        # As in torch's allocator, memory that a stream got stays that stream's.
        self.slots = {name: list(range(16 * i, 16 * i + 16)) for i, name in enumerate(STREAMS)}
        self.kept: list[np.ndarray] = []
        self.shared: dict[int, list[str]] = {}

    def current(self) -> str:
        return self.now

    def record(self, stream: str) -> tuple[str, int]:
        return stream, len(self.queues[stream])

    def wait(self, stream: str, event: tuple[str, int]) -> None:
        if (stream, event[0]) != self.forgotten:
            self.queues[stream].append(("wait", *event))

    def copy(self, stream: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in pairs:
            places = target.data_ptr(), source.data_ptr()
            self.queues[stream].append(("copy", *places, target.nbytes))

    def empty(self, size, stride, dtype) -> Tensor:
        nbytes, slot = size.numel() * dtype.itemsize, self.slots[self.now].pop()
        place = self.memory[slot * SLOT : slot * SLOT + nbytes]
        # Torch holds the array as long as anything holds the tensor's storage.
        weakref.finalize(place, self._freed, slot, nbytes, self.now).atexit = False
        return torch.from_numpy(place).view(dtype).as_strided(size, stride)

    def share(self, tensor: Tensor, stream: str) -> None:
        if self.sharing:
            slot = (tensor.data_ptr() - self.memory.ctypes.data) // SLOT
            self.shared.setdefault(slot, []).append(stream)

    def pinned(self, nbytes: int) -> Tensor:
        self.kept.append(np.zeros(nbytes, np.uint8))
        return torch.from_numpy(self.kept[-1])

    def unpin_unused(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def _freed(self, slot: int, nbytes: int, owner: str) -> None:
        for stream in self.shared.pop(slot, []):
            self.queues[owner].append(("wait", *self.record(stream)))
        address = self.memory.ctypes.data + slot * SLOT
        self.queues[owner].append(("fill", address, nbytes, POISON))
        self.slots[owner].append(slot)

    # What the program under test does on its current stream.

    def made(self, value: int, nbytes: int = 96) -> Tensor:
        tensor = self.empty(torch.Size([nbytes]), (1,), torch.uint8)
        self.queues[self.now].append(("fill", tensor.data_ptr(), nbytes, value))
        return tensor

    def check(self, tensor: Tensor, value: int) -> None:
        self.queues[self.now].append(("check", tensor.data_ptr(), tensor.nbytes, value))

    def join(self, stream: str) -> None:
        """The current stream waits for another, as a program of several streams does."""
        self.queues[self.now].append(("wait", *self.record(stream)))

    def run(self, choose: random.Random | tuple[str, ...]) -> int:
        """Errors of one order: that of a random source, or the first stream that can go on."""
        at = dict.fromkeys(STREAMS, 0)
        errors = 0
        self.memory[:] = 0
        for slab in self.kept:
            slab[:] = 0
        while any(at[s] < len(self.queues[s]) for s in STREAMS):
            ready = [s for s in STREAMS if at[s] < len(self.queues[s]) and self._can_go(s, at)]
            assert ready, "the streams wait for each other"
            stream = (
                choose.choice(ready)
                if isinstance(choose, random.Random)
                else next(s for s in choose if s in ready)
            )
            errors += self._step(*self.queues[stream][at[stream]])
            at[stream] += 1
        return errors

    def worst(self) -> int:
        """The most errors over all orders of precedence and some random ones."""
        orders = [*itertools.permutations(STREAMS), *map(random.Random, range(10))]
        return max(map(self.run, orders))

    def _can_go(self, stream: str, at: dict[str, int]) -> bool:
        kind, *what = self.queues[stream][at[stream]]
        return kind != "wait" or at[what[0]] >= what[1]

    def _step(self, kind: str, *what) -> int:
        if kind == "wait":
            return 0
        if kind == "copy":
            to, start, nbytes = what
            source, target = self._bytes(start, nbytes), self._bytes(to, nbytes)
            target[:] = source
            return int((source == POISON).any())
        address, nbytes, value = what
        place = self._bytes(address, nbytes)
        if kind == "check":
            return int((place != value).any())
        place[:] = value
        return 0

    def _bytes(self, address: int, nbytes: int) -> np.ndarray:
        for memory in (self.memory, *self.kept):
            start = address - memory.ctypes.data
            if 0 <= start < len(memory):
                return memory[start : start + nbytes]
        raise AssertionError("a copy of memory that is nobody's")
