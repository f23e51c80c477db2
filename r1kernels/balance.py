"""Sequences in micro-batches that fit, and over ranks that finish together."""

import heapq
import operator
from bisect import bisect_left
from collections.abc import Callable, Sequence

from r1kernels.model_shape import ModelShape


def pack_by_budget(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    max_bytes: int | None = None,
    bytes_of: Callable[[int], int] | None = None,
) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `max_tokens`: first fit, longest first.

    Which sequences share a micro-batch; `packing.pack` then lays them end to end. A length above
    max_tokens gets a bin of its own. Inside a bin the indices are ascending. The same lengths give
    the same bins on every machine.

    Args:
        lengths: tokens of each sequence, integers.
        max_tokens: of a bin.
        max_bytes: predicted peak of a bin, too; with bytes_of.
        bytes_of: peak bytes of so many packed tokens, never falling: for one,
            `lambda tokens: peak_bytes(shape, tokens, mode="stream").device`.

    Raises: ValueError on a negative length, a budget below 1, max_bytes without bytes_of or the
        reverse, and for a sequence that alone is predicted to need more than max_bytes.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected a positive number of tokens, got {max_tokens}")
    lengths = _whole(lengths)
    if (max_bytes is None) != (bytes_of is None):
        raise ValueError("max_bytes and bytes_of belong together: give both or neither")
    if max_bytes is not None and lengths:
        longest = max(range(len(lengths)), key=lambda i: lengths[i])
        needed = bytes_of(lengths[longest])
        if needed > max_bytes:
            raise ValueError(
                f"lengths[{longest}]: {lengths[longest]} tokens are predicted to take "
                f"{needed / 1e9:.2f} GB, more than max_bytes, {max_bytes / 1e9:.2f} GB"
            )
        if max_tokens > lengths[longest] and bytes_of(max_tokens) > max_bytes:
            max_tokens = largest_tokens(bytes_of, max_bytes)
    contents: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            contents.append([])
            room.append(max_tokens)
            place = len(room) - 1
        contents[place].append(index)
        room[place] -= lengths[index]
    return [sorted(content) for content in contents]


def largest_tokens(bytes_of: Callable[[int], int], max_bytes: int) -> int:
    """Most tokens with bytes_of(tokens) <= max_bytes, where bytes_of never falls; 0 for none.

    Raises: ValueError where 2**48 tokens still fit: nothing limits them.
    """
    high = 1
    while bytes_of(high) <= max_bytes:
        if high >= 2**48:
            raise ValueError(
                f"{high} tokens still fit: give a smaller limit, or a bytes_of that grows with them"
            )
        high *= 2
    return bisect_left(range(high), True, lo=1, key=lambda tokens: bytes_of(tokens) > max_bytes) - 1


def balance(
    lengths: Sequence[int], ranks: int, shape: ModelShape, *, equal_size: bool = False
) -> list[list[int]]:
    """Indices of `lengths` for each of `ranks` data-parallel ranks, of nearly equal cost.

    The cost of a sequence is `shape.cost`, linear and quadratic in its length. Karmarkar and Karp's
    differencing, then moves and swaps out of the most loaded rank while they help. Integers all
    through: the same lengths give the same parts on every machine and every rank.

    Args:
        lengths: tokens of each sequence.
        ranks: number of parts; some are empty where there are fewer sequences.
        shape: of the model that trains on them.
        equal_size: parts may differ by one sequence at most.

    Returns: ascending indices of each rank.
    Raises: ValueError on a negative length or ranks below 1.
    Source: Karmarkar and Karp 1982; differencing of whole tuples: Michiels et al. 2003.
    """
    if ranks < 1:
        raise ValueError(f"ranks: expected a positive number, got {ranks}")
    lengths = _whole(lengths)
    costs = [shape.cost(length) for length in lengths]
    parts = _differencing(costs, ranks, equal_size)
    _refine(parts, costs, equal_size)
    return [sorted(part) for part in parts]


def imbalance(parts: Sequence[Sequence[int]], lengths: Sequence[int], shape: ModelShape) -> float:
    """By how much the most loaded part exceeds the mean: 0.02 is 2%."""
    lengths = _whole(lengths)
    loads = [sum(shape.cost(lengths[index]) for index in part) for part in parts]
    return max(loads) * len(loads) / sum(loads) - 1 if sum(loads) else 0.0


def _whole(lengths: Sequence[int]) -> list[int]:
    """As Python's integers: the square of an array's int32 would wrap."""
    found = list(map(operator.index, lengths))
    for at, length in enumerate(found):
        if length < 0:
            raise ValueError(f"lengths[{at}]: expected 0 or more tokens, got {length}")
    return found


def _differencing(costs: list[int], ranks: int, equal_size: bool) -> list[list[int]]:
    """Partial partitions, the two of largest spread merged until one is left, heavy with light."""
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    size = ranks if equal_size else 1
    # (minus the spread, a tie-breaker, loads from heavy to light with their indices)
    heap: list[tuple[int, int, list[tuple[int, list[int]]]]] = []
    for at in range(0, max(len(order), 1), size):
        some = [(costs[index], [index]) for index in order[at : at + size]]
        some += [(0, [])] * (ranks - len(some))
        heap.append((some[-1][0] - some[0][0], at, some))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, at, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        merged = [
            (a + b, left + right)
            for (a, left), (b, right) in zip(first, reversed(second), strict=True)
        ]
        merged.sort(key=lambda load: (-load[0], load[1]))
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], at, merged))
    return [list(part) for _, part in heap[0][2]]


def _refine(parts: list[list[int]], costs: list[int], equal_size: bool) -> None:
    """Moves and swaps out of the most loaded part, in place, while its pair's maximum falls."""
    loads = [sum(costs[index] for index in part) for part in parts]
    # A thousandth over the mean is good enough.
    while max(loads) * len(loads) * 1000 > sum(loads) * 1001:
        heavy = max(range(len(parts)), key=lambda r: (loads[r], -r))
        for light in sorted(range(len(parts)), key=lambda r: (loads[r], r)):
            given = _best_exchange(
                parts, costs, heavy, light, loads[heavy] - loads[light], equal_size
            )
            if given is not None:
                break
        else:
            return
        for source, target, index in ((heavy, light, given[0]), (light, heavy, given[1])):
            if index is not None:
                parts[source].remove(index)
                parts[target].append(index)
                loads[source] -= costs[index]
                loads[target] += costs[index]


def _best_exchange(
    parts: list[list[int]], costs: list[int], heavy: int, light: int, gap: int, equal_size: bool
) -> tuple[int, int | None] | None:
    """What to give from heavy and take back from light: nearest to moving half of the gap."""
    back = sorted(parts[light], key=lambda i: (costs[i], i))
    values = [costs[index] for index in back]
    best, found = gap, None
    for index in sorted(parts[heavy]):
        options: list[tuple[int, int | None]] = []
        if not equal_size:
            options.append((costs[index], None))
        # The two around the cost that would move exactly half.
        near = bisect_left(values, costs[index] - gap // 2)
        options += [
            (costs[index] - values[at], back[at]) for at in (near - 1, near) if 0 <= at < len(back)
        ]
        for moved, other in options:
            if 0 < moved < gap and abs(gap - 2 * moved) < best:
                best, found = abs(gap - 2 * moved), (index, other)
    return found
