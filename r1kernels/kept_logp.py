"""`linear_logp` under the softmax that a sampler kept: one dot product per kept id, no GEMM."""

import torch
from torch import Tensor

from r1kernels import head_inputs
from r1kernels.backend import implementation, isolated
from r1kernels.check import (
    IGNORE,
    describe,
    device,
    dtype_in,
    no_second_derivative,
    values_readable,
)
from r1kernels.head_contract import Head, Rows
from r1kernels.head_inputs import HeadInputs, split
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import beside, counted_rows, ragged_rows

# (ids [N] int32 or int64, offsets [T + 1] int64): row t keeps ids[offsets[t] : offsets[t + 1]]
Kept = tuple[Tensor, Tensor]


def kept_logp(call: HeadInputs, kept: object, entropy: bool) -> Logp:
    """`linear_logp` with `kept`, on checked arguments; results are [T].

    Raises: TypeError and ValueError on what is no ragged list of ids for every row, on a low-rank
        term, a weight_grad or a group; where ids and targets are on the CPU, ValueError on an id
        outside the vocabulary and on a set without its target. On a GPU no value is waited for: the
        target is added to its set, an id outside the vocabulary is left out, and a row whose target
        or temperature is out of range is NaN.
    """
    others = {"lora": call.lora_RD, "weight_grad": call.weight_grad_VD, "group": call.group or None}
    for name, x in others.items():
        if x is not None:
            raise ValueError(f"kept does not go with {name}")
    stats_3T, *_ = kept_logp_fwd(*call, *_checked(kept, call), entropy)
    logp_T, entropy_T, lse_T = stats_3T.unbind()
    return Logp(logp_T, entropy_T if entropy else None, lse_T)


def _checked(kept: object, call: HeadInputs) -> Kept:
    if not isinstance(kept, tuple | list) or len(kept) != 2:
        raise TypeError(f"kept must be a pair (ids, offsets), got {describe(kept)}")
    dtype_in("kept ids", kept[0], (torch.int32, torch.int64))
    dtype_in("kept offsets", kept[1], (torch.int64,))
    T = len(call.targets_T)
    if kept[0].ndim != 1 or kept[1].shape != (T + 1,):
        raise ValueError(
            f"kept must be ids [N] and offsets [T + 1] with T = {T} rows, "
            f"got {describe(kept[0])} and {describe(kept[1])}"
        )
    on_host = {x.device.type for x in (*kept, call.targets_T)} == {"cpu"}
    ids_N, offsets = kept if on_host else (beside(x, call.hidden_TD) for x in kept)
    if not on_host:
        device("kept ids", ids_N, call.hidden_TD.device)
        device("kept offsets", offsets, call.hidden_TD.device)
    return ids_N, offsets


def _canonical(ids_N: Tensor, offsets: Tensor, targets_T: Tensor, vocab: int) -> Tensor:
    """ids as int32 with -1 for what does not count: repeats, the target (which stands by itself),
    ids of rows that do not count or outside the vocabulary."""
    N = len(ids_N)
    readable = values_readable(ids_N)
    if readable and (offsets[0] != 0 or offsets[-1] != N or (offsets.diff() < 0).any()):
        raise ValueError(
            f"kept offsets must rise from 0 to the number of ids, {N}; they go from "
            f"{int(offsets[0])} to {int(offsets[-1])}"
        )
    rows_N = ragged_rows(offsets, N)
    target_N = targets_T[rows_N]
    counted_N = target_N != IGNORE
    alive_N = counted_N & (ids_N >= 0) & (ids_N < vocab)
    is_target_N = alive_N & (ids_N == target_N)
    if readable:
        if not torch.equal(alive_N, counted_N):
            at = int((alive_N != counted_N).nonzero()[0])
            raise ValueError(f"kept ids[{at}] is {int(ids_N[at])}: an id lies in [0, {vocab})")
        lost_T = (targets_T != IGNORE).index_fill_(0, rows_N[is_target_N], False)
        if lost_T.any():
            at = int(lost_T.nonzero()[0])
            raise ValueError(
                f"kept lacks the target of row {at}: {int(targets_T[at])} is not among its "
                f"{int(offsets[at + 1] - offsets[at])} ids; {int(lost_T.sum())} rows are like it"
            )
    alive_N &= ~is_target_N
    # Ids that rise within their rows, as samplers hand them out, hold no repeats.
    if N > 1 and not (readable and ((ids_N.diff() > 0) | (rows_N.diff() > 0)).all()):
        sorted_N, order_N = ids_N.sort(stable=True)
        repeats_N = torch.zeros_like(alive_N)
        repeats_N[1:] = (sorted_N.diff() == 0) & (rows_N[order_N].diff() == 0)
        alive_N &= ~torch.zeros_like(repeats_N).index_copy_(0, order_N, repeats_N)
    return torch.where(alive_N, ids_N, -1).int()


def _start(call: HeadInputs, offsets: Tensor, num_ids: int):
    """The implementation, the head, its rows and offsets, which a kernel can follow blindly."""
    hidden_TD, targets_T, temperature_T = call.hidden_TD, call.targets_T, call.temperature_T
    # A float32 master weight meets 16-bit hidden states as a copy in their dtype.
    weight_VD = call.weight_VD.to(hidden_TD.dtype)
    head = Head(weight_VD, call.bias_V, call.softcap, call.logit_scale)
    if values_readable(targets_T):
        temperature_T = counted_rows(targets_T, len(weight_VD), temperature_T)[2]
    else:
        good_T = (targets_T >= 0) & (targets_T < len(weight_VD))
        if temperature_T is None:
            temperature_T = good_T.float()
        good_T &= (temperature_T > 0) & (temperature_T < torch.inf)
        temperature_T = torch.where(good_T, temperature_T, torch.nan)
        targets_T = torch.where(good_T | (targets_T == IGNORE), targets_T, 0)
    run = implementation("kept_logp", hidden_TD.device.type, hidden_TD, weight_VD)
    rows = Rows(hidden_TD, beside(targets_T, hidden_TD), temperature_T, None)
    return run, head, rows, beside(offsets, hidden_TD).clamp(0, num_ids)


SCHEMA = f"{head_inputs.SCHEMA}, Tensor ids_N, Tensor offsets"


@torch.library.custom_op(
    "r1kernels::kept_logp_fwd",
    mutates_args=(),
    schema=f"({SCHEMA}, bool entropy) -> (Tensor, Tensor, Tensor, Tensor)",
)
@isolated
def kept_logp_fwd(*args):
    """([3, T] logp, entropy (0 unless asked for) and lse; the same in float64; ids that count, else
    -1; transformed logits of the ids, then of the targets)."""
    call, (ids_N, offsets, entropy) = split(args)
    run, head, rows, safe = _start(call, offsets, len(ids_N))
    targets_T = call.targets_T if ids_N.device.type == "cpu" else rows.targets_T
    ids_N = beside(_canonical(ids_N, offsets, targets_T, len(head.weight_VD)), call.hidden_TD)
    exact_3T, logits_M = run.fwd(head, rows, (ids_N, safe), entropy)
    return exact_3T.float(), exact_3T, ids_N, logits_M


@kept_logp_fwd.register_fake
def _(*args):
    call, (ids_N, *_) = split(args)
    stats_3T = call.hidden_TD.new_empty((3, len(call.targets_T)), dtype=torch.float32)
    logits_M = stats_3T.new_empty(len(ids_N) + len(call.targets_T))
    ids_N = logits_M.new_empty(ids_N.shape, dtype=torch.int32)
    return stats_3T, stats_3T.double(), ids_N, logits_M


@torch.library.custom_op(
    "r1kernels::kept_logp_bwd",
    mutates_args=(),
    schema=f"({SCHEMA}, Tensor dstats_3T, bool entropy, Tensor exact_3T, Tensor logits_M, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
)
@isolated
def kept_logp_bwd(*args):
    """(dhidden, dweight, dbias); empty what `needs` does not ask for."""
    call, (ids_N, offsets, dstats_3T, entropy, exact_3T, logits_M, needs) = split(args)
    run, head, rows, offsets = _start(call, offsets, len(ids_N))
    dlogp_T, dentropy_T, dlse_T = dstats_3T
    upstream = dlogp_T, dentropy_T if entropy else None, dlse_T
    dtypes = [x.dtype if need else None for x, need in zip(call.trained, needs, strict=True)]
    found = run.bwd(upstream, head, rows, (ids_N, offsets), exact_3T, logits_M, dtypes[:3])
    return tuple(call.hidden_TD.new_empty(0) if x is None else x for x in found)


@kept_logp_bwd.register_fake
def _(*args):
    call, rest = split(args)
    return tuple(
        x.new_empty(x.shape) if need else call.hidden_TD.new_empty(0)
        for x, need in zip(call.trained[:3], rest[-1][:3], strict=True)
    )


def _setup(ctx, inputs, output):
    call, (_, offsets, ctx.entropy) = split(inputs)
    _, exact_3T, ids_N, logits_M = output
    ctx.mark_non_differentiable(exact_3T, ids_N, logits_M)
    ctx.plain = call[head_inputs.TENSORS :]
    tensors = call._replace(prior_T=None)[: head_inputs.TENSORS]
    ctx.save_for_backward(*tensors, ids_N, offsets, exact_3T, logits_M)


def _grad(ctx, dstats_3T, *_):
    no_second_derivative("kept_logp")
    *tensors, ids_N, offsets, exact_3T, logits_M = ctx.saved_tensors
    call = HeadInputs(*tensors, *ctx.plain)
    needs = list(HeadInputs(*ctx.needs_input_grad[: head_inputs.COUNT]).trained)
    found = kept_logp_bwd(*call, ids_N, offsets, dstats_3T, ctx.entropy, exact_3T, logits_M, needs)
    found = (x if need else None for x, need in zip(found, needs[:3], strict=True))
    return *head_inputs.gradients(*found, None, None), None, None, None


kept_logp_fwd.register_autograd(_grad, setup_context=_setup)
