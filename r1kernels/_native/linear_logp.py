"""The linear head on the CPU: library GEMMs on tiles of the vocabulary, row work in C++.

A chunk of C rows meets the weight in slices of `TILE_V` rows. The GEMM writes a tile of logits
[C, TILE_V]; `exp_tile` reads it back at once and leaves exponentials (or transformed logits) in its
place. Kept tiles take 4 C V bytes; without `keep` one tile is reused. 16-bit inputs are widened
slice by slice, so every product and every exponential is float32. The row work reads and writes
each tile once, from cache; with rows left out, those that stay are read and written once more.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels._native.common import address, extension, refusal
from r1kernels.backend import is_batch_invariant
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import SKIP_TILE, gradient_terms, left_out

# 2048 columns of 1024 rows are 8 MiB, still in the last-level cache when the row work reads them.
TILE_V = SKIP_TILE
# Under batch_invariant rows, columns and width come in multiples of it: then the library's GEMM
# sums every element in one order.
ALIGN = 64
# What exp_tile leaves in a tile (`Store` in csrc/cpu/kernels.hpp)
NOTHING, EXP, LOGIT = 0, 1, 2


def refuses(
    hidden: Tensor | None = None,
    _weight: Tensor | None = None,
    lora_VR: Tensor | None = None,
    *_args: object,
) -> str | None:
    """Why these tensors cannot be taken, or None."""
    if lora_VR is not None and is_batch_invariant():
        return "no low-rank term under batch_invariant"
    return refusal(hidden)


class HeadChunk:
    """See `r1kernels.head_contract.HeadChunk`."""

    skip_mass = 0.0

    def __init__(self, head, rows: int, entropy: bool, entropy_grad: bool):
        self.head = head
        self.entropy = entropy
        # The entropy's gradient and the softcap's slope need the logit; all else its exponential.
        self.store = LOGIT if entropy_grad or head.softcap else EXP
        vocab, width = head.weight_VD.shape
        self.edges = [(at, min(at + TILE_V, vocab)) for at in range(0, vocab, TILE_V)]
        self.capacity = rows
        self.tiles: Tensor | None = None
        self.scratch: Tensor | None = None
        self.align = ALIGN if is_batch_invariant() else 1
        self.width = self._up(width)
        as_is = head.weight_VD.dtype == torch.float32
        if self.align > 1:
            whole = (self._up(vocab), self.width) == (vocab, width)
            as_is = as_is and whole and head.weight_VD.is_contiguous()
        self.slice_SD = None if as_is else torch.zeros(min(TILE_V, self._up(vocab)), self.width)
        self.bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
        self.lora_VR = None if head.lora_VR is None else head.lora_VR.float()
        self.threads = torch.get_num_threads()

    @staticmethod
    def bytes_per_row(head) -> int:
        return 4 * head.weight_VD.shape[0]

    @staticmethod
    def block_rows() -> int:
        # Sixteen rows for each thread, among which the library may share them out.
        return -(-16 * torch.get_num_threads() // ALIGN) * ALIGN

    def target_logits(self, rows) -> Tensor:
        self._take(rows)
        logit_C = self._target_logit(self.targets_C.clamp(min=0))
        return torch.where(self.targets_C >= 0, logit_C, 0.0)

    def forward(self, rows, keep: bool) -> Logp:
        self._take(rows)
        count = len(self.targets_C)
        target_C = rows.target_logit_T
        if target_C is None:
            target_C = self._target_logit(self.targets_C)
        prior_C = (
            torch.zeros_like(target_C)
            if rows.prior_T is None
            else rows.prior_T.float().nan_to_num(0.0).clamp(-8.0, 0.0)
        )
        # Finite for a target of -inf, or a tile that is all -inf would come to NaN.
        anchor_C = (target_C - prior_C).clamp(min=torch.finfo(torch.float32).min)
        sum_C = torch.zeros(count, dtype=torch.float64)
        weighted_C = torch.zeros(count, dtype=torch.float64) if self.entropy else None
        self.anchors, masses = [], []
        for first, last in self.edges:
            before = (sum_C.clone(), anchor_C.clone()) if keep and self.skip_mass else None
            tile = self._logits(first, last, self._slice(first, last), keep)
            extension.exp_tile(
                **self._where(tile, first, last, self.targets_C, self.temperature_C),
                store=self.store if keep else NOTHING,
                entropy=self.entropy,
                anchor=anchor_C.data_ptr(),
                sum=sum_C.data_ptr(),
                weighted=address(weighted_C),
            )
            if keep and self.store == EXP:
                self.anchors.append(anchor_C.clone())
            if before is not None:
                moved_C = torch.exp((before[1] - anchor_C).double())
                masses.append((sum_C - before[0] * moved_C, anchor_C.double()))
        if self.head.shard is not None:
            # The largest anchor of all ranks: kept tiles are brought to it like any earlier one.
            anchor_C, sum_C, weighted_C = self.head.shard.combine(anchor_C, sum_C, weighted_C)
        self.final_C = anchor_C
        stats = self._statistics(target_C, anchor_C, sum_C, weighted_C)
        if masses:
            mass_CS = torch.stack([x_C * torch.exp(c_C - anchor_C) for x_C, c_C in masses], 1)
            mass_CS = (mass_CS / self.total_C[:, None]).clamp(min=0.0)
            self.skip_CS, self.dropped_C = left_out(mass_CS, self.targets_C, self.skip_mass)
        return stats

    def gradients(
        self, active: Tensor | None, dlogp_C: Tensor, dentropy_C: Tensor | None, grads, last: bool
    ) -> Tensor | None:
        rows = slice(None) if active is None else active
        hidden_CD, targets_C = self.hidden_CD[rows], self.targets_C[rows]
        low_CR = None if self.low_CR is None else self.low_CR[rows]
        right = hidden_CD, low_CR
        temperature_C = None if self.temperature_C is None else self.temperature_C[rows]
        if self.store == LOGIT:
            stats = Logp(*(None if x is None else x[rows] for x in self.stats))
            terms = gradient_terms(stats, dlogp_C, dentropy_C, None)
            factor_C = None
        else:
            scale = self.head.logit_scale
            # dz = factor * E with minus the sum of the others in the target's column; the factor
            # stays outside both GEMMs.
            factor_C = (-scale * dlogp_C.double() / self.total_C[rows]).float()
            if temperature_C is not None:
                factor_C /= temperature_C
            minus_C = -self.sum_C[rows].float()
            right = (None if x is None else x * factor_C[:, None] for x in right)
        self._check_rows(len(targets_C))
        right, out = tuple(right), self._row_gradients(hidden_CD, grads)
        kept = None
        for index, (first, end) in enumerate(self.edges):
            tile = self._tile(first, end, len(self.targets_C), True)
            if self.store == EXP:
                self._settle(tile, index)
            if self.skip_mass:
                kept = (~self.skip_CS[rows, index]).nonzero().squeeze(1)
                if not len(kept):
                    continue
                kept = kept if len(kept) < len(targets_C) else None

            def part(x_C: Tensor | None, kept: Tensor | None = kept) -> Tensor | None:
                return x_C if kept is None or x_C is None else x_C[kept]

            # The rows that stay are copied out; all of them if the tile must survive grad_tile.
            stay = active if kept is None else part(active) if active is not None else kept
            if stay is not None or (self.store == LOGIT and not last):
                tile = self._copy(tile, stay)
            targets_K = part(targets_C)
            if self.store == LOGIT:
                temperature_K, terms_K = part(temperature_C), {k: part(x) for k, x in terms.items()}
                where = self._where(tile, first, end, targets_K, temperature_K)
                extension.grad_tile(
                    **where, transformed=True, **{k: address(x) for k, x in terms_K.items()}
                )
            else:
                at = ((targets_K >= first) & (targets_K < end)).nonzero().squeeze(1)
                tile[at, targets_K[at] - first] = part(minus_C)[at]
            weight_SD = self._slice(first, end) if grads.hidden else None
            meets = part(right[0]), part(right[1])
            self._accumulate(tile, weight_SD, meets, part(factor_C), first, end, out, grads, kept)
        dhidden_CD, dlow_CR = out
        if factor_C is not None:
            for x in out:
                if x is not None:
                    x *= factor_C[:, None]
        self.head.add_low(dlow_CR, hidden_CD, dhidden_CD, grads)
        return self._narrow(dhidden_CD)

    def backward(
        self,
        rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads,
    ) -> Tensor | None:
        self._take(rows)
        terms = gradient_terms(stats, dlogp_C, dentropy_C, dlse_C)
        right, out = (self.hidden_CD, self.low_CR), self._row_gradients(self.hidden_CD, grads)
        for first, last in self.edges:
            weight_SD = self._slice(first, last)
            tile = self._logits(first, last, weight_SD, False)
            extension.grad_tile(
                **self._where(tile, first, last, self.targets_C, self.temperature_C),
                transformed=False,
                **{name: address(x) for name, x in terms.items()},
            )
            self._accumulate(tile, weight_SD, right, None, first, last, out, grads)
        dhidden_CD, dlow_CR = out
        self.head.add_low(dlow_CR, self.hidden_CD, dhidden_CD, grads)
        return self._narrow(dhidden_CD)

    def _take(self, rows) -> None:
        hidden_CD = rows.hidden_TD.float()
        extra = self.width - hidden_CD.shape[1]
        self.hidden_CD = F.pad(hidden_CD, (0, extra)) if extra else hidden_CD
        self._check_rows(len(hidden_CD))
        self.low_CR = self.head.low(self.hidden_CD)
        self.targets_C = rows.targets_T.contiguous()
        temperature_C = rows.temperature_T
        self.temperature_C = None if temperature_C is None else temperature_C.float().contiguous()

    def _row_gradients(self, hidden_CD: Tensor, grads) -> tuple[Tensor | None, Tensor | None]:
        """What the tiles add up to: dhidden, and the gradient of the low-rank product."""
        count = len(hidden_CD)
        low = self.lora_VR is not None and grads.low
        return (
            torch.zeros(hidden_CD.shape) if grads.hidden else None,
            torch.zeros(count, self.lora_VR.shape[1]) if low else None,
        )

    def _accumulate(
        self, tile, weight_SD, right, factor_C, first, last, out, grads, kept=None
    ) -> None:
        """GEMMs 2 and 3 of a tile; `right` is (hidden, low) as they meet it, `kept` the places of
        the tile's rows in `out` (None: all)."""
        (hidden_CD, low_CR), (dhidden_CD, dlow_CR) = right, out
        lora_SR = None if dlow_CR is None else self.lora_VR[first:last]
        for sum_CX, matrix_SX in ((dhidden_CD, weight_SD), (dlow_CR, lora_SR)):
            if sum_CX is not None and kept is None:
                sum_CX.addmm_(tile, matrix_SX)
            elif sum_CX is not None:
                sum_CX.index_add_(0, kept, tile @ matrix_SX)
        tile = tile[:, : last - first]
        if grads.weight_VD is not None:
            grads.weight_VD[first:last].addmm_(tile.T, self._narrow(hidden_CD))
        if grads.lora_VR is not None:
            grads.lora_VR[first:last].addmm_(tile.T, low_CR)
        if grads.bias_V is not None:
            grads.bias_V[first:last] += tile.sum(0) if factor_C is None else tile.T @ factor_C

    def _target_logit(self, targets_C: Tensor) -> Tensor:
        weight_CD = self.head.weight_VD[targets_C].float()
        z_C = (self._narrow(self.hidden_CD) * weight_CD).sum(-1)
        if self.low_CR is not None:
            z_C += (self.low_CR * self.lora_VR[targets_C]).sum(-1)
        if self.bias_V is not None:
            z_C += self.bias_V[targets_C]
        z_C *= self.head.logit_scale
        if self.head.softcap:
            z_C = self.head.softcap * torch.tanh(z_C / self.head.softcap)
        return z_C if self.temperature_C is None else z_C / self.temperature_C

    def _statistics(
        self, target_C: Tensor, anchor_C: Tensor, sum_C: Tensor, weighted_C: Tensor | None
    ) -> Logp:
        prior_C = target_C.double() - anchor_C
        exp_C = prior_C.exp()
        total_C = sum_C + exp_C
        log_C = total_C.log()
        # log1p keeps the digits of a logp near 0; far below, where exp(prior) may underflow, the
        # plain form is exact.
        logp_C = torch.where(prior_C > -30.0, -torch.log1p(sum_C / exp_C), prior_C - log_C)
        entropy_C = None
        if weighted_C is not None:
            # log S - (u + e q) / S cancels where the target holds most of the mass; its
            # rearrangement around log1p does not.
            peaked_C = torch.log1p(sum_C / exp_C) + (prior_C * sum_C - weighted_C) / total_C
            flat_C = log_C - (weighted_C + torch.where(exp_C > 0, exp_C * prior_C, 0.0)) / total_C
            entropy_C = torch.where(sum_C < exp_C, peaked_C, flat_C)
            entropy_C = entropy_C.clamp(min=0.0)  # NaN stays NaN
        self.sum_C, self.total_C = sum_C, total_C
        self.stats = Logp(logp_C, entropy_C, anchor_C + log_C)
        return self.stats

    def _settle(self, tile: Tensor, index: int) -> None:
        """Brings a tile whose rows were re-anchored later to the last anchor."""
        if not torch.equal(self.anchors[index], self.final_C):
            factor_C = torch.exp(self.anchors[index] - self.final_C)
            extension.rescale_tile(
                tile.data_ptr(), *tile.shape, tile.stride(0), factor_C.data_ptr(), self.threads
            )
            self.anchors[index] = self.final_C

    def _where(
        self,
        tile: Tensor,
        first: int,
        last: int,
        targets_C: Tensor,
        temperature_C: Tensor | None,
    ) -> dict:
        """What both tile kernels are told. It holds addresses: the caller keeps the tensors."""
        bias_V = None if self.bias_V is None else self.bias_V[first:]
        return {
            "tile": tile.data_ptr(),
            "rows": tile.shape[0],
            "cols": last - first,
            "ld": tile.stride(0),
            "first_column": first,
            "bias": address(bias_V),
            "targets": targets_C.data_ptr(),
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
            "temperature": address(temperature_C),
            "threads": self.threads,
        }

    def _logits(self, first: int, last: int, weight_SD: Tensor, keep: bool) -> Tensor:
        """GEMM 1 of a tile."""
        tile = self._tile(first, last, len(self.targets_C), keep)
        torch.mm(self.hidden_CD, weight_SD.T, out=tile)
        if self.low_CR is not None:
            tile.addmm_(self.low_CR, self.lora_VR[first:last].T)
        return tile

    def _tile(self, first: int, last: int, count: int, keep: bool) -> Tensor:
        """Logits of `count` rows and columns [first, last), contiguous for the GEMMs."""
        if self.tiles is None:
            vocab = self._up(self.edges[-1][1])
            self.tiles = torch.empty(self.capacity * (vocab if keep else min(TILE_V, vocab)))
        at, columns = self.capacity * first if keep else 0, self._up(last - first)
        return self.tiles[at : at + count * columns].view(count, columns)

    def _copy(self, tile: Tensor, active: Tensor | None) -> Tensor:
        if self.scratch is None:
            self.scratch = torch.empty(self.capacity * min(TILE_V, self._up(self.edges[-1][1])))
        count = len(tile) if active is None else len(active)
        out = self.scratch[: count * tile.shape[1]].view(count, tile.shape[1])
        return out.copy_(tile) if active is None else torch.index_select(tile, 0, active, out=out)

    def _slice(self, first: int, last: int) -> Tensor:
        weight_SD = self.head.weight_VD[first:last]
        if self.slice_SD is None:
            return weight_SD
        self._narrow(self.slice_SD[: last - first]).copy_(weight_SD)
        out_SD = self.slice_SD[: self._up(last - first)]
        out_SD[last - first :].zero_()
        return out_SD

    def _up(self, size: int) -> int:
        return -(-size // self.align) * self.align

    def _narrow(self, x_CD: Tensor | None) -> Tensor | None:
        """Without the columns that fill the width up."""
        return None if x_CD is None else x_CD[:, : self.head.weight_VD.shape[1]]

    def _check_rows(self, count: int) -> None:
        if self.align > 1 and count:
            for columns in {self._up(last - first) for first, last in self.edges[-2:]}:
                _check_rows_alike(count, self.block_rows(), columns, self.width, self.threads)


@functools.cache
def _check_rows_alike(rows: int, block: int, columns: int, width: int, threads: int) -> None:
    """Raises: RuntimeError unless both GEMMs of a row are the same at every place among `rows`."""
    generator = torch.Generator().manual_seed(0)
    row_D, row_S = (torch.randn(size, generator=generator) for size in (width, columns))
    weight_SD = torch.randn(columns, width, generator=generator)

    def products(count: int) -> tuple[Tensor, Tensor]:
        logits_CS = torch.mm(row_D.expand(count, -1).contiguous(), weight_SD.T)
        dhidden_CD = torch.zeros(count, width)
        return logits_CS, dhidden_CD.addmm_(row_S.expand(count, -1).contiguous(), weight_SD)

    for few, many in zip(products(block), products(rows), strict=True):
        if not ((few == few[0]).all() and (many == few[0]).all()):
            raise RuntimeError(
                f"batch_invariant: this machine's products of {rows} rows with a matrix of "
                f"{columns} x {width} on {threads} threads do not treat all rows alike"
            )
