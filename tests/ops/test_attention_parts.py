"""The attention primitive against autograd of the definition in float64."""

import pytest
import torch
from numerics import assert_no_worse
from ops.attention_cases import CASES, NAMES, Case, by_autograd, by_torch, draw

from r1kernels import attention_kernels, attention_parts
from r1kernels.attention_parts import Bounds, attend, attend_backward, merge

EAGER = {"chosen": by_torch, "tiled": by_autograd}


@pytest.fixture(params=EAGER)
def kernel(request, monkeypatch):
    """The kernel that the machine chooses, beside torch's; and plain torch, beside the same."""
    if request.param == "tiled":
        monkeypatch.setattr(attention_kernels, "choose", lambda *_: attention_kernels.TILED)
    return request.param


def run(case, problem, **options):
    """(out, lse, dquery, dkey, dvalue) of the whole softmax at once."""
    bounds = Bounds(*case.offsets)
    query, key, value, dout = problem
    out, lse = attend(query, key, value, bounds, **case.options)
    wide = attention_kernels.wide(query.dtype)
    dkey, dvalue = (torch.zeros_like(x, dtype=wide) for x in (key, value))
    dquery = attend_backward(
        dout, query, key, value, out, lse, bounds, dkey=dkey, dvalue=dvalue, **case.options,
        **options,
    )  # fmt: skip
    return out, lse, dquery, dkey, dvalue


def assert_equal_infinities(found, truth):
    """Both are -inf at the same places; returns them with 0 there."""
    assert torch.equal(found.isinf(), truth.isinf())
    return found.masked_fill(found.isinf(), 0), truth.masked_fill(truth.isinf(), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype, kernel):
    case = CASES[name]
    problem = draw(case).to(dtype)
    found = run(case, problem)
    eager = EAGER[kernel](case, problem)
    truth = by_autograd(case, problem.to(torch.float64))
    wide = attention_kernels.wide(dtype)
    assert [x.dtype for x in found] == [dtype, *[wide] * 4]
    for name, x, theirs, exact in zip(NAMES, found, eager, truth, strict=True):
        x, exact = assert_equal_infinities(x, exact)
        if dtype == torch.float64:
            torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)
        else:
            theirs = theirs.masked_fill(theirs.isinf(), 0)
            assert_no_worse(x, theirs, exact, name=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_parts_over_the_keys_add_up_to_the_whole(dtype, softcap, kernel):
    """Every key in one of three parts, one of which some sequences have no keys in."""
    case = Case((5, 1, 4), (11, 8, 3), causal=False, heads=(4, 2, 16), softcap=softcap)
    problem = draw(case, dtype)
    query, key, value, dout = problem
    truth = by_autograd(case, problem.to(torch.float64))
    parts = []
    for start, stop in ((0, 3), (3, 8), (8, 11)):
        rows = [
            torch.arange(a + start, max(a + start, min(a + stop, b)))
            for a, b in zip(case.offsets[1][:-1], case.offsets[1][1:], strict=True)
        ]
        keys = torch.tensor([0, *(len(x) for x in rows)]).cumsum(0).tolist()
        parts.append((torch.cat(rows), Bounds(case.offsets[0], keys)))
    out = lse = None
    for rows, bounds in parts:
        found = attend(query, key[rows], value[rows], bounds, **case.options)
        out, lse = found if out is None else merge(out, lse, *found)
    dquery = torch.zeros_like(query)
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    for rows, bounds in parts:
        dk, dv = torch.ones_like(key[rows]), torch.ones_like(value[rows])
        dquery += attend_backward(
            dout, query, key[rows], value[rows], out, lse, bounds, dkey=dk, dvalue=dv,
            **case.options,
        )  # fmt: skip
        # the buffers are added to
        dkey[rows], dvalue[rows] = dk - 1, dv - 1
    eager = EAGER[kernel](case, problem)
    for name, x, theirs, exact in zip(
        NAMES, (out, lse, dquery, dkey, dvalue), eager, truth, strict=True
    ):
        assert_no_worse(x, theirs, exact, name=name)


def test_a_part_without_keys_leaves_the_other_as_it_is():
    out, lse = torch.randn(3, 2, 8), torch.randn(3, 2)
    nothing = torch.zeros(3, 2, 8), torch.full((3, 2), float("-inf"))
    for found in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    both = merge(*nothing, *nothing)
    assert not both[0].any() and both[1].isneginf().all()
    half = merge(out.bfloat16(), lse, *nothing)[0]
    assert torch.equal(half, out.bfloat16())


@pytest.mark.parametrize("name", ["uneven", "more keys than queries", "window, more keys"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_turns_of_heads_change_nothing(name, groups, monkeypatch):
    case = CASES[name]
    problem = draw(case)
    for x, y in zip(run(case, problem), run(case, problem, head_groups=groups), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    monkeypatch.setitem(attention_parts.HEAD_WORKSPACE, "cpu", 1)
    N = case.heads[1]
    assert attention_parts._turns(problem.query, problem.key, None) == [
        (n, n + 1) for n in range(N)
    ]


@pytest.mark.parametrize("window", [None, 5, 60])
def test_tiles_stay_below_their_bound(window, monkeypatch):
    case = Case((70,), (150,), heads=(4, 2, 8), window=window)
    problem = draw(case)
    seen = []
    scores = attention_kernels._scores

    def watch(*args):
        found = scores(*args)
        seen.append(found[0].nbytes)
        return found

    monkeypatch.setattr(attention_kernels, "TILE", 2**15)
    monkeypatch.setattr(attention_kernels, "_scores", watch)
    monkeypatch.setattr(attention_kernels, "choose", lambda *_: attention_kernels.TILED)
    found = run(case, problem)
    assert max(seen) <= 2**15 and len(seen) >= 2 * (3 if window == 5 else 6)
    for x, exact in zip(found, by_autograd(case, problem), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


def test_strided_rows_are_taken_as_they_are():
    """As a fused projection hands them over: query, key and value in one tensor."""
    case = Case((5, 9), None, heads=(2, 2, 16))
    packed = torch.randn(14, 6, 16, dtype=torch.float64)
    problem = draw(case)._replace(query=packed[:, :2], key=packed[:, 2:4], value=packed[:, 4:])
    for x, exact in zip(run(case, problem), by_autograd(case, problem), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


def test_strides_of_zero_are_read_as_such(kernel):
    """As the gradient of a sum is handed over."""
    case = CASES["long and short"]
    problem = draw(case)
    spread = problem._replace(dout=torch.ones((), dtype=torch.float64).expand_as(problem.dout))
    for x, exact in zip(run(case, spread), by_autograd(case, spread), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


def test_a_call_repeats_bitwise(kernel):
    case = CASES["long and short"]
    problem = draw(case, torch.float32)
    for x, y in zip(run(case, problem), run(case, problem), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "query, key, said",
    [
        ((0, 4, 3), None, "must not decrease, got 4 before 3 at 1"),
        ((1, 4), None, "must start at 0"),
        ((0, 4), (0, 2, 4), "as many sequences"),
        ((0, 2, 6), (0, 3, 6), "got 4 queries and 3 keys in sequence 1"),
    ],
)
def test_bad_bounds(query, key, said, kernel):
    x = torch.randn(6, 2, 8)
    with pytest.raises(ValueError, match=said):
        attend(x, x, x, Bounds(query, key), causal=True, scale=1.0)
