import math

import pytest
import torch

from r1kernels.advantages import group_advantages
from r1kernels.reference.advantages import group_advantages as reference

MODES = ("std", "mean", "leave_one_out")


def one_group(rewards, **options):
    rewards = torch.tensor(rewards)
    return group_advantages(rewards, torch.zeros(len(rewards), dtype=torch.int64), **options)


def random_groups(seed=0, n=64, groups=9):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randint(0, 3, (n,), generator=generator).float()
    return rewards, torch.randint(0, groups, (n,), generator=generator)


@pytest.mark.parametrize(
    "rewards, ddof, expected",
    [
        ([1.0, 0, 1, 0], 0, {1: 1.0, 0: -1.0}),
        ([1.0, 0, 1, 0], 1, {1: 0.866025404, 0: -0.866025404}),
        ([1.0] * 3 + [0.0] * 13, 0, {1: 2.081665999, 0: -0.480384461}),
        ([1.0] * 3 + [0.0] * 13, 1, {1: 2.015564437, 0: -0.465130255}),
        (
            [2.0, 1, 1, 0, 2, 0, 1, 1, 0, 0, 1, 2, 0, 1, 1, 0],
            0,
            {2: 1.635260, 1: 0.258199, 0: -1.118862},
        ),
        (
            [2.0, 1, 1, 0, 2, 0, 1, 1, 0, 0, 1, 2, 0, 1, 1, 0],
            1,
            {2: 1.583333, 1: 0.25, 0: -1.083333},
        ),
    ],
)
def test_golden_values(rewards, ddof, expected):
    out = one_group(rewards, ddof=ddof, eps=0.0)
    torch.testing.assert_close(
        out, torch.tensor([expected[int(r)] for r in rewards]), rtol=0, atol=5e-7
    )


def test_default_eps_is_added_to_the_deviation():
    assert one_group([1.0, 0.0])[0].item() == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-6), rel=1e-7)


@pytest.mark.parametrize("normalize", MODES)
@pytest.mark.parametrize("ddof", [0, 1])
def test_agrees_with_the_definition(normalize, ddof):
    rewards, ids = random_groups()
    out = group_advantages(rewards, ids * 7919 - 5, normalize=normalize, ddof=ddof)
    expected = reference(rewards, ids, normalize=normalize, ddof=ddof)
    torch.testing.assert_close(out, expected, rtol=2e-7, atol=1e-7)
    assert out.abs().max() > 0.5


@pytest.mark.parametrize("normalize", MODES)
def test_equal_rewards_give_exactly_zero(normalize):
    # The mean of 0.1 seven times is not 0.1 in binary: only max == min sees equality.
    out = one_group([0.1] * 7, normalize=normalize, eps=0.0)
    assert out.tolist() == [0.0] * 7


@pytest.mark.parametrize("normalize", MODES)
def test_a_group_of_one_gets_zero_and_others_are_not_touched(normalize):
    rewards, ids = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([5, 2, 2])
    out = group_advantages(rewards, ids, normalize=normalize)
    assert out[0] == 0 and out[1] == -out[2] and out[1] > 0


@pytest.mark.parametrize("normalize", MODES)
def test_advantages_of_a_group_sum_to_zero(normalize):
    rewards, ids = random_groups(1)
    out = group_advantages(rewards, ids, normalize=normalize).double()
    sums = torch.zeros(9, dtype=torch.float64).index_add(0, ids, out)
    assert sums.abs().max() < 1e-5


def test_population_deviation_gives_squares_that_sum_to_the_group_size():
    out = one_group([0.3, 1.7, 0.2, 0.9, 2.2], ddof=0, eps=0.0).double()
    assert out.square().sum().item() == pytest.approx(5, rel=1e-6)


def test_invariant_to_shift_and_positive_scale():
    rewards, ids = random_groups(2)
    base = group_advantages(rewards, ids, eps=0.0)
    moved = group_advantages(rewards * 4 + 16, ids, eps=0.0)
    torch.testing.assert_close(moved, base, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("normalize", MODES)
def test_order_does_not_matter(normalize):
    rewards, ids = random_groups(3)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    base = group_advantages(rewards, ids, normalize=normalize)
    shuffled = group_advantages(rewards[order], ids[order], normalize=normalize)
    torch.testing.assert_close(shuffled, base[order], rtol=1e-6, atol=1e-7)


def test_leave_one_out_is_reward_less_mean_of_the_others():
    out = one_group([1.0, 2.0, 6.0], normalize="leave_one_out")
    torch.testing.assert_close(out, torch.tensor([-3.0, -1.5, 4.5]))


def test_integer_and_half_rewards():
    ids = torch.tensor([0, 0, 0])
    expected = group_advantages(torch.tensor([1.0, 0.0, 2.0]), ids)
    for dtype in (torch.int64, torch.bfloat16, torch.float64):
        out = group_advantages(torch.tensor([1, 0, 2], dtype=dtype), ids)
        assert out.dtype == torch.float32 and torch.equal(out, expected)


def test_no_rewards():
    out = group_advantages(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert out.shape == (0,) and out.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"rewards must be finite, got .* at index 2"):
        one_group([0.0, 1.0, bad, 0.0])


def test_where_values_are_not_read_nan_stays_in_its_group():
    rewards, ids = torch.tensor([0.0, math.nan, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    out = torch.ops.r1kernels.group_advantages(rewards, ids, "std", 1, 1e-6)
    assert out[:2].isnan().all()
    assert torch.equal(out[2:], group_advantages(rewards[2:], ids[2:]))
    equal = torch.full((2,), math.inf)
    assert torch.ops.r1kernels.group_advantages(equal, ids[:2], "std", 1, 1e-6).isnan().all()


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"rewards": [1.0]}, TypeError, "rewards must be a tensor, got list"),
        ({"rewards": torch.zeros(2, 2)}, ValueError, r"rewards must have shape \[N\].*\[2, 2\]"),
        ({"rewards": torch.zeros(4, dtype=torch.bool)}, TypeError, "rewards must be floating"),
        ({"group_ids": torch.zeros(4)}, TypeError, "group_ids must be torch.int64"),
        (
            {"group_ids": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"group_ids must have shape \[4\].*\[3\]",
        ),
        ({"normalize": "max"}, ValueError, "normalize must be one of.*'max'"),
        ({"ddof": 2}, ValueError, "ddof must be 0 or 1, got 2"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0 and finite, got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, error, text):
    arguments = {"rewards": torch.zeros(4), "group_ids": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        group_advantages(**(arguments | change))


@pytest.mark.parametrize("normalize", MODES)
def test_opcheck_and_fullgraph(normalize):
    rewards, ids = random_groups()
    op = torch.ops.r1kernels.group_advantages.default
    torch.library.opcheck(op, (rewards, ids, normalize, 1, 1e-6))
    compiled = torch.compile(group_advantages, fullgraph=True, backend="aot_eager")
    out = compiled(rewards, ids, normalize=normalize)
    assert torch.equal(out, group_advantages(rewards, ids, normalize=normalize))
