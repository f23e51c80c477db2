"""Pinned host memory in blocks, as far as the machine has room for it.

Memory is pinned in slabs of SLAB bytes, cut into blocks of BLOCK, and a tensor takes any blocks
that are free. Sequences of another length fit the same blocks, nothing is rounded to a power of
two, and nothing is pinned before it is needed.
"""

from collections import deque
from pathlib import Path
from typing import Protocol

from torch import Tensor

BLOCK = 4 << 20
SLAB = 64 << 20
RESERVE = 1 << 30  # host memory that is never pinned


class HostMemoryError(MemoryError):
    """Host memory has no room for the pinned buffers that were asked for."""


class Source(Protocol):
    """Where pinned memory comes from."""

    def pinned(self, nbytes: int) -> Tensor:
        """New pinned memory, uint8; RuntimeError when the system gives none."""

    def unpin_unused(self) -> None:
        """Give the system what nothing uses any more."""


class PinnedPool:
    """Blocks of pinned memory, each with the event after which it may be written again.

    Args:
        limit: the most bytes to be pinned; None: all that is available but 1 GiB.
    """

    def __init__(self, limit: int | None):
        self.limit = limit
        self._slabs: list[Tensor] = []
        # Blocks come back from finalizers, on any thread: append and popleft need no lock.
        self._free: deque[tuple[Tensor, object]] = deque()

    @property
    def pinned(self) -> int:
        """Bytes pinned."""
        return SLAB * len(self._slabs)

    @property
    def used(self) -> int:
        """Bytes in blocks that are taken."""
        return self.pinned - BLOCK * len(self._free)

    def take(self, nbytes: int, source: Source) -> list[tuple[Tensor, object]]:
        """(block, event) pairs that hold nbytes; what is missing comes from the source.

        Raises: HostMemoryError, before anything is pinned where the machine says what it has.
        """
        count = -(-nbytes // BLOCK)
        missing = (count - len(self._free)) * BLOCK
        if missing > 0:
            self._grow(-(-missing // SLAB), nbytes, source)
        return [self._free.popleft() for _ in range(count)]

    def give(self, blocks: list[tuple[Tensor, object]], event: object) -> None:
        """Take blocks back; they may be written again after the event."""
        self._free.extend((block, event) for block, _ in blocks)

    def clear(self) -> None:
        """Unpin everything. No block may be taken, and no copy under way."""
        self._free.clear()
        self._slabs.clear()

    def _room(self) -> int:
        room = max(available_host_bytes() - RESERVE, 0)
        return room if self.limit is None else min(room, self.limit - self.pinned)

    def _grow(self, slabs: int, nbytes: int, source: Source) -> None:
        if slabs * SLAB > self._room():
            # Another store's memory may still be pinned, with nobody using it.
            source.unpin_unused()
        if slabs * SLAB > (room := self._room()):
            limit = "" if self.limit is None else f", host_bytes is {self.limit}"
            raise HostMemoryError(
                f"a tensor of {nbytes} bytes needs {slabs * SLAB} bytes more of pinned host "
                f"memory, and {room} are free (beside {self.pinned} in the pool{limit}): let more "
                "bytes stay on the GPU with device_bytes, or shorten the sequences"
            )
        for _ in range(slabs):
            try:
                slab = source.pinned(SLAB)
            except RuntimeError as error:
                raise HostMemoryError(
                    f"{SLAB} bytes could not be pinned beside {self.pinned} in the pool: {error}; "
                    "raise the limit on locked memory, or let more bytes stay on the GPU with "
                    "device_bytes"
                ) from error
            self._slabs.append(slab)
            self._free.extend((block, None) for block in slab.split(BLOCK))


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that the kernel and every control group above this process would still give it.

    Page cache that can be dropped counts as free. Linux; control groups of version 1 and 2.
    """
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(meminfo["MemAvailable"].split()[0])
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container may see its own group as the top, under another path than it has outside.
        group = top / path.lstrip("/")
        for folder in (f for f in (group, *group.parents) if f == top or top in f.parents):
            if not (folder / names[0]).exists():
                continue
            limit, used = ((folder / name).read_text().strip() for name in names[:2])
            stat = dict(s.split() for s in (folder / "memory.stat").read_text().splitlines())
            if limit != "max":
                free = min(free, int(limit) - int(used) + int(stat.get(names[2], 0)))
    return free
