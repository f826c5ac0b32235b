"""Training on data that is read while training: nothing is stored, memory does not grow, and reading can be resumed.

A validation set is still fixed before the first step. Which records belong to it is decided by a hash of their content
alone, so that no list of them is needed: the same record, and every exact copy of it, is always on the same side.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from affina.data.batches import StreamingBatches, StreamState
from affina.data.encoding import Encoder
from affina.data.messages import Conversation
from affina.data.mixing import interleave_streams
from affina.data.pii import mask_conversation
from affina.data.prepare import PrepareSettings
from affina.data.quality import conversation_hash
from affina.data.samples import Sample
from affina.data.store import MemorySampleStore
from affina.data.templates import ChatTemplate
from affina.data.tokenizer import LoadedTokenizer
from affina.data.validation import ConversationStream, SourceSpec, read_conversations
from affina.errors import DataError

MAX_RECORDS_SEARCHED = 100_000
"""Records that are read at most to fill a validation set that is held out of a stream."""

RECORDS_WITHOUT_SAMPLE = 10_000
"""After so many records in a row without a single sample, something is wrong with the settings, not with a record."""


@dataclass
class StreamedData:
    """A stream of training samples and a fixed validation set.

    counts: what encoding counted so far, over everything that was read in this process
    """

    specs: tuple[SourceSpec, ...]
    encoder: Encoder
    settings: PrepareSettings
    holds_out: bool
    validation: MemorySampleStore = field(default_factory=lambda: MemorySampleStore([]))
    validation_conversations: list[Conversation] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def template(self) -> ChatTemplate:
        return self.encoder.template

    def open(self, skip_records: int = 0) -> Iterator[tuple[int, Sequence[Sample]]]:
        """(records read in all, the last one's samples), from after `skip_records` on; at the end it starts anew.

        Raises DataError as reading and encoding do; records that cannot be encoded are skipped with `on_error: skip`.
        """
        num_empty = 0
        for number, conversation in enumerate(self._records(), start=1):
            if number <= skip_records:
                continue
            samples: list[Sample] = []
            if not (self.holds_out and is_held_out(conversation, self.settings.validation_fraction)):
                result = self.encoder.encode_record(conversation)
                if result.error is not None:
                    if self.settings.on_error == "fail":
                        raise result.error
                    self.counts["unencodable"] += 1
                self.counts.update(result.counts)
                samples = [encoded.sample for encoded in result.samples]
            num_empty = 0 if samples else num_empty + 1
            if num_empty >= RECORDS_WITHOUT_SAMPLE:
                raise _nothing_to_train(num_empty, self.counts)
            yield number, samples

    def batches(
        self,
        *,
        micro_batch_size: int,
        gradient_accumulation_steps: int,
        packing: bool,
        seed: int,
        window_samples: int = 1000,
        state: StreamState | None = None,
    ) -> StreamingBatches:
        """Optimiser steps over this stream; `state` continues where an earlier one stood."""
        return StreamingBatches(
            self.open,
            max_length=self.settings.encode.max_length,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            packing=packing,
            seed=seed,
            window_samples=window_samples,
            state=state,
        )

    def _records(self) -> Iterator[Conversation]:
        """All records for ever: source after source, or mixed by their weights.

        Ends after a pass over the sources that gave no record, because `on_error: skip` left every one of them out.
        """
        weights = self.settings.weights
        stream = _open(self.specs, self.settings)
        if weights and any(weight is not None for weight in weights):
            mixed = interleave_streams(
                [_Restart(stream, index) for index in range(len(self.specs))],
                [weight if weight is not None else 0.0 for weight in weights],
                when_exhausted="repeat",
                names=[source.description for source in stream.sources],
            )
            records: Iterator[Conversation] = iter(mixed)
        else:
            records = _passes(stream)
        return (mask_conversation(record) for record in records) if self.settings.mask_pii else records


def _passes(stream: ConversationStream) -> Iterator[Conversation]:
    """The records of one pass after the other; reading on after an empty pass would never come to an end."""
    is_empty = False
    while not is_empty:
        is_empty = True
        for conversation in stream:
            is_empty = False
            yield conversation


@dataclass(frozen=True, slots=True)
class _Restart:
    """Starts reading one source of a stream."""

    stream: ConversationStream
    index: int

    def __call__(self) -> Iterator[Conversation]:
        yield from self.stream.read_source(self.index)
        self.stream.raise_errors()


def stream(
    train: Sequence[SourceSpec],
    *,
    tokenizer: LoadedTokenizer,
    settings: PrepareSettings,
    validation: Sequence[SourceSpec] = (),
) -> StreamedData:
    """Opens a stream. Reads no more than its validation set: `validation`, or what is held out of the first records.

    Raises DataError as `prepare` does.
    """
    holds_out = not validation and settings.validation_fraction > 0
    data = StreamedData(tuple(train), Encoder(tokenizer, settings.encode), settings, holds_out)
    candidates: Iterator[Conversation] = iter(())
    if validation:
        candidates = iter(_open(validation, settings))
    elif holds_out:
        first: Iterator[Conversation] = itertools.islice(_open(train, settings), MAX_RECORDS_SEARCHED)
        if settings.mask_pii:
            first = (mask_conversation(record) for record in first)
        candidates = (record for record in first if is_held_out(record, settings.validation_fraction))
    samples: list[Sample] = []
    origins: list[str] = []
    for conversation in itertools.islice(candidates, settings.max_validation_records):
        result = data.encoder.encode_record(conversation)
        if result.error is not None and settings.on_error == "fail":
            raise result.error
        if result.samples:
            samples += [encoded.sample for encoded in result.samples]
            origins += [encoded.origin for encoded in result.samples]
            data.validation_conversations.append(conversation)
    data.validation = MemorySampleStore(samples, origins=origins)
    return data


def is_held_out(conversation: Conversation, fraction: float) -> bool:
    """Whether a record belongs to the validation set: a fixed function of its content."""
    return int(conversation_hash(conversation)[:13], 16) / 16**13 < fraction


def _open(specs: Sequence[SourceSpec], settings: PrepareSettings) -> ConversationStream:
    return read_conversations(
        specs,
        on_error=settings.on_error,
        max_record_bytes=settings.max_record_bytes,
        system_prompt=None,
        wanted=settings.wanted,
    )


def _nothing_to_train(num_records: int, counts: Counter[str]) -> DataError:
    return DataError(
        "all-labels-masked",
        f"{num_records:,} records in a row gave nothing to train on",
        why=f"{counts['dropped_without_labels']:,} samples had no trained token, {counts['dropped_too_long']:,} were "
        "too long",
        fix="check data.mask, data.max_length and the train flags of the records",
    )
