"""The CUDA backend against float64, one case per process: `on_gpu.py CASE`."""

import sys

import torch
from numerics import assert_no_worse

from r1kernels import linear_logp, token_logp, use_backend
from r1kernels._cuda import token_logp as cuda_rows
from r1kernels.reference.linear_logp import linear_logp as reference_linear
from r1kernels.reference.token_logp import token_logp as reference_token

DEVICE = "cuda"


def gradients(function, leaves, upstream, **options):
    """logp, entropy, lse and the gradients of their weighted sum."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = function(*leaves, **options)
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(out, upstream, strict=True))
    return [*out, *torch.autograd.grad(total, leaves)]


def compare(names, ours, eager, truth):
    for name, x, y, z in zip(names, ours, eager, truth, strict=True):
        assert torch.isfinite(x).all(), name
        assert_no_worse(x, y, z, name=name)


def check_head(T, D, V, softcap=None, bias=False):
    hidden = torch.randn(T, D, device=DEVICE).bfloat16()
    weight = (2 * torch.randn(V, D, device=DEVICE) / D**0.5).bfloat16()
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[0], targets[-1] = V - 1, 0
    shift = torch.randn(V, device=DEVICE).bfloat16() if bias else None
    temperature = torch.rand(T, device=DEVICE) + 0.5
    upstream = torch.randn(3, T, device=DEVICE)

    def call(function, kind):
        def cast(x):
            return None if x is None else x.to(kind)

        return gradients(
            lambda h, w: function(
                h, w, targets, bias=cast(shift), softcap=softcap, logit_scale=0.9, entropy=True,
                temperature=temperature.double() if kind == torch.float64 else temperature,
            ),
            (hidden.to(kind), weight.to(kind)),
            upstream,
        )  # fmt: skip

    with use_backend("cuda"):
        ours = call(linear_logp, torch.bfloat16)
    eager, truth = call(reference_linear, torch.bfloat16), call(reference_linear, torch.float64)
    compare(("logp", "entropy", "lse", "dhidden", "dweight"), ours, eager, truth)


def head():
    check_head(2048, 2048, 32000)
    check_head(1536, 896, 65536, softcap=15.0)


def tails():
    check_head(333, 1000, 50257, bias=True)
    check_head(129, 72, 257, softcap=5.0)


def one_row():
    check_head(1, 128, 1001)


def repeat():
    hidden = torch.randn(3000, 1024, device=DEVICE).bfloat16()
    weight = torch.randn(20011, 1024, device=DEVICE).bfloat16() / 16
    targets = torch.randint(0, 20011, (3000,), device=DEVICE)
    with use_backend("cuda"):
        plain = [linear_logp(hidden, weight, targets, entropy=True) for _ in range(5)]
        kept = linear_logp(hidden.requires_grad_(), weight, targets, entropy=True)
    for other in (*plain[1:], kept):
        for x, y in zip(plain[0], other, strict=True):
            assert torch.equal(x, y.detach())


def rows():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, V, softcap in ((517, 151936, None), (64, 50264, 20.0), (3, 40, None)):
            logits = (4 * torch.randn(T, V, device=DEVICE)).to(dtype)
            targets = torch.randint(0, V, (T,), device=DEVICE)
            targets[T // 2] = -100
            upstream = torch.randn(3, T, device=DEVICE)
            options = dict(targets=targets, temperature=0.7, softcap=softcap, entropy=True)
            with use_backend("cuda"):
                ours = gradients(token_logp, [logits], upstream, **options)
            eager = gradients(reference_token, [logits], upstream, **options)
            truth = gradients(reference_token, [logits.double()], upstream, **options)
            compare(("logp", "entropy", "lse", "dlogits"), ours, eager, truth)


def fused_rows():
    logits = (4 * torch.randn(300, 151936, device=DEVICE)).bfloat16()
    targets = torch.randint(0, 151936, (300,), device=DEVICE)
    upstream = torch.randn(3, 300, device=DEVICE)
    options = targets, None, 0.0, 1.0
    stats = cuda_rows.fwd(logits, *options, True)
    apart = cuda_rows.bwd(*upstream, logits, *options, *stats, False)
    *again, together = cuda_rows.fwd_bwd(logits, *options, True, *upstream, True)
    assert together.data_ptr() == logits.data_ptr()
    for x, y in zip(stats, again, strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(together.float(), apart.float(), rtol=0.01, atol=1e-6)


def bad_rows():
    logits = torch.randn(6, 5000, device=DEVICE).bfloat16().requires_grad_()
    targets = torch.tensor([3, 5000, -1, -100, 5, 6], device=DEVICE)
    temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 0.5], device=DEVICE)
    with use_backend("cuda"):
        out = token_logp(logits, targets, temperature=temperature, entropy=True)
        (grad,) = torch.autograd.grad(sum(x.sum() for x in out), logits)
    bad = torch.tensor([False, True, True, False, True, False], device=DEVICE)
    for x in (*out, grad):
        assert x[bad].isnan().all() and x[~bad].isfinite().all()
    assert not out.logp[3] and not grad[3].any()


if __name__ == "__main__":
    torch.manual_seed(0)
    cases = {f.__name__: f for f in (head, tails, one_row, repeat, rows, fused_rows, bad_rows)}
    cases[sys.argv[1]]()
    torch.cuda.synchronize()
