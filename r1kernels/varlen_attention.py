"""Exact causal attention of packed sequences, forward and backward, with no mask and no padding."""

import torch
from torch import Tensor

from r1kernels import attention_kernels, check, packing
from r1kernels.attention_kernels import Rule
from r1kernels.attention_parts import Bounds, attend, attend_backward
from r1kernels.backend import isolated
from r1kernels.rows import positive
from r1kernels.saved_attention import remembered

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_key: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    max_seqlen: int | None = None,
    max_seqlen_key: int | None = None,
    head_groups: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale query key^T) value of each of B packed sequences by itself.

    On CUDA in half precision by the flash_attn package where it is installed (2.7 or newer), else
    by the flash kernels inside torch; on the CPU by torch's fused kernel, short sequences padded
    together; anything else (float32 on CUDA, a softcap, a window on the CPU, odd head widths) by
    matrix products on tiles of scores. No path makes the scores of a whole sequence.

    Args:
        query: [T, H, E] float32, bfloat16, float16 or float64.
        key, value: [S, N, E] like query; N divides H, and query head h looks at key head
            h // (H / N).
        cu_seqlens: int32 or int64 [B + 1], offsets of the sequences in query, from 0 to T. On the
            CPU, or beside query; in the latter case a GPU is waited for, unless max_seqlen is
            given and the kernel is a flash kernel.
        cu_seqlens_key: the same for key, from 0 to S; None: those of query.
        causal: query i of Lq sees the keys up to i + Lk - Lq, with Lq <= Lk; else all of them.
        scale: of the scores, > 0; None: E ** -0.5.
        window: with causal: a query sees the last `window` of its keys only, its own among them.
        softcap: > 0: scores become softcap tanh(scores / softcap).
        max_seqlen, max_seqlen_key: the longest sequence's queries and keys, if known. Not needed,
            and not looked at, where the offsets are on the CPU; beside a GPU's query they are
            trusted, and tokens of a longer sequence would be left out.
        head_groups: the backward takes the key-value heads in as many turns, so that its transients
            are 1 / head_groups as large; None: as many as keep them below
            `attention_parts.HEAD_WORKSPACE` bytes, and do not grow with the number of heads.
        return_lse: also return the log of the softmax's divisor.

    Returns:
        out [T, H, E] in query's dtype; with return_lse (out, lse [T, H] float32, float64 for
        float64, in nats). A query without keys has out 0 and lse -inf.

    Gradients: query, key and value, through both outputs (through lse by the tiled path).
    Numerics: float32 accumulation, probabilities and their gradients never rounded below it on the
        CPU. Repeats bitwise; on a GPU in half precision the backward does so under
        torch.use_deterministic_algorithms(True).
    Raises: ValueError on shapes, devices, offsets that fall or do not end at T and S (on a GPU
        only where they are read), more queries than keys under causal, or a window without it;
        TypeError on dtypes, and a scale or softcap that is no number.
    Source: docs/ops/varlen_attention.md.
    """
    _check(query, key, value, cu_seqlens, cu_seqlens_key)
    softcap = None if softcap is None else positive("softcap", softcap)
    for name, x in (("window", window), ("head_groups", head_groups)):
        if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < 1):
            raise ValueError(f"{name} must be a positive integer, got {x!r}")
    if window is not None and not causal:
        raise ValueError(f"window needs causal=True, got window={window}")
    scale = query.shape[-1] ** -0.5 if scale is None else positive("scale", scale)
    out, lse = varlen_attention_fwd(
        query, key, value, cu_seqlens, cu_seqlens_key, max_seqlen, max_seqlen_key, causal, scale,
        window, softcap, head_groups,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(query, key, value, cu_seqlens, cu_seqlens_key) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check.dtype_in(name, x, DTYPES)
        check.local(name, x)
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, E], got {check.describe(x)}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must be {query.dtype} like query, got {check.describe(x)}")
        check.device(name, x, query.device)
    (T, H, E), (S, N, _) = query.shape, key.shape
    check.shape("key", key, (S, N, E), "query's last dimension")
    check.shape("value", value, key.shape, "that of key")
    if 0 in (E, N, H) or H % N:
        raise ValueError(
            f"key must have a number of heads that divides query's, and a width, got {N} heads of "
            f"{E} for {H} query heads"
        )
    lengths = [("cu_seqlens", cu_seqlens, T)]
    if cu_seqlens_key is not None:
        lengths.append(("cu_seqlens_key", cu_seqlens_key, S))
    elif S != T:
        raise ValueError(f"cu_seqlens_key is needed: {T} queries and {S} keys")
    for name, cu, total in lengths:
        check.tensor(name, cu)
        device = cu.device if cu.device.type == "cpu" else query.device
        packing.check_cu_seqlens(cu, total, device, name)
    if cu_seqlens_key is not None and cu_seqlens_key.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_key must be of as many sequences as cu_seqlens, {len(cu_seqlens) - 1}, "
            f"got {len(cu_seqlens_key) - 1}"
        )


SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens, Tensor? cu_seqlens_key, "
    "int? max_seqlen, int? max_seqlen_key, bool causal, float scale, int? window, float? softcap, "
    "int? head_groups"
)


def _bounds(cu_seqlens, cu_seqlens_key, max_seqlen, max_seqlen_key) -> Bounds:
    if cu_seqlens_key is None:
        max_seqlen_key = max_seqlen
    # offsets on the CPU cost nothing to read, and are right whatever else was said
    on_device = any(x is not None and x.is_cuda for x in (cu_seqlens, cu_seqlens_key))
    known = on_device and max_seqlen is not None and max_seqlen_key is not None
    longest = (max_seqlen, max_seqlen_key) if known else None
    return Bounds(cu_seqlens, cu_seqlens_key, longest=longest)


@torch.library.custom_op(
    "r1kernels::varlen_attention_fwd", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)"
)
@isolated
def varlen_attention_fwd(query, key, value, *args):
    """(out, lse)."""
    *offsets, causal, scale, window, softcap, _ = args
    bounds = _bounds(*offsets)
    if not bounds.unread:
        for name, ends, x in (
            ("cu_seqlens", bounds.query, query),
            ("cu_seqlens_key", bounds.key, key),
        ):
            if ends[-1] != len(x):
                raise ValueError(f"{name} must end at {len(x)} tokens, got {ends[-1]}")

    def compute():
        out_THE, lse_TH = attend(
            query, key, value, bounds, causal=causal, scale=scale, window=window, softcap=softcap
        )
        return out_THE.contiguous(), lse_TH.contiguous()

    return remembered(compute)


@varlen_attention_fwd.register_fake
def _(query, *_args):
    lse_TH = query.new_empty(query.shape[:2], dtype=attention_kernels.wide(query.dtype))
    return query.new_empty(query.shape), lse_TH


@torch.library.custom_op(
    "r1kernels::varlen_attention_bwd",
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {SCHEMA}) -> "
    "(Tensor, Tensor, Tensor)",
)
@isolated
def varlen_attention_bwd(dout, dlse, out, lse, query, key, value, *args):
    """(dquery, dkey, dvalue)."""
    *offsets, causal, scale, window, softcap, head_groups = args
    bounds, wide = _bounds(*offsets), attention_kernels.wide(query.dtype)
    dout = torch.zeros_like(out) if dout is None else dout
    kernel = attention_kernels.choose(query, bounds, Rule(scale, window, softcap))
    # a flash kernel rounds to the inputs' dtype itself, and writes each key's gradient once
    once = kernel is attention_kernels.FLASH and dlse is None
    dkey, dvalue = (
        torch.zeros(x.shape, dtype=x.dtype if once else wide, device=x.device) for x in (key, value)
    )
    dquery = attend_backward(
        dout, query, key, value, out, lse, bounds, causal=causal, scale=scale, window=window,
        softcap=softcap, dkey=dkey, dvalue=dvalue, dlse=dlse, head_groups=head_groups,
        dtype=query.dtype,
    )  # fmt: skip
    # flash kernels lay dquery out as query, compiled code is told of contiguous gradients
    return dquery.contiguous(), dkey.to(key.dtype), dvalue.to(value.dtype)


@varlen_attention_bwd.register_fake
def _(dout, dlse, out, lse, query, key, value, *_args):
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup(ctx, inputs, output):
    *tensors, ctx.max_seqlen, ctx.max_seqlen_key = inputs[:7]
    ctx.options = inputs[7:]
    # None, not zeros, for an output that the loss does not use: lse's gradient takes a slower path
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _grad(ctx, dout, dlse):
    check.no_second_derivative("varlen_attention")
    grads = varlen_attention_bwd(
        dout, dlse, *ctx.saved_tensors, ctx.max_seqlen, ctx.max_seqlen_key, *ctx.options
    )
    return *grads, *[None] * 9


varlen_attention_fwd.register_autograd(_grad, setup_context=_setup)
