"""One optimizer step: on-policy ratio, accumulation, idle samples, skips, ranks."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1 import batch, model
from r1.batch import Sample
from r1.config import Long, Model, Objective, Optim, Toy
from r1.loss import needs_every_sample, objective_of
from r1.trainer import TooManySkips, Trainer

TOY = Toy(hidden=32, layers=2, heads=2, intermediate=48, max_positions=64)
OPTIM = Optim(lr=1e-3, clip_norm=1.0)


def trainer(seed=0, objective="dapo", optim=OPTIM, **options):
    lm = model.load(Model(path="toy", dtype="float32", toy=TOY), seed=seed)
    return Trainer(lm, optim, 10, objective=objective_of(Objective(preset=objective)), **options)


def samples(count=12, seed=0, advantages=None):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    made = []
    for index in range(count):
        context, length = number(1, 9), number(1, 17)
        tokens = torch.randint(3, 90, (context + length,), generator=generator).tolist()
        logps = (-5 * torch.rand(length, generator=generator)).tolist()
        advantage = 0.5 - number(0, 2) if advantages is None else advantages[index]
        made.append(
            Sample(
                tokens=tokens, context=context, policy=1.0, advantage=advantage, logp_sampler=logps
            )
        )
    return made


def weights(one):
    return torch.cat([param.detach().flatten().clone() for param in one.model.module.parameters()])


def with_old(one, part):
    scores = one.score(part.packs)
    packs = [
        pack.with_logp(old=score.logp_T) for pack, score in zip(part.packs, scores, strict=True)
    ]
    return batch.Minibatch(packs=packs, idle=part.idle, counts=part.counts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("budget", [40, 1000])
def test_the_ratio_of_an_unchanged_policy_is_exactly_one(budget, temperature):
    one = trainer(temperature=temperature)
    part = with_old(one, batch.minibatch_of(samples(), budget))
    metrics = one.step(part)
    assert metrics["tokens"] == part.counts["policy_tokens"]
    assert metrics["ratio"] == metrics["tokens"]
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    assert one.step(part)["ratio"] != metrics["tokens"]


@pytest.mark.parametrize("objective", ["dapo", "grpo", "gspo"])
def test_micro_batches_do_not_change_the_step(objective):
    whole, parts = trainer(objective=objective), trainer(objective=objective)
    before = weights(whole)
    metrics = [
        one.step(with_old(one, batch.minibatch_of(samples(), budget)))
        for one, budget in ((whole, 1000), (parts, 40))
    ]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-5, abs=1e-7)
    assert metrics[0]["grad_norm"] == pytest.approx(metrics[1]["grad_norm"], rel=1e-4)
    moved = (weights(whole) - before).norm()
    assert moved > 0 and (weights(whole) - weights(parts)).norm() < 1e-3 * moved


def test_idle_samples_change_nothing_but_cost():
    """A sample of advantage 0 gives the same step whether it is trained on or left out."""
    advantages = [1.0, 0.0, -1.0, 0.0, 0.5, 0.0]
    kept = samples(6, advantages=advantages)
    left_out = [
        Sample(
            tokens=one.tokens, context=one.context, policy=1.0, advantage=one.advantage,
            logp_sampler=one.logp_sampler, live=one.advantage != 0,
        )
        for one in kept
    ]  # fmt: skip
    results = []
    for chosen in (kept, left_out):
        one = trainer()
        part = with_old(one, batch.minibatch_of(chosen, 1000))
        results.append(
            (one.step(part), weights(one), sum(pack.num_sequences for pack in part.packs))
        )
    assert [count for _, _, count in results] == [6, 3]
    assert results[0][0]["grad_norm"] == pytest.approx(results[1][0]["grad_norm"], rel=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-6)


def grouped(groups=4, size=3, seed=0, **weights):
    """Samples in groups that share their context."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count):
        return torch.randint(3, 90, (count,), generator=generator).tolist()

    made = []
    for index in range(groups):
        context = ids(9 + 4 * index)
        for number in range(size):
            tokens = ids(2 + 3 * number + index)
            logps = (-5 * torch.rand(len(tokens), generator=generator)).tolist()
            made.append(
                Sample(
                    tokens=context + tokens, context=len(context), advantage=number - 0.8,
                    logp_sampler=logps, **weights,
                )
            )  # fmt: skip
    return made


@pytest.mark.parametrize(
    ("objective", "budget", "weights"),
    [
        ("dapo", 70, {"policy": 1.0}),
        ("gspo", 1000, {"policy": 1.0}),
        ("dapo", 1000, {"policy": 1.0, "cross_entropy": 0.3}),
    ],
)
def test_shared_prompts_do_not_change_the_step(objective, budget, weights):
    chosen = [*grouped(**weights), *samples(3)]
    ones, found = [], []
    for share in (False, True):
        one = trainer(objective=objective)
        part = with_old(one, batch.minibatch_of(chosen, budget, share))
        found.append(one.step(part))
        ones.append(one)
    assert any(pack.layout is not None and pack.layout.worth_sharing for pack in part.packs)
    assert found[1]["ratio"] == found[1]["tokens"] == found[0]["tokens"]
    for name in ("loss", "grad_norm", "entropy", "sampler_gap"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7)
    masters = [one.optimizer.masters for one in ones]
    for plain, other in zip(*masters, strict=True):
        torch.testing.assert_close(
            other.grad, plain.grad, rtol=1e-4, atol=1e-5 * float(plain.grad.abs().max())
        )


@pytest.mark.parametrize("save_attention", [False, True])
def test_recomputed_layers_take_shared_prompts(save_attention):
    gradients = []
    for mode in ("plain", "checkpoint"):
        one = trainer()
        one.model.use(mode, Long(save_attention=save_attention))
        part = with_old(one, batch.minibatch_of(grouped(policy=1.0), 1000, share=True))
        assert part.packs[0].layout is not None
        metrics = one.step(part)
        assert metrics["ratio"] == metrics["tokens"]
        gradients.append([param.grad for param in one.optimizer.masters])
    for plain, other in zip(*gradients, strict=True):
        assert (plain - other).abs().max() <= 1e-6 * plain.abs().max()


def test_a_minibatch_without_live_samples_has_gradient_zero():
    one = trainer()
    before = weights(one)
    idle = [
        Sample(
            tokens=s.tokens, context=s.context, policy=1.0, logp_sampler=s.logp_sampler, live=False
        )
        for s in samples(3)
    ]
    metrics = one.step(batch.minibatch_of(idle, 100))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped"] == 0
    assert torch.equal(weights(one), before)


def test_cross_entropy_learns_a_sequence_and_matches_torch():
    one = trainer(optim=Optim(lr=1e-2))
    part = batch.minibatch_of([Sample(tokens=range(20, 50), context=1, cross_entropy=1.0)], 100)
    with torch.no_grad():
        pack = part.packs[0]
        logits = one.model.head.logits(one.model.hidden(pack.tokens_T, pack.cu_seqlens))
        expected = torch.nn.functional.cross_entropy(logits[:-1], pack.tokens_T[1:])
    losses = [one.step(part)["cross_entropy"] for _ in range(10)]
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]


def test_non_finite_steps_are_skipped_counted_and_end_the_run():
    one = trainer(max_skips=2)
    good = batch.minibatch_of(samples(), 1000)
    bad = batch.minibatch_of(samples(3, advantages=[math.inf, 1.0, 1.0]), 1000)
    one.step(good)
    before = weights(one), one.optimizer.state_dict()["step"]
    for _ in range(2):
        assert one.step(bad)["skipped"] == 1
    assert torch.equal(weights(one), before[0]) and one.optimizer.state_dict()["step"] == before[1]
    assert one.step(good)["skipped"] == 0 and one.skipped == 2
    one.step(bad)
    one.step(bad)
    with pytest.raises(
        TooManySkips, match="3 optimizer steps in a row had a loss or gradient that is not finite"
    ):
        one.step(bad)
    assert torch.isfinite(weights(one)).all()


def test_state_repeats_the_next_step_bitwise():
    first = trainer()
    part = batch.minibatch_of(samples(), 60)
    first.step(part)
    second = trainer(seed=1)
    second.model.module.load_state_dict(first.model.module.state_dict())
    # as a file holds it: a live state shares its tensors
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert first.step(part) == second.step(part)
    assert torch.equal(weights(first), weights(second)) and second.updates == 2


def test_objective_of_settings():
    objective = objective_of(Objective(preset="r1", args={"kl_coef": 0.01}, clip_high=0.3))
    assert (objective.kl_coef, objective.clip_low, objective.clip_high) == (0.01, 10.0, 0.3)
    assert needs_every_sample(objective) and not needs_every_sample(
        objective_of(Objective(preset="dapo"))
    )
    with pytest.raises(ValueError, match=r"objective preset 'dr_grpo'.*length"):
        objective_of(Objective(preset="dr_grpo"))


def one_rank(rank, address, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    one = trainer()
    # the ranks hold 4 and 8 samples: a mean of their means would be wrong
    part = batch.minibatch_of(samples()[:4] if rank == 0 else samples()[4:], 1000)
    metrics = one.step(part)
    queue.put((rank, metrics, weights(one).tolist()))
    dist.destroy_process_group()


def test_two_ranks_step_as_one(tmp_path):
    context = mp.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'store'}"
    ranks = [context.Process(target=one_rank, args=(rank, address, queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = sorted(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    alone = trainer()
    metrics = alone.step(batch.minibatch_of(samples(), 1000))
    assert found[0][1] == found[1][1] and found[0][2] == found[1][2]
    assert found[0][1]["tokens"] == metrics["tokens"]
    assert found[0][1]["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-7)
    assert found[0][1]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-4)
    torch.testing.assert_close(torch.tensor(found[0][2]), weights(alone), rtol=0, atol=1e-5)
