"""What multiplies: kernels behind `attention_parts`, each with a forward and a backward.

    forward(query_THE, key_SNE, value_SNE, bounds, causal, rule) -> (out_THE, lse_TH)
    backward(dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_TH, bounds, causal, rule,
             dkey_SNE, dvalue_SNE) -> dquery_THE        # and adds to the other two

The last dimension of every tensor is dense: `attention_parts` sees to it.

- FLASH: CUDA in half precision: the flash_attn package, or else the kernels inside torch. A query's
  gradient is added up by atomics there unless torch is told to be deterministic.
- CPU: torch's fused CPU kernel, on one long sequence or on many short ones padded together.
- TILED: plain torch on rows of scores that fit a bound; any device, any rule.
- `_triton/attention.py`: Triton, by name only (`use_kernel`): it has never run on a GPU.

Shapes: as in `attention_parts`; G = H / N, L tokens of a sequence, C rows of a tile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from itertools import pairwise
from math import isqrt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from r1kernels.backend import Switch, load

if TYPE_CHECKING:
    from r1kernels.attention_parts import Bounds

# sequences up to this long share a padded batch on the CPU
PADDED = 256
# bytes of a tile of scores
TILE = 2**25
HALF = (torch.float16, torch.bfloat16)


class Rule(NamedTuple):
    """How scores are made and, besides causality, seen. None: no such limit."""

    scale: float
    window: int | None
    softcap: float | None


class Kernel(NamedTuple):
    forward: Callable
    backward: Callable
    # whether a causal rule may have more keys than queries
    rectangles: bool


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is summed in."""
    return dtype if dtype == torch.float64 else torch.float32


_wanted = Switch(None)


def use_kernel(name: str | None) -> AbstractContextManager[None]:
    """Within the block attention runs on kernel "tiled" or "triton", or raises RuntimeError with
    the reason why it cannot; None restores the choice by device. In force for the whole process.

    Raises: ValueError on another name.
    """
    if name not in (None, "tiled", "triton"):
        raise ValueError(f"unknown attention kernel {name!r}: choose tiled, triton or None")
    return _wanted.set(name)


def choose(query_THE: Tensor, bounds: Bounds, rule: Rule) -> Kernel:
    """The kernel asked for by name, or else the fastest that computes exactly this."""
    if _wanted.value == "triton":
        module = load("attention", "triton")
        reason = module if isinstance(module, str) else module.refuses(query_THE, rule)
        if reason is not None:
            raise RuntimeError(
                f"no Triton attention: {reason}; use_kernel(None) takes what the device has"
            )
        return Kernel(module.forward, module.backward, rectangles=True)
    if _wanted.value == "tiled":
        return TILED
    if query_THE.is_cuda and query_THE.dtype in HALF:
        E = query_THE.shape[-1]
        limited = rule.window is not None and not bounds.square
        capped = rule.softcap is not None and _flash_attn() is None
        able = torch.cuda.get_device_capability(query_THE.device) >= (8, 0)
        if able and E % 8 == 0 and E <= 256 and not limited and not capped:
            return FLASH
    elif query_THE.device.type == "cpu" and rule.softcap is None:
        unlimited = rule.window is None or rule.window >= max(bounds.longest)
        return CPU if unlimited else TILED
    return TILED


# ---- flash attention on CUDA


_package_allowed = True


def allow_flash_attn(allowed: bool) -> None:
    """Whether the flash_attn package runs where it is installed; process-wide."""
    global _package_allowed
    _package_allowed = allowed


def flash_kernels() -> str:
    """What runs in half precision on CUDA, for a log."""
    if _flash_attn() is None:
        return "the flash kernels of torch"
    return f"flash_attn {sys.modules['flash_attn'].__version__}"


def _flash_attn():
    """The functions of the flash_attn package that this code knows, or None."""
    return _installed_flash_attn() if _package_allowed else None


@cache
def _installed_flash_attn():
    try:
        import flash_attn
        from flash_attn import flash_attn_interface as interface
    except ImportError:
        # optional; a build for another torch fails here as well, and torch has kernels of its own
        return None
    version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
    return interface if version >= (2, 7) else None


def _flash_limits(bounds: Bounds, causal: bool, rule: Rule):
    """(longest queries and keys, window to the left, to the right)."""
    left, right = (-1 if rule.window is None else rule.window - 1), (0 if causal else -1)
    # where no sequence has two queries the kernels take it that each has one
    return (max(2, bounds.longest[0]), bounds.longest[1]), left, right


def _flash_forward(query_THE, key_SNE, value_SNE, bounds, causal, rule):
    if 0 in bounds.longest:
        return _nothing(query_THE)
    cu = bounds.on(query_THE.device)
    longest, left, right = _flash_limits(bounds, causal, rule)
    package = _flash_attn()
    if package is not None:
        out_THE, lse_HT, *_ = package._flash_attn_varlen_forward(
            query_THE, key_SNE, value_SNE, *cu, *longest, 0.0, rule.scale, causal=causal,
            window_size_left=left, window_size_right=right, softcap=rule.softcap or 0.0,
        )  # fmt: skip
    else:
        out_THE, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
            query_THE, key_SNE, value_SNE, *cu, *longest, 0.0, causal, False, scale=rule.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
    # the kernels write +inf where a query sees no key
    lse_TH = lse_HT.T.contiguous()
    return out_THE, lse_TH.masked_fill_(lse_TH == float("inf"), float("-inf"))


def _flash_backward(
    dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_TH, bounds, causal, rule, *grads
):
    if 0 in bounds.longest:
        return torch.zeros_like(query_THE)
    cu = bounds.on(query_THE.device)
    longest, left, right = _flash_limits(bounds, causal, rule)
    lse_HT = lse_TH.masked_fill(lse_TH == float("-inf"), float("inf")).T.contiguous()
    package = _flash_attn()
    if package is not None:
        made = [torch.empty_like(x) for x in (query_THE, key_SNE, value_SNE)]
        package._flash_attn_varlen_backward(
            dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_HT, *made, *cu, *longest, 0.0,
            rule.scale, causal, left, right, rule.softcap or 0.0, None,
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    else:
        # the generator's state, which nothing without dropout reads
        state = torch.zeros(2, dtype=torch.uint64, device=query_THE.device)
        made = torch.ops.aten._flash_attention_backward(
            dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_HT, *cu, *longest, 0.0, causal,
            state, torch.empty(0, device=query_THE.device), scale=rule.scale,
            window_size_left=left, window_size_right=right,
        )  # fmt: skip
    dquery_THE, *made = made
    for grad, x in zip(grads, made, strict=True):
        grad.add_(x)
    return dquery_THE


# ---- torch's fused kernel on the CPU


class _Batch(NamedTuple):
    """Sequences that one call takes, as B rows of L tokens.

    `source`: the packed rows that are read, B * L of them: a pad reads its sequence's last token.
    `rows`: the packed rows that they are; `slots`: their places among the B * L, and `pads`: the
    places that are left; both None where there are none.
    """

    B: int
    L: int
    source: slice | Tensor
    rows: slice | Tensor
    slots: Tensor | None
    pads: Tensor | None

    def take(self, x_Tne: Tensor, N: int, G: int, pad: float | None = None) -> Tensor:
        """[batch, heads, L, E] of packed [T, n, E], n of N or N * G heads, in the wide dtype.

        One sequence has its N key-value heads as the batch, so that the G query heads of each look
        at one copy of its keys.
        """
        if isinstance(self.source, slice):
            x_tne = x_Tne[self.source]
        else:
            x_tne = x_Tne.index_select(0, self.source)
            if pad is not None and self.pads is not None:
                x_tne.index_fill_(0, self.pads, pad)
        x_BLNgE = x_tne.to(wide(x_Tne.dtype)).unflatten(1, (N, -1)).unflatten(0, (self.B, self.L))
        x_BLNGE = x_BLNgE.expand(-1, -1, -1, G, -1)
        if self.B == 1:
            return x_BLNGE[0].permute(1, 2, 0, 3)
        return x_BLNGE.flatten(2, 3).transpose(1, 2)

    def give(self, y: Tensor, N: int, G: int) -> Tensor:
        """[rows, N, G, E] of what `take` made, or its gradient."""
        if self.B == 1:
            return y.permute(2, 0, 1, 3)
        y_tNGE = y.transpose(1, 2).unflatten(2, (N, G)).flatten(0, 1)
        return y_tNGE if self.slots is None else y_tNGE.index_select(0, self.slots)

    def add(self, grad_Tne: Tensor, y_tne: Tensor) -> None:
        if isinstance(self.rows, slice):
            grad_Tne[self.rows].add_(y_tne)
        else:
            grad_Tne.index_add_(0, self.rows, y_tne.to(grad_Tne.dtype))


Span = tuple[int, int, int, int]


@lru_cache(maxsize=16)
def _batches(spans: tuple[Span, ...], causal: bool) -> list[tuple[_Batch, _Batch]]:
    """Sequences for one call each, as (queries, keys).

    Short ones under a causal rule are padded at their ends, where no query looks, in groups of at
    most twice their tokens. The others go alone and are not copied.
    """
    short = [span for span in spans if causal and _length(span) <= PADDED]
    alone = [span for span in spans if not causal or _length(span) > PADDED]
    return [_batch([span]) for span in alone] + [_batch(group) for group in _groups(short)]


def _length(span: Span) -> int:
    """Queries of a sequence."""
    return span[1] - span[0]


def _groups(spans: list[Span]) -> list[list[Span]]:
    if len(spans) * max(map(_length, spans), default=0) <= 2 * sum(map(_length, spans)):
        return [spans] if spans else []
    groups = []
    for span in sorted(spans, key=_length, reverse=True):
        if groups and 2 * _length(span) > _length(groups[-1][0]):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _batch(spans: list[Span]) -> tuple[_Batch, _Batch]:
    """One call's sequences: one, or several with as many queries as keys each."""
    sides = []
    for ends in ([span[:2] for span in spans], [span[2:] for span in spans]):
        B, L = len(ends), max(stop - start for start, stop in ends)
        rows = source = slice(ends[0][0], ends[-1][1])
        if any(a[1] != b[0] for a, b in pairwise(ends)):
            rows = source = torch.cat([torch.arange(start, stop) for start, stop in ends])
        slots = pads = None
        if any(stop - start < L for start, stop in ends):
            starts_B1, stops_B1 = torch.tensor(ends).unsqueeze(2).unbind(1)
            places_BL = starts_B1 + torch.arange(L)
            source = places_BL.minimum(stops_B1 - 1).flatten()
            padded = (places_BL >= stops_B1).flatten()
            slots, pads = (~padded).nonzero().flatten(), padded.nonzero().flatten()
        sides.append(_Batch(B, L, source, rows, slots, pads))
    return tuple(sides)


def _collect(batches: list[_Batch], parts: list[Tensor], rows: int, fill: float) -> Tensor:
    """[rows, ...] of every batch's part; the part itself where one batch is all there is."""
    if len(parts) == 1 and batches[0].rows == slice(0, rows):
        return parts[0]
    whole = parts[0].new_full((rows, *parts[0].shape[1:]), fill)
    for batch, part in zip(batches, parts, strict=True):
        whole[batch.rows] = part
    return whole


def _cpu_forward(query_THE, key_SNE, value_SNE, bounds, causal, rule):
    T, H, _ = query_THE.shape
    N = key_SNE.shape[1]
    batches, outs, lses = _batches(bounds.spans, causal), [], []
    for queries, keys in batches:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.take(query_THE, N, H // N), keys.take(key_SNE, N, H // N),
            keys.take(value_SNE, N, H // N), 0.0, causal, scale=rule.scale,
        )  # fmt: skip
        outs.append(queries.give(out, N, H // N).flatten(1, 2))
        lses.append(queries.give(lse.unsqueeze(-1), N, H // N).flatten(1))
    if not batches:
        return _nothing(query_THE)
    own = [queries for queries, _ in batches]
    return _collect(own, outs, T, 0.0), _collect(own, lses, T, float("-inf"))


def _cpu_backward(
    dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_TH, bounds, causal, rule, *grads
):
    T, H, _ = query_THE.shape
    N = key_SNE.shape[1]
    G = H // N
    batches, parts = _batches(bounds.spans, causal), []
    for queries, keys in batches:
        dout, query, out = (queries.take(x, N, G) for x in (dout_THE, query_THE, out_THE))
        # exp(scores - inf) = 0: what a pad read has no part in any gradient
        lse = queries.take(lse_TH.unsqueeze(-1), N, G, pad=float("inf")).squeeze(-1)
        dquery, *made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, query, keys.take(key_SNE, N, G), keys.take(value_SNE, N, G), out, lse, 0.0,
            causal, scale=rule.scale,
        )  # fmt: skip
        parts.append(queries.give(dquery, N, G).flatten(1, 2))
        for grad, x_tNGE in zip(grads, (keys.give(x, N, G) for x in made), strict=True):
            keys.add(grad, x_tNGE.sum(2) if G > 1 else x_tNGE.squeeze(2))
    if not batches:
        return _nothing(query_THE)[0]
    return _collect([queries for queries, _ in batches], parts, T, 0.0)


def _nothing(query_THE: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of queries that see no key."""
    out_THE = torch.zeros(query_THE.shape, dtype=wide(query_THE.dtype), device=query_THE.device)
    return out_THE, out_THE.new_full(out_THE.shape[:2], float("-inf"))


# ---- plain torch


def _tiles(bounds: Bounds, causal: bool, rule: Rule, query_THE: Tensor):
    """Queries, keys, and which of the keys a query sees ([C, L], None: all), tile by tile."""
    bytes_per_score = query_THE.shape[1] * wide(query_THE.dtype).itemsize
    for q0, q1, k0, k1 in bounds.spans:
        scores = TILE // bytes_per_score
        C = max(1, scores // (k1 - k0))
        if rule.window is not None:
            # C queries see C + window keys at most
            C = max(C, (isqrt(rule.window**2 + 4 * scores) - rule.window) // 2)
        for start in range(q0, q1, C):
            stop = min(q1, start + C)
            if not causal:
                yield slice(start, stop), slice(k0, k1), None
                continue
            # the key beside a query is `shift` further on in its own packed rows
            shift = k1 - q1
            first = k0 if rule.window is None else max(k0, start + shift - rule.window + 1)
            last = stop + shift
            places = torch.arange(start + shift, last, device=query_THE.device)[:, None]
            columns = torch.arange(first, last, device=query_THE.device)
            seen = columns <= places
            if rule.window is not None:
                seen &= columns > places - rule.window
            yield slice(start, stop), slice(first, last), seen


def _by_key_head(x_CHE: Tensor, N: int) -> Tensor:
    """[N, R, E], the R = G * C rows that look at one key head, in the wide dtype."""
    x_NGCE = x_CHE.to(wide(x_CHE.dtype)).unflatten(1, (N, -1)).permute(1, 2, 0, 3)
    return x_NGCE.flatten(1, 2)


def _by_query(x_NRE: Tensor, C: int) -> Tensor:
    """[C, H, E] of the same."""
    return x_NRE.unflatten(1, (-1, C)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(query_NRE, key_NLE, seen, rule):
    """Scores [N, R, L], and their slope under the cap, or 1 without."""
    scores_NRL = torch.bmm(query_NRE, key_NLE.transpose(1, 2)).mul_(rule.scale)
    slope = 1.0
    if rule.softcap is not None:
        tanh = scores_NRL.div_(rule.softcap).tanh_()
        slope = 1 - tanh.square()
        scores_NRL = tanh.mul_(rule.softcap)
    if seen is not None:
        scores_NRL.unflatten(1, (-1, len(seen))).masked_fill_(~seen, float("-inf"))
    return scores_NRL, slope


def _probabilities(scores_NRL, lse_NR):
    """exp(scores - lse) in the scores' own memory, 0 in rows that see nothing."""
    floor_NR = lse_NR.masked_fill(lse_NR == float("-inf"), 0)
    return scores_NRL.sub_(floor_NR.unsqueeze(-1)).exp_()


def _tiled_forward(query_THE, key_SNE, value_SNE, bounds, causal, rule):
    N = key_SNE.shape[1]
    out_THE, lse_TH = _nothing(query_THE)
    for queries, keys, seen in _tiles(bounds, causal, rule, query_THE):
        query, C = _by_key_head(query_THE[queries], N), queries.stop - queries.start
        key, value = (_by_key_head(x[keys], N) for x in (key_SNE, value_SNE))
        scores_NRL, _ = _scores(query, key, seen, rule)
        lse_NR = scores_NRL.logsumexp(-1)
        out_NRE = torch.bmm(_probabilities(scores_NRL, lse_NR), value)
        out_THE[queries] = _by_query(out_NRE, C)
        lse_TH[queries] = _by_query(lse_NR.unsqueeze(-1), C).squeeze(-1)
    return out_THE, lse_TH


def _tiled_backward(
    dout_THE,
    query_THE,
    key_SNE,
    value_SNE,
    out_THE,
    lse_TH,
    bounds,
    causal,
    rule,
    *grads,
    dlse_TH=None,
):
    N = key_SNE.shape[1]
    dkey_SNE, dvalue_SNE = grads
    dquery_THE, _ = _nothing(query_THE)
    for queries, keys, seen in _tiles(bounds, causal, rule, query_THE):
        C = queries.stop - queries.start
        dout, query, out = (_by_key_head(x[queries], N) for x in (dout_THE, query_THE, out_THE))
        key, value = (_by_key_head(x[keys], N) for x in (key_SNE, value_SNE))
        lse_NR = _by_key_head(lse_TH[queries].unsqueeze(-1), N).squeeze(-1)
        scores_NRL, slope = _scores(query, key, seen, rule)
        p_NRL = _probabilities(scores_NRL, lse_NR)
        dvalue_SNE[keys].add_(torch.bmm(p_NRL.transpose(1, 2), dout).transpose(0, 1))
        delta_NR1 = (dout * out).sum(-1, keepdim=True)
        if dlse_TH is not None:
            delta_NR1 -= _by_key_head(dlse_TH[queries].unsqueeze(-1), N)
        dscores = torch.bmm(dout, value.transpose(1, 2)).sub_(delta_NR1).mul_(p_NRL)
        dscores = dscores.mul_(slope).mul_(rule.scale)
        dquery_THE[queries] = _by_query(torch.bmm(dscores, key), C)
        dkey_SNE[keys].add_(torch.bmm(dscores.transpose(1, 2), query).transpose(0, 1))
    return dquery_THE


FLASH = Kernel(_flash_forward, _flash_backward, rectangles=False)
CPU = Kernel(_cpu_forward, _cpu_backward, rectangles=False)
TILED = Kernel(_tiled_forward, _tiled_backward, rectangles=True)
