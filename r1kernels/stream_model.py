"""A transformers decoder run layer by layer in chunks of queries: hidden states with O(chunk)
transients, forward and backward."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from r1kernels import check
from r1kernels.backend import isolated
from r1kernels.decoder import Norm, decoder, decoder_layer, norm
from r1kernels.decoder_parts import rms_norm, rms_norm_backward
from r1kernels.model_shape import position_limit
from r1kernels.packing import position_ids as positions_of
from r1kernels.stream_layer import host_offsets, refuse_dropout, run_layer, verify_layer
from r1kernels.weight_grads import WeightGrads

if TYPE_CHECKING:
    from r1kernels.host_store import HostStore

# elements of a chunk's hidden states: enough rows that adding to the float32 sums of the weight
# gradients, once per chunk, costs little beside their products
CHUNK_ELEMENTS = 2**25
# largest difference from the model's own hidden states, relative to their largest value
TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def default_chunk_size(hidden_width: int) -> int:
    """Queries at a time: the largest power of two with rows x width <= 2^25, at least 256.

    16,384 for a width of 1,536, 8,192 for 3,584 and 4,096.
    """
    return max(256, 2 ** (CHUNK_ELEMENTS // hidden_width).bit_length() // 2)


def stream_model(
    model: nn.Module,
    *,
    chunk_size: int | None = None,
    store: "HostStore | None" = None,
    save_attention: bool = False,
) -> "StreamModel":
    """A callable (input_ids, position_ids=None, cu_seqlens=None) -> hidden [T, D] of the model.

    The hidden states are those after the final norm, which `linear_logp`, `linear_policy_loss` and
    `linear_loss` take with the model's own head. The model is not changed; its weights are read at
    every call.

    Args:
        model: a transformers causal language model or its decoder, of the form that `decoder.py`
            recognises: Qwen2, Qwen2.5, Qwen3, Llama, Mistral. Weights may be frozen, tied to the
            head, or carry a PEFT LoRA adapter.
        chunk_size: queries at a time; None: `default_chunk_size`.
        store: where the layers' inputs wait for the backward, a `HostStore`; None: on the device.
        save_attention: as `stream_layer`; what it keeps goes to the store, too.

    Returns:
        An nn.Module that holds the model (so that DDP can wrap it).

    Raises: ValueError for a model that is not recognised, whose layer or hidden states differ from
        ours on a few tokens (the module is named), or whose parameters are sharded.
    """
    return StreamModel(model, chunk_size, store, save_attention)


class StreamModel(nn.Module):
    """What `stream_model` returns."""

    def __init__(self, model, chunk_size, store, save_attention):
        super().__init__()
        self.model = model
        base, name = decoder(model)
        if store is not None and not hasattr(store, "put"):
            raise TypeError(f"store must be a HostStore, got {check.describe(store)}")
        width = base.embed_tokens.embedding_dim
        self.chunk_size = default_chunk_size(width) if chunk_size is None else chunk_size
        self.store, self.save_attention = store, save_attention
        alike = set()
        for layer, title in _layers(base, name):
            verify_layer(layer, title, alike)
        self._replaced = _replaced(base, name)
        self._verify(base, name)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of packed sequences that do not see each other.

        Args:
            input_ids: int64 [T], or [1, T] as transformers has packed batches.
            position_ids: int64, like input_ids; None: from 0 in every sequence.
            cu_seqlens: int32 or int64 [B + 1] on any device; None for one sequence, whose
                positions rise by one. Read on the host, once.

        Returns:
            [T, D] in the model's dtype.

        Gradients: every parameter that requires one, once, rounded from float32 sums.
        Raises: ValueError for a position beyond max_position_embeddings, for dropout in training,
            bad cu_seqlens and under autocast.
        """
        base, name = decoder(self.model)
        check.dtype_in("input_ids", input_ids, (torch.int64,))
        if (input_ids.ndim == 2 and len(input_ids) != 1) or input_ids.ndim not in (1, 2):
            got = check.describe(input_ids)
            raise ValueError(f"input_ids must be packed, [T] or [1, T], got {got}")
        T = input_ids.numel()
        if (replaced := _replaced(base, name)) != self._replaced:
            parts = sorted(dict(replaced ^ self._replaced))
            raise ValueError(
                f"{', '.join(parts)}: another forward than when stream_model compared the model, "
                "and it would not be called: call stream_model again"
            )
        offsets = host_offsets(cu_seqlens, T)
        positions_T = self._positions(
            base, input_ids, position_ids, offsets, guess=cu_seqlens is None
        )
        hidden_TD = base.embed_tokens(input_ids.view(T))
        # A rank without tokens takes part all the same: its gradients are zeros.
        turned_T = positions_T if T else positions_T.new_zeros(1)
        cos_TE, sin_TE = (x[0, :T] for x in base.rotary_emb(hidden_TD[None], turned_T[None]))
        waiting = None if self.store is None else _Waiting(self.store)
        for layer, title in _layers(base, name):
            found = decoder_layer(layer, title)
            refuse_dropout(found, layer)
            with (
                contextlib.nullcontext()
                if waiting is None
                else waiting.saving(cos_TE, sin_TE, *found.parameters().values())
            ):
                hidden_TD = run_layer(
                    found, hidden_TD, cos_TE, sin_TE, offsets, self.chunk_size,
                    save_attention=self.save_attention, own_gradient=True,
                )  # fmt: skip
        final = norm(base.norm, f"{name}.norm".lstrip("."))
        return _StreamNorm.apply(hidden_TD, final, self.chunk_size, final.weight)

    def _positions(self, base, input_ids, position_ids, offsets, guess: bool) -> Tensor:
        T, device = input_ids.numel(), input_ids.device
        limit = position_limit(base.config) or 2**31
        if position_ids is None:
            longest = max((stop - start for start, stop in pairwise(offsets)), default=0)
            positions_T = positions_of(torch.tensor(offsets, device=device), T)
        else:
            check.dtype_in("position_ids", position_ids, (torch.int64, torch.int32))
            check.shape("position_ids", position_ids, input_ids.shape, "that of input_ids")
            positions_T = position_ids.reshape(T)
            longest = int(positions_T.max()) + 1 if T else 0
            # transformers starts a new sequence there
            if guess and bool((positions_T.diff() != 1).any()):
                raise ValueError(
                    "position_ids do not rise by one: pass the boundaries as cu_seqlens, [0, T] "
                    "if all is one sequence"
                )
        if longest > limit:
            raise ValueError(
                f"a sequence reaches {longest} positions, the model's rotary embedding "
                f"(max_position_embeddings) {limit}: extend it first, for instance with YaRN"
            )
        return positions_T

    def _verify(self, base, name: str) -> None:
        """Compares the hidden states of a few tokens with the model's own."""
        windows = [decoder_layer(*x).window or 0 for x in _layers(base, name)]
        T = min(64, max([8, *(x + 5 for x in windows)]))
        device, vocabulary = base.embed_tokens.weight.device, base.embed_tokens.num_embeddings
        tokens_T = torch.arange(1, T + 1, device=device) * 7919 % vocabulary
        config = base.config
        given, training = config._attn_implementation, [x for x in base.modules() if x.training]
        try:
            # A plan or a kernel of one's own may not take such a call.
            config._attn_implementation = "eager"
            base.eval()
            with torch.no_grad():
                theirs_TD = base(input_ids=tokens_T[None], use_cache=False).last_hidden_state[0]
                ours_TD = self(tokens_T)
        finally:
            config._attn_implementation = given
            for module in training:
                module.training = True
        gap = (theirs_TD - ours_TD).abs().max() / theirs_TD.abs().max().clamp_min(1e-9)
        if not gap <= TOLERANCE[ours_TD.dtype]:
            raise ValueError(
                f"{name or 'model'} ({type(base).__name__}): its hidden states differ by {gap:.1e} "
                "relative from those of its layers, one after the other: it is not supported"
            )


def _layers(base: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Each with its name in the model."""
    return [(x, f"{name}.layers.{i}".lstrip(".")) for i, x in enumerate(base.layers)]


def _replaced(base: nn.Module, name: str) -> set[tuple[str, Callable]]:
    """Forwards that are not those of the modules' classes, with the modules' names."""
    return {
        (part, vars(module)["forward"])
        for part, module in base.named_modules(prefix=name)
        if "forward" in vars(module)
    }


class _Waiting:
    """What layers saved, in a store, and brought back one layer ahead of the backward."""

    def __init__(self, store: "HostStore"):
        self.store = store
        self.layers: list[list[weakref.ref]] = []

    @contextlib.contextmanager
    def saving(self, *stays: Tensor) -> Iterator[None]:
        """Within it what autograd saves goes to the store, but for the tensors that stay."""
        here = {x.data_ptr() for x in stays}
        before, handles = self.layers[-1] if self.layers else [], []
        self.layers.append(handles)

        def pack(x: Tensor):
            if x.data_ptr() in here:
                return x, x._version
            handle = self.store.put(x, more=bool(handles))
            handles.append(weakref.ref(handle))
            return handle

        def unpack(saved) -> Tensor:
            if isinstance(saved, tuple):
                x, version = saved
                if x._version != version:
                    raise RuntimeError(
                        f"a parameter, {check.describe(x)}, was modified in place between the "
                        "forward and the backward"
                    )
                return x
            x = saved.take()
            for handle in (reference() for reference in before):
                if handle is not None:
                    handle.prefetch()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class _StreamNorm(torch.autograd.Function):
    """The final norm, whose gradient is in memory of its own: the last layer may overwrite it."""

    @staticmethod
    @isolated
    def forward(ctx, x_TD: Tensor, final: Norm, chunk_size: int, weight: Tensor) -> Tensor:
        ctx.final, ctx.chunk_size = final, chunk_size
        ctx.save_for_backward(x_TD, weight)
        y_TD = torch.empty_like(x_TD)
        for y_CD, x_CD in zip(y_TD.split(chunk_size), x_TD.split(chunk_size), strict=True):
            y_CD.copy_(rms_norm(x_CD, final))
        return y_TD

    @staticmethod
    @isolated
    def backward(ctx, dy_TD: Tensor):
        check.no_second_derivative("stream_model")
        x_TD, weight = ctx.saved_tensors
        grads = WeightGrads({"norm.weight": weight} if ctx.needs_input_grad[3] else {})
        dx_TD = torch.empty_like(x_TD)
        parts = (x.split(ctx.chunk_size) for x in (dx_TD, dy_TD, x_TD))
        for dx_CD, dy_CD, x_CD in zip(*parts, strict=True):
            dx_CD.copy_(rms_norm_backward(dy_CD, x_CD, ctx.final, grads, "norm"))
        return dx_TD, None, None, grads.deliver("norm.weight")
