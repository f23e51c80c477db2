"""Log-probability and entropy from hidden states: one matrix product, then `token_logp`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.reference.token_logp import Logp, fwd, logit_gradient, token_logp, transformed
from r1kernels.rows import SKIP_TILE, left_out


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
    """See `r1kernels.head_contract.HeadChunk`; logits are kept whole."""

    skip_mass = 0.0

    def __init__(self, head, rows: int, entropy: bool, entropy_grad: bool):
        self.head, self.entropy = head, entropy

    @staticmethod
    def bytes_per_row(head) -> int:
        # float32 logits, their softmax and its gradient
        return 12 * head.weight_VD.shape[0]

    @staticmethod
    def block_rows() -> int:
        return 1

    def target_logits(self, rows) -> Tensor:
        head, at_C = self.head, rows.targets_T.clamp(min=0)
        z_C = (rows.hidden_TD.float() * head.weight_VD[at_C].float()).sum(-1)
        low_CR = head.low(rows.hidden_TD)
        z_C = z_C if low_CR is None else z_C + (low_CR * head.lora_VR[at_C].float()).sum(-1)
        z_C = z_C if head.bias_V is None else z_C + head.bias_V[at_C].float()
        return torch.where(rows.targets_T >= 0, self._transformed(z_C[:, None], rows)[:, 0], 0.0)

    def forward(self, rows, keep: bool) -> Logp:
        logits_CV = self._logits(rows)
        if self.head.shard is not None:
            stats = self._over_shards(rows, self._transformed(logits_CV, rows))
        else:
            options = rows.temperature_T, self.head.softcap, self.head.logit_scale, self.entropy
            stats = Logp(*fwd(logits_CV, rows.targets_T, *options))
        if keep:
            self.rows, self.logits_CV, self.stats = rows, logits_CV, stats
        if keep and self.skip_mass:
            mass_CS = self._masses(rows, logits_CV)
            self.skip_CS, self.dropped_C = left_out(mass_CS, rows.targets_T, self.skip_mass)
        return stats

    def gradients(
        self, active: Tensor | None, dlogp_C: Tensor, dentropy_C: Tensor | None, grads, last: bool
    ) -> Tensor | None:
        skip_CS = self.skip_CS if self.skip_mass else None
        rows, logits_CV, stats = self.rows, self.logits_CV, self.stats
        if active is not None:
            rows, logits_CV = rows.take(active), logits_CV[active]
            stats = Logp(*(None if x is None else x[active] for x in stats))
            skip_CS = None if skip_CS is None else skip_CS[active]
        return self._products(rows, logits_CV, stats, dlogp_C, dentropy_C, None, grads, skip_CS)

    def backward(
        self,
        rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads,
    ) -> Tensor | None:
        return self._products(rows, self._logits(rows), stats, dlogp_C, dentropy_C, dlse_C, grads)

    def _logits(self, rows) -> Tensor:
        logits_CV = rows.hidden_TD.float() @ self.head.weight_VD.float().T
        low_CR = self.head.low(rows.hidden_TD)
        if low_CR is not None:
            logits_CV.addmm_(low_CR, self.head.lora_VR.float().T)
        return logits_CV if self.head.bias_V is None else logits_CV + self.head.bias_V.float()

    def _masses(self, rows, logits_CV: Tensor) -> Tensor:
        """Probability of each tile of SKIP_TILE columns, without the target's."""
        p_CV = torch.softmax(self._transformed(logits_CV, rows), dim=-1)
        p_CV.scatter_(1, rows.targets_T[:, None], 0.0)
        p_CV = F.pad(p_CV, (0, -p_CV.shape[1] % SKIP_TILE))
        return p_CV.unflatten(1, (-1, SKIP_TILE)).sum(-1)

    def _transformed(self, logits_CV: Tensor, rows) -> Tensor:
        tau = 1.0 if rows.temperature_T is None else rows.temperature_T[:, None]
        return transformed(logits_CV, tau, self.head.softcap, self.head.logit_scale)

    def _over_shards(self, rows, x_CV: Tensor) -> Logp:
        """Softmax over the slices of all ranks around a maximum; the target is counted apart."""
        column_V = torch.arange(x_CV.shape[1], device=x_CV.device)
        x_CV = torch.where(column_V == rows.targets_T[:, None], -torch.inf, x_CV)
        target_C = rows.target_logit_T
        lowest = torch.finfo(torch.float32).min
        top_C = torch.maximum(x_CV.amax(-1), target_C).clamp(min=lowest)
        d_CV = x_CV - top_C[:, None]
        e_CV = d_CV.exp()
        u_C = torch.where(e_CV > 0, e_CV * d_CV, 0).sum(-1) if self.entropy else None
        top_C, s_C, u_C = self.head.shard.combine(top_C, e_CV.sum(-1), u_C)
        q_C = target_C.double() - top_C
        total_C = s_C + q_C.exp()
        log_C, entropy_C = total_C.log(), None
        if self.entropy:
            entropy_C = log_C - (u_C + torch.where(q_C.exp() > 0, q_C.exp() * q_C, 0.0)) / total_C
        return Logp(q_C - log_C, entropy_C, top_C + log_C)

    def _products(
        self, rows, logits_CV, stats, dlogp_C, dentropy_C, dlse_C, grads, skip_CS=None
    ) -> Tensor | None:
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
            None if head.shard is None else stats,
        )
        if skip_CS is not None:
            for tile, columns in enumerate(dlogits_CV.split(SKIP_TILE, dim=1)):
                columns.masked_fill_(skip_CS[:, tile, None], 0.0)
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
