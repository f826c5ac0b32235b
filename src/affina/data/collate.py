"""Lays samples end to end in one row of tensors. The only file of this package that knows torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from affina.data.batches import round_up
from affina.data.samples import IGNORED_LABEL, Sample


@dataclass(frozen=True, slots=True)
class Batch:
    """One row of isolated samples; see docs/decisions/0001.

    input_ids:      [T] int64
    labels:         [T] int64, unshifted, -100 ignored; the first label of every sample is ignored
    position_ids:   [T] int64, restarts at 0 in every sample
    cu_seqlens:     [S+1] int32, where the samples start; the last entry is T
    lengths:        [S] differences of cu_seqlens as Python numbers, so that nobody waits for a GPU to know them
    num_tokens:     tokens that belong to samples, without padding
    num_supervised: labels that are not ignored
    num_examples:   samples in the row; a preference pair is one, with two documents
    supervised_lengths: [S] labels of each document that are not ignored
    desirable:      of each sample, where they have it; else empty
    teacher_ids, teacher_log_probabilities: [N, K] int64 and float32, a teacher's likeliest tokens at each of the N
                    supervised tokens; None without a teacher. Where a sample has fewer than K, −inf
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    num_tokens: int
    num_supervised: int
    num_examples: int
    supervised_lengths: tuple[int, ...]
    desirable: tuple[bool, ...] = ()
    teacher_ids: torch.Tensor | None = None
    teacher_log_probabilities: torch.Tensor | None = None

    @property
    def max_seqlen(self) -> int:
        """Length of the longest stretch between two entries of cu_seqlens."""
        return max(self.lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where copies to a GPU can overlap with computation."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        changed: dict[str, Any] = {name: change(value) for name, value in values if isinstance(value, torch.Tensor)}
        return replace(self, **changed)


def collate(samples: Sequence[Sample], *, num_tokens: int | None, pad_token_id: int) -> Batch:
    """A row with the samples in the given order, padded at its end by a sample of its own that has no labels.

    num_tokens: T, the length of the row; None takes what the samples need, rounded up to a multiple of 128

    Raises ValueError when there are no samples or they do not fit.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    used = sum(len(sample) for sample in samples)
    total = round_up(used) if num_tokens is None else num_tokens
    if used > total:
        raise ValueError(f"{used} tokens do not fit into a row of {total}")
    input_ids = np.full(total, pad_token_id, dtype=np.int64)
    labels = np.full(total, IGNORED_LABEL, dtype=np.int64)
    position_ids = np.empty(total, dtype=np.int64)
    starts = [0]
    for sample in samples:
        first = starts[-1]
        input_ids[first : first + len(sample)] = sample.input_ids
        labels[first : first + len(sample)] = sample.labels
        for length in sample.document_lengths:
            start = starts[-1]
            labels[start] = IGNORED_LABEL
            position_ids[start : start + length] = np.arange(length)
            starts.append(start + length)
    if used < total:
        position_ids[used:] = np.arange(total - used)
        starts.append(total)
    cu_seqlens = np.asarray(starts, dtype=np.int32)
    lengths = tuple(int(length) for length in np.diff(cu_seqlens))
    is_supervised = labels != IGNORED_LABEL
    supervised_lengths = tuple(int(count) for count in np.add.reduceat(is_supervised, starts[:-1], dtype=np.int64))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=lengths,
        num_tokens=used,
        num_supervised=sum(supervised_lengths),
        num_examples=len(samples),
        supervised_lengths=supervised_lengths,
        desirable=tuple(sample.desirable for sample in samples if sample.desirable is not None),
        **_teacher_tensors(samples),
    )


def _teacher_tensors(samples: Sequence[Sample]) -> dict[str, Any]:
    teachers = [sample.teacher for sample in samples if sample.teacher is not None]
    if not teachers:
        return {}
    width = max(teacher.token_ids.shape[1] for teacher in teachers)

    def rows(arrays: Sequence[NDArray[Any]], filler: float) -> torch.Tensor:
        padded = [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=filler) for a in arrays]
        return torch.from_numpy(np.concatenate(padded))

    return {
        "teacher_ids": rows([teacher.token_ids.astype(np.int64) for teacher in teachers], 0),
        "teacher_log_probabilities": rows(
            [teacher.log_probabilities.astype(np.float32) for teacher in teachers], -np.inf
        ),
    }
