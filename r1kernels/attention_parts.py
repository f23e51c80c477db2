"""Exact attention in parts: forward, backward inside an outer softmax, and the merge of two parts.

The one primitive under packed, streamed and prefix-shared attention. Some keys of a softmax give an
output and a log-sum-exp; parts over other keys merge exactly; and the backward of a part takes the
output and the log-sum-exp of the *whole* softmax, because with P = exp(scores - lse) and
delta = rowsum(dout * out) of the whole the gradients of the parts add up to those of the whole.

Shapes: T packed queries, S packed keys, B sequences, H query heads, N key-value heads (N divides
H; query head h looks at key head h // (H / N)), E head width.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from r1kernels import attention_kernels
from r1kernels.attention_kernels import Rule

# bytes of a backward's own tensors above which it takes fewer heads at a time
HEAD_WORKSPACE = {"cpu": 2**28, "cuda": 2**29}


class Bounds:
    """Where the queries and the keys of B sequences lie in their packed rows.

    Args:
        query: offsets [B + 1], from 0 to T, integers or a tensor of them.
        key: the same from 0 to S; None where queries and keys are the same rows.
        longest: the most queries and the most keys of a sequence, or None. With them a kernel that
            takes offsets from the device needs no look at a device tensor, which would wait for it.

    Raises: ValueError when the offsets, once on the host, do not start at 0, fall, or disagree
        on B.
    """

    def __init__(
        self,
        query: Sequence[int] | Tensor,
        key: Sequence[int] | Tensor | None = None,
        *,
        longest: tuple[int, int] | None = None,
    ):
        self._given = query, query if key is None else key
        self._longest = longest
        # whether the offsets may stay on the device
        self.unread = longest is not None
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}
        if len(self._given[0]) != len(self._given[1]):
            counts = [len(x) - 1 for x in self._given]
            raise ValueError(f"queries and keys must be of as many sequences, got {counts}")

    @cached_property
    def query(self) -> tuple[int, ...]:
        """Offsets of the queries on the host; waits for the device if they came from there."""
        return _offsets(self._given[0], "query")

    @cached_property
    def key(self) -> tuple[int, ...]:
        return self.query if self._same else _offsets(self._given[1], "key")

    @property
    def _same(self) -> bool:
        return self._given[0] is self._given[1]

    @cached_property
    def square(self) -> bool:
        """Whether every sequence has as many queries as keys."""
        return self._same or self.query == self.key

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int, int], ...]:
        """(first query, end, first key, end) of the sequences that have both."""
        rows = zip(pairwise(self.query), pairwise(self.key), strict=True)
        return tuple((*q, *k) for q, k in rows if q[0] < q[1] and k[0] < k[1])

    @property
    def longest(self) -> tuple[int, int]:
        if self._longest is None:
            self._longest = tuple(
                max((b - a for a, b in pairwise(x)), default=0) for x in (self.query, self.key)
            )
        return self._longest

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both offsets as int32 tensors, one tensor twice where they are the same rows."""
        if device not in self._on:
            made = [
                torch.as_tensor(x, dtype=torch.int32).to(device, non_blocking=True)
                for x in (self._given[:1] if self._same else self._given)
            ]
            self._on[device] = made[0], made[-1]
        return self._on[device]

    @cached_property
    def corner(self) -> tuple["Bounds", "Bounds"]:
        """Two halves of a causal rule aligned to the bottom right: all queries of a sequence
        against the keys before the last as many, and against those last ones.

        Each half has 2 B sequences, of which every other one has no queries, so that the keys stay
        where they are.
        """
        before, last, keys = [0], [0], [0]
        for (q0, q1), (k0, k1) in zip(pairwise(self.query), pairwise(self.key), strict=True):
            if q1 - q0 > k1 - k0:
                raise ValueError(
                    f"causal attention needs as many keys as queries or more, got {q1 - q0} "
                    f"queries and {k1 - k0} keys in sequence {len(keys) // 2}"
                )
            before += [q1, q1]
            last += [q0, q1]
            keys += [k1 - (q1 - q0), k1]
        return Bounds(before, keys), Bounds(last, keys)


def _offsets(given: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    offsets = tuple(given.tolist() if isinstance(given, Tensor) else given)
    if not offsets or offsets[0] != 0:
        raise ValueError(f"{name} offsets must start at 0, got {offsets[:1]}")
    for b, (start, stop) in enumerate(pairwise(offsets)):
        if stop < start:
            raise ValueError(f"{name} offsets must not decrease, got {start} before {stop} at {b}")
    return offsets


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Bounds,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale query key^T) value of each sequence, and the log of the softmax's divisor.

    Args:
        query: [T, H, E] float64, float32, bfloat16 or float16, of any strides.
        key, value: [S, N, E].
        bounds: of T queries and S keys.
        causal: query i of Lq sees the keys up to i + Lk - Lq, with Lq <= Lk; else all of them.
        scale: of the scores.
        window: with causal: a query sees the last `window` of those keys only.
        softcap: scores become softcap tanh(scores / softcap).

    Returns:
        out [T, H, E] in query's dtype, lse [T, H] in nats, float32 (float64 for float64). A query
        that sees no key has out 0 and lse -inf. No gradient flows: `attend_backward` has it.

    Numerics: float32 accumulation; 16-bit inputs are widened on the CPU and multiplied as they
        are by the kernels of a GPU.
    Raises: ValueError on a causal sequence with fewer keys than queries.
    """
    query, key, value = _dense(query, key, value)
    rule = Rule(scale, window if causal else None, softcap)
    kernel = attention_kernels.choose(query, bounds, rule)
    found = [
        kernel.forward(query, key, value, part, square, rule)
        for part, square in _parts(bounds, causal, kernel.rectangles)
    ]
    out_THE, lse_TH = found[0] if len(found) == 1 else merge(*found[0], *found[1])
    return out_THE.to(query.dtype), lse_TH


def attend_backward(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Bounds,
    *,
    causal: bool,
    scale: float,
    dkey: Tensor,
    dvalue: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    dlse: Tensor | None = None,
    head_groups: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradients of `attend` over some keys of a softmax; the parts' sums are the whole's.

    Args:
        dout, query, key, value, bounds, causal, scale, window, softcap: as in `attend`.
        out: [T, H, E], lse: [T, H]: of the *whole* softmax, of which these keys may be a part.
        dkey, dvalue: [S, N, E], float32 (float64 for float64): the gradients are added to them.
            Any floating dtype is taken, and rounded to on every addition.
        dlse: [T, H] the gradient of lse, where lse is used outside the softmax; plain torch then.
        head_groups: the key-value heads are taken in as many turns, so that the transients are
            1 / head_groups of all; None: as many turns as keep them below HEAD_WORKSPACE.
        dtype: of the result; None: float32 (float64 for float64).

    Returns:
        dquery [T, H, E].

    Numerics: as `attend`. Repeats bitwise on the CPU, and in float32 on a GPU; in half precision
        there under torch.use_deterministic_algorithms(True).
    """
    dout, query, key, value, out = _dense(dout, query, key, value, out)
    rule = Rule(scale, window if causal else None, softcap)
    kernel = attention_kernels.choose(query, bounds, rule)
    if dlse is not None:
        kernel = attention_kernels.TILED
    parts = _parts(bounds, causal, kernel.rectangles)
    wide = attention_kernels.wide(query.dtype)
    dtype = wide if dtype is None else dtype
    N = key.shape[1]
    G, turns = query.shape[1] // N, _turns(query, key, head_groups)
    dquery_THE = None
    if len(turns) * len(parts) > 1:
        # two parts meet in a query's gradient, and are rounded once
        sums = dtype if len(parts) == 1 else wide
        dquery_THE = torch.zeros(query.shape, dtype=sums, device=query.device)
    for start, stop in turns:
        q, k = slice(start * G, stop * G), slice(start, stop)
        more = {} if dlse is None else {"dlse_TH": dlse[:, q]}
        for part, square in parts:
            dquery = kernel.backward(
                dout[:, q], query[:, q], key[:, k], value[:, k], out[:, q], lse[:, q], part, square,
                rule, dkey[:, k], dvalue[:, k], **more,
            )  # fmt: skip
            if dquery_THE is None:
                return dquery.to(dtype)
            dquery_THE[:, q].add_(dquery)
    return dquery_THE.to(dtype)


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of one softmax over different keys as one: (out, lse), summed in float32.

    Args:
        out_a, out_b: [T, H, E] one dtype; lse_a, lse_b: [T, H] float32 or float64.

    Returns:
        (out in out_a's dtype, lse). Where one lse is -inf the other side, to the bit; where both
        are, 0 and -inf.
    """
    lse_TH = torch.logaddexp(lse_a, lse_b)
    floor_TH = lse_TH.masked_fill(lse_TH == float("-inf"), 0)
    weights = [(x - floor_TH).exp().unsqueeze(-1) for x in (lse_a, lse_b)]
    return (out_a * weights[0] + out_b * weights[1]).to(out_a.dtype), lse_TH


def _dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors with a dense last dimension: kernels read it so, whatever its stride is."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _parts(bounds: Bounds, causal: bool, rectangles: bool) -> list[tuple[Bounds, bool]]:
    """(bounds, causal) of the calls of a kernel, which may know causal squares only."""
    if not causal or bounds.square:
        return [(bounds, causal)]
    before, last = bounds.corner
    return [(bounds, True)] if rectangles else [(before, False), (last, True)]


def _turns(query: Tensor, key: Tensor, head_groups: int | None) -> list[tuple[int, int]]:
    """Ranges of key-value heads, one after the other."""
    N = key.shape[1]
    if head_groups is None:
        # float32 gradients of queries and of keys and values expanded to the query heads
        used = 4 * query.numel() + 8 * key.numel() * (query.shape[1] // N)
        bound = HEAD_WORKSPACE.get(query.device.type, 2**29)
        head_groups = min(N, -(-used // bound))
    size = -(-N // max(1, head_groups))
    return [(start, min(N, start + size)) for start in range(0, N, size)]
