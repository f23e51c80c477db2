"""stream_model on a GPU: beside float64, bytes of a token, bitwise passes, 64-bit offsets."""

import pytest
import torch
from ops.stream_cases import (
    OFFSETS,
    PROMPTS,
    TOKENS,
    VOCABULARY,
    assert_gradients_no_worse,
    build,
    exact,
    gradients,
    plain,
)

from r1kernels import HostStore, stream_layer, stream_model

pytestmark = pytest.mark.gpu

KINDS = {
    "Llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "Qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 5, "head_dim": 16},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_no_worse_than_eager(kind, dtype):
    model = build(kind, **KINDS[kind]).to("cuda", dtype)
    truth_of, stream = exact(model), stream_model(model, chunk_size=7, store=HostStore())
    dtruth, deager, found = {}, {}, {}
    for draw in range(4):
        tokens = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
        dhidden = torch.randn(TOKENS, 32, device="cuda", dtype=torch.float64)
        dhidden[PROMPTS] = 0
        for grads, module, hidden in (
            (dtruth, truth_of, plain(truth_of, tokens, OFFSETS)),
            (deager, model, plain(model, tokens, OFFSETS)),
            (found, model, stream(tokens, cu_seqlens=OFFSETS.cuda())),
        ):
            parts = gradients(module.base_model, (hidden * dhidden).sum())
            grads |= {(draw, name): x for name, x in parts.items()}
    assert_gradients_no_worse(found, deager, dtruth)


def test_passes_with_and_without_gradients_agree_bitwise():
    model = build("Qwen3", head_dim=64).to("cuda", torch.bfloat16)
    stream = stream_model(model, chunk_size=100)
    tokens = torch.randint(VOCABULARY, (500,), device="cuda")
    hidden = stream(tokens)
    with torch.no_grad():
        again = stream(tokens)
    assert torch.equal(hidden, again)


@pytest.mark.parametrize("store", [False, True], ids=["device", "host"])
def test_bytes_of_a_token(store):
    """6 D + 12 K with inputs on the host; else every layer's input and 2 D + 12 K."""
    D, K, L, peaks = 512, 2 * 64, 4, []
    model = build(
        "Llama", layers=L, hidden_size=D, intermediate_size=3 * D, num_attention_heads=8,
        head_dim=64, max_position_embeddings=2**20,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    for T in (2**15, 2**16):
        stream = stream_model(model, chunk_size=1024, store=HostStore() if store else None)
        tokens = torch.randint(VOCABULARY, (T,), device="cuda")
        dhidden = torch.randn(T, D, device="cuda").bfloat16()
        hidden = stream(tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(hidden, list(model.base_model.parameters()), dhidden)
        held = L * 2 * D * T if not store else 0
        peaks.append(torch.cuda.max_memory_allocated() - before + held)
        del hidden
    slope = (peaks[1] - peaks[0]) / 2**15
    bound = 6 * D + 12 * K if store else 2 * D * L + 2 * D + 12 * K
    assert slope <= 1.05 * bound, f"{slope:.0f} bytes of a token, expected {bound}"


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """129 sequences of 4,096 tokens and a width of 4,096: the last is as it is alone."""
    B, S, D = 129, 4096, 4096
    model = build(
        "Llama", layers=1, hidden_size=D, intermediate_size=256, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=S,
    ).to("cuda", torch.bfloat16)  # fmt: skip
    layer = model.model.layers[0].requires_grad_(False)
    hidden = torch.randn(B * S, D, device="cuda", dtype=torch.bfloat16)
    dy = torch.randn(S, D, device="cuda", dtype=torch.bfloat16)
    cos, sin = (x[0] for x in model.model.rotary_emb(hidden, torch.arange(S, device="cuda")[None]))
    assert hidden.numel() > 2**31

    def run(x, sequences):
        x.requires_grad_(True)
        offsets = torch.arange(sequences + 1) * S
        turns = cos.repeat(sequences, 1), sin.repeat(sequences, 1)
        y = stream_layer(layer, x, turns, offsets, chunk_size=S)
        upstream = torch.zeros_like(y)
        upstream[-S:] = dy
        return y[-S:].detach(), torch.autograd.grad(y, x, upstream)[0][-S:]

    alone = run(hidden[-S:].clone(), 1)
    for ours, theirs in zip(run(hidden, B), alone, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= 2e-2 * theirs.abs().max()
