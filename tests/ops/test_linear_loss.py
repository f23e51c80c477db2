import pytest
import torch

from r1kernels import linear_loss
from r1kernels.check import IGNORE
from r1kernels.head_contract import Gradients
from tests.numerics import assert_no_worse, relative_error
from tests.ops.head_cases import eager, leaves, make


def loss_of(logp, entropy, rows):
    """Bounded, not linear, different for every row."""
    return torch.tanh(logp / 4) * (1 + rows.to(logp.dtype) / 7) - 0.1 * entropy


@pytest.mark.parametrize("options", ["entropy", "all"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_no_worse_than_eager(backend, options, workspace):
    case = make((33, 24, 290 if backend == "triton" else 9000), torch.float32, options)
    counted = (case.targets != IGNORE).nonzero().squeeze(1)

    def by_hand(inputs):
        out = eager(inputs[0], inputs[1], case.targets, bias=inputs[2], **case.options)
        return loss_of(out.logp[counted], out.entropy[counted], counted).sum()

    sets = leaves(case), leaves(case), leaves(case.to(torch.float64))
    ours = linear_loss(
        sets[0][0],
        sets[0][1],
        case.targets,
        loss_of,
        bias=sets[0][2],
        workspace_mb=workspace,
        **case.options,
    )
    losses = ours, by_hand(sets[1]), by_hand(sets[2])
    assert_no_worse(*losses, name="loss")
    grads = [
        torch.autograd.grad(3 * x, [g for g in s if g is not None])
        for x, s in zip(losses, sets, strict=True)
    ]
    for name, d, e, t in zip(("dhidden", "dweight", "dbias"), *grads, strict=False):
        assert_no_worse(d, e, t, name=name)


def test_fn_sees_every_counted_row_once(backend):
    case = make((33, 24, 9000 if backend != "triton" else 290), torch.float32, "plain")
    seen = []

    def fn(logp, entropy, rows):
        assert entropy is None
        seen.append(rows)
        return -logp

    linear_loss(case.hidden, case.weight, case.targets, fn, workspace_mb=1)
    assert torch.equal(torch.cat(seen), (case.targets != IGNORE).nonzero().squeeze(1))


def test_cross_entropy_is_torchs(backend):
    case = make((33, 24, 290), torch.float32, "plain")
    hidden, weight, _ = leaves(case)
    count = (case.targets != IGNORE).sum()
    ours = linear_loss(hidden, weight, case.targets, lambda logp, entropy, rows: -logp / count)
    theirs = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, case.targets, ignore_index=IGNORE
    )
    assert relative_error(ours, theirs) < 1e-6
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(theirs, (hidden, weight)),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


def test_constant_loss_has_no_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    loss = linear_loss(
        hidden,
        weight,
        torch.zeros(5, dtype=torch.int64),
        lambda logp, entropy, rows: torch.ones_like(rows, dtype=torch.float32),
    )
    assert loss.item() == 5
    assert not any(d.any() for d in torch.autograd.grad(loss, (hidden, weight)))


def test_without_gradients_there_are_no_gradient_products(monkeypatch):
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    wanted = []
    zeros = Gradients.zeros
    monkeypatch.setattr(
        Gradients, "zeros", lambda head, *needs: wanted.append(needs) or zeros(head, *needs)
    )
    arguments = hidden, weight, torch.zeros(5, dtype=torch.int64), lambda logp, entropy, rows: -logp
    with torch.no_grad():
        linear_loss(*arguments)
    linear_loss(*arguments)
    assert wanted == [(False,) * 5, (True, True, False, False, False)]


def test_fn_must_return_one_loss_per_token():
    with pytest.raises(ValueError, match="fn must return one loss per token"):
        linear_loss(
            torch.randn(5, 8),
            torch.randn(17, 8),
            torch.zeros(5, dtype=torch.int64),
            lambda logp, entropy, rows: logp.sum(),
        )


def test_fn_closes_over_nothing_that_would_lose_its_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(17, 8)
    targets, value = torch.zeros(5, dtype=torch.int64), torch.randn(5, requires_grad=True)

    def loss(value):
        return linear_loss(hidden, weight, targets, lambda logp, _, rows: -logp * value[rows])

    with pytest.raises(ValueError, match="fn closes over a tensor that requires a gradient"):
        loss(2 * value)
    loss(2 * value.detach()).backward()
    assert hidden.grad.any()
