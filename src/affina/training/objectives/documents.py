"""The samples of a packed row, taken apart again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from affina.data.collate import Batch
from affina.data.samples import IGNORED_LABEL, Sample

Tokens = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Reply:
    """The token ids of a sample from its first trained token on, and their labels: what templates write after a reply,
    and messages that follow it, are not trained."""

    token_ids: Tokens
    labels: Tokens

    def to(self, question: Tokens) -> Sample:
        """The sample of this reply to `question`: the same tokens are trained."""
        untrained = np.full(len(question), IGNORED_LABEL, dtype=np.int32)
        return Sample(np.concatenate([question, self.token_ids]), np.concatenate([untrained, self.labels]))


def question_and_reply(batch: Batch) -> list[tuple[Tokens, Reply]]:
    """What is before the first trained token of each sample, and the rest; samples are one document each."""
    ids = batch.input_ids.cpu().numpy().astype(np.int32)
    labels = batch.labels.cpu().numpy().astype(np.int32)
    found = []
    end = 0
    for length in batch.lengths[: batch.num_examples]:
        start, end = end, end + length
        first = start + int(np.argmax(labels[start:end] != IGNORED_LABEL))
        found.append((ids[start:first], Reply(ids[first:end], labels[first:end])))
    return found
