"""Ways to train a decoder on a long sequence: ours, torch's, transformers' and Liger's.

All share the fused head, so what differs is what happens to the layers.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.longseq_problem import Case, Tokens
from benchmarks.peers import load
from benchmarks.provider import Missing
from r1kernels.model_shape import ModelShape
from r1kernels.packing import position_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class LongProvider:
    """`apply(model, rows)` changes a new transformers model and returns a function from tokens to
    hidden states [T, D]; rows: of our chunks and tiles, None for the defaults.

    `mode` is what `r1kernels.memory` calls it, None where it has no model of it. Of a layer's input
    the GPU keeps `kept` copies until the backward; `host_width` is what a token leaves on the host,
    in numbers per layer. `packs`: takes packed sequences.
    """

    name: str
    apply: Callable
    package: str = "torch"
    suites: tuple[str, ...] = ("cpu", "gpu")
    attention: str = "sdpa"
    mode: str | None = None
    kept: int = 1
    host_width: Callable[[ModelShape], int] = lambda shape: 0
    packs: bool = False
    is_ours: bool = False
    note: str = ""

    @property
    def backend(self) -> str:
        return "r1kernels" if self.is_ours else self.package

    def predict(self, case: Case, device: str) -> float | None:
        """Peak MiB above weights and gradients by the memory model."""
        if self.mode is None:
            return None
        from r1kernels.memory import ITEMSIZE, peak_bytes
        from r1kernels.stream_model import default_chunk_size
        from r1kernels.tiled_mlp import MIN_ROWS, WORKSPACE_MB

        shape, itemsize = case.shape, ITEMSIZE[case.dtype]
        space = WORKSPACE_MB[device] * 2**20
        tile = case.rows or max(MIN_ROWS, space // (3 * shape.intermediate * itemsize))
        found = peak_bytes(
            shape,
            case.T,
            # A CPU has nowhere to offload to.
            mode=self.mode if device == "cuda" else self.mode.removesuffix("+offload"),
            dtype=case.dtype,
            optimizer="none",
            device=device,
            slack=0,
            workspace_mb=case.workspace_mb,
            mlp_rows=tile if self.is_ours else 0,
            chunk_size=case.rows or default_chunk_size(shape.hidden),
        )
        return (found.device - 2 * itemsize * shape.params) / 2**20


def _hidden(model, packs: bool = False) -> Callable:
    def hidden(tokens: Tokens) -> torch.Tensor:
        asked = {}
        if packs:
            # On the host, so that a GPU is not waited for.
            longest = max(tokens.lengths)
            asked = {"cu_seq_lens_q": tokens.cu_seqlens, "cu_seq_lens_k": tokens.cu_seqlens}
            asked |= {"max_length_q": longest, "max_length_k": longest}
            positions_T = position_ids(tokens.cu_seqlens, len(tokens.ids_T))
            asked["position_ids"] = positions_T[None].to(tokens.ids_T.device)
        out = model.base_model(input_ids=tokens.ids_T[None], use_cache=False, **asked)
        return out.last_hidden_state[0]

    return hidden


def _plain(model, rows) -> Callable:
    return _hidden(model)


def _torch_checkpoint(model, rows) -> Callable:
    for layer in model.base_model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return _hidden(model)


def _transformers(offload: bool) -> Callable:
    def apply(model, rows) -> Callable:
        if offload and not next(model.parameters()).is_cuda:
            raise Missing("without a GPU there is nowhere to offload to")
        model.gradient_checkpointing_enable(**({"offload": True} if offload else {}))
        return _hidden(model)

    return apply


def _liger(model, rows) -> Callable:
    """Its tiled MLP under transformers' checkpointing; on a GPU its norms, RoPE and product too."""
    tiled = load("liger-kernel", "liger_kernel.ops.tiled_mlp", "apply_tiled_mlp")
    gpu = next(model.parameters()).is_cuda
    if gpu:
        patch = load("liger-kernel", "liger_kernel.transformers", "apply_liger_kernel_to_qwen2")
        patch(
            rope=True,
            rms_norm=True,
            swiglu=False,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
            model=model,
        )
        product = load("liger-kernel", "liger_kernel.ops", "LigerSiLUMulFunction").apply
    for layer in model.base_model.layers:
        mlp = layer.mlp

        def fused(mlp, x):
            return mlp.down_proj(product(mlp.gate_proj(x), mlp.up_proj(x)))

        mlp.forward = functools.partial(tiled, fused if gpu else type(mlp).forward, mlp)
    model.gradient_checkpointing_enable()
    return _hidden(model)


def _tiled(model, rows) -> Callable:
    from r1kernels import tile_mlps

    tile_mlps(model, rows)
    model.gradient_checkpointing_enable()
    return _hidden(model, packs=True)


def _offloaded(model, rows) -> Callable:
    from r1kernels import checkpoint_layers, tile_mlps

    tile_mlps(model, rows)
    checkpoint_layers(model, save_attention=True)
    return _hidden(model, packs=True)


def _stream(offload: bool) -> Callable:
    def apply(model, rows) -> Callable:
        from r1kernels import HostStore, stream_model

        store = HostStore() if offload else None
        streamed = stream_model(model, chunk_size=rows, store=store)

        def hidden(tokens: Tokens) -> torch.Tensor:
            return streamed(tokens.ids_T, cu_seqlens=tokens.cu_seqlens)

        return hidden

    return apply


def _inputs(shape: ModelShape) -> int:
    return shape.hidden


def _inputs_and_attention(shape: ModelShape) -> int:
    """And attention's output, and a float32 log-sum-exp per head."""
    return shape.hidden + shape.query_width + 2 * shape.heads


PROVIDERS = {
    provider.name: provider
    for provider in (
        LongProvider(name="plain", apply=_plain, suites=("cpu",), mode="plain"),
        LongProvider(
            name="torch_checkpoint", apply=_torch_checkpoint, suites=("cpu",), mode="checkpoint"
        ),
        LongProvider(
            name="transformers",
            apply=_transformers(offload=False),
            package="transformers",
            mode="checkpoint",
            note="gradient_checkpointing_enable()",
        ),
        LongProvider(
            name="transformers_offload",
            apply=_transformers(offload=True),
            package="transformers",
            suites=("gpu",),
            mode="checkpoint+offload",
            kept=0,
            host_width=_inputs,
            note="gradient_checkpointing_enable(offload=True)",
        ),
        LongProvider(
            name="liger",
            apply=_liger,
            package="liger-kernel",
            note="tiled MLP under transformers' checkpointing; torch's activation on a CPU",
        ),
        LongProvider(
            name="checkpoint",
            apply=_tiled,
            attention="r1kernels",
            mode="checkpoint",
            packs=True,
            is_ours=True,
            note="tile_mlps under transformers' checkpointing",
        ),
        LongProvider(
            name="offload",
            apply=_offloaded,
            attention="r1kernels",
            mode="checkpoint+offload",
            kept=0,
            host_width=_inputs_and_attention,
            packs=True,
            is_ours=True,
            note="tile_mlps, checkpoint_layers(save_attention=True)",
        ),
        LongProvider(
            name="stream",
            apply=_stream(offload=True),
            mode="stream+offload",
            kept=0,
            host_width=_inputs,
            packs=True,
            is_ours=True,
            note="stream_model, layer inputs in a HostStore",
        ),
        LongProvider(
            name="stream_device",
            apply=_stream(offload=False),
            suites=("gpu",),
            mode="stream",
            packs=True,
            is_ours=True,
            note="stream_model, layer inputs on the device",
        ),
    )
}


def find(name: str) -> LongProvider:
    """A provider by name, or by `module:attribute` if defined elsewhere."""
    if ":" in name:
        module, attribute = name.split(":")
        return getattr(importlib.import_module(module), attribute)
    if name not in PROVIDERS:
        raise ValueError(
            f"no provider {name!r}; there are {', '.join(PROVIDERS)}, or module:attribute"
        )
    return PROVIDERS[name]
