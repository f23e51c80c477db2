"""Under `batch_invariant` a row's bits depend on that row alone."""

import threading

import pytest
import torch

from r1kernels import (
    PolicyObjective,
    batch_invariant,
    linear_logp,
    linear_loss,
    linear_policy_loss,
    policy_loss,
    token_logp,
    use_backend,
)
from r1kernels.backend import is_batch_invariant
from r1kernels.check import IGNORE

# Odd everything: a tail in vocabulary and width, rows of several chunks in 1 MiB.
SHAPES = {"native": (150, 40, 4177), "triton": (48, 40, 75)}
# The interpreter multiplies tiles of 16 rows with numpy, which does not treat the rows of a tile
# alike; a GPU does. There rows keep their place in the tile.
TILE = 1 if torch.cuda.is_available() else 16
OPTIONS = {
    "plain": {},
    "all": {"softcap": 8.0, "logit_scale": 1.3, "entropy": True},
}


@pytest.fixture(params=SHAPES)
def problem(request):
    """Rows, a head, and the backend's name; the backend is in force."""
    with use_backend(request.param):
        try:
            yield Problem(request.param)
        except RuntimeError as error:  # what is not built or not there
            if "no backend runs" not in str(error):
                raise
            pytest.skip(str(error))


class Problem:
    def __init__(self, backend: str):
        T, D, V = SHAPES[backend]
        linear_logp(torch.zeros(1, 4), torch.zeros(5, 4), torch.zeros(1, dtype=torch.int64))
        self.backend, self.T = backend, T
        self.hidden, self.weight, self.bias = torch.randn(T, D), torch.randn(V, D), torch.randn(V)
        self.targets = torch.randint(0, V, (T,))
        self.temperature, self.prior = torch.rand(T) + 0.5, -torch.rand(T)
        self.g = torch.randn(3, T)

    def picks(self) -> list[torch.Tensor]:
        """Rows to be asked for alone: few, many, elsewhere, in another order."""
        step = TILE if self.backend == "triton" else 1
        whole = torch.arange(self.T)
        other = (
            torch.randperm(self.T)
            if step == 1
            else torch.cat([whole[2 * step :], whole[: 2 * step]])
        )
        return [whole[:1], whole[:3], whole[:7], whole[step : step + 19], other[: self.T // 3 * 2]]


def logp(problem: Problem, rows: torch.Tensor, path: str, options: str, mask=None) -> list:
    """logp, entropy, lse and dhidden of some rows by linear_logp."""
    hidden = problem.hidden[rows].requires_grad_(path != "forward")
    weight = problem.weight.clone().requires_grad_(path == "recompute")
    targets = problem.targets[rows]
    out = linear_logp(
        hidden,
        weight,
        targets if mask is None else torch.where(mask, targets, IGNORE),
        bias=problem.bias,
        temperature=problem.temperature[rows],
        prior=problem.prior[rows],
        workspace_mb=1,
        **OPTIONS[options],
    )
    out = [x for x in out if x is not None]
    if path == "forward":
        return out
    # lse would have a frozen head make its logits again.
    used = zip(out[:-1] if path == "frozen" else out, problem.g, strict=False)
    total = sum((x * g[rows]).sum() for x, g in used)
    return [*out, torch.autograd.grad(total, hidden)[0]]


def assert_rows(found: list, whole: list, rows: torch.Tensor, case: str) -> None:
    for place, (a, b) in enumerate(zip(found, whole, strict=True)):
        assert torch.equal(a, b[rows]), f"{case}: result {place} of {len(rows)} rows"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("path", ["forward", "frozen", "recompute"])
def test_rows_of_linear_logp(problem, path, options):
    with batch_invariant():
        whole = logp(problem, torch.arange(problem.T), path, options)
        for rows in problem.picks():
            assert_rows(logp(problem, rows, path, options), whole, rows, path)
        if problem.backend == "native" or TILE == 1:
            # Masked rows leave the others in another place.
            mask = torch.rand(problem.T) < 0.5
            found = logp(problem, torch.arange(problem.T), path, options, mask)
            assert_rows([x[mask] for x in found], whole, mask.nonzero().squeeze(1), "masked")


def test_neighbours_may_hold_anything(problem):
    with batch_invariant():
        whole = logp(problem, torch.arange(problem.T), "frozen", "all")
        problem.hidden[1::2] *= 100
        problem.hidden[3] = torch.nan
        found = logp(problem, torch.arange(problem.T), "frozen", "all")
        even = torch.arange(0, problem.T, 2)
        assert_rows([x[even] for x in found], whole, even, "neighbours")


@pytest.mark.parametrize("name", ["dapo", "sapo", "entropy", "zero", "gspo"])
def test_rows_of_linear_policy_loss(problem, name):
    """Sequences of ten tokens, each the same batch or not; the coefficients are given a divisor of
    their own, and some rows have none."""
    objective = {
        "dapo": PolicyObjective.dapo(),
        "sapo": PolicyObjective.sapo(),
        "entropy": PolicyObjective(entropy_coef=0.1),
        "zero": PolicyObjective.dapo(),
        "gspo": PolicyObjective.gspo(),
    }[name]
    B = problem.T // 10
    advantages = torch.randn(B)
    if name == "zero":
        advantages[torch.arange(B) % 5 != 1] = 0.0
    logp_old = linear_logp(problem.hidden, problem.weight, problem.targets).logp - 0.05

    def run(sequences: torch.Tensor) -> tuple[list, torch.Tensor]:
        rows = (sequences[:, None] * 10 + torch.arange(10)).flatten()
        hidden = problem.hidden[rows].requires_grad_()
        weight = problem.weight.clone().requires_grad_()
        out = linear_policy_loss(
            hidden,
            weight,
            problem.targets[rows],
            advantages[sequences],
            objective,
            logp_old=logp_old[rows],
            cu_seqlens=torch.arange(0, len(rows) + 1, 10),
            normalizer=7.0,
            workspace_mb=1,
        )
        return [out.logp, torch.autograd.grad(out.loss, hidden)[0]], rows

    with batch_invariant():
        whole, _ = run(torch.arange(B))
        assert whole[1].any()
        some = [[0], [0, 1, 2]] + ([[3, 1], [4, 3, 2, 1, 0]] if problem.backend == "native" else [])
        for sequences in some:
            found, rows = run(torch.tensor(sequences))
            assert_rows(found, whole, rows, name)


def test_rows_of_linear_loss(problem):
    def run(count: int) -> torch.Tensor:
        hidden = problem.hidden[:count].requires_grad_()
        loss = linear_loss(
            hidden, problem.weight, problem.targets[:count], lambda logp, *_: logp.exp()
        )
        return torch.autograd.grad(loss, hidden)[0]

    with batch_invariant():
        whole = run(problem.T)
        for count in (1, 3, 20):
            assert torch.equal(run(count), whole[:count])


def test_rows_of_a_sequence_objective_alone_and_in_several_chunks(problem):
    """One pass would do for few rows; it takes p from other sums than a second pass does."""
    objective = PolicyObjective(ratio_level="sequence", aggregation="token_mean")
    each = problem.T // 3

    def run(count: int) -> torch.Tensor:
        hidden = problem.hidden[:count].requires_grad_()
        loss = linear_policy_loss(
            hidden,
            problem.weight,
            problem.targets[:count],
            problem.g[0, :count],
            objective,
            cu_seqlens=torch.arange(0, count + 1, each),
            normalizer=7.0,
            workspace_mb=1,
        ).loss
        return torch.autograd.grad(loss, hidden)[0]

    with batch_invariant():
        assert torch.equal(run(each), run(3 * each)[:each])


@pytest.mark.parametrize("bias", [0.0, 88.7])
def test_padding_rows_add_nothing(bias):
    """exp(88.7) is past float32, and their coefficient of 0 would make that NaN."""
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    hidden, weight = torch.randn(5, 8), (0.01 * torch.randn(50, 8)).requires_grad_()
    with use_backend("native"), batch_invariant():
        out = linear_logp(
            hidden, weight, torch.arange(5), bias=torch.full((50,), bias), entropy=True
        )
        (found,) = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), weight)
    logps = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    entropy = -(logps.exp() * logps).sum()
    (truth,) = torch.autograd.grad(logps.diagonal().sum() + entropy, weight)
    # The bias leaves logits of 16 bits after the point.
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(dtype):
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    with use_backend("native"), batch_invariant():
        problem = Problem("native")
        problem.hidden, problem.weight, problem.bias = (
            x.to(dtype) for x in (problem.hidden, problem.weight, problem.bias)
        )
        whole = logp(problem, torch.arange(problem.T), "recompute", "plain")
        for rows in problem.picks():
            assert_rows(logp(problem, rows, "recompute", "plain"), whole, rows, str(dtype))


def test_rows_of_token_logp(problem):
    logits = problem.hidden @ problem.weight.T

    def run(rows: torch.Tensor) -> list:
        x = logits[rows].requires_grad_()
        out = token_logp(
            x, problem.targets[rows], temperature=problem.temperature[rows], entropy=True
        )
        total = sum((v * g[rows]).sum() for v, g in zip(out, problem.g, strict=True))
        return [*out, torch.autograd.grad(total, x)[0]]

    with batch_invariant():
        whole = run(torch.arange(problem.T))
        for rows in problem.picks():
            assert_rows(run(rows), whole, rows, "token_logp")


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_native_rows_do_not_depend_on_the_number_of_threads(threads):
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    before = torch.get_num_threads()
    with use_backend("native"), batch_invariant():
        problem = Problem("native")
        rows = torch.arange(problem.T)
        torch.set_num_threads(1)
        try:
            alone = logp(problem, rows, "recompute", "all")
            torch.set_num_threads(threads)
            assert_rows(logp(problem, rows[:5], "recompute", "all"), alone, rows[:5], "threads")
            assert_rows(logp(problem, rows, "recompute", "all"), alone, rows, "threads")
        finally:
            torch.set_num_threads(before)


def test_results_are_as_exact_as_without(problem):
    rows = torch.arange(problem.T)
    plain = logp(problem, rows, "recompute", "all")
    with batch_invariant():
        for a, b in zip(logp(problem, rows, "recompute", "all"), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.detach().abs().max()))


def test_a_gemm_that_treats_rows_differently_is_refused(monkeypatch):
    native = pytest.importorskip("r1kernels._native.linear_logp", reason="needs the C++ extension")
    product = torch.mm

    def careless(left, right, **more):
        out = product(left, right, **more)
        out[-1] += 1e-6 * out[-1].abs()
        return out

    with use_backend("native"), batch_invariant():
        problem = Problem("native")
        native._check_rows_alike.cache_clear()
        monkeypatch.setattr(torch, "mm", careless)
        with pytest.raises(RuntimeError, match=r"batch_invariant: .* do not treat all rows alike"):
            logp(problem, torch.arange(5), "forward", "plain")


def test_reference_refuses():
    with (
        use_backend("reference"),
        batch_invariant(),
        pytest.raises(RuntimeError, match="reference: no promise under batch_invariant"),
    ):
        token_logp(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


def test_rows_of_kept_sets(problem):
    """Each row is its own dot products, whatever the switch says."""
    T, V = problem.T, len(problem.weight)
    sets = [
        torch.cat([problem.targets[t : t + 1], torch.randperm(V)[: t % 7 + 1]]) for t in range(T)
    ]

    def run(rows: torch.Tensor) -> list:
        hidden = problem.hidden[rows].requires_grad_()
        ids = [sets[int(t)].unique() for t in rows]
        offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
        out = linear_logp(
            hidden,
            problem.weight,
            problem.targets[rows],
            temperature=problem.temperature[rows],
            entropy=True,
            kept=(torch.cat(ids), offsets),
        )
        total = sum((x * g[rows]).sum() for x, g in zip(out, problem.g, strict=True))
        return [*out, torch.autograd.grad(total, hidden)[0]]

    with batch_invariant():
        whole = run(torch.arange(T))
        for rows in problem.picks():
            assert_rows(run(rows), whole, rows, "kept")


def test_a_low_rank_term_is_refused():
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    lora = torch.zeros(2, 4), torch.zeros(5, 2), 1.0
    with batch_invariant(), pytest.raises(RuntimeError, match="no low-rank term under batch_inv"):
        linear_logp(torch.zeros(1, 4), torch.zeros(5, 4), torch.tensor([0]), lora=lora)


def test_gates_of_a_policy_loss_do_not_depend_on_place():
    logp = torch.randn(101)
    objective = PolicyObjective(surrogate="sapo", aggregation="token_mean")

    def gradient(at: slice) -> torch.Tensor:
        x = logp[at].clone().requires_grad_()
        loss = policy_loss(
            x,
            torch.ones(1),
            objective,
            logp_old=logp[at] - 0.3,
            cu_seqlens=torch.tensor([0, len(x)]),
            normalizer=5.0,
        ).loss
        return torch.autograd.grad(loss, x)[0]

    whole = gradient(slice(0, 101))
    for at in (slice(0, 3), slice(5, 40), slice(64, 101)):
        assert torch.equal(gradient(at), whole[at])


def test_the_switch_nests_and_ends():
    assert not is_batch_invariant()
    with batch_invariant():
        with batch_invariant(False):
            assert not is_batch_invariant()
        assert is_batch_invariant()
    assert not is_batch_invariant()


def test_switches_of_two_threads_may_end_in_any_order():
    entered, leave = threading.Event(), threading.Event()

    def other():
        with batch_invariant(), use_backend("reference"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with batch_invariant():
        thread.start()
        entered.wait()
    assert is_batch_invariant()  # the other block goes on
    leave.set()
    thread.join()
    assert not is_batch_invariant()
