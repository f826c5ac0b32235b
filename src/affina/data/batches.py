"""Which samples every optimiser step trains: a pure function of the step number.

`BatchPlan.step(i)` needs no state, so that a run that is resumed at step i sees exactly what it would have seen.
`StreamingBatches` does the same for data that is read while training, where the only state is how far the reading is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affina.data.packing import efficiency, pack
from affina.data.samples import Sample

ROW_MULTIPLE = 128
"""Rows are padded to a multiple of this: one captured graph and full tensor-core tiles for every step."""


def round_up(num_tokens: int, multiple: int = ROW_MULTIPLE) -> int:
    """The smallest multiple that is not below num_tokens."""
    return -(-num_tokens // multiple) * multiple


class BatchPlan:
    """The order of all samples over the whole run.

    A micro-batch is a list of sample indices that are laid end to end in one row.

    packing=True:  a row has micro_batch_size × max_length tokens (rounded up to a multiple of 128) and is filled with
                   as many samples as fit, best-fit decreasing over the whole set, once. Every epoch visits the rows in
                   another order.
    packing=False: a row has micro_batch_size samples, drawn anew every epoch. Rows differ in length.

    The last step of an epoch may have fewer micro-batches; no sample is left out, and none is seen twice in an epoch.
    The number of steps is that of the epochs (a fraction of one is rounded up), at most max_steps.
    """

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        *,
        max_length: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        packing: bool,
        seed: int,
        epochs: float,
        max_steps: int | None = None,
        num_supervised: Sequence[int] | NDArray[np.integer[Any]] | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.size == 0:
            raise ValueError("a batch plan needs at least one sample")
        if int(self._lengths.max()) > max_length:
            raise ValueError(f"a sample of {self._lengths.max()} tokens is longer than max_length {max_length}")
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.is_packed = packing
        self.seed = seed
        self.epochs = epochs
        self._supervised = None if num_supervised is None else np.asarray(num_supervised, dtype=np.int64)
        self._rows = pack(self._lengths, micro_batch_size * max_length, seed=seed & 0xFFFFFFFF) if packing else None
        self._epoch_rows: tuple[int, list[list[int]]] | None = None
        wanted = math.ceil(epochs * self.steps_per_epoch - 1e-9)
        self.num_steps = max(1, min(wanted, max_steps) if max_steps is not None else wanted)

    @property
    def num_samples(self) -> int:
        return len(self._lengths)

    @property
    def micro_batches_per_epoch(self) -> int:
        return len(self._rows) if self._rows is not None else -(-self.num_samples // self.micro_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.micro_batches_per_epoch // self.gradient_accumulation_steps)

    @property
    def tokens_per_row(self) -> int | None:
        """Length of every row when packing; None when rows differ."""
        return round_up(self.micro_batch_size * self.max_length) if self.is_packed else None

    @property
    def efficiency(self) -> float:
        """Share of the computed tokens that belong to samples, over the first epoch."""
        rows = self._rows_of_epoch(0)
        if self.tokens_per_row is not None:
            return efficiency(self._lengths, len(rows), self.tokens_per_row)
        computed = sum(round_up(int(self._lengths[row].sum())) for row in rows)
        return float(self._lengths.sum() / computed)

    @property
    def padded_efficiency(self) -> float:
        """What padding to the longest sample would give, with as many samples per micro-batch as a row has here."""
        per_row = max(round(self.num_samples / self.micro_batches_per_epoch), 1)
        return padded_efficiency(self._lengths, per_row, self.seed)

    def step(self, index: int) -> list[list[int]]:
        """The micro-batches of one optimiser step, each a list of sample indices.

        Defined for every index ≥ 0, also beyond num_steps.
        """
        epoch, position = divmod(index, self.steps_per_epoch)
        rows = self._rows_of_epoch(epoch)
        start = position * self.gradient_accumulation_steps
        return [list(row) for row in rows[start : start + self.gradient_accumulation_steps]]

    def epoch_at(self, index: int) -> float:
        """How many passes over the data are behind when step `index` begins."""
        return index / self.steps_per_epoch

    def supervised_tokens(self, index: int) -> int | None:
        """Supervised tokens of one step, the divisor of its loss; None when the plan was not told."""
        if self._supervised is None:
            return None
        return int(sum(self._supervised[row].sum() for row in self.step(index)))

    def describe(self) -> str:
        """One sentence for the user about rows, steps and how full the rows are."""
        passes = f"{self.epochs:g} epoch{'' if self.epochs == 1 else 's'}"
        shape = (
            f"packed into {self.micro_batches_per_epoch:,} rows of {self.tokens_per_row:,} tokens"
            if self.is_packed
            else f"in {self.micro_batches_per_epoch:,} micro-batches of {self.micro_batch_size}"
        )
        return (
            f"{self.num_samples:,} samples {shape}, {self.efficiency:.1%} full "
            f"(padding would give {self.padded_efficiency:.1%}); {self.num_steps:,} steps for {passes} "
            f"({self.steps_per_epoch:,} per epoch)"
        )

    def _rows_of_epoch(self, epoch: int) -> list[list[int]]:
        if self._epoch_rows is not None and self._epoch_rows[0] == epoch:
            return self._epoch_rows[1]
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, epoch])
        if self._rows is not None:
            rows = [self._rows[i] for i in generator.permutation(len(self._rows)).tolist()]
        else:
            order = generator.permutation(self.num_samples).tolist()
            rows = [order[i : i + self.micro_batch_size] for i in range(0, len(order), self.micro_batch_size)]
        self._epoch_rows = (epoch, rows)
        return rows


def padded_efficiency(lengths: Sequence[int] | NDArray[np.integer[Any]], batch_size: int, seed: int = 0) -> float:
    """Share of useful tokens when shuffled batches are padded to their longest sample."""
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return 1.0
    shuffled = np.random.default_rng([seed & 0xFFFFFFFF, 0]).permutation(sizes)
    starts = np.arange(0, len(shuffled), batch_size)
    longest = np.maximum.reduceat(shuffled, starts)
    counts = np.diff(np.append(starts, len(shuffled)))
    return float(sizes.sum() / (longest * counts).sum())


@dataclass(frozen=True, slots=True)
class StreamState:
    """How far a stream was read: enough to go on exactly there.

    records:       raw records read before the current window, over all passes
    micro_batches: micro-batches of the current window that were already given out
    """

    records: int = 0
    micro_batches: int = 0

    def to_dict(self) -> dict[str, int]:
        return {"records": self.records, "micro_batches": self.micro_batches}


OpenStream = Callable[[int], Iterable[tuple[int, Sequence[Sample]]]]
"""From how many raw records to skip, to (raw records read in all, samples made of the last ones) pairs, in order."""


class StreamingBatches:
    """Optimiser steps from samples that are read while training.

    Samples are collected until a window is full, packed inside it, and the rows of the window are shuffled. Rows of a
    window and their order depend on the records and the seed only, so that `state` and the source give the rest.
    """

    def __init__(
        self,
        open_stream: OpenStream,
        *,
        max_length: int,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        packing: bool,
        seed: int,
        window_samples: int = 1000,
        state: StreamState | None = None,
    ) -> None:
        self._open_stream = open_stream
        self.max_length = max_length
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.is_packed = packing
        self.seed = seed
        self.window_samples = window_samples
        self.state = state or StreamState()

    @property
    def tokens_per_row(self) -> int | None:
        return round_up(self.micro_batch_size * self.max_length) if self.is_packed else None

    def __iter__(self) -> Iterator[list[list[Sample]]]:
        """Steps, each a list of micro-batches; `state` is up to date whenever a step is handed out.

        The last step of a stream that ends may have fewer micro-batches.
        """
        step: list[list[Sample]] = []
        for row, after in self._micro_batches(self.state):
            step.append(row)
            if len(step) == self.gradient_accumulation_steps:
                self.state = after
                yield step
                step = []
        if step:
            self.state = after
            yield step

    def _micro_batches(self, start: StreamState) -> Iterator[tuple[list[Sample], StreamState]]:
        skip = start.micro_batches
        begin = start.records
        for window, end in self._windows(start.records):
            rows = self._arrange(window, begin)
            for number, row in enumerate(rows[skip:], start=skip + 1):
                yield row, StreamState(end, 0) if number == len(rows) else StreamState(begin, number)
            begin, skip = end, 0

    def _windows(self, skip_records: int) -> Iterator[tuple[list[Sample], int]]:
        """(samples, raw records read up to the end of the window)"""
        window: list[Sample] = []
        num_records = skip_records
        for num_records, samples in self._open_stream(skip_records):
            window.extend(samples)
            if len(window) >= self.window_samples:
                yield window, num_records
                window = []
        if window:
            yield window, num_records

    def _arrange(self, window: list[Sample], begin: int) -> list[list[Sample]]:
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, begin])
        if self.is_packed:
            rows = pack(
                [len(sample) for sample in window],
                self.micro_batch_size * self.max_length,
                seed=self.seed & 0xFFFFFFFF,
            )
            return [[window[i] for i in rows[r]] for r in generator.permutation(len(rows)).tolist()]
        order = generator.permutation(len(window)).tolist()
        size = self.micro_batch_size
        return [[window[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
