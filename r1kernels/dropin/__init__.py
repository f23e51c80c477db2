"""Functions under other libraries' names and signatures, on this package's kernels.

One module per library; none of them imports its library. `r1kernels.patch` puts them in place.
"""

from r1kernels.dropin.liger import LigerFusedLinearGRPOLoss
from r1kernels.dropin.openrlhf import log_probs_from_logits
from r1kernels.dropin.prime_rl import FusedOutputLinear
from r1kernels.dropin.transformers import logprobs_forward
from r1kernels.dropin.trl import (
    ChunkedLogProbFunction,
    add_fused_lm_head,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from r1kernels.dropin.verl import FusedLinearForPPO, linear_cross_entropy, logprobs_from_logits

__all__ = [
    "ChunkedLogProbFunction",
    "FusedLinearForPPO",
    "FusedOutputLinear",
    "LigerFusedLinearGRPOLoss",
    "add_fused_lm_head",
    "entropy_from_logits",
    "linear_cross_entropy",
    "log_probs_from_logits",
    "logprobs_forward",
    "logprobs_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]
