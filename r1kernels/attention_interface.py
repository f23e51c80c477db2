"""`varlen_attention` and `prefix_attention` as one attention implementation of transformers."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from r1kernels import check
from r1kernels.packing import cu_seqlens_from_lengths
from r1kernels.prefix_attention import prefix_attention
from r1kernels.varlen_attention import varlen_attention

NAME = "r1kernels"
# the rules that a mask may be made of: the ones that the attention itself knows
RULES = {"causal_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}
# offsets found in position ids, so that a forward reads them once and not in every layer
_found = WeakTensorKeyDictionary()


def register_attention() -> str:
    """Make `varlen_attention` the attention implementation "r1kernels" of transformers.

    A model then takes it by `attn_implementation="r1kernels"` or
    `model.set_attn_implementation("r1kernels")`. Sequences packed in one row do not see each
    other, and no mask is made. Where they begin is said as for transformers' own flash attention:
    by `position_ids` that restart, or by `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and
    `max_length_k`, which a GPU need not be waited for and torch.compile needs. Rows of a batch are
    sequences of their own; keys from a cache stand before the queries. `cu_seq_lens_k` is that of
    the queries; on a GPU it is not looked at.

    A batch of `share_prefixes`, in which a prompt is there once for several sequences, goes by
    `prefix_attention`: `model(input_ids=tokens[None], position_ids=layout.position_ids[None],
    use_cache=False, layout=layout)`.

    In the model's forward, ValueErrors that name the module refuse what would be computed wrongly:
    padding or another mask, dropout, attention sinks, position biases, attention weights as a
    result, attention that is not causal, packed sequences on top of a cache; with a layout also
    capped scores and a window shorter than the longest sequence.

    Returns: the name, "r1kernels". May be called more than once.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    return NAME


def _attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    position_ids=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    layout=None,
    **options,
):
    """query [B, H, Lq, E], key and value [B, N, Lk, E] -> ([B, Lq, H, E], None)."""
    where = f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})"
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    for wrong, said in (
        (attention_mask is not None, f"attention_mask {_shape(attention_mask)} is not supported"),
        (dropout, f"dropout is not supported, got {dropout}"),
        (options.get("s_aux") is not None, "attention sinks (s_aux) are not supported"),
        (options.get("position_bias") is not None, "position_bias is not supported"),
        (options.get("output_attentions"), "output_attentions is not supported"),
        (not is_causal, "attention that is not causal is not supported"),
    ):
        if wrong:
            raise ValueError(f"{where}: {said} by the attention implementation {NAME!r}")
    B, H, Lq, E = query.shape
    Lk = key.shape[2]
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    device = query.device.type
    cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if cast and query.dtype != torch.float64:
        packed = [x.to(torch.get_autocast_dtype(device)) for x in packed]
    if layout is not None:
        for wrong, said in (
            (B != 1 or Lk != Lq, f"{B} rows of {Lq} tokens and {Lk} keys"),
            (softcap, f"scores capped at {softcap}"),
            (
                sliding_window and sliding_window < layout.longest,
                f"a window of {sliding_window} tokens, shorter than the longest sequence",
            ),
        ):
            if wrong:
                raise ValueError(f"{where}: a layout of shared prompts does not go with {said}")
        return prefix_attention(*packed, layout, scale=scaling).unsqueeze(0), None
    if cu_seq_lens_q is None:
        if position_ids is None:
            raise ValueError(
                f"{where} does not say where sequences begin: neither cu_seq_lens_q nor "
                f"position_ids reached the attention implementation {NAME!r}"
            )
        cu_seq_lens_q = _offsets(position_ids, B, Lq, where)
        max_length_q = max_length_k = None
        if Lk != Lq:
            if len(cu_seq_lens_q) != B + 1:
                raise ValueError(f"{where}: position_ids restart in a row that has a key cache")
            cu_seq_lens_k = cu_seqlens_from_lengths([Lk] * B)
        else:
            cu_seq_lens_k = None
    elif Lk != Lq:
        raise ValueError(f"{where}: cu_seq_lens_q with a key cache is not supported")
    elif cu_seq_lens_k is not None:
        # without a cache the keys are the queries' own tokens; two tensors would have to be read
        both = (cu_seq_lens_q, cu_seq_lens_k)
        if all(map(check.values_readable, both)) and not torch.equal(*both):
            raise ValueError(f"{where}: cu_seq_lens_k differs from cu_seq_lens_q")
        cu_seq_lens_k = None
    out_THE = varlen_attention(
        *packed,
        cu_seq_lens_q,
        cu_seqlens_key=cu_seq_lens_k,
        scale=scaling,
        window=sliding_window or None,
        softcap=softcap or None,
        max_seqlen=None if max_length_q is None else int(max_length_q),
        max_seqlen_key=None if max_length_k is None else int(max_length_k),
    )
    return out_THE.view(B, Lq, H, E), None


def _shape(x: Tensor | None) -> list[int] | str:
    return list(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _offsets(position_ids: Tensor, B: int, L: int, where: str) -> Tensor:
    """Where position ids [B, L] or [1, L] start anew, as int32 offsets on the CPU."""
    if torch.compiler.is_compiling():
        raise ValueError(
            f"{where}: under torch.compile pass cu_seq_lens_q and max_length_q to the model; "
            "offsets in position_ids cannot be read there"
        )
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != L:
        raise ValueError(
            f"{where}: position_ids must have shape {[B, L]}, got {list(position_ids.shape)}"
        )
    # under inference_mode tensors have no version, may change unseen, and are read in every layer
    now = None if position_ids.is_inference() else (position_ids._version, B)
    version, found = _found.get(position_ids, (None, None))
    if now is None or version != now:
        begins = torch.ones(B, L, dtype=torch.bool, device=position_ids.device)
        begins[:, 1:] = position_ids.diff(dim=1) != 1
        starts = begins.flatten().nonzero().flatten().to("cpu", torch.int32)
        found = torch.cat([starts, starts.new_tensor([B * L])])
        _found[position_ids] = now, found
    return found


def _no_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    config=None,
    **_options,
):
    """None, where the rules of the mask are those that the attention follows without one."""
    where = f"{type(config).__name__} with the attention implementation {NAME!r}"
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"{where}: attention_mask {list(attention_mask.shape)} has padding: pack the sequences "
            "(r1kernels.packing.unpad) and pass position_ids that restart, or cu_seq_lens_q"
        )
    unknown = {rule for rule in _rules(mask_function) if rule not in RULES}
    if unknown:
        raise ValueError(f"{where}: masks by {', '.join(sorted(unknown))} are not supported")
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ValueError(f"{where}: a cache with empty slots (StaticCache) is not supported")


def _rules(mask_function) -> set[str]:
    """Names of the functions that transformers made a mask function of."""
    name = mask_function.__qualname__.split(".")[0]
    if name != "and_masks":
        return {name}
    held = dict(
        zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True)
    )
    return set().union(*(_rules(part) for part in held["mask_functions"].cell_contents))
