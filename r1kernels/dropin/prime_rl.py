"""prime-rl's fused output layer."""

import torch
from torch import Tensor

from r1kernels.check import IGNORE
from r1kernels.linear_logp import linear_logp


class FusedOutputLinear(torch.nn.Linear):
    """A head that returns log-probabilities and entropy, with a temperature for each token.

    Without a sampling mask gradients flow through the entropy too, which the original refuses.
    chunk_size is accepted and has no effect: the workspace sets the chunks.
    """

    def __init__(self, in_features: int, out_features: int, chunk_size: int):
        super().__init__(in_features, out_features, bias=False)
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        temperature: Tensor | None = None,
        sampling_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """{"logprobs", "entropy"}: [B, S] float32; without labels {"logits"}: [B, S, V].

        Args:
            hidden_states: [B, S, D] float32, bfloat16 or float16.
            labels: [B, S] int64: the token that each position predicts; -100 gives 0.
            temperature: [B, S], required with labels; > 0.
            sampling_mask: [B, S, K] integers, the ids a sampler kept of each distribution, -1 for
                none. Log-probabilities are normalised over them where the label is among them. The
                entropy stays that of the whole distribution, and has no gradient then.

        Raises: ValueError without a temperature; otherwise as `linear_logp`.
        """
        if labels is None:
            return {"logits": super().forward(hidden_states)}
        if temperature is None:
            raise ValueError("temperature must be [B, S], one per token, got None")
        hidden_TD, labels_T = hidden_states.flatten(0, 1), labels.flatten()
        temperature_T = temperature.reshape(labels_T.shape)
        weight, shape = self.weight, labels.shape
        if sampling_mask is None:
            out = linear_logp(hidden_TD, weight, labels_T, temperature=temperature_T, entropy=True)
            return {"logprobs": out.logp.view(shape), "entropy": out.entropy.view(shape)}
        with torch.no_grad():
            whole = linear_logp(
                hidden_TD, weight, labels_T, temperature=temperature_T, entropy=True
            )
        ids_TK = sampling_mask.flatten(0, 1)
        replayed_T = (ids_TK == labels_T[:, None]).any(1)
        rows = replayed_T.nonzero().squeeze(1)
        kept = ids_TK[rows] >= 0
        offsets = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
        part = linear_logp(
            hidden_TD[rows],
            weight,
            labels_T[rows],
            temperature=temperature_T[rows],
            kept=(ids_TK[rows][kept].long(), offsets),
        )
        rest = linear_logp(
            hidden_TD, weight, labels_T.masked_fill(replayed_T, IGNORE), temperature=temperature_T
        )
        logp_T = rest.logp.index_add(0, rows, part.logp)
        return {"logprobs": logp_T.view(shape), "entropy": whole.entropy.view(shape)}
