"""From prepared samples to the micro-batches of a step, on the training device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from affina.data.batches import StreamingBatches
from affina.data.collate import Batch, collate
from affina.data.samples import Sample, SampleStore
from affina.errors import TrainingError


class StepPlan(Protocol):
    """A pure function from the step to the samples of its micro-batches (data/batches.py)."""

    @property
    def steps_per_epoch(self) -> float: ...

    @property
    def tokens_per_row(self) -> int | None:
        """The fixed length of a packed row, None when rows have the length of their samples."""
        ...

    def step(self, step: int, /) -> list[list[int]]: ...


class PlannedBatches:
    """Samples on disk, in the order of a plan. Needs no state: step i is the same step i in every process."""

    def __init__(self, store: SampleStore, plan: StepPlan, *, pad_token_id: int, device: torch.device) -> None:
        self._store = store
        self._plan = plan
        self._pad_token_id = pad_token_id
        self._device = device

    @property
    def steps_per_epoch(self) -> float:
        return self._plan.steps_per_epoch

    def step(self, step: int) -> list[Batch]:
        return [self._batch(self._store.take(indices)) for indices in self._plan.step(step)]

    def longest(self, num_samples: int) -> Batch:
        """The micro-batch that no other can be longer than: of the longest samples, which may meet in any epoch."""
        order = np.argsort(-self._store.lengths, kind="stable")
        return self._batch(self._store.take(order[:num_samples].tolist()))

    def describe(self, step: int) -> str:
        return name_samples(index for row in self._plan.step(step) for index in row)

    def state(self) -> dict[str, Any]:
        return {}

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        batch = collate(samples, num_tokens=self._plan.tokens_per_row, pad_token_id=self._pad_token_id)
        return batch.to(self._device)


class StreamedBatches:
    """Steps in the order in which a stream yields them; a resumed run hands in a stream with the saved position."""

    def __init__(
        self,
        stream: StreamingBatches,
        *,
        num_steps: int,
        first_step: int,
        pad_token_id: int,
        device: torch.device,
    ) -> None:
        self._stream = stream
        self._steps = iter(stream)
        self._next_step = first_step
        self._num_steps = num_steps
        self._pad_token_id = pad_token_id
        self._device = device

    @property
    def steps_per_epoch(self) -> float:
        # A stream has no epochs; the whole run counts as one.
        return float(self._num_steps)

    def step(self, step: int) -> list[Batch]:
        """The next step's micro-batches. Raises TrainingError `stream-empty` when the stream has no more."""
        assert step == self._next_step, "a stream goes forward only"
        self._next_step += 1
        return [
            collate(samples, num_tokens=self._stream.tokens_per_row, pad_token_id=self._pad_token_id).to(self._device)
            for samples in self._next_rows()
        ]

    def describe(self, step: int) -> str:
        return f"the stream's samples of step {step + 1}"

    def state(self) -> dict[str, Any]:
        return self._stream.state.to_dict()

    def _next_rows(self) -> list[list[Sample]]:
        rows = next(self._steps, None)
        if rows is None:
            raise TrainingError(
                "stream-empty",
                f"the data stream ended before step {self._next_step} of {self._num_steps}",
                why="a whole pass over the sources gave no usable record; data.on_error: skip leaves faulty ones out",
                fix="set data.on_error: fail to see what is wrong with the records",
            )
        return rows


def name_samples(indices: Iterable[int], *, limit: int = 8) -> str:
    """`samples 12, 55 and 8 more`: numbers of training samples as `affina data --show` counts them, from 0."""
    numbers = list(indices)
    shown = ", ".join(str(number) for number in numbers[:limit])
    return f"samples {shown}" + (f" and {len(numbers) - limit} more" if len(numbers) > limit else "")


def validation_batches(store: SampleStore, *, row_tokens: int, pad_token_id: int, max_samples: int) -> Iterator[Batch]:
    """Validation samples laid end to end in rows of at most `row_tokens` tokens, in their stored order."""
    row: list[Sample] = []
    used = 0
    for index in range(min(len(store), max_samples)):
        sample = store[index]
        if row and used + len(sample) > row_tokens:
            yield collate(row, num_tokens=None, pad_token_id=pad_token_id)
            row, used = [], 0
        row.append(sample)
        used += len(sample)
    if row:
        yield collate(row, num_tokens=None, pad_token_id=pad_token_id)
