"""What a sampler leaves of a distribution: ids kept per token, for `linear_logp(kept=...)`."""

import torch
from torch import Tensor

from r1kernels.check import describe, floating
from r1kernels.rows import positive


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

    Raises: TypeError on dtypes; ValueError on a shape or an option out of range, and on a row whose
        logits are NaN or all -inf.
    """
    floating("logits", logits)
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [T, V], got {describe(logits)}")
    temperature = positive("temperature", temperature)
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an int of at least 1, or None for all, got {top_k!r}")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
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
    empty = (~keep.any(-1)).nonzero().flatten()
    if len(empty):
        raise ValueError(f"logits[{int(empty[0])}] keeps no id: it is NaN or all -inf")
    offsets = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0))
    return keep.nonzero()[:, 1].int(), offsets
