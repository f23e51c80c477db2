"""Log-probability and entropy from hidden states: one matrix product, then `token_logp`."""

import torch
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.reference.token_logp import Logp, fwd, logit_gradient, token_logp


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> Logp:
    """`token_logp(hidden @ (weight + scale B A).T + bias, targets)`, the logits kept whole.

    In float64 for float64 inputs, in float32 otherwise. Differentiable by autograd, any device.
    Args as `r1kernels.linear_logp`.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = (targets != -100)[..., None]
    hidden = torch.where(counted, hidden, 0).to(wide)
    logits = hidden @ weight.to(wide).T
    if lora is not None:
        lora_RD, lora_VR, scale = lora
        logits = logits + scale * (hidden @ lora_RD.to(wide).T) @ lora_VR.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    return token_logp(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        entropy=entropy,
    )


def refuses(*_args: object) -> str | None:
    """None: runs anywhere, but promises nothing about bits."""
    return "no promise under batch_invariant" if is_batch_invariant() else None


class HeadChunk:
    """See `r1kernels.chunked_head.HeadChunk`; logits are kept whole."""

    def __init__(self, head, rows: int, entropy: bool, entropy_grad: bool):
        self.head, self.entropy = head, entropy

    @staticmethod
    def bytes_per_row(head) -> int:
        # float32 logits, their softmax and its gradient
        return 12 * head.weight_VD.shape[0]

    @staticmethod
    def block_rows() -> int:
        return 1

    def forward(self, rows, keep: bool) -> Logp:
        logits_CV = self._logits(rows)
        if keep:
            self.rows, self.logits_CV = rows, logits_CV
        return Logp(
            *fwd(
                logits_CV,
                rows.targets_T,
                rows.temperature_T,
                self.head.softcap,
                self.head.logit_scale,
                self.entropy,
            )
        )

    def gradients(
        self, active: Tensor | None, dlogp_C: Tensor, dentropy_C: Tensor | None, grads, last: bool
    ) -> Tensor | None:
        if active is None:
            return self._products(self.rows, self.logits_CV, dlogp_C, dentropy_C, None, grads)
        return self._products(
            self.rows.take(active), self.logits_CV[active], dlogp_C, dentropy_C, None, grads
        )

    def backward(
        self,
        rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads,
    ) -> Tensor | None:
        return self._products(rows, self._logits(rows), dlogp_C, dentropy_C, dlse_C, grads)

    def _logits(self, rows) -> Tensor:
        logits_CV = rows.hidden_TD.float() @ self.head.weight_VD.float().T
        low_CR = self.head.low(rows.hidden_TD)
        if low_CR is not None:
            logits_CV.addmm_(low_CR, self.head.lora_VR.float().T)
        return logits_CV if self.head.bias_V is None else logits_CV + self.head.bias_V.float()

    def _products(self, rows, logits_CV, dlogp_C, dentropy_C, dlse_C, grads) -> Tensor | None:
        head = self.head
        dlogits_CV = logit_gradient(
            dlogp_C,
            dentropy_C,
            dlse_C,
            logits_CV,
            rows.targets_T,
            rows.temperature_T,
            head.softcap,
            head.logit_scale,
        )
        if grads.weight_VD is not None:
            grads.weight_VD.addmm_(dlogits_CV.T, rows.hidden_TD.float())
        if grads.bias_V is not None:
            grads.bias_V.add_(dlogits_CV.sum(0))
        dhidden_CD = dlogits_CV @ head.weight_VD.float() if grads.hidden else None
        if grads.lora_VR is not None:
            grads.lora_VR.addmm_(dlogits_CV.T, head.low(rows.hidden_TD))
        if head.lora_VR is not None and grads.low:
            dlow_CR = dlogits_CV @ head.lora_VR.float()
            head.add_low(dlow_CR, rows.hidden_TD, dhidden_CD, grads)
        return dhidden_CD
