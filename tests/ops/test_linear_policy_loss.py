import pytest
import torch

from r1kernels import PolicyObjective, linear_logp, linear_policy_loss, policy_loss
from r1kernels.check import IGNORE
from r1kernels.reference.linear_logp import linear_logp as linear_logp_ref
from r1kernels.reference.policy_loss import policy_loss as policy_loss_ref
from tests.numerics import assert_no_worse, relative_error, relative_l2
from tests.ops.head_cases import DTYPES, eager, supported

OBJECTIVES = {
    "grpo": PolicyObjective.grpo(),
    "r1": PolicyObjective.r1(),
    "dapo": PolicyObjective.dapo(),
    "dr_grpo": PolicyObjective.dr_grpo(16),
    "gspo": PolicyObjective.gspo(),
    "cispo": PolicyObjective.cispo(),
    "sapo": PolicyObjective.sapo(),
    "rloo": PolicyObjective.rloo(),
    "kimi": PolicyObjective.kimi(0.1),
    "entropy": PolicyObjective(entropy_coef=0.1),
    "quantile": PolicyObjective(entropy_coef=0.1, top_entropy_quantile=0.5),
    "sampler": PolicyObjective(sampler_correction="sequence_mask", sampler_cap=1.1),
    "corrected": PolicyObjective(ratio_level="sequence", kl_coef=0.1, kl_ratio_corrected=True),
    "off_policy": PolicyObjective(off_policy_threshold=0.01),
}
# 53 rows that count: chunks of 29 and 24 in a workspace of 1 MiB. (Library GEMMs over one or two
# rows are less exact.)
LENGTHS = (16, 1, 20, 17)


class Problem:
    """Sequences packed into T rows, one without an advantage; a row masked in the middle."""

    def __init__(self, vocab: int, dtype: torch.dtype = torch.float32, width: int = 24):
        T = sum(LENGTHS)
        self.hidden = torch.randn(T, width).to(dtype)
        self.weight = (torch.randn(vocab, width) * 2 / width**0.5).to(dtype)
        self.targets = torch.randint(0, vocab, (T,))
        self.targets[5] = IGNORE
        self.cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
        self.advantages = torch.tensor([1.0, -0.5, 0.0, -1.5])
        base = linear_logp_ref(self.hidden, self.weight, self.targets).logp
        self.streams = {
            "logp_old": base + 0.2 * torch.randn(T),
            "logp_ref": base + 0.1 * torch.randn(T),
        }
        self.streams["logp_sampler"] = self.streams["logp_old"] + 0.05 * torch.randn(T)

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(
            x.to(dtype or x.dtype).detach().clone().requires_grad_()
            for x in (self.hidden, self.weight)
        )

    def fused(self, objective, **more):
        hidden, weight = self.leaves()
        given = {"cu_seqlens": self.cu_seqlens, **self.streams} | more
        out = linear_policy_loss(hidden, weight, self.targets, self.advantages, objective, **given)
        return out, torch.autograd.grad(out.loss, (hidden, weight))

    def composed(self, objective, head, loss, dtype):
        hidden, weight = self.leaves(dtype)
        out = head(hidden, weight, self.targets, entropy=True)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        streams = {name: x.to(wide) for name, x in self.streams.items()}
        found = loss(
            out.logp,
            self.advantages.to(wide),
            objective,
            entropy=out.entropy,
            mask=self.targets != IGNORE,
            cu_seqlens=self.cu_seqlens,
            **streams,
        )
        return found, torch.autograd.grad(found.loss, (hidden, weight))


def vocab_for(backend: str) -> int:
    return 300 if backend == "triton" else 9000


@pytest.mark.parametrize("workspace", ["one chunk", "many"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_worse_than_eager(backend, name, workspace):
    problem = Problem(vocab_for(backend))
    # A megabyte holds 29 rows of 9000 logits; reference keeps three times as much of a row.
    few = 3 if backend == "reference" else 1
    ours, grads = problem.fused(OBJECTIVES[name], workspace_mb=few if workspace == "many" else None)
    plain, plain_grads = problem.composed(OBJECTIVES[name], eager, policy_loss_ref, torch.float32)
    truth, truth_grads = problem.composed(OBJECTIVES[name], eager, policy_loss_ref, torch.float64)
    assert_no_worse(ours.logp, plain.logp, truth.logp, name="logp")
    for what, d, e, t in zip(("dhidden", "dweight"), grads, plain_grads, truth_grads, strict=True):
        assert_no_worse(d, e, t, name=what)
    # The loss sums terms of both signs: its error is measured against them, not their sum.
    assert abs(ours.loss.item() - truth.loss.item()) < 1e-6 * max(1.0, abs(truth.loss.item()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_agrees_with_policy_loss_on_linear_logp(backend, name):
    problem = Problem(vocab_for(backend))
    ours, grads = problem.fused(OBJECTIVES[name], entropy=True)
    composed, composed_grads = problem.composed(
        OBJECTIVES[name], linear_logp, policy_loss, torch.float32
    )
    assert relative_error(ours.loss, composed.loss) < 1e-5
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(grads, composed_grads, strict=True))
    assert ours.metrics.keys() == composed.metrics.keys()
    for metric, value in ours.metrics.items():
        assert value.item() == pytest.approx(composed.metrics[metric].item(), rel=1e-4, abs=1e-5), (
            metric
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("peaked", [False, True], ids=["diffuse", "peaked"])
def test_gradient_of_sixteen_bit_inputs(backend, dtype, peaked):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter's bfloat16 dot product is wrong")
    problem = Problem(vocab_for(backend), DTYPES[dtype], width=64)
    if peaked:
        rows = torch.arange(0, len(problem.targets), 2)
        problem.weight[problem.targets[rows]] = problem.hidden[rows] * 0.3
        base = linear_logp_ref(problem.hidden, problem.weight, problem.targets).logp
        problem.streams = {"logp_old": base + 0.1 * torch.randn_like(base)}
    _, grads = problem.fused(PolicyObjective.grpo())
    _, truth = problem.composed(PolicyObjective.grpo(), eager, policy_loss_ref, torch.float64)
    _, plain = problem.composed(PolicyObjective.grpo(), eager, policy_loss_ref, DTYPES[dtype])
    for d, e, t in zip(grads, plain, truth, strict=True):
        assert relative_l2(d, t) <= 4e-3, f"{relative_l2(d, t):.2e}, eager {relative_l2(e, t):.2e}"


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_ratio_of_an_unchanged_policy_is_exactly_one(backend, objective, workspace):
    problem = Problem(vocab_for(backend))
    for prior in (problem.streams["logp_sampler"], None):
        same = {"prior": prior, "workspace_mb": workspace}
        with torch.no_grad():
            old = linear_logp(problem.hidden, problem.weight, problem.targets, **same).logp
        out, _ = problem.fused(OBJECTIVES[objective], logp_old=old, **same)
        assert torch.equal(out.logp, old)
        assert out.metrics["ratio"].item() == out.metrics["tokens"].item()
        assert not out.metrics["clip_low"].item() and not out.metrics["clip_high"].item()


def test_at_ratio_one_the_gradient_is_that_of_the_advantages(backend):
    problem = Problem(vocab_for(backend))
    hidden, weight = problem.leaves()
    loss = linear_policy_loss(
        hidden,
        weight,
        problem.targets,
        problem.advantages,
        PolicyObjective(aggregation="token_mean"),
        cu_seqlens=problem.cu_seqlens,
    ).loss
    found = torch.autograd.grad(loss, (hidden, weight))
    logp = linear_logp_ref(*(leaves := problem.leaves(torch.float64)), problem.targets).logp
    per_token = problem.advantages.double().repeat_interleave(torch.tensor(LENGTHS))
    expected = torch.autograd.grad(
        -(per_token * logp).sum() / (problem.targets != IGNORE).sum(), leaves
    )
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(found, expected, strict=True))


def test_padded_is_packed(backend):
    problem = Problem(vocab_for(backend))
    S = max(LENGTHS)
    packed, (dhidden, dweight) = problem.fused(OBJECTIVES["r1"])
    pieces = torch.tensor(LENGTHS)
    inside = torch.arange(S)[None] < pieces[:, None]

    def pad(x, fill):
        out = x.new_full((len(LENGTHS), S, *x.shape[1:]), fill)
        out[inside] = x
        return out

    hidden, weight = (
        pad(problem.hidden, torch.nan).requires_grad_(),
        problem.weight.clone().requires_grad_(),
    )
    streams = {name: pad(x, torch.inf) for name, x in problem.streams.items()}
    out = linear_policy_loss(
        hidden,
        weight,
        pad(problem.targets, 0),
        problem.advantages,
        OBJECTIVES["r1"],
        mask=inside,
        **streams,
    )
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert torch.equal(out.loss, packed.loss)
    assert torch.equal(grads[0][inside], dhidden) and torch.equal(grads[1], dweight)
    assert not grads[0][~inside].any() and not out.logp[~inside].any()


def test_rows_without_a_coefficient_get_exactly_no_gradient(backend):
    problem = Problem(vocab_for(backend))
    _, (dhidden, _) = problem.fused(PolicyObjective(clip_low=0.01, clip_high=0.01))
    idle = problem.cu_seqlens[2], problem.cu_seqlens[3]
    assert not dhidden[idle[0] : idle[1]].any() and not dhidden[5].any()
    assert dhidden[:5].any()


def test_gradient_follows_the_upstream_scale(backend):
    problem = Problem(300)
    objective = OBJECTIVES["entropy"]
    _, plain = problem.fused(objective)
    hidden, weight = problem.leaves()
    out = linear_policy_loss(
        hidden,
        weight,
        problem.targets,
        problem.advantages,
        objective,
        cu_seqlens=problem.cu_seqlens,
        **problem.streams,
    )
    scaled = torch.autograd.grad(out.loss * 1024, (hidden, weight))
    assert all(torch.equal(a * 1024, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
@pytest.mark.parametrize("workspace", [None, 1])
def test_loss_scale_keeps_small_float16_gradients(backend, objective, workspace):
    """Each is 1e-7 to 1e-6 before the scale, which float16 has no digits for."""
    problem = Problem(vocab_for(backend), torch.float16)
    given = {"logp_old": None, "normalizer": 2**15, "cu_seqlens": problem.cu_seqlens}
    given["workspace_mb"] = workspace
    leaves = problem.leaves()
    arguments = problem.targets, problem.advantages, OBJECTIVES[objective]
    out = linear_policy_loss(*leaves, *arguments, **given)
    found = torch.autograd.grad(out.loss * 2**13, leaves)
    given["normalizer"] /= 2**13
    out = linear_policy_loss(*leaves, *arguments, **given)
    for a, b in zip(found, torch.autograd.grad(out.loss, leaves), strict=True):
        assert a.dtype == torch.float16 and relative_l2(a, b) < 1e-5


def test_second_derivatives_are_refused():
    problem = Problem(300)
    hidden, weight = problem.leaves()
    arguments = problem.targets, problem.advantages, OBJECTIVES["dapo"]
    out = linear_policy_loss(hidden, weight, *arguments, cu_seqlens=problem.cu_seqlens)
    with pytest.raises(RuntimeError, match="linear_policy_loss has no second derivative"):
        torch.autograd.grad(out.loss**2, hidden, create_graph=True)


def test_only_what_is_needed(backend):
    problem = Problem(300)
    _, (dhidden, dweight) = problem.fused(OBJECTIVES["grpo"])
    for needed, expected in ((0, dhidden), (1, dweight)):
        leaves = [problem.hidden.clone(), problem.weight.clone()]
        leaves[needed].requires_grad_()
        out = linear_policy_loss(
            *leaves,
            problem.targets,
            problem.advantages,
            OBJECTIVES["grpo"],
            cu_seqlens=problem.cu_seqlens,
            **problem.streams,
        )
        assert torch.equal(torch.autograd.grad(out.loss, leaves[needed])[0], expected)


def test_micro_batches_with_a_global_normalizer_add_up(backend):
    problem = Problem(300)
    total = (problem.targets != IGNORE).sum().item()
    whole, (_, dweight) = problem.fused(OBJECTIVES["dapo"])
    loss, grad = 0.0, 0.0
    for i, (start, end) in enumerate(
        zip(problem.cu_seqlens[:-1], problem.cu_seqlens[1:], strict=True)
    ):
        hidden, weight = problem.hidden[start:end].clone(), problem.weight.clone().requires_grad_()
        streams = {name: x[start:end] for name, x in problem.streams.items()}
        lengths = torch.tensor([0, end - start])
        out = linear_policy_loss(
            hidden,
            weight,
            problem.targets[start:end],
            problem.advantages[i : i + 1],
            OBJECTIVES["dapo"],
            cu_seqlens=lengths,
            normalizer=total,
            **streams,
        )
        loss = loss + out.loss
        grad = grad + torch.autograd.grad(out.loss, weight)[0]
    assert relative_error(loss, whole.loss) < 1e-5
    assert relative_error(grad, dweight) < 1e-5


def test_all_masked_and_empty(backend):
    weight = torch.randn(300, 8, requires_grad=True)
    for T in (0, 4):
        hidden = torch.full((T, 8), torch.nan, requires_grad=True)
        out = linear_policy_loss(
            hidden,
            weight,
            torch.full((T,), IGNORE),
            torch.ones(T),
            PolicyObjective(aggregation="token_mean"),
        )
        assert out.loss.item() == 0.0
        assert not any(d.any() for d in torch.autograd.grad(out.loss, (hidden, weight)))


def test_runs_repeat_bitwise(backend):
    problem = Problem(vocab_for(backend))
    (a, ga), (b, gb) = problem.fused(OBJECTIVES["r1"]), problem.fused(OBJECTIVES["r1"])
    assert torch.equal(a.loss, b.loss) and all(
        torch.equal(x, y) for x, y in zip(ga, gb, strict=True)
    )


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"objective": "grpo"}, TypeError, "objective must be a PolicyObjective"),
        (
            {"objective": PolicyObjective.r1(), "logp_ref": None},
            ValueError,
            "logp_ref is required by kl_coef",
        ),
        ({"advantages": torch.ones(2)}, ValueError, "advantages must have shape"),
        ({"advantages": None}, TypeError, "advantages must be a tensor"),
        ({"logp_old": torch.ones(3)}, ValueError, "logp_old must have shape"),
        ({"normalizer": 0.0}, ValueError, "normalizer must be > 0"),
        ({"mask": torch.ones(1)}, ValueError, r"mask must have shape \[54\]"),
        ({"mask": [1]}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(54, device="meta")}, ValueError, "mask must be on cpu"),
        ({"weights": torch.ones(54, device="meta")}, ValueError, "weights must be on cpu"),
        ({"targets": torch.full((54,), 300)}, ValueError, r"targets\[0\] is 300"),
    ],
)
def test_bad_input(change, error, match):
    problem = Problem(300)
    given = {
        "targets": problem.targets,
        "advantages": problem.advantages,
        "objective": PolicyObjective.grpo(),
        "cu_seqlens": problem.cu_seqlens,
    }
    given |= problem.streams | change
    with pytest.raises(error, match=match):
        linear_policy_loss(problem.hidden, problem.weight, **given)


def test_token_of_weight_zero_does_not_exist(backend):
    hidden, weight = torch.randn(6, 8), torch.randn(17, 8).requires_grad_()
    hidden[2] = torch.nan
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    targets, advantages = torch.arange(6), torch.randn(6)
    found = []
    for rows in (torch.arange(6), torch.tensor([0, 1, 3, 4, 5])):
        given = hidden[rows].requires_grad_()
        out = linear_policy_loss(
            given,
            weight,
            targets[rows],
            advantages[rows],
            PolicyObjective(),
            weights=weights[rows],
            normalizer=6.0,
        )
        found.append((out.loss, *torch.autograd.grad(out.loss, (weight, given))))
        assert out.metrics["tokens"] == 5
        assert len(rows) == 5 or out.logp[2] == 0
    assert not found[0][2][2].any()
    for with_it, without in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(with_it, without)
