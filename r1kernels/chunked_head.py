"""The order of work of the linear head: which rows meet which GEMM, a chunk of rows at a time.

A backend supplies a `head_contract.HeadChunk`; the paths of docs/design.md section 1 are built from
it here, once for all backends. Every path runs GEMM 1 on the same rows cut at the same places, so
all of them give bitwise the same log-probabilities.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.head_contract import Gradients, Head, HeadChunk, Rows
from r1kernels.padded_chunk import PaddedChunk
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import beside

# Logits kept per chunk, in MiB, unless the caller says: enough rows for GEMMs at full rate.
DEFAULT_WORKSPACE_MB = {"cpu": 256, "cuda": 1280}
# Copying the rows that have a coefficient pays once this share of a chunk has none.
COMPACT_BELOW = 0.9
# Most rows of a padded chunk.
INVARIANT_ROWS = 1024


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
