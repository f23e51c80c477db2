"""Group-relative advantages."""

import torch
from torch import Tensor

from r1kernels import check


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    *,
    normalize: str = "std",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Each reward against its group's: (r - mean) / (std + eps), r - mean, or r - mean of others.

    A group whose rewards are all equal, a group of one included, gets exactly 0: the test is
    max == min, not a small standard deviation.

    Args:
        rewards: [N], a floating or integer dtype.
        group_ids: int64 [N]; equal ids form a group, in any order, whatever the values.
        normalize: "std" (GRPO), "mean" (Dr. GRPO, Kimi) or "leave_one_out" (RLOO).
        ddof: 1 for the sample standard deviation, 0 for the population's.
        eps: added to the standard deviation; >= 0.

    Returns:
        float32 [N].

    Gradients: none.
    Numerics: float64 inside; the same values in another order give the same advantages up to its
        rounding. Deterministic.
    Raises: ValueError for shapes, devices, options, and for a reward that is not finite, naming its
        index, when rewards are on the CPU. On a device, or under torch.compile, looking would wait:
        there a reward that is not finite makes its whole group's advantages NaN, and no other's.
    Source: arXiv:2402.03300 section 4.1.2; arXiv:2503.20783; arXiv:2402.14740.
    """
    check.tensor("rewards", rewards)
    if rewards.dtype == torch.bool or rewards.is_complex():
        raise TypeError(f"rewards must be floating or integer, got {check.describe(rewards)}")
    if rewards.ndim != 1:
        raise ValueError(f"rewards must have shape [N], got {check.describe(rewards)}")
    check.dtype_in("group_ids", group_ids, (torch.int64,))
    check.shape("group_ids", group_ids, rewards.shape, "that of rewards")
    check.device("group_ids", group_ids, rewards.device)
    check.choice("normalize", normalize, ("std", "mean", "leave_one_out"))
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be >= 0 and finite, got {eps!r}")
    if check.values_readable(rewards):
        bad = (~rewards.isfinite()).nonzero()
        if len(bad):
            at = int(bad[0])
            raise ValueError(f"rewards must be finite, got {float(rewards[at])} at index {at}")
    return _group_advantages(rewards.detach(), group_ids, normalize, ddof, eps)


@torch.library.custom_op("r1kernels::group_advantages", mutates_args=())
def _group_advantages(
    rewards: Tensor, group_ids: Tensor, normalize: str, ddof: int, eps: float
) -> Tensor:
    # Groups are numbered by sorting: torch.unique's output shape would wait for the device.
    sorted_ids_N, order_N = group_ids.sort(stable=True)
    starts_N = torch.zeros_like(sorted_ids_N)
    starts_N[1:] = sorted_ids_N[1:] != sorted_ids_N[:-1]
    group_N = torch.empty_like(order_N).scatter_(0, order_N, starts_N.cumsum(0))

    # index_put with accumulation is deterministic on CUDA, index_add is not.
    zeros_N = torch.zeros_like(rewards, dtype=torch.float64)
    rewards_N = rewards.double()
    ones_N = torch.ones_like(rewards_N)
    count_N = zeros_N.index_put((group_N,), ones_N, accumulate=True)[group_N]
    mean_N = zeros_N.index_put((group_N,), rewards_N, accumulate=True)[group_N] / count_N
    highest_N = zeros_N.scatter_reduce(0, group_N, rewards_N, "amax", include_self=False)[group_N]
    lowest_N = zeros_N.scatter_reduce(0, group_N, rewards_N, "amin", include_self=False)[group_N]

    centred_N = rewards_N - mean_N
    if normalize == "std":
        squares_N = zeros_N.index_put((group_N,), centred_N.square(), accumulate=True)[group_N]
        centred_N = centred_N / ((squares_N / (count_N - ddof)).sqrt() + eps)
    elif normalize == "leave_one_out":
        centred_N = centred_N * count_N / (count_N - 1)
    # A mean that is not finite: so is one of the rewards, and equal ones are no excuse.
    equal_N = (highest_N == lowest_N) & mean_N.isfinite()
    return torch.where(equal_N, 0.0, centred_N).float()


@_group_advantages.register_fake
def _(rewards: Tensor, group_ids: Tensor, normalize: str, ddof: int, eps: float) -> Tensor:
    return rewards.new_empty(rewards.shape, dtype=torch.float32)
