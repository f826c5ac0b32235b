"""Token ids and labels: what preparation produces and what training reads. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IGNORED_LABEL = -100
"""A position with this label is not part of the loss."""


@dataclass(frozen=True, slots=True)
class TeacherTokens:
    """What a teacher finds likely at each of the N supervised tokens of a sample.

    token_ids: [N, K] int32     log_probabilities: [N, K] float32
    """

    token_ids: NDArray[np.int32]
    log_probabilities: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example: a document, or a few that belong together and are always in the same row.

    input_ids: [L] int32
    labels:    [L] int32, the input id where the token is trained, IGNORED_LABEL elsewhere. `labels[0]` is always
               ignored: nothing predicts a first token, and so samples laid end to end never predict each other. The
               same holds for the first label of every document
    documents: lengths of the documents inside, adding up to L: of a preference pair the chosen and the rejected text.
               () for one document
    desirable: whether the reply is wanted (KTO); None where nobody said
    teacher:   a teacher's distributions (distillation from files)
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    documents: tuple[int, ...] = ()
    desirable: bool | None = None
    teacher: TeacherTokens | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return self.documents or (len(self),)

    def split(self) -> list[Sample]:
        """The documents, each as a sample of its own."""
        if not self.documents:
            return [self]
        ends = np.cumsum(self.documents).tolist()
        return [
            Sample(self.input_ids[end - length : end], self.labels[end - length : end])
            for length, end in zip(self.documents, ends, strict=True)
        ]

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


def join_documents(documents: Sequence[Sample]) -> Sample:
    """One sample of several documents, in this order."""
    return Sample(
        np.concatenate([document.input_ids for document in documents]),
        np.concatenate([document.labels for document in documents]),
        documents=tuple(len(document) for document in documents),
    )


class SampleStore(Protocol):
    """Random access to prepared samples, and their sizes without reading them."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """[N] tokens of each sample."""
        ...

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        """[N] supervised tokens of each sample."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 over everything that determined the samples: records, template, settings."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def take(self, indices: Sequence[int]) -> list[Sample]: ...
