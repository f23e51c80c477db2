"""Chunks padded to whole blocks of rows, for `batch_invariant`.

A library's GEMM sends the last few rows of its operand, and threads with few rows, through other
kernels, whose sums differ in the last bits. With whole blocks alone there are none.
"""

import torch.nn.functional as F
from torch import Tensor

from r1kernels.reference.token_logp import Logp

# More than any log-sum-exp, and a float32: beside it every probability of a padding row is 0.
FAR = 2.0**100


class PaddedChunk:
    """A `head_contract.HeadChunk` that hands another one multiples of `block` rows.

    Padding rows are zeros with coefficient 0, so they add nothing to a gradient.
    """

    def __init__(self, chunk, block: int, head, rows: int, entropy: bool, entropy_grad: bool):
        self.block = block
        self.work = chunk(head, rows + -rows % block, entropy, entropy_grad)

    def target_logits(self, rows) -> Tensor:
        return self.work.target_logits(self._rows(rows))[: len(rows.targets_T)]

    def forward(self, rows, keep: bool) -> Logp:
        return _first(self.work.forward(self._rows(rows), keep), len(rows.targets_T))

    def gradients(
        self, active: Tensor | None, dlogp_C: Tensor, dentropy_C: Tensor | None, grads, last: bool
    ) -> Tensor | None:
        count = len(dlogp_C)
        if active is not None and count:
            # A row that is there anyway: another one might be NaN, and 0 * NaN is NaN.
            active = F.pad(active, (0, -count % self.block), value=int(active[0]))
        dlogp_C, dentropy_C = (self._pad(x) for x in (dlogp_C, dentropy_C))
        dhidden_CD = self.work.gradients(active, dlogp_C, dentropy_C, grads, last)
        return None if dhidden_CD is None else dhidden_CD[:count]

    def backward(
        self,
        rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads,
    ) -> Tensor | None:
        stats = Logp(self._pad(stats.logp), self._pad(stats.entropy), self._pad(stats.lse, FAR))
        upstream = (self._pad(x) for x in (dlogp_C, dentropy_C, dlse_C))
        dhidden_CD = self.work.backward(self._rows(rows), stats, *upstream, grads)
        return None if dhidden_CD is None else dhidden_CD[: len(dlogp_C)]

    def _rows(self, rows):
        hidden_TD = rows.hidden_TD.contiguous()
        return rows._replace(
            hidden_TD=F.pad(hidden_TD, (0, 0, 0, -len(hidden_TD) % self.block)),
            targets_T=self._pad(rows.targets_T),
            temperature_T=self._pad(rows.temperature_T, 1.0),
            prior_T=self._pad(rows.prior_T),
            target_logit_T=self._pad(rows.target_logit_T),
        )

    def _pad(self, x_C: Tensor | None, value: float = 0.0) -> Tensor | None:
        return None if x_C is None else F.pad(x_C, (0, -len(x_C) % self.block), value=value)


def _first(stats: Logp, count: int) -> Logp:
    return Logp(*(None if x is None else x[:count] for x in stats))
