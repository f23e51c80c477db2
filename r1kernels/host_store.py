"""Tensors of a GPU that wait in pinned host memory until they are needed again.

A copy out starts when a tensor is put, on a stream of its own, and overlaps with whatever the
current stream does next; a copy back starts at `prefetch`, on a second one. The host never waits.
What keeps the three streams apart, each an event that one of them waits for:

    copy out     waits for the current stream, which makes the tensor, and for the last copy that
                 read the same pinned blocks
    copy back    waits for the current stream, which may still use the memory that the new tensor
                 got, and for the copy out of the same tensor
    current      waits for the copy out before it lets the tensor's memory go, and for the copy back
                 before it uses the new tensor or lets it go

So memory becomes free at fixed places of the program, whatever the host's lead over the GPU.
"""

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import check
from r1kernels.pinned_pool import BLOCK, PinnedPool

PLAIN = Tensor, torch.nn.Parameter
SMALL = 1 << 20  # a tensor of fewer bytes is not worth a block and stays where it is


class Usage(NamedTuple):
    """Bytes of a store: on the device, in pinned blocks that hold a tensor, and pinned in all."""

    device: int
    host: int
    pinned: int


class Handle:
    """A tensor that was put into a HostStore, whose memory is free again when the handle is gone.

    This one holds the tensor itself, where it is.
    """

    def __init__(self, tensor: Tensor):
        # An alias without a graph. It shares the counter of in-place changes.
        self._tensor: Tensor | None = tensor.detach()
        self._version = None if tensor.is_inference() else tensor._version

    def prefetch(self) -> None:
        """Start to bring the tensor back to its device, unless it is there or on its way."""

    def take(self) -> Tensor:
        """The tensor on its device, in order with the current stream, any number of times.

        Raises: RuntimeError when the tensor was modified in place since it was put.
        """
        self._check()
        return self._tensor

    def _check(self) -> None:
        if self._version is not None and self._tensor._version != self._version:
            raise RuntimeError(
                f"a tensor of shape {list(self._tensor.shape)} was modified in place after it was "
                f"put into a HostStore: version {self._tensor._version}, was {self._version}"
            )


class HostStore:
    """A pool of pinned host memory and the tensors in it.

    Tensors stay on the device, the latest ones, while they are device_bytes in all; the others go
    to the host, oldest first. The memory of a tensor that is being copied out becomes free at the
    next `put`, so the tensor that was put last is on the device in any case. Tensors on a CPU, or
    of less than 1 MiB, are held as they are, uncounted: without a GPU nothing is copied.

    Args:
        device_bytes: bytes of tensors that may stay on the device.
        host_bytes: the most to be pinned; None: all there is but 1 GiB, by what the kernel and the
            control groups of this process say when more is needed.
        streams: None: CUDA's. Anything with the methods of `CudaStreams`.

    Raises: ValueError on negative sizes.
    """

    def __init__(
        self,
        device_bytes: int = 0,
        *,
        host_bytes: int | None = None,
        streams: "CudaStreams | None" = None,
    ):
        for name, value in (("device_bytes", device_bytes), ("host_bytes", host_bytes or 0)):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        self.device_bytes = device_bytes
        self._pool = PinnedPool(host_bytes)
        self._given_streams = streams
        self._streams: dict[torch.device, CudaStreams] = {}
        self._handles: list[weakref.ref[_HostHandle]] = []  # in the order of their puts
        self._lock = threading.RLock()

    def put(self, tensor: Tensor, *, more: bool = False) -> Handle:
        """A handle that gives the tensor back, bit for bit, with its strides if it is dense.

        Args:
            tensor: any dtype and shape; its values must not change any more.
            more: it goes with the `put` before, whose copy is not waited for yet.

        Raises: HostMemoryError when the host has no room; TypeError on a tensor subclass;
            RuntimeError when a tensor on its way out was modified in place.
        """
        check.tensor("tensor", tensor)
        with self._lock:
            handles = self._alive()
            if not more:
                for old in handles:
                    old.let_go()
            if tensor.nbytes < SMALL or not (tensor.is_cuda or self._given_streams):
                return Handle(tensor)
            if type(tensor) not in PLAIN:
                raise TypeError(f"a HostStore takes plain tensors, got a {type(tensor).__name__}")
            handles.append(_HostHandle(tensor, self._pool, self._streams_of(tensor.device)))
            self._handles = [weakref.ref(handle) for handle in handles]
            resident = [handle for handle in handles if not handle.blocks]
            excess = sum(handle.nbytes for handle in resident) - self.device_bytes
            # Oldest first: the latest are needed first, and their memory is free again first.
            for old in resident:
                if excess > 0:
                    old.copy_out()
                    excess -= old.nbytes
            return handles[-1]

    def usage(self) -> Usage:
        """Bytes in use now, in the order of the program: the device may be behind."""
        with self._lock:
            on_device = sum(handle.on_device() for handle in self._alive())
            return Usage(on_device, self._pool.used, self._pool.pinned)

    def release(self) -> None:
        """Unpin everything, here and what torch keeps unused; the store can be used again.

        Raises: RuntimeError while tensors are on the host.
        """
        with self._lock:
            if used := self._pool.used:
                raise RuntimeError(f"{used} bytes are still on the host: drop their handles first")
            for streams in self._streams.values():
                streams.synchronize()
            self._pool.clear()
            for streams in self._streams.values():
                streams.unpin_unused()

    def __reduce__(self):
        # A copied or saved model brings an empty store of the same size.
        return partial(HostStore, host_bytes=self._pool.limit), (self.device_bytes,)

    def _alive(self) -> list["_HostHandle"]:
        return [handle for reference in self._handles if (handle := reference()) is not None]

    def _streams_of(self, device: torch.device) -> "CudaStreams":
        if device not in self._streams:
            self._streams[device] = self._given_streams or CudaStreams(device)
        return self._streams[device]


class _HostHandle(Handle):
    """A tensor of a device with streams: there, in blocks of the host, or on its way."""

    def __init__(self, tensor: Tensor, pool: PinnedPool, streams: "CudaStreams"):
        super().__init__(tensor)
        # The strides of a dense tensor, as empty_like keeps them, or of a dense copy.
        self._stride = torch.empty_like(tensor, device="meta").stride()
        self._size, self._dtype, self.nbytes = tensor.shape, tensor.dtype, tensor.nbytes
        self._pool, self._streams = pool, streams
        self.blocks: list[tuple[Tensor, object]] = []
        self._source: Tensor | None = None  # what is being copied out
        self._loaded: Tensor | None = None  # what has been prefetched
        # The stream that owns the memory of _source or _loaded, and the events of the two copies.
        self._owner = self._written = self._read = None

    def on_device(self) -> int:
        return self.nbytes * sum(x is not None for x in (self._tensor, self._loaded))

    def copy_out(self) -> None:
        self._check()
        streams, source = self._streams, self._tensor
        self.blocks = self._pool.take(self.nbytes, streams)
        self._owner = streams.current()
        if source.stride() != self._stride:
            source = streams.empty(self._size, self._stride, self._dtype).copy_(source)
        streams.wait(streams.out, streams.record(self._owner))
        for event in {event for _, event in self.blocks} - {None}:
            streams.wait(streams.out, event)
        streams.copy(streams.out, [(block, part) for part, block in self._parts(source)])
        self._written, self._source = streams.record(streams.out), source

    def let_go(self) -> None:
        """Drop what has been copied out, once the copy is done in the order of the device."""
        if self._source is not None:
            self._check()
            self._streams.wait(self._owner, self._written)
            self._source = self._tensor = None

    def prefetch(self) -> None:
        if self._tensor is not None or self._loaded is not None:
            return
        streams = self._streams
        self._owner = streams.current()
        tensor = streams.empty(self._size, self._stride, self._dtype)
        streams.wait(streams.back, streams.record(self._owner))
        streams.wait(streams.back, self._written)
        streams.copy(streams.back, list(self._parts(tensor)))
        self._read, self._loaded = streams.record(streams.back), tensor

    def take(self) -> Tensor:
        if self._tensor is not None:
            return super().take()
        self.prefetch()
        tensor, self._loaded = self._loaded, None
        current = self._streams.current()
        self._streams.wait(current, self._read)
        if current != self._owner:
            self._streams.share(tensor, current)
        return tensor

    def _parts(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(part of a dense tensor, its place in a block), as bytes."""
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        for part, (block, _) in zip(flat.split(BLOCK), self.blocks, strict=True):
            yield part, block[: len(part)]

    def __del__(self):
        if not getattr(self, "blocks", None):
            return
        last = self._read or self._written
        if self._source is not None or self._loaded is not None:
            self._streams.wait(self._owner, last)
        self._pool.give(self.blocks, last)


class CudaStreams:
    """A device's two streams for copies, and what else a HostStore asks of CUDA."""

    def __init__(self, device: torch.device):
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event that has happened when all that is in the stream now is done."""
        return stream.record_event()

    def wait(self, stream: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        """What comes into the stream from now on starts after the event."""
        stream.wait_event(event)

    def copy(self, stream: torch.cuda.Stream, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy from second to first of each pair; the host does not wait."""
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def empty(self, size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory that belongs to the current stream."""
        return torch.empty_strided(size, stride, dtype=dtype, device=self.device)

    def share(self, tensor: Tensor, stream: torch.cuda.Stream) -> None:
        """The stream uses the tensor too: its memory is not free before that is done."""
        tensor.record_stream(stream)

    def pinned(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def unpin_unused(self) -> None:
        """Give the system the pinned memory that torch keeps for its next allocation."""
        # Public in newer torch.
        public = getattr(torch.accelerator, "empty_host_cache", None)
        (public or torch._C._host_emptyCache)()

    def synchronize(self) -> None:
        self.out.synchronize()
        self.back.synchronize()
