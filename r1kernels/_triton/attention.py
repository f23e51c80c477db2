"""Attention of packed sequences on Triton: rectangular, grouped heads, an outer softmax's backward.

    forward(query_THE, key_SNE, value_SNE, bounds, causal, rule) -> (out_THE, lse_TH)
    backward(dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_TH, bounds, causal, rule,
             dkey_SNE, dvalue_SNE) -> dquery_THE        # and adds to the other two

The contract of `attention_kernels`: out and lse of the backward are those of the whole softmax, of
which these keys may be a part; a causal rule is aligned to the bottom right, with as many keys as
queries or more. Never run on a GPU: taken by name only (`attention_kernels.use_kernel`).

A forward program has a block of one head's queries and walks over the keys that they see, with the
online softmax of Milakov and Gimelshein (arXiv:1805.02867) and Dao (arXiv:2307.08691). The backward
is two kernels. Queries first: each block walks over its keys again, with P = exp(scores - lse) and
delta = rowsum(dout out), which it writes down. Then keys: a block of one key-value head walks over
the queries of all its query heads, so that nothing is expanded to query heads, no two programs add
to one place, and the same call gives the same bits. Beside inputs and outputs the backward holds
delta, [T, H] float32.

Memory traffic of the forward, in elements: T H E (queries, outputs) and 2 S E H of keys and values
per BLOCK_Q queries that see them; the backward reads keys and values so once more, and queries and
dout once per BLOCK_K keys. Products go through float32 sums; P and dP are rounded to the inputs'
dtype before theirs, as flash-attn does. Exponentials are base 2. All row offsets are int64.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1kernels._triton.common import INTERPRETED, device_refusal, dtype_refusal
from r1kernels.backend import isolated

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# (forward, queries' gradient, keys' gradient) by padded head width: queries and keys of a block,
# warps, stages; then for widths that are no power of two. Chosen from what compiles without spills
# for sm_80 and sm_90; none has been timed.
CONFIGS = {
    64: ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    128: ((128, 64, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)),
    256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
}
UNEVEN_CONFIGS = {
    64: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    128: ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
}
FORWARD, QUERIES, KEYS = 0, 1, 2
WIDEST = 256


def config(kernel: int, head_width: int) -> dict[str, int]:
    """Blocks and launch options of a kernel."""
    if INTERPRETED:
        block_q, block_k, warps, stages = 16, 32, 1, 1
        width = max(16, triton.next_power_of_2(head_width))
    else:
        width = max(64, triton.next_power_of_2(head_width))
        configs = CONFIGS if width == head_width else UNEVEN_CONFIGS
        block_q, block_k, warps, stages = configs[width][kernel]
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_E": width}
    return {**blocks, "num_warps": warps, "num_stages": stages}


@triton.jit
def _rows(
    base_ptr, start, count, stride, E,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_E], rows `start` and on of one head, zeros from row `count` on and beyond E."""
    offs = tl.arange(0, BLOCK)
    offs_e = tl.arange(0, BLOCK_E)
    # Only the block's start needs 64 bits.
    start_ptr = base_ptr + tl.cast(start, tl.int64) * stride
    ptrs = start_ptr + (offs[:, None] * stride + offs_e[None, :])
    if MASKED:
        if EVEN_E:
            return tl.load(ptrs, mask=(offs < count - start)[:, None], other=0.0)
        mask = (offs < count - start)[:, None] & (offs_e < E)[None, :]
        return tl.load(ptrs, mask=mask, other=0.0)
    if EVEN_E:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_e < E)[None, :], other=0.0)


@triton.jit
def _write_rows(
    base_ptr, count, stride, E, made,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A block to, or added to, the first `count` rows of one head."""
    offs = tl.arange(0, BLOCK)
    offs_e = tl.arange(0, BLOCK_E)
    ptrs = base_ptr + (offs[:, None] * stride + offs_e[None, :])
    mask = (offs < count)[:, None] & (offs_e < E)[None, :]
    if ADD:
        made += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, made.to(base_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tile(tiles_ptr):
    """First row (int64) and number of rows of this program's block and of the other side; and
    `ahead`: query number i sees the keys up to number i + ahead, each counted from its first."""
    tiles_ptr += tl.program_id(0).to(tl.int64) * 5
    first, other = tl.load(tiles_ptr), tl.load(tiles_ptr + 2)
    count = (tl.load(tiles_ptr + 1) - first).to(tl.int32)
    others = (tl.load(tiles_ptr + 3) - other).to(tl.int32)
    return first, count, other, others, tl.load(tiles_ptr + 4).to(tl.int32)


@triton.jit
def _scores(
    query, key, start, keys, ahead, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores in units of log 2, [queries, keys]; -inf where a query does not see a key."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        places = start + tl.arange(0, BLOCK_K)
        seen = (places < keys)[None, :]
        if CAUSAL:
            seen = seen & (places[None, :] <= tl.arange(0, BLOCK_Q)[:, None] + ahead)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _spans(count, keys, ahead, BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr):
    """Where the blocks of keys end that all queries of a block see whole, and where all end."""
    whole = keys
    last = keys
    if CAUSAL:
        whole = tl.minimum(keys, ahead + 1)
        last = tl.minimum(keys, ahead + count)
    return whole // BLOCK_K * BLOCK_K, last


@triton.jit
def _fold(
    query, top, total, out, first, last, keys, ahead, scale,
    key_ptr, value_ptr, stride_key_s, stride_value_s, E,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """The keys from `first` to `last` into a block's maximum, sum and output."""
    for start in range(first, last, BLOCK_K):
        key = _rows(key_ptr, start, keys, stride_key_s, E, BLOCK_K, BLOCK_E, MASKED, EVEN_E)
        scores = _scores(query, key, start, keys, ahead, scale, BLOCK_Q, BLOCK_K, MASKED, CAUSAL)
        new = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen nothing yet has no maximum to subtract.
        anchor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - anchor[:, None])
        decay = tl.exp2(top - anchor)
        value = _rows(value_ptr, start, keys, stride_value_s, E, BLOCK_K, BLOCK_E, MASKED, EVEN_E)
        total = total * decay + tl.sum(p, axis=1)
        out = tl.dot(p.to(value.dtype), value, out * decay[:, None], input_precision="ieee")
        top = new
    return top, total, out


@triton.jit
def _attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, tiles_ptr,
    H, G, E, scale,
    stride_query_t, stride_query_h, stride_key_s, stride_key_n, stride_value_s, stride_value_n,
    stride_out_t, stride_out_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    first, count, other, keys, ahead = _tile(tiles_ptr)
    head = tl.program_id(1).to(tl.int64)
    query_ptr += first * stride_query_t + head * stride_query_h
    key_ptr += other * stride_key_s + head // G * stride_key_n
    value_ptr += other * stride_value_s + head // G * stride_value_n
    query = _rows(query_ptr, 0, count, stride_query_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    out = tl.zeros((BLOCK_Q, BLOCK_E), dtype=tl.float32)
    whole, last = _spans(count, keys, ahead, BLOCK_K, CAUSAL)
    top, total, out = _fold(
        query, top, total, out, 0, whole, keys, ahead, scale * LOG2E,
        key_ptr, value_ptr, stride_key_s, stride_value_s, E,
        BLOCK_Q, BLOCK_K, BLOCK_E, False, CAUSAL, EVEN_E,
    )  # fmt: skip
    top, total, out = _fold(
        query, top, total, out, whole, last, keys, ahead, scale * LOG2E,
        key_ptr, value_ptr, stride_key_s, stride_value_s, E,
        BLOCK_Q, BLOCK_K, BLOCK_E, True, CAUSAL, EVEN_E,
    )  # fmt: skip
    out /= tl.where(total > 0.0, total, 1.0)[:, None]
    out_ptr += first * stride_out_t + head * stride_out_h
    _write_rows(out_ptr, count, stride_out_t, E, out, BLOCK_Q, BLOCK_E, False)
    offs_q = tl.arange(0, BLOCK_Q)
    lse_ptrs = lse_ptr + first * H + head + offs_q * H
    tl.store(lse_ptrs, (top + tl.log2(total)) * LN2, mask=offs_q < count)


@triton.jit
def _log_sum(lse_ptrs, mask):
    """log2 of a row's softmax divisor; +inf where it saw no key, which makes its P zero."""
    lse = tl.load(lse_ptrs, mask=mask, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def _query_gradient(
    dquery, query, dout, log_sum, delta, first, last, keys, ahead, scale,
    key_ptr, value_ptr, stride_key_s, stride_value_s, E,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    """Adds what the keys from `first` to `last` give to a block's gradient."""
    for start in range(first, last, BLOCK_K):
        key = _rows(key_ptr, start, keys, stride_key_s, E, BLOCK_K, BLOCK_E, MASKED, EVEN_E)
        scores = _scores(query, key, start, keys, ahead, scale, BLOCK_Q, BLOCK_K, MASKED, CAUSAL)
        p = tl.exp2(scores - log_sum[:, None])
        value = _rows(value_ptr, start, keys, stride_value_s, E, BLOCK_K, BLOCK_E, MASKED, EVEN_E)
        dp = tl.dot(dout, tl.trans(value), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision="ieee")
    return dquery


@triton.jit
def _attention_dquery_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, delta_ptr, dquery_ptr, tiles_ptr,
    H, G, E, scale,
    stride_dout_t, stride_dout_h, stride_query_t, stride_query_h, stride_key_s, stride_key_n,
    stride_value_s, stride_value_n, stride_out_t, stride_out_h, stride_dquery_t, stride_dquery_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    first, count, other, keys, ahead = _tile(tiles_ptr)
    head = tl.program_id(1).to(tl.int64)
    query_ptr += first * stride_query_t + head * stride_query_h
    dout_ptr += first * stride_dout_t + head * stride_dout_h
    out_ptr += first * stride_out_t + head * stride_out_h
    key_ptr += other * stride_key_s + head // G * stride_key_n
    value_ptr += other * stride_value_s + head // G * stride_value_n
    query = _rows(query_ptr, 0, count, stride_query_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E)
    dout = _rows(dout_ptr, 0, count, stride_dout_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E)
    out = _rows(out_ptr, 0, count, stride_out_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    offs_q = tl.arange(0, BLOCK_Q)
    place = first * H + head
    tl.store(delta_ptr + place + offs_q * H, delta, mask=offs_q < count)
    log_sum = _log_sum(lse_ptr + place + offs_q * H, offs_q < count)
    dquery = tl.zeros((BLOCK_Q, BLOCK_E), dtype=tl.float32)
    whole, last = _spans(count, keys, ahead, BLOCK_K, CAUSAL)
    dquery = _query_gradient(
        dquery, query, dout, log_sum, delta, 0, whole, keys, ahead, scale * LOG2E,
        key_ptr, value_ptr, stride_key_s, stride_value_s, E,
        BLOCK_Q, BLOCK_K, BLOCK_E, False, CAUSAL, EVEN_E,
    )  # fmt: skip
    dquery = _query_gradient(
        dquery, query, dout, log_sum, delta, whole, last, keys, ahead, scale * LOG2E,
        key_ptr, value_ptr, stride_key_s, stride_value_s, E,
        BLOCK_Q, BLOCK_K, BLOCK_E, True, CAUSAL, EVEN_E,
    )  # fmt: skip
    dquery_ptr += first * stride_dquery_t + head * stride_dquery_h
    _write_rows(dquery_ptr, count, stride_dquery_t, E, dquery * scale, BLOCK_Q, BLOCK_E, False)


@triton.jit
def _attention_dkey_kernel(
    dout_ptr, query_ptr, key_ptr, value_ptr, lse_ptr, delta_ptr, dkey_ptr, dvalue_ptr, tiles_ptr,
    H, G, E, scale,
    stride_dout_t, stride_dout_h, stride_query_t, stride_query_h, stride_key_s, stride_key_n,
    stride_value_s, stride_value_n, stride_dkey_s, stride_dkey_n, stride_dvalue_s, stride_dvalue_n,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN_E: tl.constexpr,
):  # fmt: skip
    first, count, other, queries, ahead = _tile(tiles_ptr)
    group = tl.program_id(1).to(tl.int64)
    key_ptr += first * stride_key_s + group * stride_key_n
    value_ptr += first * stride_value_s + group * stride_value_n
    key = _rows(key_ptr, 0, count, stride_key_s, E, BLOCK_K, BLOCK_E, True, EVEN_E)
    value = _rows(value_ptr, 0, count, stride_value_s, E, BLOCK_K, BLOCK_E, True, EVEN_E)
    dkey = tl.zeros((BLOCK_K, BLOCK_E), dtype=tl.float32)
    dvalue = tl.zeros((BLOCK_K, BLOCK_E), dtype=tl.float32)
    offs_q = tl.arange(0, BLOCK_Q)
    offs_k = tl.arange(0, BLOCK_K)
    # the first query that sees a key of this block
    begin = tl.maximum(0, -ahead) if CAUSAL else 0
    for member in range(0, G):
        head = group * G + member
        query_head_ptr = query_ptr + other * stride_query_t + head * stride_query_h
        dout_head_ptr = dout_ptr + other * stride_dout_t + head * stride_dout_h
        place = other * H + head
        for start in range(begin, queries, BLOCK_Q):
            query = _rows(
                query_head_ptr, start, queries, stride_query_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E
            )
            inside = offs_q < queries - start
            row = place + tl.cast(start, tl.int64) * H
            log_sum = _log_sum(lse_ptr + row + offs_q * H, inside)
            scores = tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * LOG2E)
            # Rows of keys past the end are computed and never stored.
            p = tl.exp2(scores - log_sum[None, :])
            if CAUSAL:
                p = tl.where(offs_k[:, None] <= (offs_q + (start + ahead))[None, :], p, 0.0)
            dout = _rows(
                dout_head_ptr, start, queries, stride_dout_t, E, BLOCK_Q, BLOCK_E, True, EVEN_E
            )
            dvalue = tl.dot(p.to(dout.dtype), dout, dvalue, input_precision="ieee")
            dp = tl.dot(value, tl.trans(dout), input_precision="ieee")
            delta = tl.load(delta_ptr + row + offs_q * H, mask=inside, other=0.0)
            ds = p * (dp - delta[None, :])
            dkey = tl.dot(ds.to(query.dtype), query, dkey, input_precision="ieee")
    dkey_ptr += first * stride_dkey_s + group * stride_dkey_n
    dvalue_ptr += first * stride_dvalue_s + group * stride_dvalue_n
    _write_rows(dkey_ptr, count, stride_dkey_s, E, dkey * scale, BLOCK_K, BLOCK_E, True)
    _write_rows(dvalue_ptr, count, stride_dvalue_s, E, dvalue, BLOCK_K, BLOCK_E, True)


@lru_cache(maxsize=32)
def _tiles(
    spans: tuple[tuple[int, int, int, int], ...], block: int, keys: bool, device: torch.device
) -> Tensor:
    """int64 [n, 5] on the device, a row per block of a sequence's queries (or keys), those with the
    most work under a causal rule first: first and end of the block, first and end of the other
    side, and `ahead` (see `_tile`).
    """
    found = []
    for q0, q1, k0, k1 in spans:
        start, stop, other, end = (k0, k1, q0, q1) if keys else (q0, q1, k0, k1)
        blocks = [
            (at, min(at + block, stop), other, end, (q0 - at if keys else at - k0) + k1 - q1)
            for at in range(start, stop, block)
        ]
        found += blocks if keys else blocks[::-1]
    return torch.tensor(found, dtype=torch.int64).to(device, non_blocking=True)


def _strides(*tensors: Tensor) -> list[int]:
    return [x for tensor in tensors for x in tensor.stride()[:2]]


def _launch(kernel, which: int, pointers, strides, query, key, bounds, causal, scale) -> None:
    (H, E), N = query.shape[1:], key.shape[1]
    options = config(which, E)
    keys = which == KEYS
    block = options["BLOCK_K" if keys else "BLOCK_Q"]
    tiles = _tiles(bounds.spans, block, keys, query.device)
    if len(tiles):
        kernel[(len(tiles), N if keys else H)](
            *pointers, tiles, H, H // N, E, scale, *strides,
            CAUSAL=causal, EVEN_E=options["BLOCK_E"] == E, enable_fp_fusion=True, **options,
        )  # fmt: skip


@isolated
def forward(query_THE, key_SNE, value_SNE, bounds, causal, rule) -> tuple[Tensor, Tensor]:
    """See `attention_kernels`. A query that sees no key has out 0 and lse -inf."""
    out_THE = torch.zeros_like(query_THE, memory_format=torch.contiguous_format)
    lse_TH = out_THE.new_full(out_THE.shape[:2], float("-inf"), dtype=torch.float32)
    tensors = query_THE, key_SNE, value_SNE, out_THE
    _launch(
        _attention_fwd_kernel, FORWARD, (*tensors, lse_TH), _strides(*tensors), query_THE, key_SNE,
        bounds, causal, rule.scale,
    )  # fmt: skip
    return out_THE, lse_TH


@isolated
def backward(
    dout_THE, query_THE, key_SNE, value_SNE, out_THE, lse_TH, bounds, causal, rule,
    dkey_SNE, dvalue_SNE,
) -> Tensor:  # fmt: skip
    """See `attention_kernels`. Sums in the same order in every call."""
    dquery_THE = torch.zeros(query_THE.shape, dtype=torch.float32, device=query_THE.device)
    lse_TH = lse_TH.contiguous()
    delta_TH = torch.empty_like(lse_TH)
    inputs = dout_THE.to(query_THE.dtype), query_THE, key_SNE, value_SNE
    rest = query_THE, key_SNE, bounds, causal, rule.scale
    _launch(
        _attention_dquery_kernel, QUERIES, (*inputs, out_THE, lse_TH, delta_TH, dquery_THE),
        _strides(*inputs, out_THE, dquery_THE), *rest,
    )  # fmt: skip
    _launch(
        _attention_dkey_kernel, KEYS, (*inputs, lse_TH, delta_TH, dkey_SNE, dvalue_SNE),
        _strides(*inputs, dkey_SNE, dvalue_SNE), *rest,
    )  # fmt: skip
    return dquery_THE


def refuses(query: Tensor | None = None, rule: object = None, *_args: object) -> str | None:
    """Why these kernels cannot take queries and a rule, or None."""
    if query is None:
        return device_refusal(None)
    reason = device_refusal(query) or dtype_refusal(query)
    if reason is None and INTERPRETED and query.dtype == torch.bfloat16:
        return "the interpreter's bfloat16 dot product is wrong"
    if reason is None and not INTERPRETED and query.dtype == torch.float32:
        return "float32 products would not run on tensor cores"
    if reason is None and query.shape[-1] > WIDEST:
        return f"heads are {query.shape[-1]} wide, {WIDEST} at most"
    if reason is None and rule is not None and (rule.window is not None or rule.softcap):
        return "no window and no softcap"
    return reason
