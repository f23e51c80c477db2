"""Offsets beyond 2^31 elements, where a product of tokens and width in int32 would be negative.

On a CPU rows lie far apart in memory that is never touched between them: that proves the offsets
that are made of strides, in torch's kernels too. Only a GPU has room for tensors that are dense.
"""

import pytest
import torch
from numerics import relative_l2

from r1kernels import stream_model, tiled_mlp, varlen_attention

LIMIT = 2**31
# Rows of a dense [T, 4096] of more than 2^31 elements, and how many of the last are looked at.
T, WIDTH, TAIL = 525_312, 4096, 1024


def far(x, dtype):
    """x with rows so far apart that the last begins past 2^31 elements."""
    stride = LIMIT // (len(x) - 1) + 1
    memory = torch.empty((len(x) - 1) * stride + x[0].numel(), dtype=dtype)
    out = memory.as_strided(x.shape, (stride, *x.stride()[1:])).copy_(x)
    assert (len(x) - 1) * out.stride(0) > LIMIT
    return out


def alike(run, *tensors, dtype=torch.bfloat16):
    """run's results and gradients are the same bits, wherever its first arguments lie."""
    found = []
    for place in (lambda x: x.to(dtype), lambda x: far(x, dtype)):
        leaves = [place(x).requires_grad_() for x in tensors]
        out = run(*leaves)
        out.float().square().sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for near, distant in zip(*found, strict=True):
        assert near.abs().max() > 0
        assert torch.equal(near, distant)


def test_rows_of_an_mlp_that_lie_far_apart():
    weights = [torch.randn(n).to(torch.bfloat16) for n in ((40, 16), (40, 16), (16, 40))]
    alike(lambda x: tiled_mlp(x, *weights, tile_rows=3), torch.randn(8, 16))


def test_queries_and_keys_that_lie_far_apart():
    cu_seqlens = torch.tensor([0, 3, 9])
    query, key, value = torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    alike(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens), query, key, value)


def normal(*size):
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


def last_rows_alone(run, x, **alone):
    """(out, dx) of x's last rows within the whole, and by themselves; only they have a gradient."""
    found = []
    for rows, options in ((x, {}), (x[-TAIL:].clone(), alone)):
        leaf = rows.requires_grad_()
        out = run(leaf, **options)
        dout = torch.zeros_like(out)
        dout[-TAIL:] = out[-TAIL:].detach().sign() / 8
        out.backward(dout)
        found.append((out[-TAIL:].detach().clone(), leaf.grad[-TAIL:].clone()))
        assert torch.isfinite(leaf.grad[:TAIL]).all()
        del out, dout, leaf
        torch.cuda.empty_cache()
    return found


def agree(found):
    for whole, alone in zip(*found, strict=True):
        assert alone.float().abs().max() > 0
        # The library may tile other numbers of rows otherwise: a rounding's worth.
        assert relative_l2(whole, alone) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_dense_mlp():
    gate, up, down = normal(256, WIDTH) / 64, normal(256, WIDTH) / 64, normal(WIDTH, 256) / 16
    for weight in (gate, up, down):
        weight.requires_grad_()
    sums = []

    def run(x):
        for weight in (gate, up, down):
            sums.append(weight.grad)
            weight.grad = None
        return tiled_mlp(x, gate, up, down)

    x = normal(T, WIDTH)
    assert x.numel() > LIMIT
    agree(last_rows_alone(run, x))
    # The other rows had no gradient: the weights' is that of the last rows.
    for whole, weight in zip(sums[3:], (gate, up, down), strict=True):
        assert relative_l2(whole, weight.grad) < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_dense_queries():
    """32 heads of 128, sequences of 1024 tokens."""
    key, value = normal(T, 2, 128), normal(T, 2, 128)
    cu_seqlens = torch.arange(0, T + 1, TAIL, dtype=torch.int32)

    def run(query_TD, first=0):
        rows = slice(len(key) - len(query_TD), None)
        offsets = cu_seqlens if not first else torch.tensor([0, TAIL], dtype=torch.int32)
        query = query_TD.view(-1, 32, 128)
        return varlen_attention(query, key[rows], value[rows], offsets).flatten(1)

    x = normal(T, WIDTH)
    assert x.numel() > LIMIT
    agree(last_rows_alone(run, x, first=1))


@pytest.mark.gpu
def test_dense_hidden_states_of_a_streamed_model():
    """One layer of width 4096 on packed sequences of 1024 tokens."""
    # stream_model takes transformers' models; the kernels are tested where it is not installed.
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=128, vocab_size=512, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    streamed = stream_model(model)
    ids = torch.randint(0, 512, (T,), device="cuda")
    assert T * WIDTH > LIMIT
    found, grads = [], []
    for tokens in (ids, ids[-TAIL:]):
        model.zero_grad()
        cu_seqlens = torch.arange(0, len(tokens) + 1, TAIL, dtype=torch.int32)
        hidden = streamed(tokens, cu_seqlens=cu_seqlens)
        dhidden = torch.zeros_like(hidden)
        dhidden[-TAIL:] = hidden[-TAIL:].detach().sign() / 8
        hidden.backward(dhidden)
        found.append((hidden[-TAIL:].detach().clone(),))
        grads.append({name: x.grad.clone() for name, x in model.named_parameters()
                      if x.grad is not None})  # fmt: skip
        del hidden, dhidden
        torch.cuda.empty_cache()
    agree(found)
    for name, whole in grads[0].items():
        assert relative_l2(whole, grads[1][name]) < 4 * torch.finfo(torch.bfloat16).eps, name
