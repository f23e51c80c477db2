"""The sizes of a transformers decoder: parameters, and the work that a sequence costs.

T tokens, D hidden width, L layers, H query heads, N key-value heads, E head width, I width of the
gated MLP, V vocabulary; A = H E and K = N E are the widths of queries and of keys.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What a configuration leaves to the code of its model type: biases of q, k, v; of the output
# projection; norms of query and key heads. None: the key attention_bias says.
TRAITS: dict[str, tuple[bool | None, bool | None, bool]] = {
    "qwen2": (True, False, False),
    "qwen3": (None, None, True),
    "llama": (None, None, False),
    "mistral": (False, False, False),
}
SIZES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocab": "vocab_size",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a decoder with gated MLPs, RMS norms and rotary positions.

    qkv_bias, out_bias, mlp_bias: of the projections; qk_norm: a norm of head width on queries and
    keys. tied: the head is the embedding. window: tokens that the first `window_layers` layers
    look back, the present one included. max_positions: longest sequence, None where unknown.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    window_layers: int = 0
    max_positions: int | None = None

    def __post_init__(self):
        sizes = ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab")
        for name in sizes:
            _check_size(name, getattr(self, name))
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} kv_heads do not divide {self.heads} heads")

    @property
    def query_width(self) -> int:
        """A."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """K."""
        return self.kv_heads * self.head_dim

    @property
    def attention_matrices(self) -> int:
        """Entries of a layer's q, k, v and output projections."""
        return 2 * self.hidden * (self.query_width + self.kv_width)

    @property
    def mlp_matrices(self) -> int:
        """Entries of a layer's gate, up and down projections."""
        return 3 * self.hidden * self.intermediate

    @property
    def layer_params(self) -> int:
        """Parameters of one layer."""
        vectors = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        vectors += self.qkv_bias * (self.query_width + 2 * self.kv_width)
        vectors += self.out_bias * self.hidden
        vectors += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.attention_matrices + self.mlp_matrices + vectors

    @property
    def params(self) -> int:
        """Parameters of the model, a tied head once."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.layers * self.layer_params + embeddings + self.hidden

    def pairs(self, length: int) -> int:
        """Twice the (query, key) pairs that a causal sequence has in all layers."""
        near = min(length, self.window or length)
        narrow = self.window_layers * near * (2 * length - near)
        return (self.layers - self.window_layers) * length * length + narrow

    def cost(self, length: int) -> int:
        """Multiplications of one forward pass over a sequence, halves of attention included.

        `length` (P + V D) + A `pairs(length)`, P the entries of all layers' matrices: the linear
        and the quadratic part. Exact, so sums do not depend on their order.
        """
        matrices = self.layers * (self.attention_matrices + self.mlp_matrices)
        return length * (matrices + self.vocab * self.hidden) + self.query_width * self.pairs(
            length
        )

    def flops(self, length: int) -> int:
        """Floating-point operations that training on a sequence needs: forward and backward, causal
        attention counted as half of the square, nothing computed twice."""
        return 6 * self.cost(length)

    @classmethod
    def from_config(cls, config: object) -> "ModelShape":
        """The shape that a transformers configuration describes; transformers is not imported.

        Args:
            config: a configuration object, the dictionary of a config.json, or the path of a
                config.json or of the folder that holds one.

        Raises: FileNotFoundError when there is no such file; ValueError naming the keys that are
            missing or no sizes, a model type that is not known, or a mixture of experts.
        """
        if isinstance(config, str | os.PathLike):
            path = Path(config)
            path = path / "config.json" if path.is_dir() else path
            if not path.is_file():
                raise FileNotFoundError(f"no config.json at {path}")
            try:
                config = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
            if not isinstance(config, Mapping):
                raise ValueError(f"{path} holds no JSON object, so no configuration of a model")
        if not isinstance(config, Mapping):
            if not hasattr(config, "to_dict"):
                raise TypeError(f"config must be a configuration, got {type(config).__name__}")
            config = config.to_dict()
        return cls._from_dict(config.get("text_config") or config)

    @classmethod
    def _from_dict(cls, config: Mapping) -> "ModelShape":
        missing = [key for key in ("model_type", *SIZES.values()) if config.get(key) is None]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}")
        kind = config["model_type"]
        if kind not in TRAITS:
            raise ValueError(f"model type {kind!r} is not known, only {', '.join(TRAITS)}")
        for key in ("num_experts", "num_local_experts", "n_routed_experts"):
            if config.get(key):
                raise ValueError(f"a mixture of experts ({key}) is not a model this describes")
        sizes = {name: config[key] for name, key in SIZES.items()}
        for name, key in SIZES.items():
            _check_size(key, sizes[name])
        qkv_bias, out_bias, qk_norm = TRAITS[kind]
        given = bool(config.get("attention_bias"))
        window, kinds = config.get("sliding_window"), config.get("layer_types")
        if config.get("use_sliding_window") is False:
            window = None
        narrow = 0
        if window:
            narrow = kinds.count("sliding_attention") if kinds else sizes["layers"]
        return cls(
            **sizes,
            kv_heads=config.get("num_key_value_heads") or sizes["heads"],
            head_dim=config.get("head_dim") or sizes["hidden"] // sizes["heads"],
            tied=bool(config.get("tie_word_embeddings")),
            qkv_bias=given if qkv_bias is None else qkv_bias,
            out_bias=given if out_bias is None else out_bias,
            mlp_bias=kind == "llama" and bool(config.get("mlp_bias")),
            qk_norm=qk_norm,
            window=window or None if narrow else None,
            window_layers=narrow,
            max_positions=position_limit(config),
        )


def _check_size(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


NAMED = {
    "qwen2.5-1.5b": ModelShape(
        hidden=1536, layers=28, heads=12, kv_heads=2, head_dim=128, intermediate=8960,
        vocab=151936, tied=True, qkv_bias=True, max_positions=131072,
    ),
    "qwen2.5-7b": ModelShape(
        hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, intermediate=18944,
        vocab=152064, qkv_bias=True, max_positions=131072,
    ),
    "llama-3.1-8b": ModelShape(
        hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, intermediate=14336,
        vocab=128256, max_positions=131072,
    ),
    "qwen3-8b": ModelShape(
        hidden=4096, layers=36, heads=32, kv_heads=8, head_dim=128, intermediate=12288,
        vocab=151936, qk_norm=True, max_positions=40960,
    ),
}  # fmt: skip


def shape_of(model: object) -> ModelShape:
    """A name of `NAMED`, or whatever `ModelShape.from_config` takes.

    Raises: as `ModelShape.from_config`; ValueError for a name that is neither known nor a path.
    """
    if isinstance(model, ModelShape):
        return model
    if isinstance(model, str) and model.lower() in NAMED:
        return NAMED[model.lower()]
    if isinstance(model, str) and not os.path.exists(model):
        raise ValueError(f"unknown model {model!r}: give a path, or one of {', '.join(NAMED)}")
    return ModelShape.from_config(model)


def position_limit(config: object) -> int | None:
    """Positions that a model's rotary embedding is made for; None where that is unknown.

    max_position_embeddings, or what a scaled embedding (YaRN and others) says it reaches: its
    factor is often added to a configuration that keeps the old limit.

    Args:
        config: a transformers configuration, or the dictionary of a config.json.
    """

    def of(key: str) -> object:
        return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)

    limit, scaling = of("max_position_embeddings"), of("rope_parameters") or of("rope_scaling")
    if limit and isinstance(factor := (scaling or {}).get("factor"), int | float):
        original = scaling.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * factor))
    return limit
