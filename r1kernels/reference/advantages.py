"""Group-relative advantages, one group at a time."""

import torch
from torch import Tensor


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """r1kernels.group_advantages by its definition: float32 [N] from rewards [N], group_ids [N]."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64, device=rewards.device)
    for group in group_ids.unique():
        members = group_ids == group
        r = rewards[members].double()
        if r.max() == r.min():
            continue
        if normalize == "std":
            advantages[members] = (r - r.mean()) / (r.std(correction=ddof) + eps)
        elif normalize == "mean":
            advantages[members] = r - r.mean()
        elif normalize == "leave_one_out":
            mean_of_others = (r.sum() - r) / (len(r) - 1)
            advantages[members] = r - mean_of_others
        else:
            raise ValueError(f"normalize must be std, mean or leave_one_out, got {normalize!r}")
    return advantages.float()
