"""OpenRLHF's `log_probs_from_logits`."""

from torch import Tensor

from r1kernels.token_logp import token_logp


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of labels, float32.

    The original divides `logits` by the temperature in place; here they keep their values.

    Args:
        logits: [..., V] float32, bfloat16 or float16.
        labels: [...] int64 in [0, V); -100 gives 0.
        temperature: > 0.

    Raises: as `token_logp`.
    """
    return token_logp(logits, labels, temperature=temperature).logp
