"""From sources to packed-ready samples: read, check, split, mix, encode, report. Done once and cached.

Order matters: records are deduplicated and split before any of them is cut into parts or repeated by a mix, so that
no piece of a validation record can end up in training. Memory holds a few hundred bytes per record (hashes and
signatures), never texts or tokens: those go through files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from affina.config.objectives import Records
from affina.data.cache import default_cache_directory, open_or_build
from affina.data.conversations import ConversationStore, ConversationWriter
from affina.data.encoding import EncodeSettings, RecordSamples, encode_all
from affina.data.mixing import mix_sources
from affina.data.pii import count_pii, mask_conversation
from affina.data.quality import DuplicateFinder, Duplicates, conversation_hash, find_leakage
from affina.data.quality.duplicates import Deduplication
from affina.data.report import (
    DataReport,
    SourceReport,
    find_problems,
    summarize_lengths,
    summarize_packing,
)
from affina.data.sources import DEFAULT_MAX_RECORD_BYTES
from affina.data.splits import join_groups, split_groups, split_hashes
from affina.data.store import ArrowSampleStore, StoreWriter
from affina.data.templates import ChatTemplate
from affina.data.tokenizer import LoadedTokenizer
from affina.data.validation import ConversationStream, OnError, SourceSpec, read_conversations
from affina.errors import AffinaErrors, DataError

PREPARATION_VERSION = 3
"""Part of every cache key: raise it whenever the same input gives other samples."""

PARALLEL_FROM_BYTES = 16 * 1024 * 1024
"""Below this much text, starting processes costs more than they save."""

MAX_REPORTED_ERRORS = 20
_MAX_LISTED_PROBLEMS = 200
# With `fail`, how many more records are encoded after the first error in search of others to report with it.
_RECORDS_AFTER_FIRST_ERROR = 10_000

Progress = Callable[[str, int, int | None], None]
"""Called with a stage ("reading", "encoding train", …), records done, and records in all where that is known."""


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the prepared data, besides sources and tokenizer.

    seed:   of the split and the mix
    wanted: what the objective learns from
    """

    encode: EncodeSettings
    weights: tuple[float | None, ...] = ()
    validation_fraction: float = 0.1
    max_validation_records: int = 1000
    on_error: OnError = "fail"
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    deduplicate: Deduplication = "none"
    mask_pii: bool = False
    seed: int = 0
    wanted: Records = "replies"


@dataclass(frozen=True)
class PreparedData:
    """What training and evaluation need.

    train, validation:        samples; validation is empty when none was asked for
    validation_conversations: the records of the validation samples, for generation and comparison
    contract:                 see `ChatTemplate.contract`; to be stored with the adapter
    fingerprint:              sha256 of everything that decided this data
    enable_thinking:          how prompts are built so that they look as trained; None: the template has no switch
    was_cached:               nothing had to be done
    """

    train: ArrowSampleStore
    validation: ArrowSampleStore
    validation_conversations: ConversationStore
    report: DataReport
    template: ChatTemplate
    fingerprint: str
    directory: Path
    was_cached: bool

    @property
    def enable_thinking(self) -> bool | None:
        return self.report.enable_thinking

    @cached_property
    def contract(self) -> dict[str, Any]:
        return self.template.contract(enable_thinking=self.enable_thinking)


def prepare(
    train: Sequence[SourceSpec],
    *,
    tokenizer: LoadedTokenizer,
    settings: PrepareSettings,
    validation: Sequence[SourceSpec] = (),
    num_workers: int | None = None,
    cache_directory: Path | None = None,
    micro_batch_size: int = 1,
    packing: bool = True,
    progress: Progress | None = None,
) -> PreparedData:
    """Prepared data, from the cache where the same was prepared before.

    validation:      a set of its own; empty: a part is split off, see `settings`
    num_workers:     processes that encode; None: one per core, but only one for small sets. Does not change the result
    micro_batch_size, packing: for the report's section about packing only

    Raises DataError and AffinaErrors about sources, records and templates; `all-labels-masked`, `all-too-long`.
    """
    cache = (cache_directory or default_cache_directory()).expanduser()
    streams = [
        read_conversations(
            specs,
            on_error=settings.on_error,
            max_record_bytes=settings.max_record_bytes,
            cache_directory=cache,
            wanted=settings.wanted,
        )
        for specs in (train, validation)
    ]
    template = ChatTemplate(tokenizer, thinking=settings.encode.thinking, system_prompt=settings.encode.system_prompt)
    key = _fingerprint(streams, template, settings)

    def build(folder: Path) -> None:
        _Preparation(folder, streams, template, settings, num_workers, key, progress or _ignore_progress).run()

    folder, was_cached = open_or_build(cache, key, build)
    store = ArrowSampleStore(folder / "train.arrow")
    report = DataReport.from_dict(json.loads((folder / "report.json").read_text()))
    report = replace(
        report,
        packing=summarize_packing(
            store.lengths,
            max_length=settings.encode.max_length,
            micro_batch_size=micro_batch_size,
            packing=packing,
            seed=settings.seed,
        ),
    )
    return PreparedData(
        train=store,
        validation=ArrowSampleStore(folder / "validation.arrow"),
        validation_conversations=ConversationStore(folder / "validation.jsonl"),
        report=replace(report, findings=find_problems(report)),
        template=template,
        fingerprint=key,
        directory=folder,
        was_cached=was_cached,
    )


def _ignore_progress(stage: str, done: int, total: int | None) -> None:
    pass


def _fingerprint(streams: Sequence[ConversationStream], template: ChatTemplate, settings: PrepareSettings) -> str:
    parts = [str(PREPARATION_VERSION), template.fingerprint, repr(settings)]
    for stream in streams:
        # Descriptions are part of it because the records' origins are stored, and must name the file that was given.
        parts += [stream.fingerprint(), *(source.description for source in stream.sources)]
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()


def choose_num_workers(asked: int | None, num_bytes: int) -> int:
    """How many processes encode this much text."""
    if asked is not None:
        return max(asked, 1)
    if num_bytes < PARALLEL_FROM_BYTES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Spool:
    """Valid records on disk, and what is kept of each in memory."""

    store: ConversationStore
    hashes: list[str]
    groups: list[str | None]
    sources: NDArray[np.int32]
    duplicates: Duplicates
    pii: Counter[str]


class _Preparation:
    """One preparation into one folder."""

    def __init__(
        self,
        folder: Path,
        streams: Sequence[ConversationStream],
        template: ChatTemplate,
        settings: PrepareSettings,
        num_workers: int | None,
        fingerprint: str,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._train_stream, self._validation_stream = streams
        self._template = template
        self._settings = settings
        self._num_workers = num_workers
        self._fingerprint = fingerprint
        self._progress = progress
        self._notes: list[str] = [*template.tokenizer.notes, *template.notes]
        self._problems: list[dict[str, Any]] = []
        self._num_unencodable = 0

    def run(self) -> None:
        spool = self._spool(self._train_stream, "reading train")
        kept = spool.duplicates.kept(self._settings.deduplicate)
        train, held_out, split = self._split(spool, kept)
        if self._validation_stream.sources:
            own = self._spool(self._validation_stream, "reading validation")
            validation_store, validation = own.store, np.arange(len(own.store))
            spool.pii.update(own.pii)
            split = {**split, "validation": _hash_of_set(own.hashes)}
        else:
            validation_store, validation = spool.store, held_out
        mixed = self._mix(spool, train)
        counts = self._encode(spool.store, mixed, "train")
        validation_counts = self._encode(validation_store, validation, "validation")
        sizes = ArrowSampleStore(self._folder / "train.arrow")
        if not len(sizes):
            raise _nothing_left(counts, self._settings)
        if self._settings.wanted == "labels":
            _require_both_labels(counts)
        enable_thinking = _serves_thinking(self._template, counts)
        if enable_thinking is False:
            # Replies that were laid out as if thinking were on are not what serving sends when it is off.
            counts["prefix_mismatches"] += counts["prompt_thinking_on"]
        validation_sizes = ArrowSampleStore(self._folder / "validation.arrow")
        kept_validation = ConversationStore(self._folder / "validation.jsonl")
        leakage = {}
        if len(kept_validation):
            self._progress("comparing train and validation", 0, None)
            leakage = find_leakage(spool.store.select(np.unique(mixed)), kept_validation).to_dict()
            leakage["leaks"] = leakage["leaks"][:_MAX_LISTED_PROBLEMS]
        streams = (self._train_stream, self._validation_stream)
        report = DataReport(
            sources=tuple(_source_reports(streams)),
            num_records_read=sum(source.num_read for stream in streams for source in stream.sources),
            num_records_skipped=sum(stream.problems.num_skipped for stream in streams) + self._num_unencodable,
            num_records_repaired=sum(stream.problems.num_repaired for stream in streams),
            num_duplicates_removed=len(spool.store) - len(kept),
            train=summarize_lengths(sizes.lengths, sizes.num_supervised),
            validation=summarize_lengths(validation_sizes.lengths, validation_sizes.num_supervised),
            counts=dict(sorted((+counts).items())),
            validation_counts=dict(sorted(validation_counts.items())),
            problems=self._problem_report(streams),
            duplicates=_located(spool),
            leakage=leakage,
            pii=dict(sorted(spool.pii.items())),
            split=split,
            template=self._template_report(),
            enable_thinking=enable_thinking,
            max_length=self._settings.encode.max_length,
            notes=tuple(self._notes),
        )
        (self._folder / "report.json").write_text(json.dumps(report.to_dict(), indent=2, default=str) + "\n")
        for path in self._folder.glob("spool-*"):
            path.unlink()

    # Reading

    def _spool(self, stream: ConversationStream, stage: str) -> _Spool:
        path = self._folder / f"spool-{stage.rsplit(maxsplit=1)[-1]}.jsonl"
        hashes: list[str] = []
        groups: list[str | None] = []
        sources: list[int] = []
        pii: Counter[str] = Counter()
        with ConversationWriter(path) as writer, DuplicateFinder() as finder:
            for conversation in stream:
                pii.update(count_pii(conversation))
                record = mask_conversation(conversation) if self._settings.mask_pii else conversation
                writer.add(record)
                finder.add(record)
                hashes.append(conversation_hash(record))
                groups.append(record.group)
                sources.append(record.source)
                if len(hashes) % 256 == 0:
                    self._progress(stage, len(hashes), None)
            self._progress(stage, len(hashes), len(hashes))
            duplicates = finder.result()
        found = Counter() if self._settings.mask_pii else pii
        if self._settings.mask_pii and pii:
            listed = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(pii.items()))
            self._notes.append(f"personal data was replaced by placeholders: {listed}")
        return _Spool(
            ConversationStore(path), hashes, groups, np.array(sources, dtype=np.int32), duplicates, Counter(found)
        )

    def _split(
        self, spool: _Spool, kept: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, Any]]:
        """(train records, validation records, what the report says about the split)"""
        hashes = [spool.hashes[index] for index in kept.tolist()]
        if self._validation_stream.sources:
            return kept, kept[:0], {"train": _hash_of_set(hashes)}
        keys = join_groups(hashes, [spool.groups[index] for index in kept.tolist()], spool.duplicates.near[kept])
        split = split_groups(
            keys,
            fraction=self._settings.validation_fraction,
            max_validation_records=self._settings.max_validation_records,
            seed=self._settings.seed,
        )
        about = {**split_hashes(split, hashes), "num_groups": list(split.num_groups)}
        return kept[split.train], kept[split.validation], about

    def _mix(self, spool: _Spool, train: NDArray[np.int64]) -> NDArray[np.int64]:
        """The training records in the order in which they are encoded, repeated or left out as the weights say."""
        weights = self._settings.weights
        if not weights or all(weight is None for weight in weights):
            return train
        of_source = [train[spool.sources[train] == index] for index in range(len(weights))]
        mix = mix_sources(
            [len(records) for records in of_source],
            weights,
            seed=self._settings.seed & 0xFFFFFFFF,
            names=[source.description for source in self._train_stream.sources],
        )
        self._notes.extend(mix.notes)
        pairs = zip(mix.sources.tolist(), mix.records.tolist(), strict=True)
        return np.fromiter((of_source[source][record] for source, record in pairs), dtype=np.int64, count=len(mix))

    # Encoding

    def _encode(self, store: ConversationStore, records: NDArray[np.int64], side: str) -> Counter[str]:
        """Writes `<side>.arrow` (and the conversations that gave validation samples); what was counted."""
        counts: Counter[str] = Counter()
        errors = _ErrorCollector(self._settings.on_error)
        num_workers = choose_num_workers(self._num_workers, store.path.stat().st_size if len(records) else 0)
        results = encode_all(
            store.select(records), self._template.tokenizer, self._settings.encode, num_workers=num_workers
        )
        keeps_conversations = side == "validation"
        first_error = 0
        with (
            StoreWriter(self._folder / f"{side}.arrow", fingerprint=f"{self._fingerprint}-{side}") as writer,
            ConversationWriter(self._folder / f"{side}.jsonl") as conversations,
        ):
            for number, (record, result) in enumerate(zip(records.tolist(), results, strict=True), start=1):
                if result.error is not None:
                    errors.add(result.error)
                    first_error = first_error or number
                elif not errors.is_stopping:
                    _write(result, writer)
                    if keeps_conversations and result.samples:
                        conversations.add(store[record])
                if errors.is_stopping and number - first_error >= _RECORDS_AFTER_FIRST_ERROR:
                    errors.raise_errors()
                counts.update(result.counts)
                if number % 64 == 0 or number == len(records):
                    self._progress(f"encoding {side}", number, len(records))
        errors.raise_errors()
        self._num_unencodable += errors.num_errors
        self._problems += errors.listed
        if not keeps_conversations:
            for path in self._folder.glob(f"{side}.jsonl*"):
                path.unlink()
        return counts

    # The report

    def _problem_report(self, streams: Iterable[ConversationStream]) -> dict[str, Any]:
        counts: Counter[tuple[str, str]] = Counter()
        listed: list[dict[str, Any]] = []
        for stream in streams:
            counts.update(stream.problems.counts)
            listed += [problem.to_dict() for problem in stream.problems.listed]
        for problem in self._problems:
            counts[str(problem["code"]), "error"] += 1
        return {
            "counts": [{"code": c, "severity": s, "count": n} for (c, s), n in counts.most_common()],
            "listed": [*listed, *self._problems][:_MAX_LISTED_PROBLEMS],
        }

    def _template_report(self) -> dict[str, Any]:
        tokenizer = self._template.tokenizer
        return {
            "tokenizer": tokenizer.name,
            "end_of_turn": list(tokenizer.end_of_turn),
            "supports_thinking": self._template.supports_thinking,
            "thinking": self._settings.encode.thinking,
            "mask": self._settings.encode.mask,
            "truncation": self._settings.encode.truncation,
            "fingerprint": self._template.fingerprint,
        }


def _write(result: RecordSamples, writer: StoreWriter) -> None:
    for encoded in result.samples:
        writer.add(encoded.sample, origin=encoded.origin, source=encoded.source)


class _ErrorCollector:
    """Errors of records that cannot be encoded: all together with `fail`, counted and listed with `skip`."""

    def __init__(self, on_error: OnError) -> None:
        self._on_error = on_error
        self._errors: list[DataError] = []
        self.num_errors = 0
        self.listed: list[dict[str, Any]] = []

    @property
    def is_stopping(self) -> bool:
        return bool(self._errors)

    def add(self, error: DataError) -> None:
        if error.code == "template-missing":
            raise error  # about the model, not about this record: once says it, and skipping would leave nothing
        self.num_errors += 1
        if self._on_error == "skip":
            if len(self.listed) < _MAX_LISTED_PROBLEMS:
                entry = error.to_dict()
                reason = error.what if error.why is None else f"{error.what}; {error.why}"
                self.listed.append(
                    {
                        "code": error.code,
                        "severity": "error",
                        "file": entry["file"],
                        "line": entry["line"],
                        "reason": reason,
                        "fix": error.fix,
                    }
                )
            return
        self._errors.append(error)
        if len(self._errors) >= MAX_REPORTED_ERRORS:
            self.raise_errors()

    def raise_errors(self) -> None:
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            raise AffinaErrors(list(self._errors))


def _nothing_left(counts: Counter[str], settings: PrepareSettings) -> DataError:
    if counts["dropped_too_long"] and not counts["dropped_without_labels"]:
        is_whole = settings.wanted in ("pairs", "labels", "taught")
        noun = "pairs (chosen and rejected together)" if settings.wanted == "pairs" else "samples"
        return DataError(
            "all-too-long",
            f"all {counts['dropped_too_long']:,} {noun} are longer than data.max_length "
            f"({settings.encode.max_length:,} tokens)",
            fix="raise data.max_length" + ("" if is_whole else ", or set data.truncation: split"),
        )
    return DataError(
        "all-labels-masked",
        "no sample has a token to train on",
        why=f"{counts['dropped_without_labels']:,} samples have no trained token with data.mask: {settings.encode.mask}"
        + (f"; {counts['dropped_too_long']:,} more are too long" if counts["dropped_too_long"] else ""),
        fix="check that the conversations have replies, their train and weight flags, data.mask and data.max_length",
    )


def _require_both_labels(counts: Counter[str]) -> None:
    wanted, unwanted = counts["desirable"], counts["undesirable"]
    if wanted and unwanted:
        return
    present, missing = ("wanted", "unwanted") if wanted else ("unwanted", "wanted")
    raise DataError(
        "one-label",
        f"all {wanted + unwanted:,} replies are labelled {present}; there is no {missing} one",
        why="training.objective kto learns from the difference between the two",
        fix="write training.objective: sft to train on wanted replies" if wanted else "add wanted replies",
    )


def _serves_thinking(template: ChatTemplate, counts: Counter[str]) -> bool | None:
    """Whether prompts that look as trained have thinking on. Empty blocks come from prompts with thinking off."""
    if not template.supports_thinking or not counts["trained_replies"]:
        return None
    return template.thinking == "keep" and (counts["reasoning"] > 0 or counts["empty_think"] == 0)


def _hash_of_set(hashes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _source_reports(streams: Iterable[ConversationStream]) -> Iterator[SourceReport]:
    for role, stream in zip(("train", "validation"), streams, strict=True):
        for source in stream.sources:
            yield SourceReport(
                description=source.description,
                formats=tuple(source.formats),
                notes=tuple(source.notes),
                num_read=source.num_read,
                num_kept=source.num_kept,
                num_skipped=source.num_skipped,
                role="train" if role == "train" else "validation",
            )


def _located(spool: _Spool) -> dict[str, Any]:
    """Duplicates as JSON, with the places of the listed records instead of their numbers."""
    record = spool.duplicates.to_dict()

    def origins(numbers: Sequence[int]) -> list[str]:
        return [spool.store[number].origin for number in numbers[:5]]

    record["conflicts"] = [
        {"records": origins(conflict["records"]), "num_replies": conflict["num_replies"]}
        for conflict in record["conflicts"][:20]
    ]
    record["clusters"] = [
        {"records": origins(cluster), "num_records": len(cluster)} for cluster in record["clusters"][:20]
    ]
    return record
