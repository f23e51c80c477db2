"""What a policy loss reads: arguments checked and flattened to [T], aggregation weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels import check
from r1kernels.objective import PolicyObjective
from r1kernels.packing import check_cu_seqlens, sequence_index


class PolicyInputs(NamedTuple):
    """What policy_terms needs besides logp. Tensors are [T]; a token of weight 0 is never read.

    weights_T is aggregation weight x caller's weight x mask, normaliser included. sequence_T is
    int64, the index of each token's sequence; None: all tokens are one sequence.
    """

    advantages_T: Tensor
    logp_old_T: Tensor | None
    logp_ref_T: Tensor | None
    logp_sampler_T: Tensor | None
    entropy_T: Tensor | None
    weights_T: Tensor
    sequence_T: Tensor | None
    num_sequences: int


def prepare(
    objective: PolicyObjective,
    shape: torch.Size,
    advantages: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
    logp_sampler: Tensor | None = None,
    entropy: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    has_entropy: bool = False,
) -> PolicyInputs:
    """Check policy_loss's arguments for log-probabilities of `shape` and flatten them to [T].

    An op that makes the entropy itself passes none, and has_entropy: entropy_T is filled in later.
    """
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"objective must be a PolicyObjective, got {check.describe(objective)}")
    if len(shape) not in (1, 2):
        raise ValueError(f"log-probabilities must be [T] or [B, S], got {list(shape)}")
    no_entropy = entropy is None and not has_entropy
    for name, missing, field, unused in (
        ("logp_ref", logp_ref is None, "kl_coef", 0),
        ("logp_sampler", logp_sampler is None, "sampler_correction", "none"),
        ("entropy", no_entropy, "entropy_coef", 0),
        ("entropy", no_entropy, "top_entropy_quantile", 1),
    ):
        if missing and getattr(objective, field) != unused:
            raise ValueError(f"{name} is required by {field}={getattr(objective, field)!r}")

    if len(shape) == 2:
        if cu_seqlens is not None:
            raise ValueError(f"cu_seqlens belongs to packed tokens [T], got shape {list(shape)}")
        num_sequences = shape[0]
        sequence_T = torch.arange(shape[0] * shape[1], device=device) // max(shape[1], 1)
    elif cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, shape[0], device)
        num_sequences = cu_seqlens.shape[0] - 1
        sequence_T = sequence_index(cu_seqlens, shape[0])
    else:
        if objective.needs_sequences:
            raise ValueError(
                f"cu_seqlens is required for packed tokens {list(shape)} by {objective!r}"
            )
        num_sequences, sequence_T = 1, None

    def per_token(name: str, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        check.shape(name, x, shape, "that of the log-probabilities")
        check.device(name, x, device)
        return x.reshape(-1)

    def constant(name: str, x: Tensor | None) -> Tensor | None:
        x_T = per_token(name, x)
        return None if x_T is None else x_T.detach().to(dtype)

    check.floating("advantages", advantages)
    if advantages.shape != shape and sequence_T is not None:
        check.shape("advantages", advantages, (num_sequences,), f"or {list(shape)}")
        check.device("advantages", advantages, device)
        advantages_T = advantages.detach().to(dtype)[sequence_T]
    else:
        advantages_T = constant("advantages", advantages)

    mask_T = per_token("mask", mask)
    if mask_T is None:
        mask_T = torch.ones(shape.numel(), dtype=torch.bool, device=device)
    weights_T = constant("weights", weights)
    if isinstance(normalizer, Tensor):
        check.shape("normalizer", normalizer, (), "or a number")
        normalizer = normalizer.detach()
    elif normalizer is not None and not 0 < normalizer < float("inf"):
        raise ValueError(f"normalizer must be > 0 and finite, got {normalizer!r}")
    weights_T = aggregation_weights(
        objective, mask_T, sequence_T, num_sequences, weights_T, normalizer, dtype=dtype
    )
    entropy_T = per_token("entropy", entropy)
    return PolicyInputs(
        advantages_T,
        constant("logp_old", logp_old),
        constant("logp_ref", logp_ref),
        constant("logp_sampler", logp_sampler),
        None if entropy_T is None else entropy_T.to(dtype),
        weights_T,
        sequence_T,
        num_sequences,
    )


def live_rows(
    objective: PolicyObjective, shape: torch.Size, advantages: object, cu_seqlens: object
) -> Tensor | None:
    """Tokens that may have a coefficient, bool [T] on the CPU, from what the host knows.

    None where it knows nothing: advantages or their cu_seqlens on a device, or an objective in
    which an advantage of 0 is not enough. Looks at arguments that `prepare` has yet to check.
    """
    known = [advantages] if cu_seqlens is None else [advantages, cu_seqlens]
    if not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in known):
        return None
    if not isinstance(objective, PolicyObjective) or not objective.idle_without_advantage:
        return None
    T = shape.numel()
    sequence_T, count = None, 1
    if len(shape) == 2:
        sequence_T, count = torch.arange(T) // max(shape[1], 1), shape[0]
    elif cu_seqlens is not None:
        sequence_T, count = sequence_index(cu_seqlens, T), cu_seqlens.shape[0] - 1
    live = advantages != 0
    if live.shape != shape:
        if sequence_T is None or live.shape != (count,):
            return None
        live = live[sequence_T]
    live_T = live.reshape(-1)
    if objective.ratio_level == "sequence":
        live_T = spread_sum(live_T, sequence_T, count) > 0
    return live_T


def aggregation_weights(
    objective: PolicyObjective,
    mask_T: Tensor,
    sequence_T: Tensor | None,
    num_sequences: int,
    weights_T: Tensor | None,
    normalizer: float | Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Each token's share of the loss [T]: objective.aggregation's weight, times weights_T, or 0.

    normalizer takes the place of the local count: of the counted tokens for "token_mean", of the
    sequences for the other three (objective.counts says which); "seq_mean_token_sum_norm" divides
    by objective.length besides. Every sequence counts, one without a counted token too, as TRL and
    Liger have it. A token whose mask is 0 gets 0 whatever its weight; a token of weight 0 still
    counts in the divisors. A sequence must not be split between calls under "seq_mean_token_mean".
    """
    mask_T = mask_T.bool()
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.double()
    if objective.aggregation == "token_mean":
        divisor = mask_T.sum().double() if normalizer is None else normalizer
    else:
        divisor = num_sequences if normalizer is None else normalizer
        if objective.aggregation == "seq_mean_token_mean":
            divisor = divisor * spread_sum(mask_T, sequence_T, num_sequences)
        elif objective.aggregation == "seq_mean_token_sum_norm":
            divisor = divisor * objective.length
    # Where nothing counts a divisor is 0, and the infinite share is not taken.
    share_T = torch.ones_like(mask_T, dtype=torch.float64) / divisor
    if weights_T is not None:
        share_T = share_T * weights_T
    return torch.where(mask_T, share_T, 0.0).to(dtype)


def spread_sum(x_T: Tensor, sequence_T: Tensor | None, num_sequences: int) -> Tensor:
    """For each token the sum of x over its sequence, float64 [T]."""
    if sequence_T is None:
        return x_T.sum(dtype=torch.float64).expand(x_T.shape)
    # index_put with accumulation sorts on CUDA, so it is deterministic there; index_add is not.
    sums_B = x_T.new_zeros(num_sequences, dtype=torch.float64)
    return sums_B.index_put((sequence_T,), x_T.double(), accumulate=True)[sequence_T]
