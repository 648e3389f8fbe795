"""Paired tests and intervals: beside published values, scipy's, and plain restatements."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, trim_mean

from pipeline.core.scoring.intervals import wilson
from pipeline.core.scoring.paired import (
    compare_means,
    compare_shares,
    mcnemar,
    newcombe,
    paired_bootstrap,
    paired_mean,
    probabilities_of_best,
    resampled_means,
    trimmed_mean,
)

CAVO = (59, 6, 16, 80)
"""Complete response before and after consolidation therapy (Cavo et al. 2012), as Fagerland, Lydersen and Laake have it
in chapter 8 of Statistical Analysis of Contingency Tables."""
BENTUR = (1, 1, 7, 12)
"""Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al. 2009), from there too."""

tables = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


def test_mcnemars_exact_test_of_published_tables() -> None:
    assert mcnemar(CAVO[2], CAVO[1]) == pytest.approx(0.0525, abs=5e-5)
    assert mcnemar(BENTUR[2], BENTUR[1]) == pytest.approx(2 * (1 + 8) / 2**8)


@given(gained=st.integers(0, 400), lost=st.integers(0, 400))
def test_mcnemars_exact_test_is_the_binomial_one(gained: int, lost: int) -> None:
    n = gained + lost
    expected = binomtest(gained, n, 0.5).pvalue if n else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(gained, lost) == mcnemar(lost, gained)


def test_mcnemars_exact_test_of_more_questions_than_a_float_can_count_the_ways_of() -> None:
    assert mcnemar(2600, 2400) == pytest.approx(binomtest(2600, 5000, 0.5).pvalue, rel=1e-9)
    assert mcnemar(5000, 0) == 0.0


def test_newcombes_interval_of_a_published_table() -> None:
    both, only_a, only_b, neither = CAVO
    low, high = newcombe(both, only_a, only_b, neither)
    # The book has before - after: -0.0621 (-0.1186 to -0.0046).
    assert (low, high) == pytest.approx((0.0046, 0.1186), abs=5e-5)


@given(table=tables)
def test_newcombes_interval_encloses_the_difference_and_turns_with_the_pair(
    table: tuple[int, int, int, int],
) -> None:
    both, only_a, only_b, neither = table
    low, high = newcombe(*table)
    assert -1 <= low <= (only_b - only_a) / sum(table) + 1e-12
    assert (only_b - only_a) / sum(table) - 1e-12 <= high <= 1
    assert newcombe(both, only_b, only_a, neither) == pytest.approx((-high, -low))
    assert low < high  # no point, also where no question differs


def test_newcombes_interval_of_independent_pairs_is_wilsons_two_squared_and_added() -> None:
    # 2 of 4 and 2 of 4 with one question in each cell: no correlation.
    low, high = wilson(2, 4)
    half = math.hypot(0.5 - low, high - 0.5)
    assert newcombe(1, 1, 1, 1) == pytest.approx((-half, half))


def test_right_answers_are_compared_by_mcnemars_test() -> None:
    a, b = [1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0, 0]
    found = compare_shares(a, b)
    assert (found.n, found.a, found.b, found.gained, found.lost) == (8, 0.375, 0.625, 3, 1)
    assert found.p_value == pytest.approx(2 * (1 + 4) / 2**4)
    assert found.interval == newcombe(2, 1, 3, 2)
    told = found.in_percent()
    assert (told["a"], told["b"], told["difference"], told["test"]) == (37.5, 62.5, 25.0, "mcnemar")
    assert told["interval"] == pytest.approx([100 * bound for bound in newcombe(2, 1, 3, 2)])


def test_a_difference_that_pairs_show_is_not_seen_between_the_means() -> None:
    """Hard and easy questions differ by far more than the models do."""
    rng = np.random.default_rng(0)
    a = rng.uniform(0, 0.9, 200)
    b = a + 0.02 + 0.02 * rng.standard_normal(200)
    found = compare_means(a, b, 2000, seed=0)
    assert found.interval is not None and found.interval[0] > 0
    assert found.p_value is not None and found.p_value < 0.01
    shuffled = compare_means(a, rng.permutation(b), 2000, seed=0)
    assert shuffled.p_value is not None and shuffled.p_value > 0.05


def test_the_paired_bootstraps_interval_is_that_of_normal_differences() -> None:
    differences = 0.1 + 0.3 * np.random.default_rng(1).standard_normal(400)
    (low, high), p_value = paired_bootstrap(differences, 4000, seed=0)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(400)
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.005)
    assert p_value < 0.001
    assert paired_bootstrap(differences, 4000, seed=0) == ((low, high), p_value)
    assert paired_bootstrap(differences, 4000, seed=1) != ((low, high), p_value)
    (other_low, other_high), other_p = paired_bootstrap(-differences, 4000, seed=0)
    assert ((other_low, other_high), other_p) == (pytest.approx((-high, -low)), p_value)


def test_the_bootstraps_p_value_is_spread_evenly_where_nothing_differs() -> None:
    rng = np.random.default_rng(2)
    found = np.array([paired_bootstrap(rng.standard_normal(80), 400, seed)[1] for seed in range(300)])
    assert np.mean(found < 0.1) == pytest.approx(0.1, abs=0.06)
    assert np.mean(found < 0.5) == pytest.approx(0.5, abs=0.1)


def test_where_no_question_differs_the_interval_is_no_point() -> None:
    (low, high), p_value = paired_bootstrap([0.0] * 30, 100, seed=0)
    assert (low, high, p_value) == (-wilson(0, 30)[1], wilson(0, 30)[1], 1.0)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_few_questions_that_all_say_the_same_say_no_more_than_a_sign_test(count: int) -> None:
    (low, high), p_value = paired_bootstrap([1.0] * count, 1000, seed=0)
    assert p_value == mcnemar(count, 0)
    assert (low, high) == (pytest.approx(1 - 2 * wilson(0, count)[1]), 1.0)
    (_, _), among_others = paired_bootstrap([1.0] * count + [0.0] * 20, 1000, seed=0)
    assert among_others >= mcnemar(count, 0)


def test_without_samples_a_mean_has_no_interval_and_a_share_keeps_its_own() -> None:
    found = compare_means([0.5, 0.25], [0.5, 0.5], 0, seed=0)
    assert (found.difference, found.interval, found.p_value) == (0.125, None, None)
    assert found.in_percent()["interval"] is None


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 0.0])])
def test_scores_that_are_no_pairs_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match="are no pairs"):
        compare_shares(a, b)
    with pytest.raises(ValueError, match="are no pairs"):
        compare_means(a, b, 10, seed=0)


def test_resamples_are_of_the_questions_and_the_same_for_every_row() -> None:
    scores = np.array([np.arange(5.0), 10 + np.arange(5.0)])
    means = resampled_means(scores, 7000, seed=0)
    assert means.shape == (7000, 2)
    assert means[:, 1] == pytest.approx(means[:, 0] + 10)
    assert means[:, 0].mean() == pytest.approx(2.0, abs=0.05)
    assert means[:, 0].std() == pytest.approx(math.sqrt(2 / 5), abs=0.05)


def test_large_sets_are_drawn_in_parts() -> None:
    means = resampled_means(np.ones((1, 200_000)), 3, seed=0)
    assert means.tolist() == [[1.0], [1.0], [1.0]]


def test_the_probability_of_being_the_best_is_that_of_the_draws() -> None:
    # One question decides: it is drawn at least once in 1 - (1 - 1/4)^4 of the draws; else all are equal, and the
    # first is taken.
    scores = np.array([[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=np.float64)
    found = probabilities_of_best(scores, 20_000, seed=0)
    assert found.sum() == pytest.approx(1.0)
    assert found == pytest.approx([0.75**4, 1 - 0.75**4, 0.0], abs=0.01)


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=2, max_size=30))
def test_the_paired_standard_error_is_the_formulas(pairs: list[tuple[float, float]]) -> None:
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    found = paired_mean(before, after)
    assert found is not None
    var_a, var_b = np.var(before, ddof=1), np.var(after, ddof=1)
    covariance = np.cov(before, after)[0, 1]
    assert found.difference == pytest.approx(np.mean(after) - np.mean(before), abs=1e-9)
    # Var(b - a) = Var(a) + Var(b) - 2 Cov(a, b).
    assert found.stderr**2 == pytest.approx((var_a + var_b - 2 * covariance) / len(pairs), abs=1e-9)
    assert (found.n, found.left_out) == (len(pairs), 0)


def test_pairs_that_are_not_finite_are_left_out_of_a_difference_and_counted() -> None:
    found = paired_mean([-1.0, -math.inf, -2.0, -4.0], [-0.5, -1.0, -math.inf, -2.0])
    assert found is not None
    assert (found.n, found.difference, found.left_out) == (2, 1.25, 2)
    assert paired_mean([], []) is paired_mean([-math.inf], [-1.0]) is None


def test_one_pair_has_no_spread() -> None:
    found = paired_mean([-2.0], [-1.0])
    assert found is not None and (found.difference, found.stderr) == (1.0, 0.0)


@given(st.lists(st.floats(-100, 0), min_size=1, max_size=50))
def test_the_trimmed_mean_is_scipys(values: list[float]) -> None:
    assert trimmed_mean(values) == pytest.approx(trim_mean(values, 0.1), abs=1e-9)


def test_a_trimmed_mean_is_finite_where_one_of_many_is_not() -> None:
    assert trimmed_mean([-math.inf, *[-1.0] * 18, 0.0]) == -1.0
