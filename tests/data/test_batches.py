"""The order of the samples is a pure function of seed and step; a stream can be resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data.batches import BatchPlan, StreamingBatches, StreamState, padded_efficiency, round_up
from affina.data.samples import Sample


def plan(lengths: Sequence[int], **options: object) -> BatchPlan:
    defaults: dict[str, object] = {
        "max_length": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "packing": True,
        "seed": 0,
        "epochs": 1.0,
    }
    return BatchPlan(lengths, **{**defaults, **options})  # type: ignore[arg-type]


lengths_lists = st.lists(st.integers(1, 32), min_size=1, max_size=80)


@given(lengths=lengths_lists, packing=st.booleans(), seed=st.integers(-5, 2**40), accumulation=st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_visits_every_sample_exactly_once(
    lengths: list[int], packing: bool, seed: int, accumulation: int
) -> None:
    batches = plan(lengths, packing=packing, seed=seed, gradient_accumulation_steps=accumulation, epochs=2.0)
    for epoch in range(2):
        first = epoch * batches.steps_per_epoch
        steps = [batches.step(first + position) for position in range(batches.steps_per_epoch)]
        assert sorted(i for step in steps for row in step for i in row) == list(range(len(lengths)))
        assert all(len(step) == accumulation for step in steps[:-1])
        assert 1 <= len(steps[-1]) <= accumulation
        for row in (row for step in steps for row in step):
            if packing:
                assert sum(lengths[i] for i in row) <= 2 * 32
            else:
                assert len(row) <= 2


@given(lengths=lengths_lists, packing=st.booleans(), steps=st.lists(st.integers(0, 200), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_step_does_not_depend_on_the_steps_asked_before(lengths: list[int], packing: bool, steps: list[int]) -> None:
    used = plan(lengths, packing=packing, epochs=9)
    visited = [used.step(index) for index in steps]
    assert visited == [plan(lengths, packing=packing, epochs=9).step(index) for index in steps]


def test_epochs_differ_in_order_and_seeds_do_too() -> None:
    lengths = np.random.default_rng(0).integers(1, 33, 200).tolist()
    batches = plan(lengths, epochs=2)
    assert batches.step(0) != batches.step(batches.steps_per_epoch)
    assert batches.step(0) != plan(lengths, seed=1).step(0)


def test_steps_count_fractions_of_epochs_and_stop_at_max_steps() -> None:
    lengths = [32] * 40  # 20 rows of 64 tokens, 7 steps of 3 rows
    assert plan(lengths).steps_per_epoch == 7
    assert plan(lengths, epochs=0.5).num_steps == 4
    assert plan(lengths, epochs=3).num_steps == 21
    assert plan(lengths, epochs=3, max_steps=5).num_steps == 5
    assert plan(lengths, epochs=1, max_steps=500).num_steps == 7
    assert plan(lengths, epochs=0.001).num_steps == 1
    assert plan(lengths).epoch_at(7) == 1.0


def test_a_third_of_three_epochs_is_one_epoch() -> None:
    # 0.1 + 0.2 style rounding must not add a step.
    lengths = [32] * 60
    assert plan(lengths, epochs=1.1 - 0.1).num_steps == plan(lengths).steps_per_epoch


def test_rows_are_multiples_of_128_tokens() -> None:
    assert plan([5], max_length=100, micro_batch_size=3).tokens_per_row == 384
    assert plan([5], packing=False).tokens_per_row is None
    assert [round_up(n) for n in (1, 128, 129)] == [128, 128, 256]


def test_packing_says_how_full_its_rows_are() -> None:
    lengths = [64, 64, 128] * 40
    batches = plan(lengths, max_length=128, micro_batch_size=1)
    assert batches.efficiency == 1.0
    assert batches.padded_efficiency < 0.95
    text = batches.describe()
    assert "120 samples packed into 80 rows of 128 tokens, 100.0% full" in text
    assert "27 steps for 1 epoch (27 per epoch)" in text


def test_padding_wastes_what_the_longest_sample_of_a_batch_leaves() -> None:
    assert padded_efficiency([10, 10], 2) == 1.0
    assert padded_efficiency([10, 30], 2) == pytest.approx(40 / 60)
    assert padded_efficiency([7], 4) == 1.0


def test_supervised_tokens_of_a_step_are_the_sum_over_its_samples() -> None:
    batches = plan([10] * 12, num_supervised=list(range(12)))
    total = sum(batches.supervised_tokens(i) or 0 for i in range(batches.steps_per_epoch))
    assert total == sum(range(12))
    assert plan([10]).supervised_tokens(0) is None


def test_a_sample_longer_than_a_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="33 tokens is longer than max_length 32"):
        plan([33])
    with pytest.raises(ValueError, match="at least one sample"):
        plan([])


# Streams


def sample(number: int) -> Sample:
    ids = np.full(1 + number * 7 % 30, number, dtype=np.int32)
    return Sample(ids, ids)


class Source:
    """Records 1, 2, 3, …; every third gives two samples and every fifth none."""

    def __init__(self, num_records: int) -> None:
        self.num_records = num_records
        self.num_opened_records = 0

    def __call__(self, skip: int) -> Iterator[tuple[int, list[Sample]]]:
        for number in range(skip + 1, self.num_records + 1):
            self.num_opened_records += 1
            yield number, [] if number % 5 == 0 else [sample(number)] * (2 if number % 3 == 0 else 1)


def streaming(source: Source, *, packing: bool = True, state: StreamState | None = None) -> StreamingBatches:
    return StreamingBatches(
        source,
        max_length=32,
        micro_batch_size=2,
        gradient_accumulation_steps=3,
        packing=packing,
        seed=1,
        window_samples=20,
        state=state,
    )


def numbers(steps: list[list[list[Sample]]]) -> list[list[list[int]]]:
    return [[[int(item.input_ids[0]) for item in row] for row in step] for step in steps]


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_gives_every_sample_once(packing: bool) -> None:
    steps = numbers(list(streaming(Source(200), packing=packing)))
    expected = [n for n in range(1, 201) if n % 5 for _ in range(2 if n % 3 == 0 else 1)]
    assert sorted(n for step in steps for row in step for n in row) == expected
    assert all(len(step) == 3 for step in steps[:-1])


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_resumed_after_any_step_goes_on_as_if_never_stopped(packing: bool) -> None:
    whole = numbers(list(streaming(Source(200), packing=packing)))
    for stop in range(1, len(whole)):
        batches = streaming(Source(200), packing=packing)
        iterator = iter(batches)
        for _ in range(stop):
            next(iterator)
        state = StreamState(**batches.state.to_dict())
        source = Source(200)
        assert numbers(list(streaming(source, packing=packing, state=state))) == whole[stop:]
        assert source.num_opened_records == 200 - state.records


def test_a_packed_stream_keeps_rows_within_their_length() -> None:
    for step in streaming(Source(100)):
        assert all(sum(len(item) for item in row) <= 64 for row in step)
