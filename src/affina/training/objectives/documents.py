"""The samples of a packed row, taken apart again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from affina.data.collate import Batch
from affina.data.samples import IGNORED_LABEL

Tokens = NDArray[np.int32]


def question_and_reply(batch: Batch) -> list[tuple[Tokens, Tokens]]:
    """The token ids of each sample before its first trained token, and from there on; samples are one document each."""
    ids, labels = batch.input_ids.cpu().numpy(), batch.labels.cpu().numpy()
    found = []
    end = 0
    for length in batch.lengths[: batch.num_examples]:
        start, end = end, end + length
        first = start + int(np.argmax(labels[start:end] != IGNORED_LABEL))
        found.append((ids[start:first].astype(np.int32), ids[first:end].astype(np.int32)))
    return found
