"""The public op: numerics, gradients one at a time, schema, errors."""

import pytest
import torch
from numerics import assert_no_worse
from ops.attention_cases import CASES, by_autograd, by_torch, draw

from r1kernels import varlen_attention
from r1kernels.reference.attention import attention


def run(case, problem, **more):
    """(out, lse, dquery, dkey, dvalue)."""
    query, key, value = (x.detach().requires_grad_() for x in problem[:3])
    cu = torch.tensor(case.offsets[0], dtype=torch.int32)
    cu_key = None if case.keys is None else torch.tensor(case.offsets[1])
    options = {name: x for name, x in case.options.items() if x is not None}
    out, lse = varlen_attention(
        query, key, value, cu, cu_seqlens_key=cu_key, return_lse=True, **options, **more
    )
    return out, lse, *torch.autograd.grad(out, (query, key, value), problem.dout)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name, dtype):
    case = CASES[name]
    problem = draw(case).to(dtype)
    found = run(case, problem)
    truth = by_autograd(case, problem.to(torch.float64))
    eager = by_torch(case, problem)
    assert [x.dtype for x in (found[0], *found[2:])] == [dtype] * 4
    for at, what in ((0, "out"), (2, "dquery"), (3, "dkey"), (4, "dvalue")):
        if dtype == torch.float64:
            torch.testing.assert_close(found[at], truth[at], rtol=1e-11, atol=1e-12)
        else:
            assert_no_worse(found[at], eager[at], truth[at], name=what)


@pytest.mark.parametrize("name", ["uneven", "more keys than queries", "window, more keys"])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_flow_through_lse_as_well(name, groups):
    case = CASES[name]
    problem = draw(case)
    cu, cu_key = (torch.tensor(x) for x in case.offsets)
    options = {name: x for name, x in case.options.items() if x is not None}
    wanted = []
    for fn in (
        lambda *x: varlen_attention(
            *x, cu, cu_seqlens_key=cu_key, return_lse=True, head_groups=groups, **options
        ),
        lambda *x: attention(*x, *case.offsets, **case.options),
    ):
        for only_lse in (True, False):
            inputs = [x.detach().requires_grad_() for x in problem[:3]]
            out, lse = fn(*inputs)
            loss = (lse * problem.dout[..., 0]).sum()
            if not only_lse:
                loss = loss + (out * problem.dout).sum()
            wanted.append(torch.autograd.grad(loss, inputs[: 2 if only_lse else 3]))
    for ours, truth in zip(wanted[:2], wanted[2:], strict=True):
        for x, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


def test_gradients_one_at_a_time():
    case = CASES["short"]
    problem = draw(case)
    truth = by_autograd(case, problem)
    cu = torch.tensor(case.offsets[0])
    for i in range(3):
        inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate(problem[:3])]
        varlen_attention(*inputs, cu).backward(problem.dout)
        torch.testing.assert_close(inputs[i].grad, truth[2 + i], rtol=1e-11, atol=1e-12)
        assert [x.grad is None for x in inputs].count(True) == 2


def test_strides_and_empty_batches():
    case = CASES["short"]
    problem = draw(case)
    swapped = problem._replace(query=problem.query.permute(2, 0, 1).contiguous().permute(1, 2, 0))
    for x, y in zip(run(case, swapped), run(case, problem), strict=True):
        assert torch.equal(x, y)
    nothing = torch.zeros(0, 4, 16, requires_grad=True)
    for lengths in ([0], [0, 0, 0]):
        out = varlen_attention(nothing, nothing[:, :2], nothing[:, :2], torch.tensor(lengths))
        out.sum().backward()
        assert out.shape == (0, 4, 16) and nothing.grad.shape == (0, 4, 16)


def test_no_second_derivative():
    x = torch.randn(4, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="varlen_attention has no second derivative"):
        out = varlen_attention(x, x, x, torch.tensor([0, 4]))
        torch.autograd.grad(out.sum(), x, create_graph=True)


X = torch.randn(6, 4, 8)
CU = torch.tensor([0, 2, 6])
GOOD = {"query": X, "key": X[:, :2], "value": X[:, :2], "cu_seqlens": CU}


@pytest.mark.parametrize(
    "changed, error, said",
    [
        ({"query": X[0]}, ValueError, r"query must have shape \[tokens, heads, E\]"),
        ({"query": X.long()}, TypeError, "query must be torch.float32 or"),
        ({"key": X[:, :2].double()}, TypeError, "key must be torch.float32 like query"),
        ({"key": X[:, :3], "value": X[:, :3]}, ValueError, "divides query's.* 3 heads"),
        ({"value": X[:, :1]}, ValueError, r"value must have shape \[6, 2, 8\]"),
        ({"key": X[:, :2, :4]}, ValueError, r"key must have shape \[6, 2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "cu_seqlens must not decrease"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "cu_seqlens must end at .* 6, got 5"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "cu_seqlens must start at 0"),
        ({"cu_seqlens": CU.float()}, TypeError, "cu_seqlens must be torch.int32"),
        ({"cu_seqlens_key": CU[:-1]}, ValueError, "cu_seqlens_key must end"),
        ({"cu_seqlens_key": torch.tensor([0, 6])}, ValueError, "cu_seqlens_key must be of as many"),
        ({"cu_seqlens_key": torch.tensor([0, 1, 6])}, ValueError, "2 queries and 1 keys"),
        ({"key": X[:4, :2], "value": X[:4, :2]}, ValueError, "cu_seqlens_key is needed"),
        ({"window": 0}, ValueError, "window must be a positive integer, got 0"),
        ({"window": 3, "causal": False}, ValueError, "window needs causal=True"),
        ({"query": X[:, :0]}, ValueError, "2 heads of 8 for 0 query heads"),
        ({"window": True}, ValueError, "window must be a positive integer, got True"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive and finite, got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
        ({"scale": "0.1"}, TypeError, "scale must be a number, got str '0.1'"),
        ({"head_groups": 0}, ValueError, "head_groups must be a positive integer"),
    ],
)
def test_errors_name_the_argument(changed, error, said):
    with pytest.raises(error, match=said):
        varlen_attention(**GOOD | changed)
