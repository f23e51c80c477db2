"""What a sampler leaves of a distribution: ids kept per token, for `linear_logp(kept=...)`."""

import torch
from torch import Tensor


def kept_from_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The sets that a sampler keeps: the `kept` of `linear_logp`. Ids ascend within a row.

    The rules apply in this order, each to the distribution that the one before leaves, as in
    transformers (vLLM applies min_p first; take its own masks where it hands them out). The most
    probable id is always kept, and of equal ones at top_k's border all.

    Args:
        logits: [T, V] the sampler's own, any floating dtype.
        temperature: > 0; applied first.
        top_k: ids kept at most, ties apart.
        top_p: the least probable ids whose mass together is at most 1 - top_p go.
        min_p: ids of less than min_p times the largest probability go.

    Returns:
        (ids int32 [N], offsets int64 [T + 1]). Waits for the device.
    """
    x = logits.float() / temperature
    if top_k is not None and top_k < x.shape[1]:
        x = x.masked_fill(x < x.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ascending, order = x.sort()
        drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        x = x.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -torch.inf)
    if min_p is not None:
        p = x.softmax(-1)
        x = x.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    keep = x > -torch.inf
    offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    return keep.nonzero()[:, 1].int(), offsets
