"""Prepared samples on disk: an Arrow file that is mapped into memory, so that any number of samples costs no RAM.

Per sample the file holds the token ids (int32), one bit per token for the mask, and a few numbers. Sizes are columns of
their own, so that a batch plan is made without touching a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from affina.data.samples import IGNORED_LABEL, Sample, TeacherTokens
from affina.errors import DataError, Location

FORMAT_VERSION = 2
ROWS_PER_BATCH = 512

_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.bool_())),
        ("length", pa.int32()),
        ("num_supervised", pa.int32()),
        ("origin", pa.string()),
        ("source", pa.int32()),
        ("documents", pa.list_(pa.int32())),
        ("desirable", pa.bool_()),
        ("teacher_ids", pa.list_(pa.int32())),
        ("teacher_log_probabilities", pa.list_(pa.float32())),
    ]
)


class StoreWriter:
    """Writes samples one after the other; memory holds one record batch. Use as a context manager."""

    def __init__(self, path: Path, *, fingerprint: str) -> None:
        metadata: dict[str, str] = {
            "affina_format": str(FORMAT_VERSION),
            "fingerprint": fingerprint,
            "rows": str(ROWS_PER_BATCH),
        }
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA.with_metadata(metadata))
        self._pending: list[tuple[Sample, str, int]] = []

    def add(self, sample: Sample, *, origin: str = "", source: int = 0) -> None:
        self._pending.append((sample, origin, source))
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._file.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        samples = [sample for sample, _, _ in self._pending]
        lengths = np.array([len(sample) for sample in samples], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int32, copy=False)
        trained = np.concatenate([sample.labels for sample in samples]) != IGNORED_LABEL
        columns = [
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(trained)),
            pa.array(lengths),
            pa.array([sample.num_supervised for sample in samples], type=pa.int32()),
            pa.array([origin for _, origin, _ in self._pending], type=pa.string()),
            pa.array([source for _, _, source in self._pending], type=pa.int32()),
            pa.array([sample.documents for sample in samples], type=pa.list_(pa.int32())),
            pa.array([sample.desirable for sample in samples], type=pa.bool_()),
            pa.array([s.teacher and s.teacher.token_ids.ravel() for s in samples], type=pa.list_(pa.int32())),
            pa.array([s.teacher and s.teacher.log_probabilities.ravel() for s in samples], type=pa.list_(pa.float32())),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._pending.clear()


class ArrowSampleStore:
    """A `SampleStore` over a file of `StoreWriter`. Cheap to open, safe to hand to other processes by pickling.

    Raises DataError `store-damaged` when the file is not complete.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._map = pa.memory_map(os.fspath(self.path), "r")
            self._reader = pa.ipc.open_file(self._map)
            metadata: dict[str, str] = {
                key.decode(): value.decode() for key, value in (self._reader.schema.metadata or {}).items()
            }
            if metadata.get("affina_format") != str(FORMAT_VERSION):
                raise pa.ArrowInvalid("not a sample store of this version of affina")
            batches = [self._reader.get_batch(index) for index in range(self._reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                "store-damaged",
                "a file of prepared samples cannot be read",
                why=str(error).splitlines()[0],
                fix="delete it; affina prepares the data again",
                where=Location(self.path),
            ) from error
        self._rows_per_batch = int(metadata["rows"])
        self._fingerprint = metadata["fingerprint"]
        self._batches: list[Any] = batches
        self._lengths = _column(batches, "length")
        self._num_supervised = _column(batches, "num_supervised")

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self._lengths

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        return self._num_supervised

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int, /) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        batch, row = divmod(index, self._rows_per_batch)
        columns = self._batches[batch]
        ids = columns.column("input_ids")[row].values.to_numpy(zero_copy_only=True)
        trained = columns.column("trained")[row].values.to_numpy(zero_copy_only=False)
        return Sample(
            ids,
            np.where(trained, ids, np.int32(IGNORED_LABEL)),
            documents=tuple(columns.column("documents")[row].as_py()),
            desirable=columns.column("desirable")[row].as_py(),
            teacher=_teacher(columns, row),
        )

    def take(self, indices: Sequence[int]) -> list[Sample]:
        return [self[int(index)] for index in indices]

    def origin(self, index: int) -> str:
        """`file:line` of the record that the sample was made of."""
        batch, row = divmod(index, self._rows_per_batch)
        return str(self._batches[batch].column("origin")[row])

    @property
    def sources(self) -> NDArray[np.int32]:
        """[N] number of the source that each sample comes from."""
        return _column(self._batches, "source")

    def __reduce__(self) -> tuple[object, ...]:
        return (ArrowSampleStore, (self.path,))


class MemorySampleStore:
    """A `SampleStore` over samples in memory, for small sets and tests."""

    def __init__(self, samples: Iterable[Sample], *, fingerprint: str = "", origins: Sequence[str] = ()) -> None:
        self._samples = list(samples)
        self._origins = tuple(origins)
        self._fingerprint = fingerprint
        self._lengths = np.array([len(sample) for sample in self._samples], dtype=np.int32)
        self._num_supervised = np.array([sample.num_supervised for sample in self._samples], dtype=np.int32)

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self._lengths

    @property
    def num_supervised(self) -> NDArray[np.int32]:
        return self._num_supervised

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        return self._samples[index]

    def take(self, indices: Sequence[int]) -> list[Sample]:
        return [self._samples[int(index)] for index in indices]

    def origin(self, index: int) -> str:
        """`file:line` of the record that the sample was made of; "" when it was not told."""
        return self._origins[index] if self._origins else ""


def _teacher(columns: Any, row: int) -> TeacherTokens | None:
    ids = columns.column("teacher_ids")[row]
    if not ids.is_valid:
        return None
    num_supervised = columns.column("num_supervised")[row].as_py()
    log_probabilities = columns.column("teacher_log_probabilities")[row]
    return TeacherTokens(
        ids.values.to_numpy().reshape(num_supervised, -1),
        log_probabilities.values.to_numpy().reshape(num_supervised, -1),
    )


def _column(batches: Sequence[Any], name: str) -> NDArray[np.int32]:
    if not batches:
        return np.empty(0, dtype=np.int32)
    return np.concatenate([batch.column(name).to_numpy(zero_copy_only=True) for batch in batches])
