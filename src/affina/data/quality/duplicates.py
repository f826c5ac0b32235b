"""Exact duplicates, near duplicates, and conversations that answer the same prompt differently."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from affina.data.messages import Conversation
from affina.data.quality.minhash import SimilarityIndex, Unit
from affina.data.quality.texts import hash128, prompt_and_reply, whole_text
from affina.data.splits import UnionFind

Deduplication = Literal["none", "exact", "near"]

MAX_LISTED: Final = 100
"""Conflicts and clusters that are listed in a report; counts are exact beyond."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """One prompt that has several different replies.

    records: [K] numbers of the records, ascending
    num_replies: how many different replies there are
    """

    records: tuple[int, ...]
    num_replies: int


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Which records repeat each other.

    exact: [N] int64, the number of the first record with the same (normalised) prompt and reply
    near:  [N] int64, the number of the first record of the cluster of near duplicates; equal to `exact` when they were
           not looked for
    prompts: [N] int64, the number of the first record with the same prompt; records without one stand for themselves
    conflicts: the first of the prompts with different replies
    """

    exact: NDArray[np.int64]
    near: NDArray[np.int64]
    prompts: NDArray[np.int64]
    conflicts: tuple[Conflict, ...]
    num_conflicts: int

    @property
    def num_records(self) -> int:
        return len(self.exact)

    @property
    def num_exact(self) -> int:
        """Records that repeat an earlier one exactly."""
        return int((self.exact != np.arange(len(self.exact))).sum())

    @property
    def num_near(self) -> int:
        """Records that nearly or exactly repeat another one: what deduplication with `near` removes."""
        return int((self.near != np.arange(len(self.near))).sum())

    def kept(self, mode: Deduplication) -> NDArray[np.int64]:
        """[M] int64, the records that remain: the first of each set of duplicates, in order."""
        if mode == "none":
            return np.arange(self.num_records, dtype=np.int64)
        labels = self.exact if mode == "exact" else self.near
        return np.flatnonzero(labels == np.arange(len(labels))).astype(np.int64)

    def clusters(self, limit: int = MAX_LISTED) -> list[tuple[int, ...]]:
        """The largest clusters of near duplicates."""
        roots, sizes = np.unique(self.near, return_counts=True)
        largest = np.argsort(-sizes, kind="stable")[:limit]
        return [
            tuple(np.flatnonzero(self.near == roots[index]).tolist()) for index in largest.tolist() if sizes[index] > 1
        ]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts and the listed examples."""
        return {
            "num_records": self.num_records,
            "num_exact_duplicates": self.num_exact,
            "num_near_duplicates": self.num_near,
            "num_conflicts": self.num_conflicts,
            "conflicts": [
                {"records": list(conflict.records), "num_replies": conflict.num_replies} for conflict in self.conflicts
            ],
            "clusters": [list(cluster) for cluster in self.clusters(20)],
        }


class DuplicateFinder:
    """Takes conversations one by one, and says at the end which repeat or contradict each other.

    near:      whether near duplicates are looked for (about 0.2 ms per short record)
    threshold: Jaccard similarity of word or character 5-grams from which two records are near duplicates
    """

    def __init__(self, *, near: bool = True, threshold: float = 0.8, width: int = 5, unit: Unit = "words") -> None:
        self._index = SimilarityIndex(threshold=threshold, width=width, unit=unit) if near else None
        self._pairs = bytearray()
        self._prompts = bytearray()
        self._seen: set[bytes] = set()
        self._indexed: list[int] = []
        self._num_records = 0

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Frees the temporary file."""
        if self._index is not None:
            self._index.close()

    def add(self, conversation: Conversation) -> None:
        """Takes the next record."""
        prompt, reply = prompt_and_reply(conversation)
        pair = hash128(f"{prompt}\x1d{reply}")
        self._pairs += pair
        # Records without a prompt (plain text) must not look like answers to the same one.
        self._prompts += hash128(prompt) if prompt else pair
        if self._index is not None and pair not in self._seen:
            # Exact repeats are joined by their hash; only the first goes through the similarity search.
            self._seen.add(pair)
            self._index.add(whole_text(conversation))
            self._indexed.append(self._num_records)
        self._num_records += 1

    def result(self) -> Duplicates:
        """What was found among the records so far."""
        exact = _first_of_equal(self._pairs)
        prompts = _first_of_equal(self._prompts)
        near = exact
        if self._index is not None:
            union = UnionFind(self._num_records)
            for number in np.flatnonzero(exact != np.arange(len(exact))).tolist():
                union.join(int(exact[number]), number)
            self._index.join_similar(union, np.array(self._indexed, np.int64))
            near = union.labels()
        conflicts, num_conflicts = _find_conflicts(prompts, exact)
        return Duplicates(exact, near, prompts, conflicts, num_conflicts)


def find_duplicates(
    conversations: Iterable[Conversation], *, near: bool = True, threshold: float = 0.8, unit: Unit = "words"
) -> Duplicates:
    """Duplicates and conflicts among `conversations`, which are read once and not kept."""
    with DuplicateFinder(near=near, threshold=threshold, unit=unit) as finder:
        for conversation in conversations:
            finder.add(conversation)
        return finder.result()


def deduplicate(conversations: Iterable[Conversation], mode: Deduplication) -> NDArray[np.int64]:
    """[M] int64, the numbers of the records to keep.

    mode: none keeps all, exact the first of equal ones, near the first of each cluster of near duplicates
    """
    if mode == "none":
        return np.arange(sum(1 for _ in conversations), dtype=np.int64)
    return find_duplicates(conversations, near=mode == "near").kept(mode)


def _first_of_equal(hashes: bytearray) -> NDArray[np.int64]:
    """[N] int64: for each 16-byte hash the number of the first that equals it."""
    values = np.frombuffer(bytes(hashes), dtype=np.dtype([("high", "<u8"), ("low", "<u8")]))
    if not len(values):
        return np.empty(0, np.int64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)].astype(np.int64)


def _find_conflicts(prompts: NDArray[np.int64], pairs: NDArray[np.int64]) -> tuple[tuple[Conflict, ...], int]:
    """Prompts whose records are not all the same pair."""
    distinct = np.unique(np.stack([prompts, pairs], axis=1), axis=0) if len(prompts) else np.empty((0, 2), np.int64)
    roots, counts = np.unique(distinct[:, 0], return_counts=True)
    found = np.flatnonzero(counts > 1)
    listed = tuple(
        Conflict(tuple(np.flatnonzero(prompts == roots[index]).tolist()), int(counts[index]))
        for index in found[:MAX_LISTED].tolist()
    )
    return listed, len(found)
