"""Student's t, and what it says about pairs."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [(0.95, 4, 2.776), (0.90, 4, 2.132), (0.95, 1, 12.706), (0.95, 9, 2.262), (0.99, 3, 5.841), (0.95, 2, 4.303)],
)
def test_quantiles_are_those_of_the_printed_tables(confidence: float, degrees: int, expected: float) -> None:
    from equivalence import t_probability, t_quantile

    assert t_quantile(confidence, degrees) == pytest.approx(expected, abs=5e-4)
    assert t_probability(t_quantile(confidence, degrees), degrees) == pytest.approx(confidence)


def test_small_differences_are_equivalent_within_a_wide_margin_and_may_still_be_real() -> None:
    from equivalence import paired_test

    found = paired_test([0.010, 0.011, 0.009, 0.010, 0.010], margin=0.1)
    assert found["is_equivalent"]
    assert found["is_different"]
    assert found["mean"] == pytest.approx(0.010)
    assert found["p_equal"] < 1e-3


def test_scattered_differences_show_neither() -> None:
    from equivalence import paired_test

    found = paired_test([0.3, -0.2, 0.1, -0.4, 0.2], margin=0.1)
    assert not found["is_equivalent"]
    assert not found["is_different"]


def test_differences_beyond_the_margin_are_not_equivalent() -> None:
    from equivalence import paired_test

    assert not paired_test([0.2, 0.21, 0.19, 0.2, 0.2], margin=0.1)["is_equivalent"]


def test_equal_runs_are_equivalent_and_one_pair_shows_nothing() -> None:
    from equivalence import paired_test

    same = paired_test([0.0, 0.0, 0.0], margin=0.1)
    assert same["is_equivalent"]
    assert not same["is_different"]
    assert same["p_equal"] == 1.0
    assert paired_test([0.1], margin=0.1)["is_equivalent"] is None
