"""Tiny transformers decoders, and plain autograd through them, for the tests of streaming."""

import copy

import torch
from torch import Tensor, nn

from tests.numerics import EPS, relative_l2

# Packed: an empty sequence, one of a single token, and prompts that no loss sees.
LENGTHS = (9, 1, 0, 23, 17)
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
TOKENS = sum(LENGTHS)
PROMPTS = torch.tensor([t < min(4, n - 1) for n in LENGTHS for t in range(n)])
VOCABULARY = 61


def build(kind: str, *, layers: int = 2, **options) -> nn.Module:
    """A float64 model of transformers' class, with weights that make peaked attention."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "sdpa",
    }
    config = getattr(transformers, f"{kind}Config")(**(sizes | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x.copy_(noise / x.shape[-1] ** 0.5 + (x.ndim == 1))
    return model


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64 whose norms are, too: transformers' compute in float32 whatever comes."""
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def plain(model: nn.Module, tokens_T: Tensor, offsets: Tensor) -> Tensor:
    """Hidden states of transformers' own forward, every sequence alone."""
    return torch.cat(
        [
            model.base_model(input_ids=x[None], use_cache=False).last_hidden_state[0]
            for x in tokens_T.split(offsets.diff().tolist())
            if len(x)
        ]
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """By name, of the parameters that take one; the model's own are left alone."""
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if grad is None else grad
        for (name, x), grad in zip(trained.items(), found, strict=True)
    }


def gradient_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Root mean square over the parameters of their gradients' relative errors."""
    errors = [relative_l2(found[name], x) ** 2 for name, x in truth.items()]
    return (sum(errors) / len(errors)) ** 0.5


def assert_gradients_no_worse(
    found: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """The numerics rule over all parameters at once: one small gradient's error is mostly luck.

    So is that of one draw of tokens: give several, under names of their own.
    """
    ours, theirs = gradient_error(found, truth), gradient_error(eager, truth)
    assert ours <= 2 * theirs + 4 * EPS, f"error {ours:.3e} against float64, eager's {theirs:.3e}"
