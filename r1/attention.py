"""Attention for packed sequences and for batched decoding, plugged into transformers models.

A model loaded with `attn_implementation=NAME` hands every layer's queries, keys and values to the
*plan* it was called with (`plan=` reaches the layers through the model's keyword arguments):

- `PackedPlan`: T tokens of B sequences, one row; a token sees its own sequence's past only.
- `SharedPlan`: the same sequences, with prompts that several of them share there once.
- `DecodePlan`: one new token for each of B rows, keys and values in a cache that it owns.

Shapes: T tokens, B rows, S slots, H query heads, N key-value heads, E head width, L layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels import prefix_attention, varlen_attention
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
        # whether a layer had a window or capped scores, once the model has run
        self.restricted = False

    def attend(self, layer, query_THE, key_TNE, value_TNE, scale, window, softcap):
        self.restricted |= bool(window or softcap)
        if self.store is not None:
            self.store.append((key_TNE, value_TNE))
        return varlen_attention(
            query_THE, key_TNE, value_TNE, self.cu_seqlens, scale=scale, window=window or None,
            softcap=softcap or None, max_seqlen=max(self.lengths),
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
