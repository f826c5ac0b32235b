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
class Sample:
    """One training example.

    input_ids: [L] int32
    labels:    [L] int32, the input id where the token is trained, IGNORED_LABEL elsewhere. `labels[0]` is always
               ignored: nothing predicts a first token, and so samples laid end to end never predict each other.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_supervised(self) -> int:
        return int((self.labels != IGNORED_LABEL).sum())


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
