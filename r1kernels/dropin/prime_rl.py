"""prime-rl's fused output layer."""

import torch
from torch import Tensor

from r1kernels.linear_logp import linear_logp


class FusedOutputLinear(torch.nn.Linear):
    """A head that returns log-probabilities and entropy, with a temperature for each token.

    Gradients flow through the entropy too, which the original refuses. chunk_size is accepted and
    has no effect: the workspace sets the chunks.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"logprobs", "entropy"}: [B, S] float32; without labels {"logits"}: [B, S, V].

        Args:
            hidden_states: [B, S, D] float32, bfloat16 or float16.
            labels: [B, S] int64: the token that each position predicts; -100 gives 0.
            temperature: [B, S], required with labels; > 0.

        Raises: ValueError without a temperature; otherwise as `linear_logp`.
        """
        if labels is None:
            return {"logits": super().forward(hidden_states)}
        if temperature is None:
            raise ValueError("temperature must be [B, S], one per token, got None")
        out = linear_logp(
            hidden_states,
            self.weight,
            labels,
            temperature=temperature.view(labels.shape),
            entropy=True,
        )
        return {"logprobs": out.logp, "entropy": out.entropy}
