import dataclasses
import itertools
import math

import pytest
import torch
from numerics import assert_no_worse

from r1kernels.objective import CHOICES, PolicyObjective
from r1kernels.policy_inputs import prepare
from r1kernels.policy_loss import policy_loss
from r1kernels.policy_terms import METRICS, PolicyInputs, policy_terms
from r1kernels.reference.policy_loss import policy_loss as reference

PRESETS = {
    "grpo": PolicyObjective.grpo(kl_coef=0.04),
    "dr_grpo": PolicyObjective.dr_grpo(length=7),
    "dapo": PolicyObjective.dapo(),
    "bnpo": PolicyObjective.bnpo(),
    "gspo": dataclasses.replace(PolicyObjective.gspo(), clip_low=0.1, clip_high=0.2),
    "cispo": PolicyObjective.cispo(1.5),
    "sapo": PolicyObjective.sapo(),
    "rloo": PolicyObjective.rloo(),
    "kimi": PolicyObjective.kimi(0.3),
    "r1": PolicyObjective.r1(),
}
EVERYTHING = PolicyObjective(
    ratio_level="sequence",
    clip_max=1.6,
    kl_coef=0.2,
    kl_ratio_corrected=True,
    sampler_correction="sequence_truncate",
    entropy_coef=0.1,
    top_entropy_quantile=0.6,
    off_policy_threshold=0.1,
    aggregation="seq_mean_token_mean",
)
LENGTHS = [5, 1, 0, 7, 4]
PER_TOKEN = ("logp_old", "logp_ref", "logp_sampler", "entropy", "mask", "weights")


def random_call(seed=0, dtype=torch.float64, lengths=LENGTHS, spread=0.4):
    """Packed arguments of every kind; ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)

    def normal():
        return torch.randn(T, generator=generator, dtype=torch.float64)

    logp = -normal().abs() - 3
    return {
        "logp": logp.to(dtype),
        "advantages": normal().to(dtype),
        "logp_old": (logp + spread * normal()).to(dtype),
        "logp_ref": (logp + spread * normal()).to(dtype),
        "logp_sampler": (logp + spread * normal()).to(dtype),
        "entropy": normal().abs().to(dtype),
        "mask": torch.rand(T, generator=generator) > 0.2,
        "weights": (0.5 + torch.rand(T, generator=generator, dtype=torch.float64)).to(dtype),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)]),
    }


def evaluate(function, objective, call, upstream=1.0):
    """The loss, its gradients by logp and by entropy (None where unused), and the metrics."""
    call = dict(call)
    leaves = [call["logp"].detach().requires_grad_(), call["entropy"].detach().requires_grad_()]
    call["logp"], call["entropy"] = leaves
    out = function(objective=objective, **call)
    if not out.loss.requires_grad:
        return out.loss.detach(), [None, None], out
    grads = torch.autograd.grad(out.loss * upstream, leaves, allow_unused=True)
    return out.loss.detach(), grads, out


def close(out, expected, tolerance=1e-12):
    return torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


def assert_same(a, b, tolerance=1e-12):
    (loss_a, grads_a, _), (loss_b, grads_b, _) = a, b
    close(loss_a, loss_b, tolerance)
    for grad_a, grad_b in zip(grads_a, grads_b, strict=True):
        zero = torch.zeros_like(grads_a[0])
        close(zero if grad_a is None else grad_a, zero if grad_b is None else grad_b, tolerance)


def variants(surrogate, level, correction):
    """KL and masks crossed; every aggregation comes up."""
    kls = [(0.0, "k3", False)]
    kls += [(0.3, k, corrected) for k in CHOICES["kl_estimator"] for corrected in (False, True)]
    masks = [
        {},
        {"top_entropy_quantile": 0.6, "off_policy_threshold": 0.1},
        {"entropy_coef": 0.2, "top_entropy_quantile": 0.37},
    ]
    aggregations = itertools.cycle(CHOICES["aggregation"])
    for (kl_coef, estimator, corrected), extra in itertools.product(kls, masks):
        aggregation = next(aggregations)
        yield PolicyObjective(
            surrogate=surrogate,
            ratio_level=level,
            clip_low=0.1,
            clip_max=1.3,
            kl_coef=kl_coef,
            kl_estimator=estimator,
            kl_ratio_corrected=corrected,
            sampler_correction=correction,
            sampler_cap=1.4,
            aggregation=aggregation,
            length=9 if aggregation == "seq_mean_token_sum_norm" else None,
            **extra,
        )


GRID = list(
    itertools.product(CHOICES["surrogate"], CHOICES["ratio_level"], CHOICES["sampler_correction"])
)
SURROGATES_AND_LEVELS = list(itertools.product(CHOICES["surrogate"], CHOICES["ratio_level"]))


# Truth


@pytest.mark.parametrize("surrogate, level, correction", GRID)
def test_closed_form_is_the_definitions_autograd(surrogate, level, correction):
    call = random_call()
    for objective in variants(surrogate, level, correction):
        ours = evaluate(policy_loss, objective, call)
        theirs = evaluate(reference, objective, call)
        assert_same(ours, theirs)
        for name, value in theirs[2].metrics.items():
            close(ours[2].metrics[name], value, 1e-10)


# Without cispo: it stops the ratio's gradient, so its gradient is not its value's derivative.
@pytest.mark.parametrize("surrogate, level, correction", [g for g in GRID if g[0] != "cispo"])
def test_gradcheck_of_the_definition(surrogate, level, correction):
    call = random_call(seed=1, lengths=[3, 1, 2])
    for objective in variants(surrogate, level, correction):

        def loss(logp, entropy, objective=objective):
            arguments = call | {"logp": logp, "entropy": entropy}
            return reference(objective=objective, **arguments).loss

        leaves = call["logp"].clone().requires_grad_(), call["entropy"].clone().requires_grad_()
        assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "advantage, ratio, eps, surrogate, derivative",
    [
        (1, 2, 0.2, 1.2, 0),
        (1, 2, 10, 2, 2),
        (1, 12, 10, 11, 0),
        (-1, 0.5, 0.2, -0.8, 0),
        (-1, 12, 10, -12, -12),
        (-1, 0.01, 10, -0.01, -0.01),
        (1, 0.5, 0.2, 0.5, 0.5),
    ],
)
def test_golden_clip_table(advantage, ratio, eps, surrogate, derivative):
    logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    out = policy_loss(
        logp,
        torch.tensor([float(advantage)], dtype=torch.float64),
        PolicyObjective(clip_low=eps, clip_high=eps),
        logp_old=torch.zeros(1, dtype=torch.float64),
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    assert -out.loss.item() == pytest.approx(surrogate, abs=1e-12)
    assert -grad.item() == pytest.approx(derivative, abs=1e-12)


@pytest.mark.parametrize(
    "estimator, values, mean",
    [
        ("k1", [0.223143551, -0.287682072, 0], 0.025267154),
        ("k2", [0.024896522, 0.041380490, 0], 0.024862407),
        ("k3", [0.023143551, 0.045651261, 0], 0.025267154),
    ],
)
def test_golden_kl_estimators(estimator, values, mean):
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    objective = PolicyObjective(kl_coef=1.0, kl_estimator=estimator)
    for weights, expected in [*zip(torch.eye(3), values, strict=True), (policy, mean)]:
        out = policy_loss(
            policy.log(),
            torch.zeros(3),
            objective,
            logp_ref=ref.log(),
            weights=weights,
            normalizer=1,
        )
        assert out.loss.item() == pytest.approx(expected, abs=5e-9)


def test_kimi_is_the_squared_residuals_gradient():
    """X05: sum over answers of -A L + tau/2 (L - L_old)^2, one coefficient for a whole sequence."""
    call = random_call()
    call.update(mask=None, weights=None, advantages=torch.randn(5, dtype=torch.float64))
    logp = call["logp"].clone().requires_grad_()
    parts = zip(logp.split(LENGTHS), call["logp_old"].split(LENGTHS), strict=True)
    L, L_old = (torch.stack(x) for x in zip(*[(a.sum(), b.sum()) for a, b in parts], strict=True))
    loss = (-call["advantages"] * L + 0.3 / 2 * (L - L_old) ** 2).mean()
    (grad,) = torch.autograd.grad(loss, logp)
    ours, grads, _ = evaluate(policy_loss, PolicyObjective.kimi(0.3), call)
    close(ours, loss.detach())
    close(grads[0], grad)


def test_ties_are_not_clipped():
    logp = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64).log().requires_grad_()
    # exp(log(x)) is x to the last bit for these three, so each ratio is exactly its bound.
    assert logp.exp().tolist() == [0.5, 1.5, 2.0]
    out = policy_loss(
        logp,
        torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float64),
        PolicyObjective(clip_low=0.5, clip_high=0.5, clip_max=2.0),
        logp_old=torch.zeros(3, dtype=torch.float64),
        normalizer=1,
    )
    close(torch.autograd.grad(out.loss, logp)[0], torch.tensor([0.5, -1.5, 2.0]).double())
    assert not any(out.metrics[name] for name in ("clip_low", "clip_high", "clip_max"))


# Numerics


@pytest.mark.parametrize("name", [*PRESETS, "everything"])
def test_error_is_at_most_twice_eagers(name):
    objective = (PRESETS | {"everything": EVERYTHING})[name]
    call = random_call(seed=3, dtype=torch.float32, lengths=[40, 3, 80, 1])
    double = {k: x.double() if x.is_floating_point() else x for k, x in call.items()}
    truth, eager, ours = (
        evaluate(function, objective, arguments)
        for function, arguments in ((reference, double), (reference, call), (policy_loss, call))
    )
    assert ours[0].dtype == torch.float32
    assert_no_worse(ours[0], eager[0], truth[0], name="loss")
    for what, out, plain, exact in zip(
        ("dlogp", "dentropy"), ours[1], eager[1], truth[1], strict=True
    ):
        if exact is not None:
            assert_no_worse(out, plain, exact, name=what)


def test_k3_near_zero_keeps_its_digits():
    """exp(x) - x - 1 loses all digits at x = 1e-4 in float32; the value is x^2 / 2."""
    logp = torch.full((1,), -1.0)
    objective = PolicyObjective(kl_coef=1.0)
    out = policy_loss(logp, torch.zeros(1), objective, logp_ref=logp + 2**-13)
    assert out.loss.item() == pytest.approx(2**-27, rel=1e-3)


# Properties


@pytest.mark.parametrize("surrogate, level", SURROGATES_AND_LEVELS)
@pytest.mark.parametrize("given", [False, True])
def test_on_policy_gradient_is_minus_advantage(surrogate, level, given):
    call = random_call(dtype=torch.float32)
    advantages = torch.randn(5)
    objective = PolicyObjective(surrogate=surrogate, ratio_level=level, clip_max=2.0)
    logp = call["logp"].requires_grad_()
    out = policy_loss(
        logp,
        advantages,
        objective,
        logp_old=logp.detach().clone() if given else None,
        mask=call["mask"],
        cu_seqlens=call["cu_seqlens"],
    )
    (grad,) = torch.autograd.grad(out.loss, logp)
    expected = -advantages.repeat_interleave(torch.tensor(LENGTHS)) / call["mask"].sum()
    close(grad, expected * call["mask"], 1e-6)
    assert out.metrics["ratio"] == out.metrics["tokens"]


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
def test_padded_is_packed(objective):
    packed = random_call()
    where = torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)
    padded = {}
    for name, x in packed.items():
        if name != "cu_seqlens":
            fill = False if x.dtype == torch.bool else math.nan
            padded[name] = torch.full((5, 9), fill, dtype=x.dtype)
            padded[name][where] = x
    loss, grads, out = evaluate(policy_loss, objective, padded)
    assert out.logp.shape == (5, 9) and (out.logp[~where] == 0).all()
    assert all(g is None or (g[~where] == 0).all() for g in grads)
    grads = [None if g is None else g[where] for g in grads]
    assert_same((loss, grads, None), evaluate(policy_loss, objective, packed))


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
def test_order_of_sequences_does_not_matter(objective):
    call, order = random_call(), [3, 0, 4, 2, 1]
    starts = call["cu_seqlens"].tolist()
    tokens = torch.tensor([t for b in order for t in range(starts[b], starts[b + 1])])
    moved = {k: x[tokens] for k, x in call.items() if k != "cu_seqlens"}
    moved["cu_seqlens"] = torch.tensor([0, *itertools.accumulate(LENGTHS[b] for b in order)])
    loss, grads, out = evaluate(policy_loss, objective, call)
    grads = [None if g is None else g[tokens] for g in grads]
    assert_same((loss, grads, out), evaluate(policy_loss, objective, moved))


@pytest.mark.parametrize("objective", PRESETS.values())
def test_micro_batches_with_the_global_count_add_up(objective):
    """512 sequences at once, or in 8 calls of 64: the same loss and gradient."""
    lengths = torch.randint(0, 6, (512,)).tolist()
    call = random_call(lengths=lengths)
    count = call["mask"].sum() if objective.counts == "tokens" else 512
    whole = evaluate(policy_loss, objective, call)
    losses, grads = [], []
    for first in range(0, 512, 64):
        begin, end = call["cu_seqlens"][first], call["cu_seqlens"][first + 64]
        part = {k: x[begin:end] for k, x in call.items() if k != "cu_seqlens"}
        part["cu_seqlens"] = call["cu_seqlens"][first : first + 65] - begin
        loss, (grad, _), _ = evaluate(policy_loss, objective, part | {"normalizer": count})
        losses.append(loss)
        grads.append(grad)
    close(torch.stack(losses).sum(), whole[0])
    close(torch.cat(grads), whole[1][0])


@pytest.mark.parametrize("normalizer", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
def test_normalizer_takes_the_place_of_the_count(normalizer):
    call = random_call()
    for name, local in (("dapo", call["mask"].sum()), ("grpo", 5), ("dr_grpo", 5)):
        own = evaluate(policy_loss, PRESETS[name], call)
        other = evaluate(policy_loss, PRESETS[name], call | {"normalizer": normalizer})
        close(other[0] * 3, own[0] * local)


def test_dr_grpo_weighs_every_token_alike():
    """X03: twice as long a wrong answer weighs twice as much."""
    logp = torch.zeros(6, requires_grad=True)
    objective = PolicyObjective.dr_grpo(length=10)
    out = policy_loss(logp, -torch.ones(2), objective, cu_seqlens=torch.tensor([0, 2, 6]))
    close(torch.autograd.grad(out.loss, logp)[0], torch.full((6,), 1 / 20), 1e-7)


@pytest.mark.parametrize("objective", [o for o in PRESETS.values() if o.scope == "token"])
def test_token_scope_terms_of_parts_add_up(objective):
    call = random_call()
    inputs = prepare(
        objective,
        call["logp"].shape,
        call["advantages"],
        device=torch.device("cpu"),
        dtype=torch.float64,
        **{k: call[k] for k in (*PER_TOKEN, "cu_seqlens")},
    )
    whole = policy_terms(objective, call["logp"], inputs)
    parts = []
    for rows in (slice(0, 6), slice(6, 17)):
        cut = PolicyInputs(*(x[rows] if isinstance(x, torch.Tensor) else x for x in inputs))
        parts.append(policy_terms(objective, call["logp"][rows], cut))
    close(parts[0].loss + parts[1].loss, whole.loss)
    close(parts[0].metrics + parts[1].metrics, whole.metrics)
    close(torch.cat([part.dlogp_T for part in parts]), whole.dlogp_T)


def test_zero_advantages_without_kl_give_no_gradient():
    for objective in PRESETS.values():
        if objective.kl_coef or objective.surrogate == "mirror_descent":
            continue
        call = random_call()
        call["advantages"] = torch.zeros(5, dtype=torch.float64)
        loss, grads, out = evaluate(policy_loss, objective, call)
        assert loss == 0 and (grads[0] == 0).all() and out.metrics["active"] == 0


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
def test_upstream_scale_and_repeat(objective):
    call = random_call(dtype=torch.float32)
    one, again = (evaluate(policy_loss, objective, call) for _ in range(2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1][0], again[1][0])
    scaled = evaluate(policy_loss, objective, call, upstream=-4.0)
    for grad, expected in zip(scaled[1], one[1], strict=True):
        assert (grad is None and expected is None) or torch.equal(grad, -4 * expected)


# Edges


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_not_counted_may_hold_anything(objective, poison):
    call = random_call(dtype=torch.float32)
    dirty = {k: x.clone() for k, x in call.items()}
    for name in ("logp", "advantages", *PER_TOKEN):
        if name != "mask":
            dirty[name][~call["mask"]] = poison
    clean, out = evaluate(policy_loss, objective, call), evaluate(policy_loss, objective, dirty)
    assert torch.equal(clean[0], out[0]) and clean[0].isfinite()
    assert torch.equal(clean[1][0], out[1][0])
    assert torch.equal(clean[2].logp, out[2].logp)
    for name in METRICS:
        assert torch.equal(clean[2].metrics[name], out[2].metrics[name]), name


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
def test_a_weight_of_zero_is_not_read_either(objective):
    call = random_call(dtype=torch.float32)
    call["weights"][call["mask"].logical_not()] = 0.0
    for name in ("logp", "advantages", "logp_old", "logp_ref", "logp_sampler", "entropy"):
        call[name][~call["mask"]] = math.nan
    loss, grads, out = evaluate(policy_loss, objective, call | {"mask": None})
    assert loss.isfinite() and (grads[0][~call["mask"]] == 0).all() and grads[0].isfinite().all()
    assert out.metrics["tokens"] == call["mask"].sum()


@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
@pytest.mark.parametrize("lengths", [LENGTHS, [0, 0], []])
def test_nothing_counted_is_a_loss_of_zero(objective, lengths):
    call = random_call(dtype=torch.float32, lengths=lengths)
    call["mask"] = torch.zeros_like(call["mask"])
    for normalizer in (None, torch.tensor(0.0)):
        loss, grads, out = evaluate(policy_loss, objective, call | {"normalizer": normalizer})
        assert loss == 0 and (grads[0] == 0).all()
        assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("surrogate, level", SURROGATES_AND_LEVELS)
@pytest.mark.parametrize("gap", [40.0, -40.0, 1e4, -1e4])
def test_extreme_log_ratios_stay_finite(surrogate, level, gap):
    call = random_call(dtype=torch.float32)
    for name in ("logp_old", "logp_ref", "logp_sampler"):
        call[name] = call["logp"] - gap
    for correction in ("none", "sequence_mask", "token_truncate"):
        objective = PolicyObjective(
            surrogate=surrogate,
            ratio_level=level,
            clip_max=2.0,
            kl_coef=0.1,
            kl_ratio_corrected=True,
            sampler_correction=correction,
            off_policy_threshold=1.0,
        )
        ours = evaluate(policy_loss, objective, call)
        assert ours[0].isfinite() and ours[1][0].isfinite().all()
        assert ours[2].metrics["clamped"] == ours[2].metrics["tokens"] == call["mask"].sum()
        double = {k: x.double() if x.is_floating_point() else x for k, x in call.items()}
        assert_same(
            [x.double() if isinstance(x, torch.Tensor) else x for x in (ours[0],)]
            + [[ours[1][0].double(), None], None],
            evaluate(reference, objective, double),
            2e-5,
        )


def test_a_token_its_sampler_could_not_score_is_not_corrected():
    call = random_call()
    call["logp_sampler"][::3] = math.nan
    filled = call | {
        "logp_sampler": call["logp_sampler"].where(
            call["logp_sampler"].isfinite(), call["logp_old"]
        )
    }
    for correction in CHOICES["sampler_correction"]:
        objective = PolicyObjective(sampler_correction=correction)
        unknown = evaluate(policy_loss, objective, call)
        assert unknown[0].isfinite()
        assert_same(unknown, evaluate(policy_loss, objective, filled))


def test_quantile_keeps_the_tokens_torch_quantile_keeps():
    for share in (0.01, 0.2, 0.5, 0.9):
        call = random_call(seed=5, lengths=[101])
        objective = PolicyObjective(surrogate="reinforce", top_entropy_quantile=share)
        _, grads, out = evaluate(policy_loss, objective, call)
        entropy = call["entropy"][call["mask"]]
        kept = entropy >= torch.quantile(entropy, 1 - share)
        assert torch.equal(grads[0][call["mask"]] != 0, kept)
        assert out.metrics["entropy_dropped"] == (~kept).sum()


def test_second_derivatives_are_refused():
    logp = -torch.rand(4, requires_grad=True)
    loss = policy_loss(logp, torch.ones(4), PolicyObjective()).loss
    with pytest.raises(RuntimeError, match="policy_loss has no second derivative"):
        torch.autograd.grad(loss, logp, create_graph=True)


def test_half_precision_logp_gets_its_gradient_in_its_dtype():
    call = random_call(dtype=torch.bfloat16)
    loss, grads, out = evaluate(policy_loss, EVERYTHING, call)
    assert loss.dtype == out.logp.dtype == torch.float32
    assert grads[0].dtype == grads[1].dtype == torch.bfloat16


def test_metrics_of_a_small_case():
    out = policy_loss(
        torch.tensor([0.5, 1.5, 3.0, 1.0, math.exp(25)]).log(),
        torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0]),
        PolicyObjective(clip_max=2.0, sampler_correction="token_truncate", sampler_cap=1.25),
        logp_old=torch.zeros(5),
        logp_ref=torch.zeros(5),
        logp_sampler=-torch.tensor([1.0, 1.5, 1.25, 0.5, 1.0]).log(),
    )
    metrics = {name: value.item() for name, value in out.metrics.items()}
    expected = {
        "tokens": 5,
        "active": 1,
        "clip_low": 1,
        "clip_high": 1,
        "clip_max": 1,
        "clamped": 1,
        "sampler_capped": 1,
        "sampler_ratio": 1 + 1.25 + 1.25 + 0.5 + 1,
        "ratio": 6.0 + math.exp(20),
        "policy_loss": (0.8 - 1.2 * 1.25 + 2.0 * 1.25 - 0.5) / 5,
        "kl_loss": 0.0,
    }
    assert {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()} == {
        k: metrics[k] for k in expected
    }
    assert tuple(metrics) == METRICS
    assert all(x.dtype == torch.float64 and x.ndim == 0 for x in out.metrics.values())


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"logp": [1.0]}, TypeError, "logp must be a tensor, got list"),
        (
            {"logp": torch.zeros(17, dtype=torch.int64)},
            TypeError,
            "logp must have a floating dtype",
        ),
        (
            {"logp": torch.zeros(1, 1, 17)},
            ValueError,
            r"must be \[T\] or \[B, S\], got \[1, 1, 17\]",
        ),
        (
            {"advantages": torch.zeros(4)},
            ValueError,
            r"advantages must have shape \[5\] \(or \[17\]",
        ),
        ({"logp_old": torch.zeros(16)}, ValueError, r"logp_old must have shape \[17\].*\[16\]"),
        ({"mask": torch.ones(17, 1)}, ValueError, r"mask must have shape \[17\].*\[17, 1\]"),
        ({"logp_ref": torch.zeros(17, device="meta")}, ValueError, "logp_ref must be on cpu"),
        ({"logp_ref": None}, ValueError, "logp_ref is required by kl_coef=0.2"),
        ({"logp_sampler": None}, ValueError, "logp_sampler is required by sampler_correction"),
        ({"entropy": None}, ValueError, "entropy is required by entropy_coef=0.1"),
        ({"cu_seqlens": None}, ValueError, r"cu_seqlens is required for packed tokens \[17\]"),
        ({"cu_seqlens": torch.tensor([0, 16])}, ValueError, "must end at the number of tokens, 17"),
        ({"normalizer": 0}, ValueError, "normalizer must be > 0 and finite, got 0"),
        ({"normalizer": torch.ones(1)}, ValueError, r"normalizer must have shape \[\]"),
        ({"objective": "grpo"}, TypeError, "objective must be a PolicyObjective, got str 'grpo'"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    with pytest.raises(error, match=text):
        policy_loss(**(random_call() | {"objective": EVERYTHING} | change))


# The objective itself


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"surrogate": "ppo"}, "surrogate must be one of 'clip', .*, got 'ppo'"),
        ({"aggregation": "mean"}, "aggregation must be one of .*, got 'mean'"),
        ({"clip_low": -0.1}, "clip_low must be >= 0.0, got -0.1"),
        ({"clip_high": math.nan}, "clip_high must be >= 0.0, got nan"),
        ({"clip_high": "0.2"}, "clip_high must be a number, got '0.2'"),
        ({"clip_max": 0.5}, "clip_max must be >= 1.0 and finite, got 0.5"),
        ({"kl_coef": math.inf}, "kl_coef must be >= 0.0 and finite, got inf"),
        ({"kl_coef": None}, "kl_coef must be a number, got None"),
        ({"kl_ratio_corrected": 1}, "kl_ratio_corrected must be a bool, got 1"),
        ({"sampler_cap": 0}, "sampler_cap must be > 0.0, got 0.0"),
        ({"entropy_coef": math.nan}, "entropy_coef must be .* got nan"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must be > 0.0 and finite, got 0.0"),
        ({"top_entropy_quantile": 1.1}, "top_entropy_quantile must be at most 1, got 1.1"),
        ({"off_policy_threshold": -1}, "off_policy_threshold must be >= 0.0 and finite, got -1.0"),
        ({"mirror_tau": -1.0}, "mirror_tau must be >= 0.0 and finite, got -1.0"),
        ({"sapo_temperature": (1.0, 0.0)}, "sapo_temperature must be > 0.0 and finite, got 0.0"),
        ({"sapo_temperature": 1.0}, "sapo_temperature must be two numbers, got 1.0"),
        ({"surrogate": "cispo"}, "clip_max must be set for surrogate 'cispo', got None"),
        ({"aggregation": "seq_mean_token_sum_norm"}, "length must be set .* got length=None"),
        ({"length": 5}, "length must be set .* only there, got length=5.0"),
    ],
)
def test_bad_fields_are_named(fields, text):
    with pytest.raises(ValueError, match=text):
        PolicyObjective(**fields)


def test_spec_is_one_line_and_exact():
    odd = PolicyObjective(clip_low=0.1 + 0.2, clip_high=math.inf, kl_coef=math.ulp(1.0), clip_max=3)
    for objective in [*PRESETS.values(), EVERYTHING, odd]:
        again = PolicyObjective.from_spec(objective.spec)
        assert again == objective and again.spec == objective.spec and "\n" not in objective.spec
        assert hash(again) == hash(objective)
    assert PolicyObjective.from_spec(odd.spec) is PolicyObjective.from_spec(odd.spec)


def test_replace_recomputes_the_spec():
    changed = dataclasses.replace(PolicyObjective.dapo(), clip_high=0.3)
    assert PolicyObjective.from_spec(changed.spec).clip_high == 0.3


@pytest.mark.parametrize(
    "objective, scope, needs_sequences, counts",
    [
        (PolicyObjective.dapo(), "token", False, "tokens"),
        (PolicyObjective.grpo(), "token", True, "sequences"),
        (PolicyObjective.gspo(), "sequence", True, "sequences"),
        (PolicyObjective(sampler_correction="token_mask"), "token", False, "tokens"),
        (PolicyObjective(sampler_correction="sequence_mask"), "sequence", True, "tokens"),
        (PolicyObjective(off_policy_threshold=0.1), "sequence", True, "tokens"),
        (PolicyObjective(top_entropy_quantile=0.2), "batch", False, "tokens"),
        (EVERYTHING, "batch", True, "sequences"),
    ],
)
def test_scope(objective, scope, needs_sequences, counts):
    assert objective.scope == scope
    assert objective.needs_sequences == needs_sequences
    assert objective.counts == counts


# Compilation


@pytest.mark.parametrize("objective", [PRESETS["dapo"], PRESETS["gspo"], EVERYTHING])
def test_opcheck(objective):
    call = random_call(dtype=torch.float32)
    inputs = prepare(
        objective,
        call["logp"].shape,
        call["advantages"],
        device=torch.device("cpu"),
        **{k: call[k] for k in (*PER_TOKEN, "cu_seqlens")},
    )
    inputs = inputs._replace(entropy_T=inputs.entropy_T.requires_grad_())
    op = torch.ops.r1kernels.policy_loss_fwd.default
    torch.library.opcheck(op, (call["logp"].requires_grad_(), *inputs, objective.spec))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("objective", [PRESETS["grpo"], PRESETS["kimi"], EVERYTHING])
def test_fullgraph(objective, layout):
    call = random_call(dtype=torch.float32, lengths=[4, 4, 4])
    if layout == "padded":
        del call["cu_seqlens"]
        call = {name: x.view(3, 4) for name, x in call.items()}
        call["advantages"] = call["advantages"][:, 0]
    call["normalizer"] = torch.tensor(5.0)
    torch._dynamo.reset()
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    eager, graph = (evaluate(f, objective, call) for f in (policy_loss, compiled))
    assert torch.equal(eager[0], graph[0]) and torch.equal(eager[1][0], graph[1][0])
    for name in METRICS:
        assert torch.equal(eager[2].metrics[name], graph[2].metrics[name]), name


# Devices


def test_no_value_is_read_on_the_host():
    """Tensors without values go all the way through: nothing waits for a device."""
    call = {k: x.to("meta") for k, x in random_call(dtype=torch.float32).items()}
    logp, advantages = call.pop("logp"), call.pop("advantages")
    normalizer = torch.empty((), device="meta")
    for objective in [*PRESETS.values(), EVERYTHING]:
        inputs = prepare(
            objective, logp.shape, advantages, device=logp.device, normalizer=normalizer, **call
        )
        terms = policy_terms(objective, logp, inputs)
        assert terms.loss.shape == () and terms.dlogp_T.shape == logp.shape
        assert terms.metrics.shape == (len(METRICS),) and terms.metrics.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("objective", [*PRESETS.values(), EVERYTHING])
def test_cuda_agrees_with_cpu_without_waiting_and_repeats(objective):
    call = random_call(dtype=torch.float32, lengths=[300, 7, 0, 2000])
    expected = evaluate(policy_loss, objective, call)
    moved = {name: x.cuda() for name, x in call.items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, again = (evaluate(policy_loss, objective, moved) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1][0], again[1][0])
    assert_same(
        (first[0].cpu(), [None if g is None else g.cpu() for g in first[1]], None), expected, 1e-5
    )
