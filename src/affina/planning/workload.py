"""How much there is to learn: samples, tokens, steps, and the longest micro-batch.

Exact where the data has been prepared (its lengths are known); otherwise estimated from the size of the files, which
takes no time, and said to be an estimate.
"""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affina.catalog.embedded import embedded_dataset_path, is_embedded_name
from affina.config.schema import RunConfig, SourceConfig
from affina.data.batches import BatchPlan, round_up
from affina.data.json_records import read_json
from affina.data.records import RecordProblem
from affina.errors import DataError

BYTES_PER_TOKEN = 4.0
"""Of JSON with English text: about 4.5 bytes of text to a token, and markup that the template replaces by its own."""
_TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
_MEASURED_FILES, _MEASURED_RECORDS = 20, 2000


@dataclass(frozen=True, slots=True)
class Workload:
    """The data of a run.

    num_samples, num_tokens, num_supervised: of one epoch; None: unknown
    num_steps, steps_per_epoch: of the optimiser
    num_validation: samples held out
    row_lengths:  documents of the row that needs most memory: a full one, or the longest micro-batch
    mean_lengths: documents of the row by which time is counted
    longest:      tokens of the longest sample, None: unknown
    is_exact:     the data was tokenised; else sizes of files were divided by a usual number
    """

    num_samples: int | None
    num_tokens: int | None
    num_supervised: int | None
    num_steps: int | None
    steps_per_epoch: int | None
    num_validation: int
    row_lengths: tuple[int, ...]
    mean_lengths: tuple[int, ...]
    row_supervised: int | None
    longest: int | None
    is_exact: bool


def row_tokens_of(config: RunConfig) -> int:
    """Tokens of a full row."""
    return round_up(config.training.micro_batch_size * config.data.max_length)


def measured_workload(
    config: RunConfig,
    lengths: Sequence[int] | NDArray[np.integer[Any]],
    num_supervised: Sequence[int] | NDArray[np.integer[Any]],
    *,
    num_validation: int,
) -> Workload:
    """The workload of prepared data, from the very plan of batches that training follows."""
    training = config.training
    sizes, supervised = np.asarray(lengths), np.asarray(num_supervised)
    plan = BatchPlan(
        sizes,
        max_length=config.data.max_length,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        packing=config.data.packing,
        seed=training.seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        num_supervised=supervised,
    )
    if config.data.packing:
        rows = [row for index in range(min(plan.steps_per_epoch, 50)) for row in plan.step(index)]
        longest_row = max(rows, key=lambda row: float((sizes[row].astype(np.float64) ** 2).sum()))
    else:
        # Every epoch deals micro-batches anew: any samples may meet, so the longest ones will be met for sure.
        longest_row = np.argsort(sizes)[::-1][: training.micro_batch_size].tolist()
    return Workload(
        num_samples=len(sizes),
        num_tokens=int(sizes.sum()),
        num_supervised=int(supervised.sum()),
        num_steps=plan.num_steps,
        steps_per_epoch=plan.steps_per_epoch,
        num_validation=num_validation,
        row_lengths=tuple(int(length) for length in sizes[longest_row]),
        mean_lengths=_mean_row(config, int(sizes.sum()), len(sizes)),
        row_supervised=int(supervised[longest_row].sum()),
        longest=int(sizes.max()),
        is_exact=True,
    )


def estimated_workload(config: RunConfig) -> Workload:
    """The workload by the sizes of local files; unknown parts are None."""
    training, data = config.training, config.data
    known = [_file_size(source, data.max_record_bytes) for source in data.train]
    num_samples = num_tokens = None
    if known and all(part is not None for part in known):
        parts = [part for part in known if part is not None]
        num_bytes, num_samples = sum(part[0] for part in parts), sum(part[1] for part in parts)
        num_tokens = max(1, int(num_bytes / BYTES_PER_TOKEN))
    num_validation = 0
    if not data.validation and num_samples is not None and num_tokens is not None:
        num_validation = min(round(num_samples * data.validation_fraction), data.max_validation_records)
        num_tokens = int(num_tokens * (1 - num_validation / max(num_samples, 1)))
        num_samples -= num_validation
    num_steps = steps_per_epoch = None
    if num_samples and num_tokens:
        filled = num_tokens / row_tokens_of(config) if data.packing else num_samples / training.micro_batch_size
        rows = math.ceil(filled)
        steps_per_epoch = max(1, math.ceil(rows / training.gradient_accumulation_steps))
        num_steps = max(1, math.ceil(training.epochs * steps_per_epoch - 1e-9))
    if training.max_steps is not None:
        num_steps = min(num_steps, training.max_steps) if num_steps is not None else training.max_steps
    return Workload(
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_supervised=None,
        num_steps=num_steps,
        steps_per_epoch=steps_per_epoch,
        num_validation=num_validation,
        row_lengths=_full_row(config, num_tokens, num_samples),
        mean_lengths=_mean_row(config, num_tokens, num_samples),
        row_supervised=None,
        longest=None,
        is_exact=False,
    )


def _full_row(config: RunConfig, num_tokens: int | None, num_samples: int | None) -> tuple[int, ...]:
    """Packed: a full row of documents of the mean length; otherwise the longest samples that can be."""
    if config.data.packing:
        return _mean_row(config, num_tokens, num_samples)
    return (config.data.max_length,) * config.training.micro_batch_size


def _mean_row(config: RunConfig, num_tokens: int | None, num_samples: int | None) -> tuple[int, ...]:
    """Documents of the mean length: as many as fill a row, or as many as are in a micro-batch."""
    limit = config.data.max_length
    mean = min(limit, max(1, num_tokens // num_samples)) if num_tokens and num_samples else limit
    if not config.data.packing:
        return (mean,) * config.training.micro_batch_size
    total = row_tokens_of(config)
    return (mean,) * (total // mean) + ((total % mean,) if total % mean else ())


def _file_size(source: SourceConfig, max_record_bytes: int) -> tuple[int, int] | None:
    """(bytes, records) of a local source's text files; None: not local, or of a kind that says nothing."""
    measured = _measured(source, max_record_bytes)
    if measured is None:
        return None
    num_bytes, num_records = (sum(getattr(file, name) for file in measured) for name in ("num_bytes", "num_records"))
    others = _files(source.path, source.split)[len(measured) :]
    share = sum(file.stat().st_size for file in others) / max(sum(file.file_bytes for file in measured), 1)
    return round(num_bytes * (1 + share)), max(1, round(num_records * (1 + share)))


def _files(path: str, split: str | None) -> list[Path]:
    if is_embedded_name(path):
        embedded = embedded_dataset_path(path, split)
        return [embedded] if embedded is not None else []
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix.lower() in _TEXT_FILES)
    return [Path(file) for file in sorted(glob.glob(str(place)))]


@dataclass(frozen=True, slots=True)
class _Measured:
    """A file by its first records.

    file_bytes:    as it is on the disk
    num_bytes:     of its records, without what is only layout
    longest_bytes: of the longest of the first records
    """

    file_bytes: int
    num_bytes: int
    num_records: int
    longest_bytes: int


def _measured(source: SourceConfig, max_record_bytes: int) -> list[_Measured] | None:
    """Of a local source's first text files; None: not local, of a kind that says nothing, or not what they seem."""
    files = _files(source.path, source.split)
    if not files or any(file.suffix.lower() not in _TEXT_FILES for file in files):
        return None
    try:
        return [_measure(file, source.split, max_record_bytes) for file in files[:_MEASURED_FILES]]
    except DataError:
        return None  # reading the data says what is wrong with it


def _measure(file: Path, split: str | None, max_record_bytes: int) -> _Measured:
    """By its first records: the objects of JSON, the lines of other files."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix.lower() == ".json":
            records = read_json(stream, name=str(file), split=split, max_record_bytes=max_record_bytes, report=_ignore)
            sizes = [
                (record.raw_bytes, len(json.dumps(record.value, ensure_ascii=False).encode(errors="replace")))
                for record in islice(records, _MEASURED_RECORDS + 1)
            ]
        else:
            sizes = [(len(line), len(line)) for line in islice(stream, _MEASURED_RECORDS + 1)]
    first = sizes[:_MEASURED_RECORDS]
    raw, text = sum(size[0] for size in first), sum(size[1] for size in first)
    longest = max((size[1] for size in first), default=0)
    if len(sizes) == len(first):  # that was all of them
        return _Measured(file_bytes, text, len(first), longest)
    share = file_bytes / raw
    return _Measured(file_bytes, round(share * text), round(share * len(first)), longest)


def _ignore(problem: RecordProblem) -> None:
    """What is wrong with a record is told when the data is read."""


def longest_record_bytes(config: RunConfig) -> int | None:
    """Of the longest of each file's first records; None where a source is not a local text file."""
    longest = 0
    for source in config.data.train:
        measured = _measured(source, config.data.max_record_bytes)
        if measured is None:
            return None
        longest = max([longest, *(sample.longest_bytes for sample in measured)])
    return longest or None
