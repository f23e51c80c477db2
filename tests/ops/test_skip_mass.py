"""`skip_mass`: what is left out of a gradient is what is said, and no more than is said."""

import pytest
import torch

from r1kernels import (
    PolicyObjective,
    batch_invariant,
    linear_loss,
    linear_policy_loss,
    use_backend,
)
from r1kernels.check import IGNORE
from r1kernels.rows import SKIP_TILE
from tests.numerics import relative_l2

T, D, V = 20, 24, 4400
TILES = -(-V // SKIP_TILE)
BOUND = 1e-3
TOKEN = PolicyObjective(surrogate="reinforce")
CU_SEQLENS = torch.tensor([0, 6, 14, 20])
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7, "logit_scale": 1.2},
    "softcap": {"softcap": 20.0},
}


class Problem:
    """Half of the rows peaked at their targets, a row that does not count."""

    def __init__(self):
        self.hidden, self.weight = torch.randn(T, D), torch.randn(V, D) / D**0.5
        self.targets = torch.randperm(V)[:T]
        norms = self.hidden.square().sum(-1, keepdim=True)
        self.weight[self.targets[::2]] = (self.hidden * 18 / norms)[::2]
        self.targets[5] = IGNORE
        self.advantages = torch.tensor([1.0, -0.5, 2.0])

    def run(self, skip_mass: float, objective=TOKEN, advantages=None, **more):
        leaves = [x.clone().requires_grad_() for x in (self.hidden, self.weight)]
        out = linear_policy_loss(
            *leaves,
            self.targets,
            self.advantages if advantages is None else advantages,
            objective,
            cu_seqlens=CU_SEQLENS,
            normalizer=3.0,
            skip_mass=skip_mass,
            **more,
        )
        return out, torch.autograd.grad(out.loss, leaves)

    def truth(self, temperature=1.0, logit_scale=1.0, softcap=None, drop=True):
        """float64: the mass left out of each row, and the gradients without it.

        The coefficients are those of REINFORCE: minus the advantage, over the normalizer.
        """
        hidden, weight = self.hidden.double(), self.weight.double()
        z = (hidden @ weight.T).requires_grad_()
        x = z * logit_scale
        x = (softcap * torch.tanh(x / softcap) if softcap else x) / temperature
        counted = self.targets != IGNORE
        target = torch.where(counted, self.targets, 0)[:, None]
        logp = torch.log_softmax(x, -1)
        g = self.advantages.repeat_interleave(CU_SEQLENS.diff()) * counted
        coefficient = -g.double() / 3.0
        dz = torch.autograd.grad((logp.gather(1, target)[:, 0] * coefficient).sum(), z)[0]
        p = logp.detach().exp().scatter(1, target, 0.0)
        mass = torch.stack([part.sum(1) for part in p.split(SKIP_TILE, 1)], 1)
        skip = (mass < BOUND).scatter(1, target // SKIP_TILE, False) & counted[:, None]
        # Far enough from the bound for every rounding.
        assert ((mass / BOUND).log().abs() > 1e-2)[counted].all()
        if drop:
            for tile, part in enumerate(dz.split(SKIP_TILE, 1)):
                part.masked_fill_(skip[:, tile, None], 0.0)
        return (mass * skip).sum(1), coefficient, dz, (dz @ weight, dz.T @ hidden)


@pytest.fixture
def problem():
    return Problem()


@pytest.mark.parametrize("options", OPTIONS)
def test_leaves_out_what_it_says(backend, problem, options):
    more = OPTIONS[options]
    dropped, *_, truth = problem.truth(**more)
    out, grads = problem.run(BOUND, **more)
    assert 3 < int((dropped > 0).sum()) < T  # rows of both kinds
    if not (backend == "triton" and "softcap" in more):  # there it is the mass times the slope
        torch.testing.assert_close(out.dropped.double(), dropped, rtol=2e-3, atol=1e-9)
    assert bool((out.dropped <= BOUND * TILES).all()) and float(out.dropped[5]) == 0.0
    for grad, expected in zip(grads, truth, strict=True):
        assert relative_l2(grad, expected) < 1e-5
    exact, _ = problem.run(0.0, **more)
    assert torch.equal(out.loss, exact.loss) and torch.equal(out.logp, exact.logp)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_error_is_within_the_bound(problem, options):
    """In every backend the gradients are those of the truth above; here its own bound holds."""
    more = OPTIONS[options]
    dropped, coefficient, kept, _ = problem.truth(**more)
    *_, exact, _ = problem.truth(**more, drop=False)
    scale = more.get("logit_scale", 1.0) / more.get("temperature", 1.0)
    lost = (kept - exact).abs().sum(1)
    assert bool((lost <= coefficient.abs() * scale * dropped * (1 + 1e-9)).all()) and lost.any()
    at = problem.targets != IGNORE
    rows = torch.arange(T)[at]
    assert torch.equal(kept[rows, problem.targets[at]], exact[rows, problem.targets[at]])


def test_a_bound_that_leaves_nothing_out_changes_no_bit(backend, problem):
    out, grads = problem.run(1e-30)
    exact, expected = problem.run(0.0)
    assert exact.dropped is None and not out.dropped.any()
    assert torch.equal(out.loss, exact.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_rows_without_a_coefficient_have_nothing_to_leave_out(backend, problem):
    problem.advantages[:2] = 0.0
    dropped, *_, truth = problem.truth()
    out, grads = problem.run(BOUND)
    assert not out.dropped[:14].any()
    torch.testing.assert_close(out.dropped[14:].double(), dropped[14:], rtol=2e-3, atol=1e-9)
    for grad, expected in zip(grads, truth, strict=True):
        assert relative_l2(grad, expected) < 1e-5


def test_two_passes_agree_with_one(backend, problem):
    objective = PolicyObjective.gspo()
    one, grads = problem.run(BOUND, objective, workspace_mb=8)
    two, again = problem.run(BOUND, objective, workspace_mb=1)
    with use_backend("reference"):
        _, expected = problem.run(BOUND, objective)
    torch.testing.assert_close(one.dropped, two.dropped, rtol=1e-3, atol=1e-9)
    assert one.dropped.any()
    for a, b, c in zip(grads, again, expected, strict=True):
        assert relative_l2(a, b.double()) < 1e-5 and relative_l2(a, c.double()) < 1e-5


def test_low_rank_term_and_bias(problem):
    generator = torch.Generator().manual_seed(1)
    lora = [torch.randn(*size, generator=generator) * 0.1 for size in ((2, D), (V, 2))]
    bias = torch.randn(V, generator=generator) * 0.1

    def run() -> list:
        inputs = [x.clone().requires_grad_() for x in (problem.hidden, *lora, bias)]
        hidden, a, b, c = inputs
        out = linear_policy_loss(
            hidden, problem.weight, problem.targets, problem.advantages, TOKEN,
            lora=(a, b, 0.5), bias=c, cu_seqlens=CU_SEQLENS, skip_mass=BOUND,
        )  # fmt: skip
        return [out.dropped, *torch.autograd.grad(out.loss, inputs)]

    with use_backend("reference"):
        expected = run()
    assert expected[0].any()
    for a, b in zip(run(), expected, strict=True):
        assert relative_l2(a, b.double()) < 1e-4


def test_own_loss(backend, problem):
    def run(skip_mass: float) -> torch.Tensor:
        hidden = problem.hidden.clone().requires_grad_()
        loss = linear_loss(
            hidden, problem.weight, problem.targets, lambda logp, *_: -logp, skip_mass=skip_mass
        )
        return torch.autograd.grad(loss, hidden)[0]

    lost = (run(BOUND) - run(0.0)).abs().sum(1)
    widest = problem.weight.abs().sum(1).max()
    assert lost.any() and bool((lost <= BOUND * TILES * widest + 1e-5).all())


@pytest.mark.parametrize(
    ("skip_mass", "objective", "error", "match"),
    [
        (-0.1, TOKEN, ValueError, r"skip_mass must lie in \[0, 1\), got -0.1"),
        (1.0, TOKEN, ValueError, "skip_mass must lie"),
        (float("nan"), TOKEN, ValueError, "skip_mass must lie"),
        ("all", TOKEN, TypeError, "skip_mass must be a number"),
        (0.1, PolicyObjective(entropy_coef=0.1), ValueError, "gradient of the entropy"),
    ],
)
def test_bad_input(problem, skip_mass, objective, error, match):
    with pytest.raises(error, match=match):
        problem.run(skip_mass, objective)


def test_refused_beside_an_entropy_and_under_batch_invariant(problem):
    given = problem.hidden, problem.weight, problem.targets, lambda logp, entropy, rows: logp
    with pytest.raises(ValueError, match="gradient of the entropy"):
        linear_loss(*given, entropy=True, skip_mass=0.1)
    with batch_invariant(), pytest.raises(ValueError, match="skip_mass does not go with batch_in"):
        problem.run(0.1)
