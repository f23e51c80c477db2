"""Attention of packed sequences that share prompts: a prompt is attended to where it stands.

Two calls on views: every piece causally to itself, and the completions of a group, as one sequence,
to their prompt. They are merged by their log-sum-exps.

Shapes: T packed tokens, H query heads, N key-value heads, E head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from r1kernels import check
from r1kernels.attention_kernels import wide
from r1kernels.attention_parts import Bounds, attend, attend_backward, merge
from r1kernels.backend import isolated
from r1kernels.rows import positive
from r1kernels.saved_attention import remembered
from r1kernels.shared_prefixes import SharedPrefixes

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixes, *, scale: float | None = None
) -> Tensor:
    """Causal attention of every sequence of `layout`, the prompts' keys and values used in place.

    What `varlen_attention` gives on the batch without sharing, at the rows that are left. The
    completions of a group are one sequence of queries against their prompt's keys, so nothing is
    copied per completion, and a prompt's gradients come out summed over them.

    A transformers model under `register_attention` calls it when it is given `layout=`.

    Args:
        query: [T, H, E] float32, float64, bfloat16 or float16, rotated by `layout.position_ids`.
        key, value: [T, N, E], N a divisor of H.
        layout: of these T tokens.
        scale: of the scores, > 0; None for 1 / sqrt(E).

    Returns: [T, H, E] in query's dtype.

    Gradients: query, key, value, once.
    Numerics: parts are merged in float32 (float64 for float64); in the backward both take the
        merged output and log-sum-exp, so their probabilities are those of the whole softmax, and
        the gradients of keys and values are summed in float32 before they are rounded.
    Raises: TypeError on dtypes and a layout of another type; ValueError on devices, a scale that is
        not positive, and shapes that do not fit, a layout of another batch among them.
    Source: docs/ops/prefix_attention.md.
    """
    if not isinstance(layout, SharedPrefixes):
        raise TypeError(f"layout must be a SharedPrefixes, got {check.describe(layout)}")
    # a number of tokens known while something traces would be all that the trace is good for
    if not torch.compiler.is_compiling():
        layout.check_tokens("query", query)
    check.dtype_in("query", query, DTYPES)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check.local(name, x)
        check.dtype_in(name, x, (query.dtype,))
        check.device(name, x, query.device)
    heads = (*query.shape[1:], *key.shape[1:2])
    if (query.ndim, key.ndim) != (3, 3) or 0 in heads or heads[0] % heads[2]:
        raise ValueError(
            "query must be [T, H, E] and key [T, N, E] with N a divisor of H, none 0, "
            f"got {check.describe(query)} and {check.describe(key)}"
        )
    check.shape("key", key, (query.shape[0], key.shape[1], query.shape[2]), "[T, N, E]")
    check.shape("value", value, key.shape, "that of key")
    scale = query.shape[-1] ** -0.5 if scale is None else positive("scale", scale)
    return prefix_attention_fwd(query, key, value, *layout.offsets, scale)[0]


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor own, Tensor? cross_query, Tensor? cross_key, "
    "float scale"
)


class _Spans(NamedTuple):
    """The two calls of a layout: own causally; `completions` of the row against its `prompts`."""

    own: Bounds
    cross: Bounds | None
    prompts: slice
    completions: slice


# made of a layout's offsets once, so that all layers share what is copied to a device
_spans = WeakTensorKeyDictionary()


def _spans_of(query: Tensor, own: Tensor, cross_query: Tensor | None, cross_key: Tensor | None):
    if own not in _spans:
        cross, first, rest = None, 0, 0
        if cross_query is not None:
            cross = Bounds(cross_query.tolist(), cross_key.tolist())
            first, rest = cross.key[-1], cross.query[-1]
        # of lists: tensors would keep themselves alive through their own entry
        _spans[own] = _Spans(Bounds(own.tolist()), cross, slice(first), slice(first, first + rest))
    found = _spans[own]
    if found.own.query[-1] != len(query):
        raise ValueError(
            f"query has {len(query)} tokens, the layout {found.own.query[-1]}: it belongs to "
            "another batch"
        )
    return found


@torch.library.custom_op(
    "r1kernels::prefix_attention_fwd", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
@isolated
def prefix_attention_fwd(query, key, value, *args):
    """(out, lse), of both calls together."""
    *offsets, scale = args
    spans = _spans_of(query, *offsets)

    def compute():
        out_THE, lse_TH = attend(query, key, value, spans.own, causal=True, scale=scale)
        out_THE, lse_TH = out_THE.contiguous(), lse_TH.contiguous()
        if spans.cross is not None:
            prompts, rest = spans.prompts, spans.completions
            part = attend(
                query[rest], key[prompts], value[prompts], spans.cross, causal=False, scale=scale
            )
            out_THE[rest], lse_TH[rest] = merge(out_THE[rest], lse_TH[rest], *part)
        return out_THE, lse_TH

    return remembered(compute)


@prefix_attention_fwd.register_fake
def _(query, *_args):
    return query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=wide(query.dtype))


@torch.library.custom_op(
    "r1kernels::prefix_attention_bwd",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor out, Tensor lse, {SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
@isolated
def prefix_attention_bwd(dout, out, lse, query, key, value, *args):
    """(dquery, dkey, dvalue)."""
    *offsets, scale = args
    spans, dtype = _spans_of(query, *offsets), wide(query.dtype)
    dkey, dvalue = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    dquery = attend_backward(
        dout, query, key, value, out, lse, spans.own, causal=True, scale=scale, dkey=dkey,
        dvalue=dvalue,
    )  # fmt: skip
    if spans.cross is not None:
        prompts, rest = spans.prompts, spans.completions
        # the merged output and log-sum-exp make this call's probabilities those of the whole
        dquery[rest] += attend_backward(
            dout[rest], query[rest], key[prompts], value[prompts], out[rest], lse[rest],
            spans.cross, causal=False, scale=scale, dkey=dkey[prompts], dvalue=dvalue[prompts],
        )  # fmt: skip
    dquery = dquery.to(query.dtype).contiguous()
    return dquery, dkey.to(key.dtype), dvalue.to(value.dtype)


@prefix_attention_bwd.register_fake
def _(dout, out, lse, query, key, value, *_args):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _grad(ctx, dout, _dlse):
    check.no_second_derivative("prefix_attention")
    return *prefix_attention_bwd(dout, *ctx.saved_tensors, ctx.scale), *[None] * 4


prefix_attention_fwd.register_autograd(_grad, setup_context=_setup)
