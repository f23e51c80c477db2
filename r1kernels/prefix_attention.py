"""Attention of packed sequences that share prompts: a prompt is attended to where it stands.

Two calls on views: every piece causally to itself, and the completions of a group, as one sequence,
to their prompt. They are merged by their log-sum-exps.

Shapes: T packed tokens, H query heads, N key-value heads, E head width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1kernels import check
from r1kernels.attention_parts import attend, attend_backward, merge
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
        scale: of the scores; None for 1 / sqrt(E).

    Returns: [T, H, E] in query's dtype.

    Gradients: query, key, value, once.
    Numerics: parts are merged in float32 (float64 for float64); in the backward both take the
        merged output and log-sum-exp, so their probabilities are those of the whole softmax, and
        the gradients of keys and values are summed in float32 before they are rounded.
    Raises: TypeError on dtypes and a layout of another type; ValueError on devices and on shapes
        that do not fit, a layout of another batch among them.
    Source: docs/ops/prefix_attention.md.
    """
    if not isinstance(layout, SharedPrefixes):
        raise TypeError(f"layout must be a SharedPrefixes, got {check.describe(layout)}")
    layout.check_tokens("query", query)
    check.dtype_in("query", query, DTYPES)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check.local(name, x)
        check.dtype_in(name, x, (query.dtype,))
        check.device(name, x, query.device)
    if query.ndim != 3 or key.ndim != 3 or key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query must be [T, H, E] and key [T, N, E] with N a divisor of H, "
            f"got {check.describe(query)} and {check.describe(key)}"
        )
    check.shape("key", key, (query.shape[0], key.shape[1], query.shape[2]), "[T, N, E]")
    check.shape("value", value, key.shape, "that of key")
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return _PrefixAttention.apply(query, key, value, layout, scale)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_THE, key_TNE, value_TNE, layout, scale):
        def compute():
            out_THE, lse_TH = attend(
                query_THE, key_TNE, value_TNE, layout.own, causal=True, scale=scale
            )
            if layout.cross is not None:
                prompts, rest = layout.prompts, layout.completions
                part = attend(
                    query_THE[rest], key_TNE[prompts], value_TNE[prompts], layout.cross,
                    causal=False, scale=scale,
                )  # fmt: skip
                out_THE[rest], lse_TH[rest] = merge(out_THE[rest], lse_TH[rest], *part)
            return out_THE, lse_TH

        out_THE, lse_TH = remembered(compute)
        ctx.save_for_backward(query_THE, key_TNE, value_TNE, out_THE, lse_TH)
        ctx.layout, ctx.scale = layout, scale
        return out_THE

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_THE):
        query_THE, key_TNE, value_TNE, out_THE, lse_TH = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        wide = torch.float64 if key_TNE.dtype == torch.float64 else torch.float32
        dkey_TNE = torch.zeros_like(key_TNE, dtype=wide, memory_format=torch.contiguous_format)
        dvalue_TNE = torch.zeros_like(dkey_TNE)
        dquery_THE = attend_backward(
            dout_THE, query_THE, key_TNE, value_TNE, out_THE, lse_TH, layout.own,
            causal=True, scale=scale, dkey=dkey_TNE, dvalue=dvalue_TNE,
        )  # fmt: skip
        if layout.cross is not None:
            prompts, rest = layout.prompts, layout.completions
            dquery_THE[rest] += attend_backward(
                dout_THE[rest], query_THE[rest], key_TNE[prompts], value_TNE[prompts],
                out_THE[rest], lse_TH[rest], layout.cross, causal=False, scale=scale,
                dkey=dkey_TNE[prompts], dvalue=dvalue_TNE[prompts],
            )  # fmt: skip
        return (
            dquery_THE.to(query_THE.dtype),
            dkey_TNE.to(key_TNE.dtype),
            dvalue_TNE.to(value_TNE.dtype),
            None,
            None,
        )
