"""Validation records that training has seen: exactly, nearly, or in long pieces.

Three tests, from certain to suspicious:
- exact: the same prompt and reply, or the same prompt, after normalisation;
- near: MinHash finds a training prompt with Jaccard similarity ≥ 0.8;
- overlap: more than 50% of the words of the validation prompt lie in 8-grams that one training record shares with it,
  the test of Tülu 3 (Lambert et al. 2024, arXiv 2411.15124), here on words.

Only the validation side is kept in memory; training records are read once, in any number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from affina.data.messages import Conversation
from affina.data.quality.minhash import SimilarityIndex, Unit
from affina.data.quality.texts import hash128, ngram_hashes, prompt_and_reply, prompt_text, word_hashes

LeakKind = Literal["pair", "prompt", "near", "overlap"]

NGRAM_WORDS: Final = 8
_BATCH_RECORDS: Final = 512
_SEVERITY: Final[dict[LeakKind, int]] = {"pair": 0, "prompt": 1, "near": 2, "overlap": 3}


@dataclass(frozen=True, slots=True)
class Leak:
    """One validation record that a training record gives away.

    validation, train: numbers of the records
    kind:  pair: the same prompt and reply. prompt: the same prompt. near: Jaccard ≥ threshold. overlap: shared 8-grams
    score: 1, the Jaccard similarity, or the share of the validation prompt's words that are covered
    """

    validation: int
    train: int
    kind: LeakKind
    score: float


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """The worst leak of each validation record that has one, by the record's number."""

    leaks: tuple[Leak, ...]
    num_train: int
    num_validation: int

    @property
    def counts(self) -> dict[LeakKind, int]:
        """Validation records by the kind of their worst leak."""
        found = Counter(leak.kind for leak in self.leaks)
        return {kind: found[kind] for kind in _SEVERITY}

    @property
    def leaked_share(self) -> float:
        """Share of the validation records that leak in any way."""
        return len(self.leaks) / self.num_validation if self.num_validation else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts, and the leaks."""
        return {
            "num_train": self.num_train,
            "num_validation": self.num_validation,
            "counts": dict(self.counts),
            "leaked_share": self.leaked_share,
            "leaks": [
                {
                    "validation": leak.validation,
                    "train": leak.train,
                    "kind": leak.kind,
                    "score": round(leak.score, 4),
                }
                for leak in self.leaks
            ],
        }


def find_leakage(
    train: Iterable[Conversation],
    validation: Iterable[Conversation],
    *,
    threshold: float = 0.8,
    min_overlap: float = 0.5,
    unit: Unit = "words",
) -> LeakageReport:
    """The leaks from `train` into `validation`; each is read once.

    threshold:   Jaccard similarity of the prompts' 5-grams from which they are near duplicates
    min_overlap: share of a validation prompt's words in 8-grams of one training record above which it is contaminated
    """
    detector = _LeakageDetector(validation, threshold, min_overlap, unit)
    num_train = 0
    try:
        for batch in _batches(train, _BATCH_RECORDS):
            detector.check(batch, num_train)
            num_train += len(batch)
    finally:
        detector.close()
    leaks = tuple(detector.worst[number] for number in sorted(detector.worst))
    return LeakageReport(leaks, num_train, detector.num_validation)


class _LeakageDetector:
    """The validation side, and the worst leak of each of its records so far."""

    def __init__(self, validation: Iterable[Conversation], threshold: float, min_overlap: float, unit: Unit) -> None:
        self.worst: dict[int, Leak] = {}
        self.num_validation = 0
        self._min_overlap = min_overlap
        self._pairs: dict[bytes, list[int]] = {}
        self._prompts: dict[bytes, list[int]] = {}
        self._index = SimilarityIndex(threshold=threshold, unit=unit)
        grams: list[NDArray[np.uint64]] = []
        num_words: list[int] = []
        for number, conversation in enumerate(validation):
            prompt, reply = prompt_and_reply(conversation)
            self._pairs.setdefault(hash128(f"{prompt}\x1d{reply}"), []).append(number)
            if prompt:
                self._prompts.setdefault(hash128(prompt), []).append(number)
            text = prompt_text(conversation)
            self._index.add(text)
            words = word_hashes(text)
            num_words.append(len(words))
            grams.append(ngram_hashes(words, NGRAM_WORDS))
            self.num_validation += 1
        self._num_words = np.array(num_words, np.int64)
        self._sort_grams(grams)

    def _sort_grams(self, grams: list[NDArray[np.uint64]]) -> None:
        """Every 8-gram of the validation prompts with the record and the place where it stands, sorted by its hash."""
        values = np.concatenate(grams) if grams else np.empty(0, np.uint64)
        records = np.repeat(np.arange(len(grams), dtype=np.int64), [len(items) for items in grams])
        starts = np.concatenate([np.arange(len(items), dtype=np.int64) for items in grams]) if grams else records
        order = np.argsort(values, kind="stable")
        self._gram_values, self._gram_records, self._gram_starts = values[order], records[order], starts[order]

    def close(self) -> None:
        self._index.close()

    def check(self, batch: list[Conversation], first_number: int) -> None:
        """Compares a batch of training records, the first of which has the number `first_number`."""
        texts = [prompt_text(conversation) for conversation in batch]
        for position, conversation in enumerate(batch):
            number = first_number + position
            prompt, reply = prompt_and_reply(conversation)
            for validation in self._pairs.get(hash128(f"{prompt}\x1d{reply}"), ()):
                self._note(Leak(validation, number, "pair", 1.0))
            if prompt:
                for validation in self._prompts.get(hash128(prompt), ()):
                    self._note(Leak(validation, number, "prompt", 1.0))
            self._check_overlap(texts[position], number)
        for position, validation, similarity in self._index.matches(texts):
            self._note(Leak(validation, first_number + position, "near", similarity))

    def _note(self, leak: Leak) -> None:
        known = self.worst.get(leak.validation)
        if known is None or (_SEVERITY[leak.kind], -leak.score) < (_SEVERITY[known.kind], -known.score):
            self.worst[leak.validation] = leak

    def _check_overlap(self, text: str, number: int) -> None:
        """Notes the validation prompts of which this training text covers more than `min_overlap`."""
        grams = np.unique(ngram_hashes(word_hashes(text), NGRAM_WORDS))
        left = np.searchsorted(self._gram_values, grams, "left")
        right = np.searchsorted(self._gram_values, grams, "right")
        hit = right > left
        if not hit.any():
            return
        places = np.concatenate([np.arange(a, b) for a, b in zip(left[hit], right[hit], strict=True)])
        records, starts = self._gram_records[places], self._gram_starts[places]
        order = np.lexsort((starts, records))
        records, starts = records[order], starts[order]
        # Windows of 8 words overlap: each adds the words up to the start of the next one, at most 8.
        gap = np.full(len(starts), NGRAM_WORDS, np.int64)
        same = records[1:] == records[:-1]
        gap[:-1][same] = np.minimum(starts[1:] - starts[:-1], NGRAM_WORDS)[same]
        covered = np.bincount(records, weights=gap, minlength=self.num_validation)
        share = covered / np.maximum(self._num_words, 1)
        for validation in np.flatnonzero(share > self._min_overlap).tolist():
            self._note(Leak(validation, number, "overlap", float(share[validation])))


def _batches(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
