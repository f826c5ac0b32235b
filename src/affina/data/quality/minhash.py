"""MinHash with locality-sensitive hashing: pairs of similar texts among many, without comparing all of them.

A text is the set S of its shingles (n-grams of words or characters). For a random hash function the smallest hash over
S equals that over S' with probability J(S, S') = |S ∩ S'| / |S ∪ S'|, the Jaccard similarity (Broder 1997). 128 of
them make a signature; it is cut into 21 bands of 6 values, and two texts are candidates when a whole band agrees, which
happens with probability 1 − (1 − J⁶)²¹: 0.998 at J = 0.8, 0.28 at J = 0.5. Candidates are then compared by their true
Jaccard similarity.

Kept per text: 21 band keys of 8 bytes, the lowest byte of each of the 128 values, and the shingles, which go to a
temporary file beyond 64 MiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from affina.data.quality.texts import character_hashes, ngram_hashes, scramble, word_hashes
from affina.data.splits import UnionFind

NUM_PERMUTATIONS: Final = 128
NUM_BANDS: Final = 21
BAND_ROWS: Final = 6
Unit = Literal["words", "characters"]

_BATCH_SHINGLES: Final = 1 << 16  # keeps the working set of a batch (512 KiB) inside the second-level cache
_SPILL_BYTES: Final = 64 * 1024 * 1024
# At J = 0.8 the share of equal values has a standard deviation of 0.035; 3.5 of them below misses practically no pair,
# and spares reading most shingles.
_PREFILTER_MARGIN: Final = 0.124
# In a bucket of many different texts (one template, many fillings) every text is compared with this many clusters.
_MAX_REPRESENTATIVES: Final = 64


def shingles(text: str, *, width: int = 5, unit: Unit = "words") -> NDArray[np.uint32]:
    """Sorted distinct 32-bit hashes of the n-grams of a normalised text; of the whole text when it is shorter."""
    units = word_hashes(text) if unit == "words" else character_hashes(text)
    hashes = ngram_hashes(units, min(width, max(1, len(units))))
    return np.unique((hashes >> np.uint64(32)).astype(np.uint32))


def jaccard(a: NDArray[np.uint32], b: NDArray[np.uint32]) -> float:
    """Jaccard similarity of two sorted sets; 0 when both are empty."""
    union = np.concatenate([a, b])
    union.sort(kind="stable")
    common = int((union[1:] == union[:-1]).sum())
    total = len(union) - common
    return common / total if total else 0.0


class MinHasher:
    """128 hash functions h(x) = (a·x + b mod 2⁶⁴) / 2³² with odd a (multiply-shift), fixed by the seed."""

    def __init__(self, seed: int = 1) -> None:
        generator = np.random.default_rng(seed)
        self._a = generator.integers(0, 1 << 63, NUM_PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._b = generator.integers(0, 1 << 63, NUM_PERMUTATIONS, dtype=np.uint64)

    def signatures(self, sets: list[NDArray[np.uint32]]) -> NDArray[np.uint32]:
        """[len(sets), 128] uint32; an empty set gets the largest value everywhere."""
        result = np.full((len(sets), NUM_PERMUTATIONS), 0xFFFFFFFF, np.uint32)
        filled = [index for index, items in enumerate(sets) if len(items)]
        if not filled:
            return result
        values = scramble(np.concatenate([sets[index] for index in filled]).astype(np.uint64))
        starts = np.cumsum([0] + [len(sets[index]) for index in filled[:-1]])
        hashes = np.empty_like(values)
        for function in range(NUM_PERMUTATIONS):
            np.multiply(values, self._a[function], out=hashes)
            np.add(hashes, self._b[function], out=hashes)
            smallest = np.minimum.reduceat(hashes, starts)
            result[filled, function] = (smallest >> np.uint64(32)).astype(np.uint32)
        return result


def band_keys(signatures: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """[N, 21] uint64: one key per band; texts that share one are candidates."""
    bands = signatures[:, : NUM_BANDS * BAND_ROWS].reshape(len(signatures), NUM_BANDS, BAND_ROWS).astype(np.uint64)
    return ngram_rows(bands)


def ngram_rows(bands: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[N, 21, 6] → [N, 21]: a hash of each band."""
    keys = np.zeros(bands.shape[:2], np.uint64)
    for row in range(bands.shape[2]):
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + bands[:, :, row] + np.uint64(1)
    return scramble(keys)


class SimilarityIndex:
    """Collects texts and finds those that are alike.

    threshold: Jaccard similarity from which two texts are near duplicates
    width, unit: of the shingles
    """

    def __init__(self, *, threshold: float = 0.8, width: int = 5, unit: Unit = "words", seed: int = 1) -> None:
        self.threshold = threshold
        self._width, self._unit = width, unit
        self._hasher = MinHasher(seed)
        self._pending: list[NDArray[np.uint32]] = []
        self._num_pending_shingles = 0
        self._keys: list[NDArray[np.uint64]] = []
        self._bytes: list[NDArray[np.uint8]] = []
        self._ends: list[int] = [0]
        self._file = tempfile.SpooledTemporaryFile(max_size=_SPILL_BYTES)  # noqa: SIM115 (closed with the index)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def close(self) -> None:
        """Deletes the temporary file."""
        self._file.close()

    def add(self, text: str) -> None:
        """Adds one normalised text."""
        items = shingles(text, width=self._width, unit=self._unit)
        self._file.write(items.tobytes())
        self._ends.append(self._ends[-1] + len(items))
        self._pending.append(items)
        self._num_pending_shingles += len(items)
        if self._num_pending_shingles >= _BATCH_SHINGLES:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            signatures = self._hasher.signatures(self._pending)
            self._keys.append(band_keys(signatures))
            self._bytes.append((signatures & np.uint32(0xFF)).astype(np.uint8))
            self._pending, self._num_pending_shingles = [], 0

    def _arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        self._flush()
        if not self._keys:
            return np.empty((0, NUM_BANDS), np.uint64), np.empty((0, NUM_PERMUTATIONS), np.uint8)
        self._keys, self._bytes = [np.concatenate(self._keys)], [np.concatenate(self._bytes)]
        return self._keys[0], self._bytes[0]

    def shingles_of(self, index: int) -> NDArray[np.uint32]:
        """[shingles] uint32, sorted, of the text that was added as number `index`."""
        start, end = self._ends[index], self._ends[index + 1]
        self._file.seek(start * 4)
        items = np.frombuffer(self._file.read((end - start) * 4), np.uint32)
        self._file.seek(0, 2)
        return items

    def is_empty(self, index: int) -> bool:
        return self._ends[index] == self._ends[index + 1]

    def join_similar(self, union: UnionFind, numbers: NDArray[np.int64]) -> None:
        """Joins the sets of near duplicates in `union`, where text i of this index is element `numbers[i]`."""
        keys, low_bytes = self._arrays()
        refused: set[tuple[int, int]] = set()
        for band in range(NUM_BANDS):
            for bucket in _equal_runs(keys[:, band]):
                self._join_bucket(bucket, low_bytes, union, numbers, refused)

    def _join_bucket(
        self,
        bucket: NDArray[np.int64],
        low_bytes: NDArray[np.uint8],
        union: UnionFind,
        numbers: NDArray[np.int64],
        refused: set[tuple[int, int]],
    ) -> None:
        representatives: list[int] = []
        for member in bucket.tolist():
            if self.is_empty(member):
                continue
            root = union.find(int(numbers[member]))
            if any(union.find(int(numbers[other])) == root for other in representatives):
                continue
            if representatives:
                agreement = (low_bytes[representatives] == low_bytes[member]).mean(axis=1)
                for position in np.flatnonzero(agreement >= self.threshold - _PREFILTER_MARGIN).tolist():
                    pair = (representatives[position], member)
                    if pair in refused:
                        continue
                    if jaccard(self.shingles_of(pair[0]), self.shingles_of(member)) >= self.threshold:
                        union.join(int(numbers[pair[0]]), int(numbers[member]))
                    elif len(refused) < 1_000_000:
                        refused.add(pair)
            if len(representatives) < _MAX_REPRESENTATIVES:
                representatives.append(member)

    def matches(self, texts: list[str]) -> list[tuple[int, int, float]]:
        """(position in `texts`, number in this index, Jaccard) of every pair that reaches the threshold."""
        keys, low_bytes = self._arrays()
        sets = [shingles(text, width=self._width, unit=self._unit) for text in texts]
        signatures = self._hasher.signatures(sets)
        wanted, wanted_bytes = band_keys(signatures), (signatures & np.uint32(0xFF)).astype(np.uint8)
        candidates: set[tuple[int, int]] = set()
        for band in range(NUM_BANDS):
            order, ordered = self._sorted_band(keys, band)
            left = np.searchsorted(ordered, wanted[:, band], "left")
            right = np.searchsorted(ordered, wanted[:, band], "right")
            for position in np.flatnonzero(right > left).tolist():
                numbers = order[left[position] : right[position]]
                candidates.update((position, number) for number in numbers.tolist())
        found = []
        for position, number in sorted(candidates):
            if not len(sets[position]) or self.is_empty(number):
                continue
            agreement = (wanted_bytes[position] == low_bytes[number]).mean()
            if agreement < self.threshold - _PREFILTER_MARGIN:
                continue
            similarity = jaccard(sets[position], self.shingles_of(number))
            if similarity >= self.threshold:
                found.append((position, number, similarity))
        return found

    def _sorted_band(self, keys: NDArray[np.uint64], band: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        if getattr(self, "_sorted_for", None) != len(keys):
            orders = [np.argsort(keys[:, index], kind="stable") for index in range(NUM_BANDS)]
            self._sorted = [(order, keys[order, index]) for index, order in enumerate(orders)]
            self._sorted_for = len(keys)
        return self._sorted[band]


def _equal_runs(keys: NDArray[np.uint64]) -> Iterator[NDArray[np.int64]]:
    """Positions, ascending, of the elements of each value that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    bounds = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])) if len(keys) else keys[:0]
    lengths = np.diff(bounds.astype(np.int64))
    for run in np.flatnonzero(lengths > 1).tolist():
        yield order[bounds[run] : bounds[run + 1]]
