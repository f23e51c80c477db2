"""Decoders by their sizes alone, a long problem for them, its float64 truth, and what a step costs.

Nothing is downloaded: weights are drawn from a seed, on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from r1kernels import PolicyObjective, register_attention
from r1kernels.model_shape import NAMED, ModelShape
from r1kernels.packing import shift_targets

ROWS_CHECKED = 512
OBJECTIVE = PolicyObjective(aggregation="token_mean")
TRUTH_CHUNK = 1024
PARTS = (("norm", "norm"), ("self_attn", "attention"), ("mlp", "mlp"), ("embed", "embedding"))


QWEN_1B, QWEN_7B, SMALL, TINY = "qwen2.5-1.5b", "qwen2.5-7b", "small", "tiny"
DECODERS = {
    QWEN_1B: NAMED[QWEN_1B],
    QWEN_7B: NAMED[QWEN_7B],
    # Attention at 64k tokens takes a CPU 20 s and more a layer: few layers, narrow heads.
    SMALL: ModelShape(
        hidden=128, layers=2, heads=2, kv_heads=1, head_dim=16, intermediate=704, vocab=4096,
        tied=True, qkv_bias=True,
    ),
    TINY: ModelShape(
        hidden=16, layers=4, heads=2, kv_heads=1, head_dim=8, intermediate=40, vocab=97,
        tied=True, qkv_bias=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A decoder by name with `layers` layers, on T tokens: one sequence, or sequences of `packed`.

    workspace_mb: of the head; rows: of chunks and tiles; None: the defaults.
    """

    decoder: str
    layers: int
    T: int
    dtype: str
    packed: int | None = None
    workspace_mb: int | None = None
    rows: int | None = None

    @property
    def shape(self) -> ModelShape:
        return decoder(self.decoder, self.layers)


def decoder(name: str, layers: int | None = None) -> ModelShape:
    """Sizes by name, of the whole model or with fewer layers."""
    return replace(DECODERS[name], layers=layers or DECODERS[name].layers)


def step_flops(shape: ModelShape, lengths: list[int]) -> float:
    """Model operations of one step on packed sequences; what is computed twice counts once."""
    return float(sum(shape.flops(length) for length in lengths))


def config(shape: ModelShape, longest: int):
    """transformers' configuration, for sequences of up to `longest` tokens."""
    from transformers import Qwen2Config

    return Qwen2Config(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=longest,
        use_cache=False,
    )


def build_model(shape: ModelShape, longest: int, dtype: str, device: str, attention: str):
    """The model in training mode, its gradients zeros: as in every micro-batch but the first."""
    from transformers import AutoModelForCausalLM

    if attention == "r1kernels":
        register_attention()
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config(shape, longest), dtype=getattr(torch, dtype), attn_implementation=attention
        )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model.train()


@dataclass(frozen=True, slots=True)
class Tokens:
    """Packed sequences as a trainer has them: the streams on the host, ids where the model is."""

    ids_T: torch.Tensor
    targets_T: torch.Tensor
    mask_T: torch.Tensor
    advantages_B: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        return self.cu_seqlens.diff().tolist()


def build_tokens(vocab: int, T: int, device: str, packed: int | None = None) -> Tokens:
    """One sequence of T tokens, or sequences of `packed` tokens; the first eighth is a prompt."""
    generator = torch.Generator().manual_seed(T)
    ids_T = torch.randint(0, vocab, (T,), generator=generator)
    starts = list(range(0, T, packed or T))
    cu_seqlens = torch.tensor([*starts, T], dtype=torch.int32)
    lengths_B = cu_seqlens.diff()
    position_T = torch.arange(T) - cu_seqlens[:-1].long().repeat_interleave(lengths_B)
    targets_T = shift_targets(ids_T, cu_seqlens)
    mask_T = (position_T + 1 >= lengths_B.repeat_interleave(lengths_B) // 8).float()
    advantages_B = torch.randn(len(starts), generator=generator)
    return Tokens(ids_T.to(device), targets_T, mask_T, advantages_B, cu_seqlens)


def policy_loss(model, hidden_TD: torch.Tensor, tokens: Tokens, workspace_mb: int | None):
    """The fused head, which is the same for every provider."""
    from r1kernels import linear_policy_loss

    return linear_policy_loss(
        hidden_TD,
        model.get_output_embeddings().weight,
        tokens.targets_T,
        tokens.advantages_B,
        OBJECTIVE,
        mask=tokens.mask_T,
        cu_seqlens=tokens.cu_seqlens,
        workspace_mb=workspace_mb,
    ).loss


def truth(model, hidden: Callable, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Gradients in float64 by autograd through `hidden(tokens)`, the model's own layers.

    The model is changed to float64 and not to be used again.

    transformers' norms compute in float32 whatever comes in: they are replaced here.
    """
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm64(module)
    for parameter in model.parameters():
        parameter.grad = None
    hidden_TD = hidden(tokens)
    leaf_TD = hidden_TD.detach().requires_grad_()
    weight_VD = model.get_output_embeddings().weight
    advantage_T = tokens.advantages_B.repeat_interleave(tokens.cu_seqlens.diff())
    counted_T = (tokens.mask_T > 0) & (tokens.targets_T >= 0)
    # The mean over tokens of a ratio that is 1: its gradient is that of -advantage x logp.
    coefficient_T = (-advantage_T * counted_T / counted_T.sum()).double().to(leaf_TD.device)
    targets_T = tokens.targets_T.clamp_min(0).to(leaf_TD.device)
    for start in range(0, len(leaf_TD), TRUTH_CHUNK):
        rows = slice(start, start + TRUTH_CHUNK)
        logits_CV = F.linear(leaf_TD[rows], weight_VD)
        logp_C = -F.cross_entropy(logits_CV, targets_T[rows], reduction="none")
        (coefficient_T[rows] * logp_C).sum().backward()
    hidden_TD.backward(leaf_TD.grad)
    return sampled_gradients(model)


def _norm64(module):
    def forward(x):
        variance = x.square().mean(-1, keepdim=True)
        return module.weight * x * torch.rsqrt(variance + module.variance_epsilon)

    return forward


def sampled_gradients(model) -> dict[str, torch.Tensor]:
    """By parameter: rows of its gradient from the first to the last, evenly spaced."""
    found = {}
    for name, parameter in model.named_parameters():
        rows = parameter.grad.shape[0]
        step = torch.linspace(0, rows - 1, min(rows, ROWS_CHECKED)).long().unique()
        found[name] = parameter.grad[step.to(parameter.grad.device)].cpu()
    return found


def gradient_errors(model, truths: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors in the Frobenius norm, of the parameters of one kind together."""
    wrong: dict[str, float] = {}
    whole: dict[str, float] = {}
    for name, gradient in sampled_gradients(model).items():
        kind = next((kind for part, kind in PARTS if part in name), "head")
        difference = gradient.double() - truths[name].double()
        wrong[kind] = wrong.get(kind, 0.0) + difference.square().sum().item()
        whole[kind] = whole.get(kind, 0.0) + truths[name].double().square().sum().item()
    return {kind: (wrong[kind] / whole[kind]) ** 0.5 for kind in wrong}
