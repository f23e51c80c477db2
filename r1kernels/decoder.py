"""What a transformers decoder is made of: its weights and sizes, or a refusal by name.

Parts are recognised by what they hold, not by their class: submodules, parameters, and the options
that change attention. Whatever else is there could change the result and is a ValueError that names
the module. `stream_model` then compares numbers, which shows what structure does not.

Recognised are Qwen2, Qwen2.5, Qwen3, Llama, Mistral, and what has their form:

    r = x + output(attention(rope(query_norm(query(n))), rope(key_norm(key(n))), value(n)))
    y = r + down(act(gate(m)) * up(m))                   n = input_norm(x), m = mlp_norm(r)
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from r1kernels import check
from r1kernels.projection import KEYS, Projection, has_hooks, linear_parts
from r1kernels.reference.glu import ACTIVATIONS, glu
from r1kernels.tiled_mlp import Mlp

MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = ("gate", "up", "down")


class Norm(NamedTuple):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis."""

    weight: Tensor  # [D]
    eps: float


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights and sizes of one layer. Read anew for every call, since weights move and change."""

    name: str
    input_norm: Norm
    query: Projection
    key: Projection
    value: Projection
    query_norm: Norm | None
    key_norm: Norm | None
    output: Projection
    mlp_norm: Norm
    mlp: Mlp
    heads: int
    kv_heads: int
    head_width: int
    scale: float
    window: int | None
    dropout: float

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by a name such as "query.weight" or "up.lora_a", in a fixed order."""
        found = {}
        for field in fields(self):
            part = getattr(self, field.name)
            if isinstance(part, Norm):
                found[f"{field.name}.weight"] = part.weight
            elif isinstance(part, Projection):
                found |= {f"{field.name}.{k}": x for k, x in zip(KEYS, part, strict=False)}
            elif isinstance(part, Mlp):
                found |= part.tensors
        return {name: x for name, x in found.items() if x is not None}

    def to(self, dtype: torch.dtype) -> "DecoderLayer":
        """With low-rank terms in the dtype of the rows, which PEFT keeps in float32."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{k: x.to(dtype) for k, x in parts.items() if isinstance(x, Projection | Mlp)}
        )


def decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """The part of a transformers model that holds the layers, and its name in the model.

    Raises: ValueError when there is none of the form embed_tokens, layers, norm, rotary_emb.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layers", None), nn.ModuleList)
    ]
    for part, outer in model.named_modules():
        if isinstance(outer, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{part or 'model'} is a DistributedDataParallel, which would not see the call and "
                "average no gradients: wrap what stream_model returns, not what it takes"
            )
        if getattr(getattr(outer, "active_peft_config", None), "is_prompt_learning", False):
            raise _refusal(outer, part or "model", "learns a prompt, which would be left out")
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} must hold exactly one decoder (a module with `layers`), "
            f"found {[name or type(model).__name__ for name, _ in found]}"
        )
    name, module = found[0]
    _expect(module, name, MODEL)
    if type(module.embed_tokens) is not nn.Embedding:
        raise _refusal(module.embed_tokens, f"{name}.embed_tokens", "is no plain embedding")
    for part, inner in ((name or "model", module), (f"{name}.norm".lstrip("."), module.norm)):
        if has_hooks(inner):
            raise _refusal(inner, part, "has hooks, which would not be called")
    return module, name


def decoder_layer(layer: nn.Module, name: str = "layer") -> DecoderLayer:
    """The description of a layer.

    Args:
        layer: a decoder layer of a transformers model.
        name: what to call it in an error.

    Raises: ValueError that names the module, its class and what was not recognised.
    """
    _expect(layer, name, LAYER)
    for part, module in layer.named_modules(prefix=name):
        if has_hooks(module):
            raise _refusal(module, part, "has hooks, which would not be called")
    attn, mlp = layer.self_attn, layer.mlp
    at, within = f"{name}.self_attn", f"{name}.mlp"
    has_norms = "q_norm" in dict(attn.named_children())
    _expect(attn, at, ATTENTION | (HEAD_NORMS if has_norms else set()))
    _expect(mlp, within, {f"{x}_proj" for x in MLP_PARTS}, {"act_fn"})
    head_width = getattr(attn, "head_dim", None)
    if not isinstance(head_width, int) or not hasattr(attn, "config"):
        raise _refusal(attn, at, "has no head_dim or no config")
    query, key, value, output = (
        _projection(getattr(attn, f"{x}_proj"), f"{at}.{x}_proj") for x in "qkvo"
    )
    queries, hidden = query.weight_NK.shape
    keys = key.weight_NK.shape[0]
    if queries % head_width or not keys or keys % head_width or queries % keys:
        raise _refusal(attn, at, f"has {queries} and {keys} columns in heads of {head_width}")
    found = DecoderLayer(
        name=name,
        input_norm=norm(layer.input_layernorm, f"{name}.input_layernorm"),
        query=query,
        key=key,
        value=value,
        query_norm=norm(attn.q_norm, f"{at}.q_norm") if has_norms else None,
        key_norm=norm(attn.k_norm, f"{at}.k_norm") if has_norms else None,
        output=output,
        mlp_norm=norm(layer.post_attention_layernorm, f"{name}.post_attention_layernorm"),
        mlp=Mlp(
            *(_projection(getattr(mlp, f"{x}_proj"), f"{within}.{x}_proj") for x in MLP_PARTS),
            _activation(mlp, within),
        ),
        heads=queries // head_width,
        kv_heads=keys // head_width,
        head_width=head_width,
        scale=float(getattr(attn, "scaling", head_width**-0.5)),
        window=_window(attn, at),
        dropout=float(getattr(attn, "attention_dropout", 0.0)),
    )
    inner = found.mlp.width
    parameters = found.parameters()
    for part, shape in {
        "input_norm": [hidden],
        "query_norm": [head_width],
        "key_norm": [head_width],
        "mlp_norm": [hidden],
        "key": [keys, hidden],
        "value": [keys, hidden],
        "output": [hidden, queries],
        "gate": [inner, hidden],
        "up": [inner, hidden],
        "down": [hidden, inner],
    }.items():
        if (weight := parameters.get(f"{part}.weight")) is not None:
            check.shape(f"{name}: {part}", weight, shape)
    dtype, device = query.weight_NK.dtype, query.weight_NK.device
    for part, x in parameters.items():
        check.device(f"{name}: {part}", x, device)
        check.dtype_in(f"{name}: {part}", x, {dtype, torch.float32} if "lora" in part else {dtype})
    return found


def _refusal(module: nn.Module, name: str, what: str) -> ValueError:
    return ValueError(f"{name} ({type(module).__name__}) is not recognised: it {what}")


def _expect(module: nn.Module, name: str, parts: set[str], may: set[str] = frozenset()) -> None:
    """Raises: ValueError unless module has these submodules and no parameter of its own."""
    own = sorted(x for x, _ in module.named_parameters(recurse=False))
    if own:
        raise _refusal(module, name, f"has parameters {own} of its own")
    have = {x for x, _ in module.named_children()}
    if missing := sorted(parts - have):
        raise _refusal(module, name, f"has no {', '.join(missing)}")
    if extra := sorted(have - parts - may):
        raise _refusal(module, name, f"has {', '.join(extra)} besides {', '.join(sorted(parts))}")


def _projection(module: nn.Module, name: str) -> Projection:
    weight, bias, low_rank = linear_parts(name, module)
    check.local(f"{name}.weight", weight)
    check.floating(f"{name}.weight", weight)
    if weight.is_meta:
        raise _refusal(module, name, "has its weight on no device: load it, or do not offload it")
    if type(weight) not in (Tensor, nn.Parameter):
        raise _refusal(module, name, f"has a weight of type {type(weight).__name__}")
    return Projection(weight, bias, *(low_rank or ()))


def norm(module: nn.Module, name: str) -> Norm:
    """The weight and eps of an RMS norm.

    Raises: ValueError, with its name, on a module of another form.
    """
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    own = [x for x, _ in module.named_parameters()]
    if own != ["weight"] or module.weight.ndim != 1 or not isinstance(eps, float):
        raise _refusal(module, name, f"is no RMS norm: parameters {own}, eps {eps!r}")
    check.local(f"{name}.weight", module.weight)
    return Norm(module.weight, eps)


def _activation(mlp: nn.Module, name: str) -> str:
    act = getattr(mlp, "act_fn", None)
    if act is None:
        # A fused module knows it by name alone.
        act = getattr(getattr(mlp, "config", None), "hidden_act", None)
    found = _known_activation(act)
    if found is None:
        raise _refusal(mlp, name, f"has an activation other than {', '.join(ACTIVATIONS)}: {act}")
    return found


@functools.lru_cache(maxsize=256)
def _known_activation(act: Callable | str | None) -> str | None:
    if not callable(act):
        act = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
        return act if act in ACTIVATIONS else None
    x = torch.linspace(-4, 4, 33)
    one = torch.ones_like(x)
    return next((k for k in ACTIVATIONS if torch.allclose(act(x), glu(x, one, k), atol=1e-6)), None)


def _window(attn: nn.Module, name: str) -> int | None:
    config = attn.config
    for option in ("attn_logit_softcapping", "sinks", "attention_chunk_size"):
        if getattr(attn, option, getattr(config, option, None)) is not None:
            raise _refusal(attn, name, f"has {option}")
    if not getattr(attn, "is_causal", True):
        raise _refusal(attn, name, "is not causal")
    if hasattr(attn, "sliding_window"):
        return attn.sliding_window
    window = getattr(config, "sliding_window", None)
    # Mistral's attention reads it from the configuration; Llama's has it there by accident.
    if window is not None and getattr(config, "model_type", None) not in ("mistral", "ministral"):
        raise _refusal(attn, name, f"does not say whether the sliding window {window} is its own")
    return window
