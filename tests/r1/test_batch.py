"""Packing with streams, and the division of a rollout."""

import pytest
import torch

from r1 import batch
from r1.batch import IGNORE, Sample
from r1.types import Completion, Group, Prompt


def sampled(context, tokens, advantage=1.0, live=True):
    logps = tuple(-0.1 * (i + 1) for i in range(tokens))
    numbers = tuple(range(1, context + tokens + 1))
    return Sample(
        tokens=numbers,
        context=context,
        policy=1.0,
        advantage=advantage,
        logp_sampler=logps,
        live=live,
    )


def test_streams_stand_at_the_row_that_predicts_the_token():
    pack = batch.pack([sampled(2, 3, advantage=0.5), sampled(1, 1, advantage=-2.0)])
    assert pack.tokens_T.tolist() == [1, 2, 3, 4, 5, 1, 2]
    assert pack.targets_T.tolist() == [IGNORE, 3, 4, 5, IGNORE, 2, IGNORE]
    assert pack.policy_T.tolist() == [0, 1, 1, 1, 0, 1, 0]
    assert pack.advantages_T.tolist() == [0, 0.5, 0.5, 0.5, 0, -2, 0]
    torch.testing.assert_close(pack.logp_sampler_T, torch.tensor([0, -0.1, -0.2, -0.3, 0, -0.1, 0]))
    assert pack.cu_seqlens.tolist() == [0, 5, 7]
    assert pack.sequence_T.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert pack.num_sequences == 2


def test_components_have_their_own_rows():
    pack = batch.pack([sampled(1, 2), Sample(tokens=(7, 8, 9), context=2, cross_entropy=0.5)])
    assert pack.policy_T.tolist() == [1, 1, 0, 0, 0, 0]
    assert pack.cross_entropy_T.tolist() == [0, 0, 0, 0, 0.5, 0]
    assert pack.targets_T.tolist() == [2, 3, IGNORE, IGNORE, 9, IGNORE]


def test_a_sample_without_completion_has_no_rows():
    pack = batch.pack([sampled(3, 0), sampled(1, 2)])
    assert pack.targets_T.tolist() == [IGNORE, IGNORE, IGNORE, 2, 3, IGNORE]
    assert batch.minibatch_of([sampled(3, 0), sampled(1, 2)], 100).counts["policy_sequences"] == 1


def test_packs_keep_to_the_budget_and_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 60, (200,), generator=generator).tolist()
    samples = [
        Sample(tokens=(index,) * length, cross_entropy=1.0) for index, length in enumerate(lengths)
    ]
    packs = batch.packs_of(samples, 100)
    assert sorted(x for pack in packs for x in set(pack.tokens_T.tolist())) == list(range(200))
    assert all(len(pack.tokens_T) <= 100 for pack in packs)
    assert len(packs) <= 1.1 * sum(lengths) / 100 + 1


def test_each_sample_is_in_exactly_one_minibatch():
    samples = [Sample(tokens=(1, 2, index), context=1, cross_entropy=1.0) for index in range(70)]
    generator = torch.Generator().manual_seed(1)
    parts = batch.minibatches_of(samples, size=16, budget=12, generator=generator)
    sizes = [sum(pack.num_sequences for pack in part.packs) for part in parts]
    assert len(parts) == 5 and sum(sizes) == 70 and max(sizes) - min(sizes) <= 1
    ends = [
        int(pack.tokens_T[end - 1])
        for part in parts
        for pack in part.packs
        for end in pack.cu_seqlens[1:]
    ]
    assert sorted(ends) == list(range(70)) and ends != list(range(70))


def test_samples_without_gradient_are_counted_and_stand_apart():
    samples = [sampled(2, 4), sampled(2, 6, advantage=0.0, live=False), sampled(2, 1)]
    part = batch.minibatch_of(samples, 100)
    assert part.counts == {"policy_tokens": 11, "policy_sequences": 3, "cross_entropy_tokens": 0}
    assert [pack.num_sequences for pack in part.packs] == [2]
    assert [pack.num_sequences for pack in part.idle] == [1]


def answers(prompt, lengths, **options):
    """Samples that go on from one prompt, each with tokens of its own."""
    return [
        Sample(
            tokens=(*prompt, *(100 * index + n for n in range(length))), context=len(prompt),
            policy=1.0, advantage=index - 0.5, logp_sampler=(-1.0 - index,) * length, **options,
        )
        for index, length in enumerate(lengths)
    ]  # fmt: skip


def test_a_pack_of_units_has_a_row_for_every_sampled_token():
    alone = Sample(tokens=(7, 8, 9), context=2, cross_entropy=0.5)
    pack = batch.pack_units([answers((5, 6), [2, 1]), [alone]])
    assert pack.tokens_T.tolist() == [5, 6, 0, 1, 100, 7, 8, 9]
    assert pack.layout.rows.tolist() == [1, 2, 1, 6]
    assert pack.targets_T.tolist() == [0, 1, 100, 9]
    assert pack.policy_T.tolist() == [1, 1, 1, 0]
    assert pack.cross_entropy_T.tolist() == [0, 0, 0, 0.5]
    assert pack.advantages_T.tolist() == [-0.5, -0.5, 0.5, 0]
    assert pack.logp_sampler_T.tolist() == [-1, -1, -2, 0]
    assert pack.sequence_T.tolist() == [0, 0, 1, 2] and pack.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert pack.num_sequences == 3


def test_contexts_are_shared_where_it_pays_and_fit_the_budget():
    long, short = answers(range(50), [20] * 9), answers(range(9), [40, 40])
    units = batch.units_of([*short, *long, *answers((1, 2), [0, 5])], 120)
    # 3 of 50 + 3 x 20 tokens each; a prompt of 9 would save 9 of 98; nothing to predict, no row
    assert sorted(map(len, units)) == [1, 1, 1, 3, 3, 3]
    packs = batch.packs_of([*short, *long], 120, share=True)
    assert max(len(pack.tokens_T) for pack in packs) <= 120
    assert sum(pack.num_sequences for pack in packs) == 11
    assert sum(int((pack.policy_T != 0).sum()) for pack in packs) == 9 * 20 + 2 * 40
    assert sum(pack.layout is not None for pack in packs) == 3
    assert all(pack.layout is None for pack in batch.packs_of([*short, *long], 120))
    assert set(map(len, batch.units_of(answers((1, 2, 3), [4, 5]), 1000))) == {1}
    many = [one for n in range(40) for one in answers((n, 3), [60])]
    assert set(map(len, batch.units_of([*many, *long], 1000))) == {1}


def test_sharing_moves_no_sample_to_another_minibatch():
    samples = [one for n in range(10) for one in answers((n, *range(30)), [3, 4, 5])]
    found = []
    for share in (False, True):
        generator = torch.Generator().manual_seed(1)
        parts = batch.minibatches_of(samples, size=8, budget=1000, generator=generator, share=share)
        logps = [torch.cat([pack.logp_sampler_T for pack in part.packs]) for part in parts]
        found.append([(part.counts, x[x != 0].sort().values.tolist()) for part, x in zip(
            parts, logps, strict=True
        )])  # fmt: skip
        assert any(pack.layout is not None for part in parts for pack in part.packs) == share
    assert found[0] == found[1]


def group(rewards):
    prompt = Prompt("p", "q", "a", "t", tokens=(1, 2, 3))
    completions = [Completion((4, 5), (-0.5, -0.25), "stop", 0) for _ in rewards]
    return Group(prompt, completions, rewards, [{} for _ in rewards])


@pytest.mark.parametrize("keep_zero", [True, False])
def test_samples_of_groups(keep_zero):
    samples = batch.samples_of([group([1.0, 0.0])], [0.7, 0.0], keep_zero=keep_zero)
    assert [sample.advantage for sample in samples] == [0.7, 0.0]
    assert [sample.live for sample in samples] == [True, keep_zero]
    assert samples[0].tokens == (1, 2, 3, 4, 5) and samples[0].context == 3
    assert samples[0].logp_sampler == (-0.5, -0.25)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample(tokens=(1, 2), context=0), "context: expected 1 to 2"),
        (lambda: Sample(tokens=(1, 2, 3), context=1, policy=1.0), "logp_sampler: 0 values for 2"),
        (lambda: batch.pack([]), "samples: expected at least one"),
        (lambda: batch.packs_of([sampled(1, 1)], 0), "max_tokens: expected a positive number"),
        (lambda: batch.pack_units([]), "units: expected at least one"),
        (
            lambda: batch.minibatches_of([sampled(1, 1)], size=0, budget=1, generator=None),
            "size: expected",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
