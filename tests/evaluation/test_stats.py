from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.evaluation.stats import (
    MIN_RECORDS_FOR_INTERVAL,
    Estimate,
    Interval,
    accuracy_difference,
    bootstrap_ratio,
    critical_value,
    mcnemar_exact,
    newcombe_paired_interval,
    num_records_needed,
    wilson_interval,
)


def test_critical_value_of_95_percent_is_1_96() -> None:
    assert critical_value(0.95) == pytest.approx(1.959964, abs=1e-6)


@pytest.mark.parametrize(
    ("num_right", "num_records", "low", "high"),
    [
        # Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_reproduces_published_values(num_right: int, num_records: int, low: float, high: float) -> None:
    interval = wilson_interval(num_right, num_records)
    assert interval.low == pytest.approx(low, abs=5e-5)  # printed with four decimals
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_interval_at_the_ends_is_one_sided_and_never_empty() -> None:
    nothing, everything = wilson_interval(0, 10), wilson_interval(10, 10)
    assert nothing.low == 0.0
    assert nothing.high > 0.2
    assert everything.high == 1.0
    assert everything.low == pytest.approx(1 - nothing.high)


def test_wilson_interval_of_no_records_is_everything() -> None:
    assert wilson_interval(0, 0).to_list() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 · 1/2
        (5, 0, 2 / 32),
        (6, 0, 2 / 64),
        (0, 6, 2 / 64),
        (3, 3, 1.0),
        (4, 1, 2 * (1 + 5) / 32),
        (10, 3, 2 * (1 + 13 + 78 + 286) / 8192),
    ],
)
def test_mcnemar_counts_coin_tosses(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar_exact(gained, lost) == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_of_thousands_of_records_does_not_overflow() -> None:
    assert mcnemar_exact(3000, 2000) < 1e-40
    assert mcnemar_exact(5000, 5000) == 1.0


def test_newcombe_interval_reproduces_the_published_example() -> None:
    # Newcombe 1998, Statistics in Medicine 17:2635, table II, 36/12/2/0: method 10 gives 0.0569 to 0.3404.
    interval = newcombe_paired_interval(36, 12, 2, 0)
    assert interval.low == pytest.approx(0.0569, abs=5e-5)
    assert interval.high == pytest.approx(0.3404, abs=5e-5)


@given(st.lists(st.integers(0, 30), min_size=4, max_size=4))
def test_newcombe_interval_contains_the_difference_and_mirrors_when_models_are_swapped(counts: list[int]) -> None:
    both, gained, lost, neither = counts
    interval = newcombe_paired_interval(both, gained, lost, neither)
    mirrored = newcombe_paired_interval(both, lost, gained, neither)
    total = sum(counts)
    if total:
        assert interval.low - 1e-12 <= (gained - lost) / total <= interval.high + 1e-12
    assert interval.low == pytest.approx(-mirrored.high, abs=1e-12)
    assert -1.0 <= interval.low <= interval.high <= 1.0


def test_bootstrap_estimates_the_ratio_of_sums_not_the_mean_of_ratios() -> None:
    estimate = bootstrap_ratio([10, 1, 1, 1, 1], [1, 10, 10, 10, 10])
    assert estimate.value == pytest.approx(14 / 41)


def test_standard_error_of_a_mean_is_the_textbook_one() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 9.0]
    estimate = bootstrap_ratio(values, np.ones(6))
    assert estimate.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(6), rel=1e-12)


def test_studentized_interval_is_symmetric_and_about_student_s_t_for_normal_data() -> None:
    values = np.random.default_rng(5).normal(size=40)
    interval = bootstrap_ratio(values, np.ones(40), num_resamples=20_000).interval
    half_width = (interval.high - interval.low) / 2
    assert (interval.high + interval.low) / 2 == pytest.approx(values.mean(), abs=1e-12)
    # t with 39 degrees of freedom has the quantile 2.0227; the bootstrap's own noise is a few percent.
    assert half_width == pytest.approx(2.0227 * values.std(ddof=1) / math.sqrt(40), rel=0.08)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=30)
    first, again, other = (bootstrap_ratio(values, np.ones(30), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.interval != other.interval


def test_identical_models_have_an_interval_of_zero_width_at_zero() -> None:
    estimate = bootstrap_ratio(np.zeros(20), np.arange(1, 21))
    assert estimate == Estimate(0.0, Interval(0.0, 0.0, 0.95), 0.0)


def test_a_constant_ratio_has_no_spread_whatever_the_lengths() -> None:
    tokens = np.array([3, 7, 50, 120, 9, 11])
    estimate = bootstrap_ratio(-0.7 * tokens, tokens)
    assert estimate.interval.to_list() == pytest.approx([-0.7, -0.7])
    assert estimate.interval.excludes(0.0)


def test_fewer_than_five_records_give_no_bounds() -> None:
    estimate = bootstrap_ratio([1.0] * (MIN_RECORDS_FOR_INTERVAL - 1), [1.0] * (MIN_RECORDS_FOR_INTERVAL - 1))
    assert estimate.interval.low == -math.inf
    assert not estimate.interval.excludes(0.0)


def test_records_of_one_group_count_as_one_observation() -> None:
    values = np.repeat(np.random.default_rng(2).normal(size=20), 10)
    apart = bootstrap_ratio(values, np.ones(200)).interval
    grouped = bootstrap_ratio(values, np.ones(200), groups=[f"g{index // 10}" for index in range(200)]).interval
    # Ten copies of each record: √10 times the spread that records taken one by one pretend.
    assert (grouped.high - grouped.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(10), rel=0.2)


def test_groups_that_hold_one_record_each_change_nothing_but_the_name() -> None:
    values = np.random.default_rng(2).normal(size=12)
    names = [str(index) for index in range(12)]
    assert bootstrap_ratio(values, np.ones(12), groups=names) == bootstrap_ratio(values, np.ones(12))
    assert bootstrap_ratio(values, np.ones(12), groups=[None] * 12) == bootstrap_ratio(values, np.ones(12))


def test_many_records_are_resampled_in_pieces_with_the_same_law() -> None:
    values = np.random.default_rng(3).normal(size=60_000)
    estimate = bootstrap_ratio(values, np.ones(60_000), num_resamples=100)
    assert estimate.standard_error == pytest.approx(1 / math.sqrt(60_000), rel=0.02)
    assert estimate.interval.excludes(1.0)


@pytest.mark.parametrize("lengths", [[], [1.0, 0.0, 1.0, 1.0, 1.0]])
def test_a_ratio_needs_records_and_positive_denominators(lengths: list[float]) -> None:
    with pytest.raises(ValueError, match="positive denominator"):
        bootstrap_ratio(np.zeros(len(lengths)), lengths)


def test_vectors_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        bootstrap_ratio([1.0, 2.0], [1.0])


def test_accuracy_difference_is_honest_when_every_record_improves() -> None:
    estimate = accuracy_difference([False] * 6, [True] * 6)
    assert estimate.value == 1.0
    assert estimate.interval.high == 1.0
    # Six of six: Wilson's lower end of the tuned model is 0.61, its upper end of the base 0.39.
    assert 0.2 < estimate.interval.low < 0.61


def test_accuracy_difference_of_equal_outcomes_is_zero_inside_a_real_interval() -> None:
    estimate = accuracy_difference([True, False] * 20, [True, False] * 20)
    assert estimate.value == 0.0
    assert estimate.interval.low < 0.0 < estimate.interval.high


def test_accuracy_in_groups_has_a_wider_interval() -> None:
    base = [False] * 60
    tuned = [index // 10 % 2 == 0 for index in range(60)]
    apart = accuracy_difference(base, tuned)
    grouped = accuracy_difference(base, tuned, groups=[str(index // 10) for index in range(60)])
    assert grouped.interval.low < apart.interval.low
    assert grouped.interval.high > apart.interval.high


def test_records_needed_follow_the_square_of_error_over_effect() -> None:
    estimate = Estimate(0.1, Interval(-0.1, 0.3, 0.95), 0.1)
    # (1.95996 + 0.84162)² · 40 = 313.96
    assert num_records_needed(estimate, 40) == 314
    half_the_effect = Estimate(0.05, Interval(-0.15, 0.25, 0.95), 0.1)
    assert num_records_needed(half_the_effect, 40) == 1256


def test_no_number_of_records_shows_a_difference_that_is_not_there() -> None:
    assert num_records_needed(Estimate(0.0, Interval(-0.1, 0.1, 0.95), 0.05), 40) is None
    assert num_records_needed(Estimate(0.2, Interval(-math.inf, math.inf, 0.95), math.inf), 3) is None


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=5, max_size=20), st.integers(0, 1000))
def test_an_interval_always_contains_its_estimate(values: list[float], seed: int) -> None:
    estimate = bootstrap_ratio(values, np.ones(len(values)), num_resamples=200, seed=seed)
    assert estimate.interval.low <= estimate.value <= estimate.interval.high


def test_nominal_95_percent_intervals_of_perplexity_cover_the_truth_93_to_97_times_of_100() -> None:
    """1,000 simulated validation sets; a nominal coverage would show 95% ± 0.7% (one standard error)."""
    random = np.random.default_rng(20260101)
    num_records, true_log_ratio, num_sets = 60, -0.3, 1000
    num_covered = 0
    for index in range(num_sets):
        tokens = np.maximum(1, random.lognormal(3.5, 0.6, num_records)).round()
        differences = tokens * (true_log_ratio + 0.4 * random.standard_normal(num_records))
        interval = bootstrap_ratio(differences, tokens, num_resamples=300, seed=index).interval
        num_covered += not interval.excludes(true_log_ratio)
    assert 0.93 <= num_covered / num_sets <= 0.97


@pytest.mark.parametrize("shares", [(0.40, 0.20, 0.10), (0.05, 0.85, 0.02), (0.80, 0.05, 0.03)])
def test_intervals_of_accuracy_cover_the_truth_also_when_few_records_change(shares: tuple[float, float, float]) -> None:
    """Never below 93%; above 97% where only a handful of records differ (a score interval errs on the safe side)."""
    random = np.random.default_rng(7)
    both, gained, lost = shares
    num_covered = 0
    for index in range(400):
        kinds = random.choice(4, size=60, p=[both, gained, lost, 1 - both - gained - lost])
        base, tuned = (kinds == 0) | (kinds == 2), (kinds == 0) | (kinds == 1)
        interval = accuracy_difference(base.tolist(), tuned.tolist(), num_resamples=200, seed=index).interval
        num_covered += not interval.excludes(gained - lost)
    assert num_covered / 400 >= 0.93
