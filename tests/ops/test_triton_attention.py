"""The Triton attention kernels, in the interpreter where there is no GPU."""

import pytest
import torch
from numerics import assert_no_worse
from ops.attention_cases import CASES, NAMES, Case, by_autograd, by_torch, draw

from r1kernels import attention_kernels
from r1kernels.attention_kernels import use_kernel
from r1kernels.attention_parts import Bounds, attend, attend_backward, merge
from r1kernels.varlen_attention import varlen_attention

pytest.importorskip("triton", reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's product of bfloat16 is wrong; a GPU is not asked for float32.
DTYPES = [torch.float16, torch.bfloat16 if DEVICE == "cuda" else torch.float32]
CHOSEN = ["uneven", "one head for all", "more keys than queries", "all keys"]
# several blocks of queries and of keys, the last ones partly filled
LONG = Case((50, 3, 21), (71, 40, 21), heads=(4, 2, 24))


@pytest.fixture(autouse=True)
def kernel():
    with use_kernel("triton"):
        yield


def run(case, problem):
    """(out, lse, dquery, dkey, dvalue), the last two on top of ones."""
    bounds = Bounds(*case.offsets)
    query, key, value, dout = problem
    out, lse = attend(query, key, value, bounds, **case.options)
    dkey, dvalue = (torch.ones_like(x, dtype=torch.float32) for x in (key, value))
    dquery = attend_backward(
        dout, query, key, value, out, lse, bounds, dkey=dkey, dvalue=dvalue, **case.options
    )
    return out, lse, dquery, dkey - 1, dvalue - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CHOSEN, "long"])
def test_against_the_definition(name, dtype):
    case = LONG if name == "long" else CASES[name]
    problem = draw(case, dtype, DEVICE)
    found, eager = run(case, problem), by_torch(case, problem)
    truth = by_autograd(case, problem.to(torch.float64))
    for name, x, theirs, exact in zip(NAMES, found, eager, truth, strict=True):
        assert torch.equal(x.isinf(), exact.isinf())
        finite = exact.isfinite()
        x, theirs, exact = (torch.where(finite, y, 0) for y in (x, theirs, exact))
        assert_no_worse(x, theirs, exact, name=name)


def test_parts_over_the_keys_add_up_to_the_whole():
    """Keys before the queries' own, and those: as chunks of a long sequence meet them."""
    case = Case((20, 5), (60, 33), heads=(4, 2, 16))
    problem = draw(case, DTYPES[1], DEVICE)
    query, key, value, dout = problem
    truth = by_autograd(case, problem.to(torch.float64))
    rows = torch.arange(len(key), device=DEVICE)
    own = ((rows >= 40) & (rows < 60)) | (rows >= 88)
    parts = [
        (~own, Bounds((0, 20, 25), (0, 40, 68)), False),
        (own, Bounds((0, 20, 25), (0, 20, 25)), True),
    ]
    options = {"scale": case.scale}
    found = [attend(query, key[at], value[at], b, causal=c, **options) for at, b, c in parts]
    out, lse = merge(*found[0], *found[1])
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value))
    for at, bounds, causal in parts:
        dk, dv = torch.zeros_like(dkey[at]), torch.zeros_like(dvalue[at])
        dquery += attend_backward(
            dout, query, key[at], value[at], out, lse, bounds, causal=causal, dkey=dk, dvalue=dv,
            **options,
        )  # fmt: skip
        dkey[at], dvalue[at] = dk, dv
    eager = by_torch(case, problem)
    for name, x, theirs, exact in zip(
        NAMES, (out, lse, dquery, dkey, dvalue), eager, truth, strict=True
    ):
        assert_no_worse(x, theirs, exact, name=name)


def test_any_strides_and_the_same_bits_again():
    case = Case((3, 0, 5), (8, 4, 5), heads=(4, 2, 16))
    problem = draw(case, DTYPES[1], DEVICE)
    spread = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in problem]
    expanded = problem._replace(dout=problem.dout[:1, :1, :1].expand_as(problem.dout))
    plain = expanded._replace(dout=expanded.dout.contiguous())
    first = run(case, problem)
    for x, *others in zip(
        first, run(case, problem), run(case, type(problem)(*spread)), strict=True
    ):
        assert all(torch.equal(x, y) for y in others)
    for x, y in zip(run(case, expanded), run(case, plain), strict=True):
        assert torch.equal(x, y)


def test_it_serves_the_public_function():
    problem = draw(LONG, DTYPES[1], DEVICE)
    inputs = [x.requires_grad_() for x in problem[:3]]
    cu, cu_key = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in LONG.offsets)
    found = []
    for name in ("triton", "tiled"):
        with use_kernel(name):
            out = varlen_attention(*inputs, cu, cu_seqlens_key=cu_key)
            found.append((out, *torch.autograd.grad(out, inputs, problem.dout)))
    near = 1e-4 if DEVICE == "cpu" else 3e-2
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=near, atol=near)


def test_it_runs_by_name_only_and_says_why_it_cannot():
    problem = draw(CASES["short"], DTYPES[1], DEVICE)
    rule = attention_kernels.Rule(1.0, None, None)
    bounds = Bounds(*CASES["short"].offsets)
    with use_kernel(None):
        chosen = attention_kernels.choose(problem.query, bounds, rule)
        assert chosen.forward.__module__ == "r1kernels.attention_kernels"
    for name in ("window", "softcap"):
        with pytest.raises(RuntimeError, match="no Triton attention: no window and no softcap"):
            run(CASES[name], draw(CASES[name], DTYPES[1], DEVICE))
    with pytest.raises(RuntimeError, match=r"dtype is torch\.float64"):
        run(CASES["short"], draw(CASES["short"], torch.float64, DEVICE))
    wide = Case((3,), None, heads=(1, 1, 264))
    with pytest.raises(RuntimeError, match="heads are 264 wide, 256 at most"):
        run(wide, draw(wide, DTYPES[1], DEVICE))
    with pytest.raises(ValueError, match="unknown attention kernel 'fast'"):
        use_kernel("fast")
