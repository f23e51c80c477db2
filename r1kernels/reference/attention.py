"""The definition of attention over packed sequences; any dtype, differentiable by autograd."""

from itertools import pairwise

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: list[int],
    key_offsets: list[int],
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) value, scores = scale query key^T, of each of B sequences by itself.

    Args:
        query: [T, H, E].
        key, value: [S, N, E]; query head h looks at key head h // (H / N).
        query_offsets, key_offsets: [B + 1], from 0 to T and from 0 to S.
        causal: query i of Lq sees the keys up to i + Lk - Lq.
        window: and only the last `window` of them.
        softcap: scores become softcap tanh(scores / softcap).

    Returns:
        out [T, H, E], lse [T, H], the log of the softmax's divisor. A query that sees no key has 0
        and -inf.
    """
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(query_offsets), pairwise(key_offsets), strict=True):
        groups = query.shape[1] // key.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhe,khe->hqk", query[q0:q1], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q1 - q0, device=query.device)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0, device=query.device)
        seen = (column <= place) | (not causal)
        if window is not None:
            seen = seen & (column > place - window)
        scores = scores.masked_fill(~seen, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        weights = (scores - lse.masked_fill(lse == float("-inf"), 0)).exp()
        outs.append(torch.einsum("hqk,khe->qhe", weights, values))
        lses.append(lse.squeeze(-1).T)
    return torch.cat(outs), torch.cat(lses)
