"""How much there is to learn: samples, tokens, steps, and the longest micro-batch.

Exact where the data has been prepared (its lengths are known); otherwise estimated from the size of the files, which
takes no time, and said to be an estimate.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affina.catalog.embedded import embedded_dataset_path, is_embedded_name
from affina.config.schema import RunConfig
from affina.data.batches import BatchPlan, round_up

BYTES_PER_TOKEN = 4.0
"""Of JSON with English text: about 4.5 bytes of text to a token, and markup that the template replaces by its own."""
_TEXT_FILES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md")
_MEASURED_RECORDS = 2000


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
    known = [_file_size(source.path, source.split) for source in data.train]
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
        rows = num_tokens / row_tokens_of(config) if data.packing else num_samples / training.micro_batch_size
        steps_per_epoch = max(1, round(rows / training.gradient_accumulation_steps + 0.5))
        num_steps = max(1, round(training.epochs * steps_per_epoch))
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


def _file_size(path: str, split: str | None) -> tuple[int, int] | None:
    """(bytes, records) of a local source's text files; None: not local, or of a kind that says nothing."""
    files = _files(path, split)
    if not files or any(file.suffix.lower() not in _TEXT_FILES for file in files):
        return None
    num_bytes = sum(file.stat().st_size for file in files)
    mean = _mean_record_bytes(files[0])
    return num_bytes, max(1, round(num_bytes / mean))


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


def _mean_record_bytes(file: Path) -> float:
    """By the first records, one to a line."""
    with file.open("rb") as stream:
        sizes = [len(line) for _, line in zip(range(_MEASURED_RECORDS), stream, strict=False)]
    return max(1.0, sum(sizes) / len(sizes)) if sizes else 1.0


def longest_record_bytes(config: RunConfig) -> int | None:
    """Of the longest of each file's first records; None where a source is not a local text file."""
    longest = 0
    for source in config.data.train:
        files = _files(source.path, source.split)
        if not files or any(file.suffix.lower() not in _TEXT_FILES for file in files):
            return None
        for file in files:
            with file.open("rb") as stream:
                longest = max(
                    [longest, *(len(line) for _, line in zip(range(_MEASURED_RECORDS), stream, strict=False))]
                )
    return longest or None
