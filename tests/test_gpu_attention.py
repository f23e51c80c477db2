"""Attention on a GPU: the flash kernels beside float64, external sums, memory, 64-bit offsets."""

import pytest
import torch
from numerics import assert_no_worse
from ops.attention_cases import CASES, NAMES, by_autograd, by_torch, draw
from ops.test_attention_parts import run

from r1kernels import attention_kernels, varlen_attention
from r1kernels.attention_parts import Bounds, attend, attend_backward, merge
from r1kernels.reference.attention import attention

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["package", "torch"])
def flash(request, monkeypatch):
    """Both homes of the flash kernels."""
    if request.param == "torch":
        monkeypatch.setattr(attention_kernels, "_flash_attn", lambda: None)
    elif attention_kernels._flash_attn() is None:
        pytest.skip("flash_attn 2.7 or newer is not installed")


def compare(case, problem):
    found = run(case, problem)
    eager = by_torch(case, problem)
    truth = by_autograd(case, draw(case).to(problem.query.dtype).to(torch.float64))
    for name, x, theirs, exact in zip(NAMES, found, eager, truth, strict=True):
        x, theirs = x.cpu(), theirs.cpu()
        assert torch.equal(x.isinf(), exact.isinf()), name
        x, theirs, exact = (y.masked_fill(exact.isinf(), 0) for y in (x, theirs, exact))
        assert_no_worse(x, theirs, exact, name=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_no_worse_than_twice_torchs(name, dtype, flash):
    compare(CASES[name], draw(CASES[name], dtype, "cuda"))


@pytest.mark.parametrize("name", CASES)
def test_float32_on_a_gpu(name):
    compare(CASES[name], draw(CASES[name], torch.float32, "cuda"))


@pytest.mark.parametrize("name", ["long and short", "more keys than queries", "window"])
def test_gradients_flow_through_lse_of_the_flash_kernels(name, flash):
    case = CASES[name]
    problem = draw(case, torch.bfloat16, "cuda")
    weights = draw(case, device="cuda", seed=1).dout[..., 0]
    options = {name: x for name, x in case.options.items() if x is not None}
    cu, cu_key = (torch.tensor(x, dtype=torch.int32) for x in case.offsets)

    def ours(*qkv):
        return varlen_attention(*qkv, cu, cu_seqlens_key=cu_key, return_lse=True, **options)

    def plain(*qkv):
        return attention(*qkv, *case.offsets, **case.options)

    found = []
    for fn, dtype in ((ours, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in problem[:3]]
        out, lse = fn(*inputs)
        loss = (out * problem.dout).sum() + (lse * weights).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for what, *three in zip(NAMES[2:], *found, strict=True):
        assert_no_worse(*(x.cpu() for x in three), name=what)


def test_flash_kernels_are_what_runs():
    for name in ("long and short", "window", "all keys"):
        problem, bounds = draw(CASES[name], torch.bfloat16, "cuda"), Bounds(*CASES[name].offsets)
        rule = attention_kernels.Rule(1.0, CASES[name].window, None)
        assert attention_kernels.choose(problem.query, bounds, rule) is attention_kernels.FLASH


def test_parts_take_the_output_and_sum_of_the_whole(flash):
    """The queries of a chunk: earlier keys, then their own."""
    T, C, H, N, E = 3000, 700, 8, 2, 128
    query, dout = (torch.randn(C, H, E, device="cuda").bfloat16() for _ in range(2))
    key, value = (torch.randn(T, N, E, device="cuda").bfloat16() for _ in range(2))
    whole = Bounds((0, C), (0, T))
    options = {"causal": True, "scale": E**-0.5}
    out, lse = attend(query, key, value, whole, **options)
    dkey, dvalue = (torch.zeros(T, N, E, device="cuda") for _ in range(2))
    inner = {"out": out, "lse": lse, "dkey": dkey, "dvalue": dvalue}
    dquery = attend_backward(dout, query, key, value, bounds=whole, **inner, **options)
    cut = T - C
    parts = [
        (slice(0, cut), Bounds((0, C), (0, cut)), False),
        (slice(cut, T), Bounds((0, C)), True),
    ]
    found = merge(
        *(
            x
            for rows, bounds, causal in parts
            for x in attend(
                query, key[rows], value[rows], bounds, causal=causal, scale=options["scale"]
            )
        )
    )
    assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    dk, dv = torch.zeros_like(dkey), torch.zeros_like(dvalue)
    dq = sum(
        attend_backward(
            dout, query, key[rows], value[rows], out, lse, bounds, causal=causal,
            scale=options["scale"], dkey=dk[rows], dvalue=dv[rows],
        )
        for rows, bounds, causal in parts
    )  # fmt: skip
    for name, x, y in (("dquery", dq, dquery), ("dkey", dk, dkey), ("dvalue", dv, dvalue)):
        assert (x - y).norm() <= 1e-2 * y.norm(), name


def qkv(T, H, N, E):
    sizes = ((T, H, E), (T, N, E), (T, N, E))
    return [torch.randn(x, device="cuda", dtype=torch.bfloat16).requires_grad_() for x in sizes]


def test_a_gpu_is_not_waited_for():
    query, key, value = qkv(512, 4, 2, 64)
    cu = torch.tensor([0, 200, 512], dtype=torch.int32, device="cuda")

    def step():
        varlen_attention(query, key, value, cu, max_seqlen=312).sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_backward_repeats_under_deterministic_algorithms():
    query, key, value = qkv(4096, 4, 2, 64)
    cu = torch.tensor([0, 4096], dtype=torch.int32)
    torch.use_deterministic_algorithms(True)
    try:
        once, again = (
            torch.autograd.grad(varlen_attention(query, key, value, cu).sum(), (query, key, value))
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, once, again))


def test_transients_do_not_grow_with_the_heads():
    """Twice the heads in twice the turns: what the backward takes beyond its results stays."""
    taken = []
    for N in (2, 4):
        query, key, value = qkv(32768, 7 * N, N, 128)
        cu = torch.tensor([0, 32768], dtype=torch.int32)
        out = varlen_attention(query, key, value, cu, head_groups=N)
        dout = torch.randn_like(out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, (query, key, value), dout)
        torch.cuda.synchronize()
        results = sum(x.nbytes for x in grads)
        taken.append(torch.cuda.max_memory_allocated() - before - results)
    assert taken[1] <= 1.1 * taken[0] + 2**24, taken


@pytest.mark.slow
def test_offsets_beyond_int32():
    """More than 2^31 elements of queries; the last sequence is what it is alone."""
    L, B, H, N, E = 4096, 136, 32, 2, 128
    query, key, value = qkv(L * B, H, N, E)
    assert query.numel() > 2**31
    cu = torch.arange(0, L * B + 1, L, dtype=torch.int32)
    out = varlen_attention(query, key, value, cu)
    dout = torch.ones_like(out[-L:])
    upstream = torch.zeros_like(out)
    upstream[-L:] = dout
    grads = torch.autograd.grad(out, (query, key, value), upstream)
    alone = [x[-L:].detach().requires_grad_() for x in (query, key, value)]
    expected = varlen_attention(*alone, cu[:2])
    assert (out[-L:] - expected).norm() <= 1e-3 * expected.norm()
    for x, y in zip(grads, torch.autograd.grad(expected, alone, dout), strict=True):
        assert (x[-L:].float() - y.float()).norm() <= 1e-2 * y.float().norm()
        assert not x[:L].any()
