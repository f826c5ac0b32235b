"""Mixing: exact shares at every point, no repeats while records suffice, the same mix for the same seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data.mixing import Scheduler, integer_weights, interleave_streams, mix_sources
from affina.errors import DataError

weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(weights, st.integers(1, 300))
@settings(max_examples=150, deadline=None)
def test_every_source_is_within_one_record_of_its_share_at_every_point(parts: list[int], count: int) -> None:
    scheduler, given_so_far, total = Scheduler(parts), [0] * len(parts), sum(parts)
    for number in range(1, count + 1):
        given_so_far[scheduler.next()] += 1
        for part, taken in zip(parts, given_so_far, strict=True):
            assert abs(Fraction(part * number, total) - taken) < 1  # Tijdeman 1980: at most 1 − 1/(2n−2)


def worst_deviation(parts: list[int], choose: Callable[[list[int], int], int]) -> float:
    taken, total, worst = [0] * len(parts), sum(parts), 0.0
    for number in range(1, total + 1):
        taken[choose(taken, number)] += 1
        worst = max(worst, *(abs(p * number / total - t) for p, t in zip(parts, taken, strict=True)))
    return worst


def test_the_largest_deficit_rule_alone_would_break_that_law() -> None:
    # Why the schedule is Tijdeman's: with these weights the obvious rule is 1.21 records off at its worst.
    parts = [3, 25, 1, 25, 1, 5, 1, 43, 1]
    total, scheduler = sum(parts), Scheduler(parts)
    greedy = worst_deviation(
        parts, lambda taken, number: max(range(9), key=lambda i: parts[i] * number - taken[i] * total)
    )
    assert greedy > 1.2
    assert worst_deviation(parts, lambda taken, number: scheduler.next()) < 1


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 20)), min_size=1, max_size=5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_largest_mix_without_repeats_uses_no_record_twice_and_keeps_the_shares(
    sources: list[tuple[int, int]], seed: int
) -> None:
    sizes, parts = [size for size, _ in sources], [part for _, part in sources]
    mix = mix_sources(sizes, [float(part) for part in parts], seed=seed)
    pairs = set(zip(mix.sources.tolist(), mix.records.tolist(), strict=True))
    assert len(pairs) == len(mix)
    for index, (size, part) in enumerate(sources):
        taken = int((mix.sources == index).sum())
        assert taken == mix.counts[index]
        assert abs(taken - len(mix) * part / sum(parts)) < 1
        assert set(mix.records[mix.sources == index].tolist()) <= set(range(size))
    # It is the largest: one more round of whole shares would need a record that is not there.
    if len(mix) > 1:
        assert any((len(mix) + 1) * part > size * sum(parts) for size, part in sources)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_repeats_are_spread_evenly_over_the_records(size: int, other: int, count: int) -> None:
    mix = mix_sources([size, other], [1, 1], num_records=count)
    for index, available in enumerate((size, other)):
        times = np.bincount(mix.records[mix.sources == index], minlength=available)
        assert times.max(initial=0) - times.min(initial=count) <= 1


def test_three_quarters_and_one_quarter_are_exact() -> None:
    mix = mix_sources([1000, 1000], [0.75, 0.25], names=["task.jsonl", "general.jsonl"])
    assert len(mix) == 1333
    assert mix.counts == (1000, 333)
    assert mix.notes == (
        "task.jsonl: 1,000 of 1,333 records (75.0%); all of them, once",
        "general.jsonl: 333 of 1,333 records (25.0%); 667 of its 1,000 are left out",
    )
    fixed = mix_sources([10, 1000], [0.75, 0.25], num_records=40)
    assert fixed.counts == (30, 10)
    assert "it has 10, so each is used 3.00 times on average" in fixed.notes[0]


def test_the_mix_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (mix_sources([500, 500], [3, 1], seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first.records, again.records)
    assert not np.array_equal(first.records, other.records)
    assert np.array_equal(first.sources, other.sources)


def test_without_weights_every_record_is_used_once_in_order() -> None:
    mix = mix_sources([2, 0, 3], [None, None, None])
    assert mix.sources.tolist() == [0, 0, 2, 2, 2]
    assert mix.records.tolist() == [0, 1, 0, 1, 2]


def test_decimal_weights_mean_what_is_written() -> None:
    assert integer_weights([0.1, 0.2, 0.7], ["a", "b", "c"]) == (1, 2, 7)
    assert integer_weights([75, 25], ["a", "b"]) == (75, 25)
    assert integer_weights([1 / 3], ["a"])[0] > 0


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), 1e-9])
def test_weights_that_are_no_share_are_refused(weight: float) -> None:
    with pytest.raises(DataError, match=r"bad-source-weight\]: b has the weight(.|\n)*above 0"):
        mix_sources([1, 1], [1, weight], names=["a", "b"])


def test_some_weights_and_some_not_is_an_error() -> None:
    with pytest.raises(DataError, match=r"missing-weight\]: b has no weight(.|\n)*give every source a weight, or none"):
        mix_sources([1, 1], [1, None], names=["a", "b"])


def test_an_empty_source_with_a_weight_is_an_error() -> None:
    with pytest.raises(DataError, match=r"empty-source\]: b has a weight but no records(.|\n)*remove it"):
        mix_sources([1, 0], [1, 1], names=["a", "b"])


# Streams


def counted(name: str, size: int) -> Iterator[str]:
    return (f"{name}{index}" for index in range(size))


def test_a_stream_mix_ends_with_the_first_source_that_ends_and_says_so() -> None:
    mixed = interleave_streams([lambda: counted("a", 6), lambda: counted("b", 100)], [3, 1], names=["a", "b"])
    records = list(mixed)
    assert [record for record in records if record.startswith("a")] == [f"a{index}" for index in range(6)]
    assert mixed.ended_by == 0
    assert "a: 6 of 8 records (75.0%), and its end ended the mix" in mixed.notes
    assert list(mixed) == records  # starts anew


def test_a_stream_mix_that_repeats_starts_sources_again_and_counts_it() -> None:
    mixed = interleave_streams(
        [lambda: counted("a", 3), lambda: counted("b", 100)], [1, 1], when_exhausted="repeat", names=["a", "b"]
    )
    records = list(itertools.islice(mixed, 20))
    assert [record for record in records if record.startswith("a")] == ["a0", "a1", "a2"] * 3 + ["a0"]
    assert mixed.repeats == [3, 0]
    assert "started again 3 times" in mixed.notes[0]


@given(weights, st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_a_stream_mix_has_the_same_order_as_a_plan(parts: list[int], count: int) -> None:
    streams = [lambda index=index: itertools.repeat(index) for index in range(len(parts))]
    streamed = list(itertools.islice(interleave_streams(streams, [float(part) for part in parts]), count))
    planned = mix_sources([1000] * len(parts), [float(part) for part in parts], num_records=count)
    assert streamed == planned.sources.tolist()


def test_repeating_an_empty_stream_is_an_error() -> None:
    with pytest.raises(DataError, match=r"empty-source\]: b has a weight but no records(.|\n)*remove the source"):
        list(
            interleave_streams(
                [lambda: counted("a", 3), lambda: counted("b", 0)], [1, 1], when_exhausted="repeat", names=["a", "b"]
            )
        )
