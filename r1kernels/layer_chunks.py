"""The arithmetic of a decoder layer in chunks of queries, forward and backward, without autograd.

Forward: each chunk of rows goes through norm, projections, attention, output projection, norm and
MLP by itself; its keys and values go where all are kept.

Backward: keys and values are made again, and the chunks are taken from the last to the first. When
a chunk's turn comes, all queries that see its keys have been there: the gradients of its keys and
values are complete, and leave with that of its queries, through the projections and the norm, in
one piece. Residuals are added in float32 and rounded once.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.attention_parts import Bounds, attend, attend_backward
from r1kernels.decoder import DecoderLayer
from r1kernels.decoder_parts import rms_norm, rms_norm_backward, rotate, rotate_backward
from r1kernels.tiled_mlp import mlp_chunk, mlp_chunk_backward
from r1kernels.weight_grads import WeightGrads, sum_dtype

# keys at a time in the backward of a chunk's attention, per query of the chunk
KEYS_PER_QUERY = 4
MIN_KEYS = 256

# attention's output [T, H, E] and log-sum-exp [T, H], or nothing
Attention = tuple[Tensor, Tensor] | tuple[None, None]


class Chunk(NamedTuple):
    """Packed rows of queries, wherever sequences begin, and the rows of keys that they see."""

    rows: slice
    keys: slice
    bounds: Bounds


def cut(offsets: Sequence[int], size: int, window: int | None = None) -> list[Chunk]:
    """Chunks of `size` rows, the last one of what is left.

    A chunk's keys are contiguous: from its first sequence's start, or as far back as the window of
    its first query reaches, to its own end.

    Args:
        offsets: of the sequences, [B + 1], from 0 to T, not decreasing.
        window: how many keys a query sees, itself among them; None for all.
    """
    sequences = [(start, stop) for start, stop in pairwise(offsets) if stop > start]
    chunks, first = [], 0
    for begin in range(0, offsets[-1], size):
        end = min(begin + size, offsets[-1])
        while sequences[first][1] <= begin:
            first += 1
        last = first
        while sequences[last][1] < end:
            last += 1
        near = sequences[first][0]
        if window is not None:
            near = max(near, begin + 1 - window)
        ends = [min(stop, end) for _, stop in sequences[first : last + 1]]
        bounds = Bounds([0, *(x - begin for x in ends)], [0, *(x - near for x in ends)])
        chunks.append(Chunk(slice(begin, end), slice(near, end), bounds))
    return chunks


def forward(
    x_TD: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    layer: DecoderLayer,
    chunks: list[Chunk],
    save_attention: bool,
) -> tuple[Tensor, Attention]:
    """The layer's output, and attention's if it is to be saved."""
    y_TD = torch.empty_like(x_TD)
    key_TNE, value_TNE = (_buffer(x_TD, layer.kv_heads, layer) for _ in range(2))
    out_THE = _buffer(x_TD, layer.heads, layer) if save_attention else None
    lse_TH = None
    if save_attention:
        lse_TH = x_TD.new_empty(len(x_TD), layer.heads, dtype=sum_dtype(x_TD.dtype))
    for chunk in chunks:
        rows = chunk.rows
        x_CD, cos_CE, sin_CE = x_TD[rows], cos_TE[rows], sin_TE[rows]
        normed_CD = rms_norm(x_CD, layer.input_norm)
        # A chunk's keys end where it does: those of earlier chunks are there already.
        _, key_TNE[rows] = _project(normed_CD, layer.key, layer.key_norm, layer, cos_CE, sin_CE)
        value_TNE[rows] = _heads(layer.value.apply(normed_CD), layer)
        _, query_CHE = _project(normed_CD, layer.query, layer.query_norm, layer, cos_CE, sin_CE)
        out_CHE, lse_CH = _attend(query_CHE, key_TNE, value_TNE, chunk, layer)
        if save_attention:
            out_THE[rows], lse_TH[rows] = out_CHE, lse_CH
        r_CD = x_CD + layer.output.apply(out_CHE.flatten(1))
        y_TD[rows] = r_CD + mlp_chunk(rms_norm(r_CD, layer.mlp_norm), layer.mlp)
    return y_TD, (out_THE, lse_TH)


def backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    cos_TE: Tensor,
    sin_TE: Tensor,
    layer: DecoderLayer,
    chunks: list[Chunk],
    attention: Attention,
    grads: WeightGrads,
    dx_TD: Tensor,
) -> None:
    """Fills dx, which may be the memory of dy, and adds to the weights' gradients."""
    dtype = x_TD.dtype
    key_TNE, value_TNE = (_buffer(x_TD, layer.kv_heads, layer) for _ in range(2))
    for chunk in chunks:
        rows = chunk.rows
        normed_CD = rms_norm(x_TD[rows], layer.input_norm)
        _, key_TNE[rows] = _project(
            normed_CD, layer.key, layer.key_norm, layer, cos_TE[rows], sin_TE[rows]
        )
        value_TNE[rows] = _heads(layer.value.apply(normed_CD), layer)
    dkey_TNE, dvalue_TNE = (
        torch.zeros_like(x, dtype=sum_dtype(dtype)) for x in (key_TNE, value_TNE)
    )
    for chunk in reversed(chunks):
        rows = chunk.rows
        x_CD, dy_CD, cos_CE, sin_CE = (x[rows] for x in (x_TD, dy_TD, cos_TE, sin_TE))
        normed_CD = rms_norm(x_CD, layer.input_norm)
        projected_CHE, query_CHE = _project(
            normed_CD, layer.query, layer.query_norm, layer, cos_CE, sin_CE
        )
        if attention[0] is None:
            out_CHE, lse_CH = _attend(query_CHE, key_TNE, value_TNE, chunk, layer)
        else:
            out_CHE, lse_CH = (x[rows] for x in attention)
        r_CD = x_CD + layer.output.apply(out_CHE.flatten(1))
        dm_CD = mlp_chunk_backward(dy_CD, rms_norm(r_CD, layer.mlp_norm), layer.mlp, grads)
        dr_CD = rms_norm_backward(dm_CD, r_CD, layer.mlp_norm, grads, "mlp_norm").add_(dy_CD)
        narrow_CD = dr_CD.to(dtype)
        layer.output.weight_grads("output", narrow_CD, out_CHE.flatten(1), grads)
        dquery_CHE = _attend_backward(
            _heads(layer.output.input_grad(narrow_CD), layer),
            query_CHE, key_TNE, value_TNE, out_CHE, lse_CH, chunk, layer, dkey_TNE, dvalue_TNE,
        )  # fmt: skip
        dprojected = {"value": dvalue_TNE[rows]}
        for name, part, dhead, norm in (
            ("query", layer.query, dquery_CHE, layer.query_norm),
            ("key", layer.key, dkey_TNE[rows], layer.key_norm),
        ):
            dhead = rotate_backward(dhead, cos_CE, sin_CE)
            if norm is not None:
                head = projected_CHE if name == "query" else _heads(part.apply(normed_CD), layer)
                dhead = rms_norm_backward(dhead, head, norm, grads, f"{name}_norm")
            dprojected[name] = dhead
        dnormed_CD = torch.zeros_like(x_CD)
        for name, dhead in dprojected.items():
            part, dhead = getattr(layer, name), dhead.flatten(1).to(dtype)
            part.weight_grads(name, dhead, normed_CD, grads)
            part.input_grad(dhead, dnormed_CD, add=True)
        dr_CD += rms_norm_backward(dnormed_CD, x_CD, layer.input_norm, grads, "input_norm")
        dx_TD[rows] = dr_CD


def _buffer(x_TD: Tensor, heads: int, layer: DecoderLayer) -> Tensor:
    return x_TD.new_empty(len(x_TD), heads, layer.head_width)


def _heads(x_CM: Tensor, layer: DecoderLayer) -> Tensor:
    return x_CM.unflatten(1, (-1, layer.head_width))


def _project(normed_CD, part, norm, layer, cos_CE, sin_CE) -> tuple[Tensor, Tensor]:
    """(what the head norm takes, heads after head norm and rotation), both [C, heads, E]."""
    projected = _heads(part.apply(normed_CD), layer)
    head = projected if norm is None else rms_norm(projected, norm)
    return projected, rotate(head, cos_CE, sin_CE).to(head.dtype)


def _attend(query_CHE, key_TNE, value_TNE, chunk, layer) -> tuple[Tensor, Tensor]:
    return attend(
        query_CHE, key_TNE[chunk.keys], value_TNE[chunk.keys], chunk.bounds,
        causal=True, scale=layer.scale, window=layer.window,
    )  # fmt: skip


def _attend_backward(
    dout_CHE, query_CHE, key_TNE, value_TNE, out_CHE, lse_CH, chunk, layer, dkey_TNE, dvalue_TNE
):
    """Keys before the chunk a few at a time, or a kernel's own buffers would be as long as they.

    All of them are of the chunk's first sequence, whose queries see them whole: only the square of
    the chunk's own rows is causal. A window makes the keys few, and their rule another.
    """

    def part(queries: slice, keys: slice, bounds: Bounds, causal: bool) -> Tensor:
        return attend_backward(
            dout_CHE[queries], query_CHE[queries], key_TNE[keys], value_TNE[keys],
            out_CHE[queries], lse_CH[queries], bounds, causal=causal, scale=layer.scale,
            window=layer.window, dkey=dkey_TNE[keys], dvalue=dvalue_TNE[keys],
        )  # fmt: skip

    rows, keys, bounds = chunk
    if layer.window is not None:
        return part(slice(None), keys, bounds, True)
    dquery_CHE = part(slice(None), rows, Bounds(bounds.query), True)
    first = slice(0, bounds.query[1])
    step = max(MIN_KEYS, KEYS_PER_QUERY * len(query_CHE))
    for start in range(keys.start, rows.start, step):
        some = slice(start, min(start + step, rows.start))
        size = Bounds([0, first.stop], [0, some.stop - some.start])
        dquery_CHE[first] += part(first, some, size, False)
    return dquery_CHE
