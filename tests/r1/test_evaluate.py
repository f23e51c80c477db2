from itertools import combinations
from statistics import fmean

import pytest

from r1 import evaluate


@pytest.mark.parametrize(
    "n, c, k, expected",
    [
        (64, 13, 1, 0.203125),
        (64, 13, 4, 0.606689582),
        (64, 13, 16, 0.985313974),
        (10, 3, 5, 0.916666667),
        (200, 1, 100, 0.5),
        (5, 0, 3, 0.0),
        (5, 5, 3, 1.0),
    ],
)
def test_codex_pass_at_k_golden(n, c, k, expected):
    assert evaluate.codex_pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_codex_pass_at_k_is_the_mean_over_subsets(k):
    row = [True, False, False, True, False]
    subsets = [any(subset) for subset in combinations(row, k)]
    assert evaluate.codex_pass_at_k(5, 2, k) == pytest.approx(fmean(subsets))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_codex_pass_at_k_refuses(n, c, k):
    with pytest.raises(ValueError, match="pass@k needs"):
        evaluate.codex_pass_at_k(n, c, k)


def test_pass_at_1_is_pass_at_k_of_1():
    correct = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert evaluate.pass_at_1(correct) == pytest.approx(1.75 / 4)
    assert evaluate.pass_at_k(correct, 1) == pytest.approx(evaluate.pass_at_1(correct))


@pytest.mark.parametrize(
    "answers, correct, expected",
    [
        (["4", "4", "5"], [1, 1, 0], 1.0),
        (["4", "5", "5"], [1, 0, 0], 0.0),
        (["4", "5"], [1, 0], 0.5),
        (["4", "5", "6"], [1, 0, 0], 1 / 3),
        (["5", "6"], [0, 0], 0.0),
        ([None, None, "4"], [0, 0, 1], 1.0),
        ([None, None], [0, 0], 0.0),
        # two spellings of the right answer outvote a wrong one
        (["1/2", "0.5", "3", "3", "\\frac12"], [1, 1, 0, 0, 1], 1.0),
        # and so do two spellings of a wrong one
        (["2", "1/4", "0.25"], [1, 0, 0], 0.0),
    ],
)
def test_majority(answers, correct, expected):
    assert evaluate.majority(answers, correct) == pytest.approx(expected)
    assert evaluate.majority(answers[::-1], correct[::-1]) == pytest.approx(expected)


def test_cons_at_k():
    answers, correct = [["4", "4", "5"], ["1", "2", "2"]], [[1, 1, 0], [1, 0, 0]]
    assert evaluate.cons_at_k(answers, correct, 3) == 0.5
    assert evaluate.cons_at_k(answers, correct, 1) == pytest.approx(evaluate.pass_at_1(correct))
    pairs = [
        evaluate.majority([a[i] for i in s], [c[i] for i in s])
        for a, c in zip(answers, correct, strict=True)
        for s in combinations(range(3), 2)
    ]
    assert evaluate.cons_at_k(answers, correct, 2) == pytest.approx(fmean(pairs))
    with pytest.raises(ValueError, match="k=4"):
        evaluate.cons_at_k(answers, correct, 4)


def test_cons_at_k_of_many_subsets_repeats_by_seed():
    answers, correct = [[str(i % 7) for i in range(32)]], [[i % 7 == 0 for i in range(32)]]
    values = [evaluate.cons_at_k(answers, correct, 8, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]


def test_bootstrap_interval():
    correct = [[i % 2 == 0] for i in range(100)]
    low, high = evaluate.bootstrap_ci(correct, resamples=2000)
    # the binomial's own interval is 0.5 +- 0.098
    assert 0.37 < low < 0.44 and 0.56 < high < 0.63
    assert evaluate.bootstrap_ci(correct, resamples=2000) == (low, high)
    assert evaluate.bootstrap_ci([[1], [1]]) == (1.0, 1.0)
    narrow = evaluate.bootstrap_ci(correct, resamples=2000, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_summary_leaves_out_k_beyond_the_samples():
    figures = evaluate.summary([["4", "4"], ["1", "2"]], [[1, 1], [1, 0]], pass_at=(1, 2, 4))
    assert set(figures) == {"pass@1", "pass@1/low", "pass@1/high", "pass@2", "cons@2"}
    assert (figures["pass@1"], figures["pass@2"], figures["cons@2"]) == (0.75, 1.0, 0.75)


@pytest.mark.parametrize("correct, words", [([], "no prompts"), ([[1], []], "prompt 1 has no")])
def test_nothing_to_evaluate(correct, words):
    with pytest.raises(ValueError, match=words):
        evaluate.pass_at_1(correct)
