"""Splits: whole groups, as near to the asked size as they allow, whatever the order of the records."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from affina.data.splits import UnionFind, choose_groups, join_groups, split_groups, split_hashes
from affina.errors import DataError

group_lists = st.lists(st.integers(0, 12).map(str), min_size=2, max_size=80).filter(lambda groups: len(set(groups)) > 1)
fractions = st.floats(0.01, 0.5)


@given(group_lists, fractions, st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_no_group_is_on_both_sides_and_no_record_is_lost(groups: list[str], fraction: float, seed: int) -> None:
    split = split_groups(groups, fraction=fraction, seed=seed)
    train, validation = ({groups[index] for index in side} for side in (split.train, split.validation))
    assert not train & validation
    assert train
    assert validation
    assert sorted([*split.train.tolist(), *split.validation.tolist()]) == list(range(len(groups)))
    assert split.num_groups == (len(train), len(validation))


@given(group_lists, fractions, st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_split_does_not_depend_on_the_order_of_the_records(
    groups: list[str], fraction: float, generator: random.Random
) -> None:
    order = list(range(len(groups)))
    generator.shuffle(order)
    shuffled = [groups[index] for index in order]
    held_out = {groups[index] for index in split_groups(groups, fraction=fraction).validation}
    assert {shuffled[index] for index in split_groups(shuffled, fraction=fraction).validation} == held_out


@given(st.lists(st.integers(1, 9), min_size=2, max_size=9), st.integers(1, 40))
@example([1, 6], 4)
@settings(max_examples=200, deadline=None)
def test_the_size_is_as_near_as_the_groups_allow(sizes: list[int], target: int) -> None:
    chosen = choose_groups(sizes, target)
    best = min(
        abs(sum(subset) - target) for count in range(1, len(sizes)) for subset in itertools.combinations(sizes, count)
    )
    assert abs(sum(sizes[index] for index in chosen) - target) == best
    assert len(set(chosen)) == len(chosen) < len(sizes)


@given(st.integers(2, 500), fractions)
@settings(max_examples=60, deadline=None)
def test_single_records_give_the_exact_size(count: int, fraction: float) -> None:
    split = split_groups([str(index) for index in range(count)], fraction=fraction)
    assert len(split.validation) == max(1, round(count * fraction))


@given(group_lists, fractions, st.integers(1, 10))
@settings(max_examples=100, deadline=None)
def test_the_limit_is_kept_unless_every_group_is_larger(groups: list[str], fraction: float, limit: int) -> None:
    split = split_groups(groups, fraction=fraction, max_validation_records=limit)
    smallest = min(groups.count(group) for group in set(groups))
    assert len(split.validation) <= max(limit, smallest)


def test_another_seed_gives_another_split() -> None:
    groups = [str(index) for index in range(200)]
    sides = {tuple(split_groups(groups, fraction=0.1, seed=seed).validation.tolist()) for seed in range(10)}
    assert len(sides) == 10


def test_seeds_hold_out_every_record_equally_often() -> None:
    groups = [str(index) for index in range(50)]
    times = np.zeros(50)
    for seed in range(400):
        times[split_groups(groups, fraction=0.2, seed=seed).validation] += 1
    # Binomial(400, 0.2) has mean 80 and standard deviation 8; 50 values stay within 4.5 of them.
    assert abs(times - 80).max() < 36


def test_nothing_is_held_out_when_nothing_is_asked() -> None:
    split = split_groups(["a", "b"], fraction=0.0)
    assert split.train.tolist() == [0, 1]
    assert split.validation.tolist() == []
    assert len(split_groups([], fraction=0.5).train) == 0


def test_one_group_cannot_be_split() -> None:
    with pytest.raises(
        DataError, match=r"cannot-split\]: all 3 records belong to one group(.|\n)*validation_fraction: 0"
    ):
        split_groups(["a", "a", "a"], fraction=0.1)


def test_a_huge_set_of_large_groups_takes_the_greedy_choice_and_is_still_near() -> None:
    generator = random.Random(0)
    sizes = [generator.randint(50, 90) for _ in range(60_000)]
    target = 400_001
    assert abs(sum(sizes[index] for index in choose_groups(sizes, target)) - target) < 50


# Groups


def test_records_are_joined_by_hash_group_and_cluster_also_through_others() -> None:
    hashes = ["h1", "h2", "h3", "h4", "h1", "h6"]
    groups = [None, "g", "g", None, None, None]
    clusters = [0, 1, 2, 2, 4, 5]
    keys = join_groups(hashes, groups, clusters)
    assert keys[0] == keys[4] == "h1"  # equal content
    assert keys[1] == keys[2] == keys[3] == "h2"  # group g, and h3 is a near duplicate of h4
    assert keys[5] == "h6"
    assert len(set(keys)) == 3


@given(
    st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=25),
    st.randoms(),
)
@settings(max_examples=100, deadline=None)
def test_group_keys_do_not_depend_on_the_order(
    records: list[tuple[int, int | None, int]], generator: random.Random
) -> None:
    def keys(items: list[tuple[int, int | None, int]]) -> dict[tuple[int, int | None, int], str]:
        found = join_groups(
            [f"hash{item[0]}" for item in items],
            [None if item[1] is None else f"group{item[1]}" for item in items],
            [item[2] for item in items],
        )
        return dict(zip(items, found, strict=True))

    shuffled = list(records)
    generator.shuffle(shuffled)
    assert keys(records) == keys(shuffled)


def test_split_hashes_name_the_content_of_each_side_and_not_its_order() -> None:
    hashes = [f"h{index}" for index in range(20)]
    split = split_groups(hashes, fraction=0.3)
    before = split_hashes(split, hashes)
    backwards = hashes[::-1]
    assert split_hashes(split_groups(backwards, fraction=0.3), backwards) == before
    changed = [*hashes[:-1], "another"]
    assert split_hashes(split, changed) != before
    assert before["train"] != before["validation"]


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_union_find_agrees_with_a_search_of_the_graph(edges: list[tuple[int, int]]) -> None:
    union = UnionFind(20)
    neighbours: dict[int, set[int]] = {node: {node} for node in range(20)}
    for a, b in edges:
        union.join(a, b)
        neighbours[a].add(b)
        neighbours[b].add(a)
    for node in range(20):
        reached, frontier = {node}, [node]
        while frontier:
            for other in neighbours[frontier.pop()] - reached:
                reached.add(other)
                frontier.append(other)
        assert union.find(node) == min(reached)
    assert union.labels().tolist() == [union.find(node) for node in range(20)]
