"""Vocabulary shards: a head whose rows lie on the ranks of a process group, in rank order.

Every rank works on the same tokens and its own slice of the vocabulary. What travels, per token and
rank: one float32 target logit before the first chunk, three or four float64 row sums with each
chunk, and dhidden once at the end. Every rank combines the same numbers in the same order, so all
of them hold the same bits.
"""

import functools
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from r1kernels.check import describe

# What a call tells the other ranks of itself, after a 1 for "my arguments are fine".
AGREED = ("the number of rows", "hidden's width", "dtype, options or backend", "per-token tensors")
HEADER = 3 + len(AGREED)


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's slice of the vocabulary: columns [first, first + size) of `vocab`."""

    group: "dist.ProcessGroup"
    first: int
    size: int
    vocab: int
    chunk_rows: int  # what the workspace of every rank holds

    def local(self, targets_T: Tensor) -> Tensor:
        """The targets' columns in this slice; -1 where another rank has the target."""
        at_T = targets_T - self.first
        return torch.where((at_T >= 0) & (at_T < self.size), at_T, -1)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in place."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def in_order(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, added in rank order."""
        return functools.reduce(torch.add, _gather(x, self.group).unbind())

    def combine(self, anchor_C: Tensor, *sums_C: Tensor | None) -> tuple[Tensor | None, ...]:
        """(anchor, s, u, lost) over the whole vocabulary from this slice's, the sums in float64.

        Each rank's are around its own anchor, which differ where one was redone around a maximum;
        the result is around the largest, so that no factor overflows.

            s = sum_j exp(l_j - c)      u = sum_j exp(l_j - c) (l_j - c)      lost: a part of s
        """
        given = [anchor_C, *(x for x in sums_C if x is not None)]
        anchor_RC, *parts_RC = _gather(torch.stack([x.double() for x in given]), self.group).unbind(
            1
        )
        top_C = anchor_RC.amax(0)
        step_RC = anchor_RC - top_C
        # A rank without any mass may have any anchor, -inf too.
        factor_RC = torch.where(parts_RC[0] == 0, 0.0, step_RC.exp())
        if len(sums_C) > 1 and sums_C[1] is not None:
            parts_RC[1] = parts_RC[1] + torch.where(factor_RC == 0, 0.0, step_RC * parts_RC[0])
        totals = iter(functools.reduce(torch.add, (factor_RC * x).unbind()) for x in parts_RC)
        return top_C.to(anchor_C.dtype), *(None if x is None else next(totals) for x in sums_C)


def local_head(
    weight: object, bias: object, group: "dist.ProcessGroup | None"
) -> tuple[object, object, str]:
    """This rank's weight and bias as plain tensors, and the group's name for an op schema.

    The name is "" where no other rank takes part.

    Raises: TypeError when group is no process group; ValueError on a DTensor that is not split by
        rows over exactly this group.
    """
    if group is None:
        return weight, bias, ""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {describe(group)}")
    local = (_local(name, x, group) for name, x in (("weight", weight), ("bias", bias)))
    return *local, group.group_name if group.size() > 1 else ""


def _local(name: str, x: object, group: "dist.ProcessGroup") -> object:
    if not hasattr(x, "placements"):
        return x
    mesh, found = x.device_mesh, False
    for dim, placement in enumerate(x.placements):
        over = mesh.get_group(dim)
        if over.group_name == group.group_name and mesh.get_local_rank(dim) == group.rank():
            found = type(placement).__name__ == "Shard" and placement.dim == 0
        elif not placement.is_replicate():
            found = False
            break
    if not found:
        raise ValueError(
            f"{name} must be a DTensor with Shard(0) over `group` and replicated over every other "
            f"dimension of its mesh, in rank order; got {x.placements} on {mesh}"
        )
    return x.to_local()


@contextmanager
def refusals_told(group: "dist.ProcessGroup | str | object") -> Iterator[None]:
    """What this rank refuses within the block is an error on the other ranks, not a long wait.

    RuntimeError too: a backend asked for by name may refuse one rank's slice alone.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if isinstance(group, str):
            group = dist.distributed_c10d._resolve_process_group(group) if group else None
        if isinstance(group, dist.ProcessGroup) and group.size() > 1:
            _gather(torch.zeros(HEADER, dtype=torch.int64, device=_device(group)), group)
        raise


def join(
    group: str, size: int, chunk_rows: int, hidden_TD: Tensor, agreed: Iterable[object]
) -> Shard:
    """This rank's slice, once the ranks agree on the call.

    One exchange of a few integers, read by the host.

    Args:
        size: rows of this rank's weight.
        chunk_rows: what this rank's workspace holds; all take the fewest.
        agreed: what must be equal on all ranks: per-token tensors, bit for bit, and options.

    Raises: ValueError on every rank where they differ, RuntimeError where one refused its
        arguments.
    """
    ranks = dist.distributed_c10d._resolve_process_group(group)
    tensors = [x for x in agreed if isinstance(x, Tensor)]
    options = repr([None if isinstance(x, Tensor) else (x,) for x in agreed])
    told = (1, size, chunk_rows, *hidden_TD.shape, zlib.crc32(options.encode()), 0)
    header = torch.tensor(told, dtype=torch.int64, device=_device(ranks))
    header[-1] = _fingerprint(tensors)
    headers = _gather(header, ranks).tolist()
    refused = [rank for rank, header in enumerate(headers) if not header[0]]
    if refused:
        raise RuntimeError(f"group: ranks {refused} refused their arguments; see their errors")
    for at, what in enumerate(AGREED, HEADER - len(AGREED)):
        others = [rank for rank, header in enumerate(headers) if header[at] != headers[0][at]]
        if others:
            raise ValueError(
                f"group: {what} must be the same on every rank; ranks {others} differ from rank 0"
            )
    sizes = [header[1] for header in headers]
    first = sum(sizes[: ranks.rank()])
    return Shard(ranks, first, size, sum(sizes), min(header[2] for header in headers))


def _fingerprint(tensors: list[Tensor]) -> Tensor | int:
    """A number that depends on every bit of every tensor and on its place."""
    total = 0
    for x in tensors:
        bytes_N = x.contiguous().view(torch.uint8).long()
        place_N = torch.arange(1, len(bytes_N) + 1, device=x.device)
        total = 31 * total + (bytes_N * place_N).sum()
    return total


def _gather(x: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """Every rank's x, [ranks, *x.shape]."""
    out = x.new_empty((group.size(), *x.shape))
    dist.all_gather(list(out.unbind()), x, group=group)
    return out


def _device(group: "dist.ProcessGroup") -> torch.device:
    """Where a collective of the group may take a tensor from; the host where that is possible."""
    return min(group._device_types, key=lambda device: device.type != "cpu")
