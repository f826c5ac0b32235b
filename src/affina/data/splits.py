"""Splitting a validation set off: whole groups, seeded, independent of the order of the records.

Records that belong together (same conversation, same document, near duplicates of each other) are one group, and a
group is never on both sides; otherwise validation measures memory. Groups are ordered by a hash of their key and the
seed, so that shuffling, sorting or splitting the files changes nothing.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from affina.errors import DataError

# Above this many bits of intermediate sets the exact choice of groups is left for the greedy one.
_MAX_SUBSET_BITS: Final = 1 << 28


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of the records on both sides, ascending.

    train:      [N_train] int64
    validation: [N_validation] int64
    num_groups: (train, validation)
    target:     the size that was asked for, in records
    """

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    num_groups: tuple[int, int]
    target: int


def split_groups(
    groups: Sequence[str], *, fraction: float, max_validation_records: int | None = None, seed: int = 0
) -> Split:
    """Holds out whole groups so that the validation set is as near to the asked size as they allow.

    groups:   the key of each record's group (see `join_groups`)
    fraction: share of the records to hold out, 0 ≤ fraction < 1; at most `max_validation_records` of them
    raises:   DataError when something is to be held out, but there is only one group
    """
    assert 0 <= fraction < 1, "a fraction in [0, 1)"
    num_records = len(groups)
    target = round(num_records * fraction)
    if fraction > 0:
        target = max(1, target)
    if max_validation_records is not None:
        target = min(target, max_validation_records)
    if target == 0 or num_records == 0:
        everything = np.arange(num_records, dtype=np.int64)
        return Split(everything, everything[:0], (len(set(groups)), 0), 0)
    sizes = Counter(groups)
    if len(sizes) < 2:
        raise DataError(
            "cannot-split",
            (f"all {num_records:,} records belong to one group" if num_records > 1 else "there is only one record")
            + ", so no validation set can be split off",
            why="records of one group (same conversation, document or near duplicates) stay together",
            fix="name a separate data.validation, set data.validation_fraction: 0, or check columns.group",
        )
    ordered = sorted(sizes, key=lambda key: (_rank(key, seed), key))
    chosen = choose_groups([sizes[key] for key in ordered], target, limit=max_validation_records)
    held_out = {ordered[index] for index in chosen}
    is_validation = np.fromiter((key in held_out for key in groups), dtype=bool, count=num_records)
    return Split(
        train=np.flatnonzero(~is_validation).astype(np.int64),
        validation=np.flatnonzero(is_validation).astype(np.int64),
        num_groups=(len(sizes) - len(held_out), len(held_out)),
        target=target,
    )


def choose_groups(sizes: Sequence[int], target: int, *, limit: int | None = None) -> list[int]:
    """Indices of groups whose sizes add up as near to `target` as possible; never none, never all.

    sizes: of the groups, in the order of preference: of equally good choices the one that takes early groups wins
    limit: a sum that is not exceeded unless every group is larger
    """
    greedy: list[int] = []
    remaining = target
    for index, size in enumerate(sizes):
        if size <= remaining and len(greedy) < len(sizes) - 1:
            greedy.append(index)
            remaining -= size
            if remaining == 0:
                return greedy
    # To be nearer than the greedy choice, a sum may exceed the target by less than what that one lacks.
    bound = target + remaining if greedy else min(sizes)
    if limit is not None:
        bound = min(bound, max(limit, min(sizes)))
    bound = min(bound, sum(sizes) - min(sizes))
    if len(sizes) * (bound + 1) > _MAX_SUBSET_BITS:
        return greedy or [min(range(len(sizes)), key=lambda index: sizes[index])]
    return _nearest_subset(sizes, target, bound)


def _nearest_subset(sizes: Sequence[int], target: int, bound: int) -> list[int]:
    """The exact answer, by subset sums held as bits of integers: bit s of `reachable[i]` is set when some of the groups
    from i on add up to s ≤ bound."""
    mask = (1 << (bound + 1)) - 1
    reachable = [1] * (len(sizes) + 1)
    for index in range(len(sizes) - 1, -1, -1):
        later = reachable[index + 1]
        reachable[index] = (later | (later << sizes[index])) & mask
    sums = reachable[0]
    best = min(
        (total for total in range(1, bound + 1) if sums >> total & 1), key=lambda total: (abs(total - target), total)
    )
    chosen = []
    for index, size in enumerate(sizes):
        if size <= best and reachable[index + 1] >> (best - size) & 1:
            chosen.append(index)
            best -= size
    return chosen


def _rank(key: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\x00{key}".encode("utf-8", "surrogatepass")).digest()


def join_groups(
    record_hashes: Sequence[str],
    groups: Sequence[str | None],
    clusters: Sequence[int] | NDArray[np.int64] | None = None,
) -> list[str]:
    """One key per record; records that share a hash, a group, or a cluster, directly or through others, share it.

    record_hashes: a hash of the content of each record
    groups:        the group that the data names (conversation, document), None where it names none
    clusters:      a number per record; equal numbers are near duplicates (`quality.near_duplicates`)
    A key is the smallest record hash of its group, hence independent of the order of the records.
    """
    num_records = len(record_hashes)
    assert len(groups) == num_records, "one group or None per record"
    assert clusters is None or len(clusters) == num_records, "one cluster per record"
    union = UnionFind(num_records)
    labelings: list[Sequence[object]] = [record_hashes, groups]
    if clusters is not None:
        labelings.append([int(cluster) for cluster in clusters])
    for labels in labelings:
        first: dict[object, int] = {}
        for index, label in enumerate(labels):
            if label is not None:
                union.join(first.setdefault(label, index), index)
    roots = [union.find(index) for index in range(num_records)]
    key_of_root: dict[int, str] = {}
    for index, root in enumerate(roots):
        key_of_root[root] = min(record_hashes[index], key_of_root.get(root, record_hashes[index]))
    return [key_of_root[root] for root in roots]


def split_hashes(split: Split, record_hashes: Sequence[str]) -> dict[str, str]:
    """sha256 of each side's content, independent of the order: {"train": …, "validation": …}."""
    sides = {"train": split.train, "validation": split.validation}
    return {
        side: hashlib.sha256("\n".join(sorted(record_hashes[index] for index in indices)).encode()).hexdigest()
        for side, indices in sides.items()
    }


class UnionFind:
    """Disjoint sets of 0 … size-1; the representative of a set is its smallest member."""

    def __init__(self, size: int) -> None:
        # An array of machine integers: 8 bytes each, and twice as fast as NumPy to index one by one.
        self._parent = array("q", range(size))

    def find(self, index: int) -> int:
        """The smallest member of the set that holds `index`."""
        parent = self._parent
        root = index
        while parent[root] != root:
            root = parent[root]
        while parent[index] != root:
            parent[index], index = root, parent[index]
        return root

    def join(self, a: int, b: int) -> bool:
        """Makes the sets of a and b one; False when they were one already."""
        root_a, root_b = self.find(a), self.find(b)
        if root_a == root_b:
            return False
        self._parent[max(root_a, root_b)] = min(root_a, root_b)
        return True

    def labels(self) -> NDArray[np.int64]:
        """[size] int64, the smallest member of each one's set."""
        return np.fromiter((self.find(index) for index in range(len(self._parent))), np.int64, len(self._parent))
