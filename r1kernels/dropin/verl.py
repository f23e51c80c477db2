"""verl's fused heads and `logprobs_from_logits`."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1kernels.check import choice
from r1kernels.linear_logp import linear_logp
from r1kernels.reference.token_logp import Logp
from r1kernels.token_logp import token_logp


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropy) of labels, float32, flattened to [T] as the original's.

    Any width and vocabulary; on the CPU too.

    Args:
        hidden: [..., D] float32, bfloat16 or float16.
        weight: [V, D], dtype and device of hidden.
        labels: [...] or [T] int64 in [0, V); -100 gives 0.
        temperature: a number, or one for each token, [...] or [T]; > 0. None is 1.
        reduction: "none" or None, or "sum" or "mean" of the log-probabilities, 0-d; the entropy
            stays [T].
        dist_process_group: a group of one process or None: the head is not sharded here.

    Raises: ValueError on another reduction or a group of several; otherwise as `linear_logp`.
    """
    reduction = "none" if reduction is None else reduction
    choice("reduction", reduction, ("none", "sum", "mean"))
    if dist_process_group is not None and dist_process_group.size() > 1:
        raise ValueError(
            "dist_process_group must be None or have one process: a vocabulary that is sharded "
            f"over {dist_process_group.size()} is left to verl's own function"
        )
    temperature = 1.0 if temperature is None else temperature
    logp_T, entropy_T, _ = _head(hidden.flatten(0, -2), weight, labels.flatten(), temperature)
    reduced = {"none": logp_T, "sum": logp_T.sum(), "mean": logp_T.mean()}[reduction]
    return reduced, entropy_T


class FusedLinearForPPO(torch.nn.Module):
    """(log-probabilities float32, entropy in the dtype of the hidden states), shaped as the labels.

    chunk_size and impl_backend ("torch" or "liger") are accepted and have no effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        choice("impl_backend", impl_backend, ("torch", "liger"))
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Arguments as `linear_cross_entropy`; input_ids are the labels, of any integer dtype."""
        out = _head(hidden_states, vocab_weights, input_ids.long(), temperature)
        return out.logp, out.entropy.to(hidden_states.dtype)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities of labels, float32, shaped as the labels.

    Args:
        logits: [..., V] float32, bfloat16 or float16.
        labels: [...] int64 in [0, V); -100 gives 0.
        inplace_backward: the backward writes the gradient over the logits, as flash-attn's
            cross-entropy does for verl; pass False where they are used again.

    Raises: as `token_logp`.
    """
    return token_logp(logits, labels, inplace_backward=inplace_backward).logp


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor) -> Logp:
    if isinstance(temperature, Tensor):
        one = temperature.numel() == 1
        if not one and temperature.numel() != labels.numel():
            raise ValueError(
                f"temperature must be one number or one for each of {labels.numel()} labels, "
                f"got {list(temperature.shape)}"
            )
        temperature = temperature.expand(labels.shape) if one else temperature.view(labels.shape)
    return linear_logp(hidden, weight, labels, temperature=temperature, entropy=True)
