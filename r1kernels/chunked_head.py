"""The order of work of the linear head: which rows meet which GEMM, a chunk of rows at a time.

A backend supplies `HeadChunk` (below); the paths of docs/design.md section 1 are built from it
here, once for all backends. Every path runs GEMM 1 on the same rows cut at the same places, so all
of them give bitwise the same log-probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.padded_chunk import PaddedChunk
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import beside
from r1kernels.shards import Shard

# Logits kept per chunk, in MiB, unless the caller says: enough rows for GEMMs at full rate.
DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 1280}
# Copying the rows that have a coefficient pays once this share of a chunk has none.
COMPACT_BELOW = 0.9
# Most rows of a padded chunk.
INVARIANT_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits.

    `l = softcap tanh(logit_scale (h (W + s B A)^T + b) / softcap) / temperature`, the temperature
    per row. The low-rank term is another product, `low = s h A^T` times B^T, in the tile of the
    first.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float  # 0: none
    logit_scale: float
    lora_RD: Tensor | None = None  # A
    lora_VR: Tensor | None = None  # B, in the dtype of the weight
    lora_scale: float = 1.0
    shard: Shard | None = None  # None: the weight is the whole vocabulary

    def low(self, hidden_CD: Tensor) -> Tensor | None:
        """s h A^T in float32; None without a low-rank term."""
        if self.lora_RD is None:
            return None
        return self.lora_scale * (hidden_CD.float() @ self.lora_RD.float().T)

    def add_low(
        self,
        dlow_CR: Tensor | None,
        hidden_CD: Tensor,
        dhidden_CD: Tensor | None,
        grads: "Gradients",
    ) -> None:
        """Adds to dhidden and to the gradient of A what the gradient of `low` comes to."""
        if dlow_CR is None:
            return
        dlow_CR = dlow_CR * self.lora_scale
        if dhidden_CD is not None:
            dhidden_CD.addmm_(dlow_CR, self.lora_RD.float())
        if grads.lora_RD is not None:
            grads.lora_RD.addmm_(dlow_CR.T, hidden_CD.float())


class Rows(NamedTuple):
    """The rows that count, in order."""

    hidden_TD: Tensor
    targets_T: Tensor
    temperature_T: Tensor | None
    prior_T: Tensor | None
    target_logit_T: Tensor | None = None  # given where a shard may not have the target (-1)
    # Where they stand among the `total` rows of the call; None: they are all of them.
    place_T: Tensor | None = None
    total: int | None = None

    def take(self, at: slice | Tensor) -> "Rows":
        found = Rows(*(x[at] if isinstance(x, Tensor) else x for x in self))
        if self.place_T is None and isinstance(at, Tensor):
            return found._replace(place_T=at, total=len(self.targets_T))
        return found

    def buffer(self, dtype: torch.dtype, zero: bool = False) -> Tensor:
        """[total, D] for results of these rows, 0 where a row of the call is none of them."""
        if self.place_T is not None:
            return self.hidden_TD.new_zeros((self.total, self.hidden_TD.shape[1]), dtype=dtype)
        new = self.hidden_TD.new_zeros if zero else self.hidden_TD.new_empty
        return new(self.hidden_TD.shape, dtype=dtype)

    def put(
        self, out_TD: Tensor, at: slice, value_AD: Tensor, active: Tensor | None = None
    ) -> None:
        """Writes results of the rows `at`, or of `active` among them, to their places in `out`."""
        where = None if self.place_T is None else self.place_T[at]
        if active is not None:
            where = at.start + active if where is None else where[active]
        if where is None:
            out_TD[at] = value_AD
        else:
            out_TD.index_copy_(0, where, value_AD.to(out_TD.dtype))


class Gradients(NamedTuple):
    """Which gradients are wanted; those of the head are accumulated in float32 over all chunks."""

    hidden: bool
    weight_VD: Tensor | None
    bias_V: Tensor | None
    lora_RD: Tensor | None = None
    lora_VR: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        head: Head,
        hidden: bool,
        weight: bool,
        bias: bool,
        lora_RD: bool = False,
        lora_VR: bool = False,
        weight_grad_VD: Tensor | None = None,
    ) -> "Gradients":
        """Buffers of zeros; for the weight's, weight_grad_VD if given, whatever it holds."""

        def buffer(like: Tensor | None, wanted: bool) -> Tensor | None:
            return (
                torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
                if wanted
                else None
            )

        return cls(
            hidden,
            weight_grad_VD
            if weight and weight_grad_VD is not None
            else buffer(head.weight_VD, weight),
            buffer(head.bias_V, bias),
            buffer(head.lora_RD, lora_RD),
            buffer(head.lora_VR, lora_VR),
        )

    @property
    def of_head(self) -> tuple[Tensor | None, ...]:
        return self[1:]

    @property
    def any(self) -> bool:
        return self.hidden or any(x is not None for x in self.of_head)

    @property
    def low(self) -> bool:
        """Whether the gradient of `Head.low` is wanted."""
        return self.hidden or self.lora_RD is not None


class HeadChunk(Protocol):
    """One backend's work on up to `rows` rows at a time.

    every_row: set where all rows are known to have a coefficient, so that none looks for them.
    """

    every_row: bool = False

    # Above 0: `gradients` leaves tiles of the vocabulary out (`rows.left_out`), and `forward` with
    # `keep` puts their mass [C] into dropped_C. Never together with an entropy gradient.
    skip_mass: float
    dropped_C: Tensor

    def __init__(self, head: Head, rows: int, entropy: bool, entropy_grad: bool): ...

    @staticmethod
    def bytes_per_row(head: Head) -> int:
        """Workspace of one kept row."""

    @staticmethod
    def block_rows() -> int:
        """Under `batch_invariant` a chunk has a multiple of as many rows; 1: any number will do."""

    def target_logits(self, rows: Rows) -> Tensor:
        """Transformed logits of the targets, [C] float32; 0 where another shard has them."""

    def forward(self, rows: Rows, keep: bool) -> Logp:
        """GEMM 1 and the row statistics, [C] float64: their low bits matter to a gradient.

        With `keep`, `gradients` may follow. The statistics are those of the whole vocabulary: a
        shard combines its sums with the other ranks'.
        """

    def gradients(
        self,
        active: Tensor | None,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        grads: Gradients,
        last: bool,
    ) -> Tensor | None:
        """GEMMs 2 and 3 of the kept chunk, for the rows `active` (all: None).

        Adds to grads; returns dhidden of those rows in float32. With `last` false the kept chunk
        survives for another call.
        """

    def backward(
        self,
        rows: Rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads: Gradients,
    ) -> Tensor | None:
        """GEMMs 1 to 3 of a chunk whose statistics are known.

        Adds to grads; returns dhidden in float32.
        """


def chunk_rows(chunk: type[HeadChunk], head: Head, workspace_mb: int | None) -> int:
    """Rows per chunk: what the workspace holds. Depends on nothing else, so all paths cut alike."""
    if head.shard is not None:
        return head.shard.chunk_rows
    mb = workspace_mb or DEFAULT_WORKSPACE_MB.get(
        head.weight_VD.device.type, DEFAULT_WORKSPACE_MB["cpu"]
    )
    size = max(16, mb * 2**20 // chunk.bytes_per_row(head))
    block = chunk.block_rows() if is_batch_invariant() else 1
    if block == 1:
        return size
    # Few distinct sizes, since each is put to the test once.
    return max(1, min(size, INVARIANT_ROWS) // block) * block


def _start(
    chunk: type[HeadChunk], head: Head, rows: int, entropy: bool, entropy_grad: bool
) -> HeadChunk:
    if is_batch_invariant() and chunk.block_rows() > 1:
        return PaddedChunk(chunk, chunk.block_rows(), head, rows, entropy, entropy_grad)
    return chunk(head, rows, entropy, entropy_grad)


def forward(
    chunk: type[HeadChunk], head: Head, rows: Rows, entropy: bool, workspace_mb: int | None
) -> Logp:
    """Statistics of all rows; nothing is kept."""
    size = chunk_rows(chunk, head, workspace_mb)
    out = _empty_stats(rows, entropy)
    work = _start(chunk, head, min(size, len(rows.targets_T)), entropy, False)
    rows = _with_target_logits(work, head, rows, size)
    for at in _slices(rows, size):
        _write(out, at, work.forward(rows.take(at), keep=False))
    return out


def jacobian(
    chunk: type[HeadChunk], head: Head, rows: Rows, entropy: bool, workspace_mb: int | None
) -> tuple[Logp, Tensor, Tensor | None]:
    """Statistics of all rows and d logp / d hidden, with `entropy` d entropy / d hidden too.

    A frozen head needs no more. The Jacobians are float32: rounded here and again after the
    upstream factor, a bfloat16 gradient would be worse than eager's.
    """
    size = chunk_rows(chunk, head, workspace_mb)
    out = _empty_stats(rows, entropy)
    jac_TD = rows.buffer(torch.float32)
    jac_entropy_TD = rows.buffer(torch.float32) if entropy else None
    work = _start(chunk, head, min(size, len(rows.targets_T)), entropy, entropy)
    work.every_row = True
    rows = _with_target_logits(work, head, rows, size)
    grads = Gradients(True, None, None)
    for at in _slices(rows, size):
        stats = work.forward(rows.take(at), keep=True)
        _write(out, at, stats)
        one = torch.ones(len(stats.logp), dtype=torch.float32, device=stats.logp.device)
        zero = torch.zeros_like(one)
        rows.put(jac_TD, at, work.gradients(None, one, None, grads, last=not entropy))
        if entropy:
            rows.put(jac_entropy_TD, at, work.gradients(None, zero, one, grads, last=True))
    return out, _over_shards(head, jac_TD), _over_shards(head, jac_entropy_TD)


def backward(
    chunk: type[HeadChunk],
    head: Head,
    rows: Rows,
    stats: Logp,
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor | None,
    grads: Gradients,
    workspace_mb: int | None,
    dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Gradients of all rows from known statistics; the logits are made again.

    Adds to grads; returns dhidden of all rows of the call in `dtype`, by default that of hidden.
    """
    size = chunk_rows(chunk, head, workspace_mb)
    dtype = dtype or rows.hidden_TD.dtype
    partial = dtype if head.shard is None else torch.float32
    dhidden_TD = rows.buffer(partial) if grads.hidden else None
    work = _start(
        chunk,
        head,
        min(size, len(rows.targets_T)),
        stats.entropy is not None,
        dentropy_T is not None,
    )
    for at in _slices(rows, size):
        part = Logp(*(None if x is None else x[at] for x in stats))
        upstream = (None if x is None else x[at] for x in (dlogp_T, dentropy_T, dlse_T))
        dhidden_CD = work.backward(rows.take(at), part, *upstream, grads)
        if dhidden_TD is not None:
            rows.put(dhidden_TD, at, dhidden_CD)
    _over_shards(head, grads.lora_RD)
    return _over_shards(head, dhidden_TD, dtype)


def unscaled_dtype(dtype: torch.dtype) -> torch.dtype:
    """What holds a gradient that the upstream factor has not reached yet.

    float16 has not the range: a loss scale is there to keep small gradients from it, and comes with
    that factor.
    """
    return torch.float32 if dtype == torch.float16 else dtype


# (rows that the statistics belong to, float32 statistics) -> float32 dloss/dlogp, dloss/dentropy or
# None
Coefficients = Callable[[slice, Logp], tuple[Tensor, Tensor | None]]


def fused(
    chunk: type[HeadChunk],
    head: Head,
    rows: Rows,
    entropy: bool,
    entropy_grad: bool,
    whole_batch: bool,
    coefficients: Coefficients,
    grads: Gradients,
    workspace_mb: int | None,
    live: Tensor | None = None,
    skip_mass: float = 0.0,
) -> tuple[Logp, Tensor | None, Tensor | None]:
    """Statistics and gradients of the loss that `coefficients` differentiates.

    In one pass where that is possible.

    `whole_batch`: a row's coefficient needs all rows. Then, unless they fit one chunk, a first pass
    takes the statistics and a second one makes the logits of the rows with a coefficient again.
    `live`: on the CPU, in order, the rows that may have a coefficient (None: all may).
    `skip_mass`: tiles of the vocabulary with less of a row's mass are left out of its gradient.
    Adds to grads; returns the statistics, dhidden of all rows of the call in `unscaled_dtype` of
    hidden's, and with `skip_mass` the mass left out of each row, 0 where there is no gradient.
    """
    size = chunk_rows(chunk, head, workspace_mb)
    total = len(rows.targets_T)
    # Another path for another number of rows would give a row other bits.
    if whole_batch and (total > size or is_batch_invariant()):
        stats = forward(chunk, head, rows, entropy, workspace_mb)
        dlogp_T, dentropy_T = coefficients(slice(0, total), rounded(stats))
        if not skip_mass:
            rest = grads, workspace_mb, live
            return stats, _second_pass(chunk, head, rows, stats, dlogp_T, dentropy_T, *rest), None
        # The masses are made with the statistics, so those are made again too.
        active = dlogp_T.nonzero().squeeze(1)
        _, dhidden_TD, dropped_A = fused(
            chunk, head, rows.take(active), False, False, False,
            lambda at, _: (dlogp_T[active][at], None), grads, workspace_mb, None, skip_mass,
        )  # fmt: skip
        return stats, dhidden_TD, dlogp_T.new_zeros(total).index_copy_(0, active, dropped_A)

    out = _empty_stats(rows, entropy)
    dtype = unscaled_dtype(rows.hidden_TD.dtype)
    partial = dtype if head.shard is None else torch.float32
    dhidden_TD = rows.buffer(partial, zero=True) if grads.hidden else None
    live = None if live is None else _Live(live, rows.hidden_TD)
    work = _start(chunk, head, min(size, total), entropy, entropy_grad)
    work.skip_mass = skip_mass
    dropped_T = torch.zeros_like(out.logp, dtype=torch.float32) if skip_mass else None
    rows = _with_target_logits(work, head, rows, size)
    for at in _slices(rows, size):
        stats = work.forward(rows.take(at), keep=grads.any)
        _write(out, at, stats)
        dlogp_C, dentropy_C = coefficients(at, rounded(stats))
        if not grads.any:
            continue
        active = _active(dlogp_C, dentropy_C, None if live is None else live.among(at))
        given_C = dlogp_C
        if active is not None:
            dlogp_C, dentropy_C = (
                dlogp_C[active],
                None if dentropy_C is None else dentropy_C[active],
            )
            if not len(active):
                continue
        dhidden_CD = work.gradients(active, dlogp_C, dentropy_C, grads, last=True)
        if dhidden_TD is not None:
            rows.put(dhidden_TD, at, dhidden_CD, active)
        if skip_mass:
            dropped_T[at] = torch.where(given_C != 0, work.dropped_C, 0.0)
    _over_shards(head, grads.lora_RD)
    return out, _over_shards(head, dhidden_TD, dtype), dropped_T


def rounded(stats: Logp) -> Logp:
    """The statistics as callers see them, float32."""
    return Logp(*(None if x is None else x.float() for x in stats))


def _second_pass(
    chunk: type[HeadChunk],
    head: Head,
    rows: Rows,
    stats: Logp,
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    grads: Gradients,
    workspace_mb: int | None,
    live: Tensor | None,
) -> Tensor | None:
    if not grads.any:
        return None
    active = _active(dlogp_T, dentropy_T, beside(live, rows.hidden_TD))
    rest = grads, workspace_mb, unscaled_dtype(rows.hidden_TD.dtype)
    if active is None:
        return backward(chunk, head, rows, stats, dlogp_T, dentropy_T, None, *rest)
    part = Logp(*(None if x is None else x[active] for x in stats))
    dentropy_A = None if dentropy_T is None else dentropy_T[active]
    return backward(chunk, head, rows.take(active), part, dlogp_T[active], dentropy_A, None, *rest)


class _Live:
    """Rows that may have a coefficient, as the host knows them and as the device does."""

    def __init__(self, live: Tensor, like: Tensor):
        self.host, self.there = live, beside(live, like)

    def among(self, at: slice) -> Tensor:
        """Those of a chunk, counted from its start."""
        first, last = torch.searchsorted(self.host, torch.tensor([at.start, at.stop])).tolist()
        return self.there[first:last] - at.start


def looks_free(device: torch.device) -> bool:
    """Whether values on this device can be looked at without stopping the host."""
    return device.type == "cpu"


def _active(dlogp_C: Tensor, dentropy_C: Tensor | None, known: Tensor | None) -> Tensor | None:
    """Rows with a coefficient; None for all, and when nearly all have one.

    On a GPU those that the host knows (`known`): to look would stop it.
    """
    active = known
    if looks_free(dlogp_C.device):
        has = dlogp_C != 0
        if dentropy_C is not None:
            has |= dentropy_C != 0
        active = has.nonzero().squeeze(1)
    return active if active is not None and len(active) < COMPACT_BELOW * len(dlogp_C) else None


def _with_target_logits(work: HeadChunk, head: Head, rows: Rows, size: int) -> Rows:
    """A row's anchor comes from its target's logit, which one shard can compute and all need."""
    if head.shard is None:
        return rows
    logits_T = rows.hidden_TD.new_empty(len(rows.targets_T), dtype=torch.float32)
    for at in _slices(rows, size):
        logits_T[at] = work.target_logits(rows.take(at))
    return rows._replace(target_logit_T=head.shard.add_up(logits_T))


def _over_shards(head: Head, x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """A gradient that every shard has a part of, summed in place and only then rounded."""
    if head.shard is None or x is None:
        return x
    if is_batch_invariant():
        # An all-reduce adds in an order that depends on the place in the buffer.
        for part in x.split(INVARIANT_ROWS):
            part.copy_(head.shard.in_order(part))
    else:
        head.shard.add_up(x)
    return x.to(dtype or x.dtype)


def _slices(rows: Rows, size: int) -> list[slice]:
    total = len(rows.targets_T)
    return [slice(at, min(at + size, total)) for at in range(0, total, size)]


def _empty_stats(rows: Rows, entropy: bool) -> Logp:
    def empty() -> Tensor:
        return rows.hidden_TD.new_empty(len(rows.targets_T), dtype=torch.float64)

    return Logp(empty(), empty() if entropy else None, empty())


def _write(out: Logp, at: slice, part: Logp) -> None:
    for whole, piece in zip(out, part, strict=True):
        if whole is not None:
            whole[at] = piece
