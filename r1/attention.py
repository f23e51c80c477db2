"""Attention for packed sequences and for batched decoding, plugged into transformers models.

A model loaded with `attn_implementation=NAME` hands every layer's queries, keys and values to the
*plan* it was called with (`plan=` reaches the layers through the model's keyword arguments):

- `PackedPlan`: T tokens of B sequences, one row; a token sees its own sequence's past only. On
  CUDA in half precision flash-attn's or torch's variable-length kernel; elsewhere sequences of
  similar length are padded together and run through scaled_dot_product_attention.
- `SharedPlan`: the same sequences, with prompts that several of them share there once.
- `DecodePlan`: one new token for each of B rows, keys and values in a cache that it owns.

Shapes: T tokens, B rows, S slots, H query heads, N key-value heads, E head width, L layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels import prefix_attention
from r1kernels.shared_prefixes import SharedPrefixes

NAME = "r1_plan"

# slots that a key-value cache gains at least when it is full
MIN_GROWTH = 32


def register() -> None:
    """Make NAME an attention implementation of transformers. May be called more than once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


def _attend(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, plan=None, **options
):
    if plan is None:
        raise ValueError(f"a model with attention {NAME!r} needs a plan: call CausalLM.hidden")
    if options.get("position_bias") is not None or options.get("s_aux") is not None:
        raise ValueError(
            f"{type(module).__name__}: position biases and attention sinks are not supported"
        )
    # transformers hands over [1, heads, T, E]
    query_THE, key_TNE, value_TNE = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window, softcap = options.get("sliding_window"), options.get("softcap")
    out_THE = plan.attend(module.layer_idx, query_THE, key_TNE, value_TNE, scale, window, softcap)
    return out_THE.unsqueeze(0), None


def _scores_attention(query, key, value, scale, mask, softcap):
    """Attention with capped scores, which no fused kernel here offers. [B, heads, S, E]."""
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
    scores = scores.masked_fill(~mask, float("-inf")).float().softmax(-1)
    return scores.to(value.dtype) @ value


class PackedPlan:
    """How the tokens of one packed row attend.

    Args:
        lengths: tokens of each sequence, each > 0, in packed order.
        device: where the model is.
        store: optional list; every layer's (key [T, N, E], value) is appended, for a DecodePlan.
    """

    def __init__(self, lengths: list[int], device: torch.device, store: list | None = None):
        self.lengths = lengths
        self.store = store
        self.positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self.cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)
        self._buckets = None
        # whether a layer had a window or capped scores, once the model has run
        self.restricted = False

    def attend(self, layer, query_THE, key_TNE, value_TNE, scale, window, softcap):
        self.restricted |= bool(window or softcap)
        if self.store is not None:
            self.store.append((key_TNE, value_TNE))
        kernel = _varlen_kernel(query_THE, softcap)
        if kernel is not None:
            return kernel(
                query_THE,
                key_TNE,
                value_TNE,
                self.cu_seqlens,
                max(self.lengths),
                scale,
                window,
                softcap,
            )
        if self._buckets is None:
            self._buckets = _buckets(self.lengths, query_THE.device)
        outs = [
            _padded(query_THE, key_TNE, value_TNE, bucket, scale, window, softcap)
            for bucket in self._buckets
        ]
        if len(outs) == 1:
            return outs[0]
        order_T = torch.cat([tokens_t for tokens_t, _, _, _ in self._buckets])
        return torch.zeros_like(query_THE).index_copy(0, order_T, torch.cat(outs))


def _buckets(lengths: list[int], device: torch.device) -> list[tuple]:
    """Sequences grouped so that a padded group is at most twice its tokens.

    One tuple per group: its tokens' places in the packed row (None: all of them in order), their
    places in the padded [B * S], B, S.
    """
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    if len(lengths) * max(lengths) <= 2 * starts[-1]:
        groups = [list(range(len(lengths)))]
    else:
        groups = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if groups and 2 * lengths[i] > lengths[groups[-1][0]]:
                groups[-1].append(i)
            else:
                groups.append([i])
    buckets = []
    for group in groups:
        S = max(lengths[i] for i in group)
        slots = torch.cat([torch.arange(lengths[i]) + row * S for row, i in enumerate(group)])
        tokens = None
        if len(groups) > 1:
            tokens = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in group]).to(device)
        buckets.append((tokens, slots.to(device), len(group), S))
    return buckets


def _padded(query_THE, key_TNE, value_TNE, bucket, scale, window, softcap):
    tokens_t, slots_t, B, S = bucket

    def pad(x_Tnh):
        x_tnh = x_Tnh if tokens_t is None else x_Tnh.index_select(0, tokens_t)
        zeros = x_tnh.new_zeros(B * S, *x_tnh.shape[1:])
        return zeros.index_copy(0, slots_t, x_tnh).view(B, S, *x_tnh.shape[1:]).transpose(1, 2)

    # padding stands behind the tokens, so the causal rule alone keeps it out of sight
    query, key, value = pad(query_THE), pad(key_TNE), pad(value_TNE)
    H, N = query.shape[1], key.shape[1]
    mask = None
    if softcap or (window and window < S):
        offset_SS = torch.arange(S, device=query.device)[:, None] - torch.arange(
            S, device=query.device
        )
        mask = (offset_SS >= 0) & (offset_SS < (window or S))
    if softcap:
        key, value = key.repeat_interleave(H // N, 1), value.repeat_interleave(H // N, 1)
        out = _scores_attention(query, key, value, scale, mask, softcap)
    else:
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=H != N,
        )
    return out.transpose(1, 2).reshape(B * S, H, -1).index_select(0, slots_t)


def _varlen_kernel(query_THE, softcap):
    """The fastest variable-length kernel that takes this input, or None."""
    if not query_THE.is_cuda or query_THE.dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        pass
    else:
        return _flash_attn
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return None
    return None if softcap else _torch_varlen


def _flash_attn(query, key, value, cu_seqlens, max_len, scale, window, softcap):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, cu_seqlens, cu_seqlens, max_len, max_len, causal=True,
        softmax_scale=scale, window_size=(window - 1 if window else -1, 0), softcap=softcap or 0.0,
    )  # fmt: skip


def _torch_varlen(query, key, value, cu_seqlens, max_len, scale, window, softcap):
    from torch.nn.attention.varlen import varlen_attn

    # only newer versions have the option
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    return varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), cu_seqlens, cu_seqlens,
        max_len, max_len, scale=scale, window_size=(window - 1 if window else -1, 0), **grouped,
    )  # fmt: skip


class SharedPlan:
    """How the tokens of one packed row attend in which shared prompts are there once."""

    def __init__(self, layout: SharedPrefixes):
        self.layout = layout
        self.positions = layout.position_ids

    def attend(self, layer, query_THE, key_TNE, value_TNE, scale, window, softcap):
        if softcap or (window and window < self.layout.longest):
            raise ValueError(
                f"layer {layer} has a window of {window} tokens or scores capped at {softcap}, "
                'which shared prompts do not go with: rl.share_prefix = "never"'
            )
        return prefix_attention(query_THE, key_TNE, value_TNE, self.layout, scale=scale)


class DecodePlan:
    """Attention of one new token per row over a key-value cache that grows by half when full.

    Args:
        prompts: every layer's (key [T, N, E], value) of the packed prompts, from PackedPlan.store.
        plan: the plan those prompts ran with.
        rows: for every row of the batch the index of its prompt.
    """

    def __init__(self, prompts: list[tuple], plan: PackedPlan, rows: Tensor):
        device = rows.device
        lengths_P = torch.tensor(plan.lengths, device=device)
        P, S = len(plan.lengths), max(plan.lengths)
        prompt_T = torch.repeat_interleave(torch.arange(P, device=device), lengths_P)
        self.lengths_B = lengths_P[rows]
        self.longest = S
        self.rows_B = torch.arange(len(rows), device=device)
        self.cache = []
        for pair in prompts:
            caches = []
            for x_TNE in pair:
                padded = x_TNE.new_zeros(P, x_TNE.shape[1], S, x_TNE.shape[2])
                padded[prompt_T, :, plan.positions] = x_TNE
                caches.append(padded[rows])
            self.cache.append(caches)

    def begin(self) -> Tensor:
        """Open a slot for one token per row; returns the tokens' positions [B]."""
        positions_B = self.lengths_B
        self.lengths_B = positions_B + 1
        self.longest += 1
        size = self.cache[0][0].shape[2]
        if self.longest > size:
            more = max(MIN_GROWTH, size // 2)
            self.cache = [[F.pad(x, (0, 0, 0, more)) for x in pair] for pair in self.cache]
        slots_S = torch.arange(self.longest, device=positions_B.device)
        self.distance_BS = positions_B[:, None] - slots_S
        self.positions = positions_B
        self.mask_BS = self.distance_BS >= 0
        # an additive mask is the cheaper form for torch's CPU kernel; it is shared by the layers
        key = self.cache[0][0]
        self.bias = torch.zeros(self.mask_BS.shape, dtype=key.dtype, device=key.device)
        self.bias = self.bias.masked_fill(~self.mask_BS, float("-inf"))[:, None, None]
        return positions_B

    def attend(self, layer, query_BHE, key_BNE, value_BNE, scale, window, softcap):
        key_cache, value_cache = self.cache[layer]
        key_cache[self.rows_B, :, self.positions] = key_BNE
        value_cache[self.rows_B, :, self.positions] = value_BNE
        key, value = key_cache[:, :, : self.longest], value_cache[:, :, : self.longest]
        # the query heads of one key head stand in as its query positions: no copy of the cache
        B, H, E = query_BHE.shape
        query = query_BHE.reshape(B, key.shape[1], -1, E)
        bias, mask = self.bias, self.mask_BS
        if window and window < self.longest:
            mask = mask & (self.distance_BS < window)
            bias = bias.masked_fill(~mask[:, None, None], float("-inf"))
        if softcap:
            out = _scores_attention(query, key, value, scale, mask[:, None, None], softcap)
        else:
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return out.reshape(B, H, -1)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these (int64 indices): finished rows cost nothing afterwards."""
        self.cache = [[x.index_select(0, rows) for x in pair] for pair in self.cache]
        self.lengths_B = self.lengths_B[rows]
        self.longest = int(self.lengths_B.max())
        self.rows_B = torch.arange(len(rows), device=rows.device)
