"""A decoder layer run in chunks of queries: transients of the size of a chunk, exact gradients.

Keys and values are projected once for the whole batch; then each chunk of queries goes through
norm, projection, attention, output projection, norm and MLP by itself. Of all this the backward
needs the layer's input alone.
"""

import copy
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from r1kernels import check
from r1kernels.backend import isolated
from r1kernels.decoder import DecoderLayer, decoder_layer
from r1kernels.layer_chunks import backward, cut, forward
from r1kernels.packing import check_cu_seqlens
from r1kernels.weight_grads import WeightGrads

# largest difference from the original layer's result in float32, relative to its largest value;
# a GPU may multiply float32 in fewer bits
TOLERANCE = 2e-3


def stream_layer(
    layer: nn.Module,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    cu_seqlens: Tensor | None = None,
    *,
    chunk_size: int,
    save_attention: bool = False,
) -> Tensor:
    """layer(hidden) of a transformers decoder layer over packed sequences, in chunks of queries.

    Args:
        layer: what `decoder.decoder_layer` recognises (Qwen2, Qwen3, Llama, Mistral). Its weights
            may be frozen or carry a PEFT LoRA adapter. When it is first seen its result on a few
            rows is compared with ours.
        hidden: packed [T, D], the dtype of the weights.
        position_embeddings: (cos, sin) [T, E], as the model's rotary_emb makes them.
        cu_seqlens: int32 or int64 [B + 1], on any device; None for one sequence. Read on the host.
        chunk_size: queries at a time. It need not divide anything.
        save_attention: keep attention's output and log-sum-exp, T (H E + 2 H) elements of 16 bits,
            so that the backward does not run attention's forward again.

    Returns:
        [T, D] in hidden's dtype.

    Gradients: hidden and every parameter, each once: weight gradients are summed in float32 over
        the chunks and rounded at the end. Besides hidden the backward holds its gradient, keys and
        values, and their gradients in float32.
    Numerics: error at most twice eager's in the same dtype. The same call repeats bitwise on a
        CPU, and gives the same bits with and without gradients.
    Raises: ValueError for a layer that is not recognised or differs (it names the module), for
        dropout in training, for bad shapes and under autocast.
    Source: StreamBP (arXiv:2506.03077) splits layers alike; docs/ops/stream.md.
    """
    verify_layer(layer)
    found = decoder_layer(layer)
    check.floating("hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be packed, [T, D], got {check.describe(hidden)}")
    offsets = host_offsets(cu_seqlens, hidden.shape[0])
    refuse_dropout(found, layer)
    return run_layer(
        found, hidden, *position_embeddings, offsets, chunk_size, save_attention=save_attention
    )


def host_offsets(cu_seqlens: Tensor | None, num_tokens: int) -> list[int]:
    """Offsets of the sequences on the host, checked.

    Raises: ValueError when they do not run from 0 to num_tokens without decreasing.
    """
    if cu_seqlens is None:
        return [0, num_tokens]
    check.tensor("cu_seqlens", cu_seqlens)
    cu_seqlens = cu_seqlens.detach().cpu()
    check_cu_seqlens(cu_seqlens, num_tokens, cu_seqlens.device)
    return cu_seqlens.tolist()


def refuse_dropout(found: DecoderLayer, layer: nn.Module) -> None:
    if found.dropout and layer.training:
        raise ValueError(
            f"{found.name}.self_attn: attention_dropout must be 0 in training, got {found.dropout}"
        )


def run_layer(
    layer: DecoderLayer,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    offsets: Sequence[int],
    chunk_size: int,
    *,
    save_attention: bool = False,
    own_gradient: bool = False,
) -> Tensor:
    """`stream_layer` of a description, whose layer was verified.

    Args:
        own_gradient: the gradient of the result belongs to nobody else, so that hidden's
            overwrites it.
    """
    dtype = layer.input_norm.weight.dtype
    check.dtype_in("hidden", hidden, (dtype,))
    check.device("hidden", hidden, layer.input_norm.weight.device)
    check.shape("hidden", hidden, (hidden.shape[0], len(layer.input_norm.weight)), "[T, D]")
    for name, x in (("cos", cos), ("sin", sin)):
        check.shape(f"position_embeddings: {name}", x, (hidden.shape[0], layer.head_width))
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"position_embeddings: {name} would get no gradient: detach it")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
    if torch.is_autocast_enabled(hidden.device.type):
        raise ValueError("streaming runs in the dtype of the weights: leave autocast to call it")
    return _StreamLayer.apply(
        hidden, cos, sin, layer, cut(offsets, chunk_size, layer.window),
        save_attention and torch.is_grad_enabled(), own_gradient, *layer.parameters().values(),
    )  # fmt: skip


class _StreamLayer(torch.autograd.Function):
    @staticmethod
    @isolated
    def forward(ctx, hidden, cos, sin, layer, chunks, save_attention, own_gradient, *parameters):
        ctx.layer, ctx.chunks, ctx.own_gradient = layer, chunks, own_gradient
        save_attention = save_attention and any(ctx.needs_input_grad)
        y_TD, attention = forward(hidden, cos, sin, layer.to(hidden.dtype), chunks, save_attention)
        # The parameters are there for autograd's own check that nobody changes them meanwhile.
        ctx.save_for_backward(hidden, cos, sin, *attention, *parameters)
        return y_TD

    @staticmethod
    @isolated
    def backward(ctx, dy_TD):
        check.no_second_derivative("stream_layer")
        hidden_TD, cos_TE, sin_TE, out_THE, lse_TH, *_ = ctx.saved_tensors
        parameters = ctx.layer.parameters()
        wanted = zip(parameters.items(), ctx.needs_input_grad[-len(parameters) :], strict=True)
        grads = WeightGrads({name: x for (name, x), needed in wanted if needed})
        dx_TD = dy_TD if ctx.own_gradient and dy_TD.is_contiguous() else torch.empty_like(hidden_TD)
        backward(
            dy_TD, hidden_TD, cos_TE, sin_TE, ctx.layer.to(hidden_TD.dtype), ctx.chunks,
            (out_THE, lse_TH), grads, dx_TD,
        )  # fmt: skip
        return dx_TD, *[None] * 6, *(grads.deliver(name) for name in parameters)


# The kinds that layers were of when they were compared with ours.
_verified: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def verify_layer(layer: nn.Module, name: str = "layer", alike: set[tuple] | None = None) -> None:
    """Compares the layer's result on a few rows with ours, unless that was done before.

    On a copy of the layer in float32 with weights drawn anew: those of the layer might hide a
    difference, being small or in few bits.

    Args:
        alike: kinds of layers of the same model that were compared; this one's is added.

    Raises: ValueError when they differ, and what `decoder_layer` raises.
    """
    kind, alike = _kind(layer), set() if alike is None else alike
    if kind in alike or _verified.get(layer) == kind:
        return
    found = decoder_layer(layer, name)
    twin = copy.deepcopy(layer).float().eval()
    twin.self_attn.config._attn_implementation = "eager"
    device = found.input_norm.weight.device
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    T, E = 9 if found.window is None else min(64, found.window + 5), found.head_width
    with torch.no_grad():
        for x in twin.parameters():
            x.copy_(torch.randn(x.shape, **draw) / x.shape[-1] ** 0.5 + (x.ndim == 1))
        angle_TE = torch.randn(T, E // 2, **draw).repeat(1, 2)
        cos_TE, sin_TE = angle_TE.cos(), angle_TE.sin()
        hidden_TD = torch.randn(T, len(found.input_norm.weight), **draw)
        rows_T = torch.arange(T, device=device)
        distance_TT = rows_T[:, None] - rows_T
        seen_TT = (distance_TT >= 0) & (distance_TT < (found.window or T))
        theirs_TD = twin(
            hidden_TD[None],
            attention_mask=torch.where(seen_TT, 0.0, -1e30)[None, None],
            position_ids=rows_T[None],
            position_embeddings=(cos_TE[None], sin_TE[None]),
            past_key_values=None,
            use_cache=False,
        )[0]
        ours_TD = run_layer(decoder_layer(twin, name), hidden_TD, cos_TE, sin_TE, [0, T], 4)
    gap = (theirs_TD.reshape(T, -1) - ours_TD).abs().max() / theirs_TD.abs().max()
    if not gap <= TOLERANCE:
        raise ValueError(
            f"{name} ({type(layer).__name__}) has the parts of a decoder layer but differs from "
            f"one by {gap:.1e} relative: it is not supported"
        )
    alike.add(kind)
    _verified[layer] = kind


def _kind(layer: nn.Module) -> tuple:
    """What may make a layer's result another function of its weights: classes and options."""
    plain = bool, int, float, str, type(None)
    return tuple(
        (
            type(module),
            module.forward if "forward" in vars(module) else None,
            tuple(
                sorted(
                    (name, repr(value))
                    for name, value in vars(module).items()
                    if isinstance(value, plain) and name not in ("layer_idx", "training")
                )
            ),
        )
        for module in layer.modules()
    )
