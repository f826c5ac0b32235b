"""What happens to a sample that is longer than the context. Nothing is lost without being counted.

drop:     the whole record is left out
truncate: the first max_length tokens stay; replies that lose their end-of-turn are counted, and a sample that has no
          label left is dropped
split:    a conversation is cut between exchanges into parts that repeat the system turn and are rendered anew, so that
          each part is a sample in its own right; plain text is cut into windows that overlap by one token, so that
          every token is predicted exactly once
raise:    an error with the record and its length
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from affina.data.masking import Mask
from affina.data.messages import Conversation, Message
from affina.data.samples import IGNORED_LABEL, Sample
from affina.data.templates import EncodedSample
from affina.errors import DataError, Location

Truncation = Literal["drop", "truncate", "split", "raise"]

Encode = Callable[[Conversation, Mask], list[EncodedSample]]


@dataclass(frozen=True, slots=True)
class FittedSamples:
    """The samples of one record, each with 1..max_length tokens and at least one label.

    counts: too_long (samples over the limit), dropped_too_long, truncated, split_records, split_parts,
            lost_end_of_turn (trained replies cut before their end), lost_tokens, dropped_without_labels, and for each
            sample that is kept what `ChatTemplate.encode` counted
    """

    samples: tuple[EncodedSample, ...]
    counts: Counter[str] = field(default_factory=Counter)


def fit_record(
    conversation: Conversation, *, encode: Encode, mask: Mask, max_length: int, truncation: Truncation
) -> FittedSamples:
    """The samples of a record, none longer than max_length tokens.

    Raises DataError `sample-too-long` when truncation is "raise", and what `encode` raises.
    """
    encoded = encode(conversation, mask)
    counts: Counter[str] = Counter()
    longest = max(len(sample) for sample in encoded)
    if longest <= max_length:
        return _keep_labelled(encoded, counts)
    counts["too_long"] += sum(len(sample) > max_length for sample in encoded)
    if truncation == "raise":
        raise DataError(
            "sample-too-long",
            f"a record has {longest:,} tokens, data.max_length is {max_length:,}",
            fix="raise data.max_length, or choose data.truncation: drop, truncate or split",
            where=where_of(conversation.origin),
        )
    if truncation == "drop":
        short = [sample for sample in encoded if len(sample) <= max_length]
        counts["dropped_too_long"] += len(encoded) - len(short)
        counts["lost_tokens"] += sum(len(sample) for sample in encoded if len(sample) > max_length)
        return _keep_labelled(short, counts)
    if truncation == "truncate":
        return _keep_labelled([_cut(sample, max_length, counts) for sample in encoded], counts)
    counts["split_records"] += 1
    if conversation.messages:
        parts = _split_conversation(conversation, encode=encode, mask=mask, max_length=max_length, counts=counts)
    else:
        parts = _split_text(encoded[0], max_length)
    counts["split_parts"] += len(parts)
    return _keep_labelled(parts, counts)


def where_of(origin: str) -> Location | None:
    """`file:line` of a record as a Location."""
    if not origin:
        return None
    path, _, line = origin.rpartition(":")
    return Location(path, int(line)) if path and line.isdigit() else Location(origin)


def _keep_labelled(encoded: Sequence[EncodedSample], counts: Counter[str]) -> FittedSamples:
    kept: list[EncodedSample] = []
    for sample in encoded:
        if sample.sample.num_supervised == 0:
            counts["dropped_without_labels"] += 1
            continue
        kept.append(sample)
        counts.update(sample.counts)
    return FittedSamples(tuple(kept), counts)


def _cut(encoded: EncodedSample, max_length: int, counts: Counter[str]) -> EncodedSample:
    if len(encoded) <= max_length:
        return encoded
    kept_ends = tuple(end for end in encoded.reply_ends if end < max_length)
    num_lost = len(encoded.reply_ends) - len(kept_ends)
    counts["truncated"] += 1
    counts["lost_end_of_turn"] += num_lost
    counts["lost_tokens"] += len(encoded) - max_length
    own = Counter(encoded.counts)
    own["ends_of_turn"] = min(own["ends_of_turn"], len(kept_ends))
    return replace(
        encoded,
        sample=Sample(encoded.sample.input_ids[:max_length], encoded.sample.labels[:max_length]),
        reply_ends=kept_ends,
        counts=own,
    )


def _split_text(encoded: EncodedSample, max_length: int) -> list[EncodedSample]:
    """Windows that overlap by one token, because the first token of a window is predicted in the window before."""
    ids, labels = encoded.sample.input_ids, encoded.sample.labels
    parts: list[EncodedSample] = []
    for start in range(0, max(len(ids) - 1, 1), max_length - 1):
        stop = min(start + max_length, len(ids))
        part_labels = labels[start:stop].copy()
        part_labels[:1] = IGNORED_LABEL
        ends = tuple(end - start for end in encoded.reply_ends if start <= end < stop)
        counts = encoded.counts if start == 0 else Counter[str]()
        parts.append(replace(encoded, sample=Sample(ids[start:stop], part_labels), reply_ends=ends, counts=counts))
    return parts


def _split_conversation(
    conversation: Conversation, *, encode: Encode, mask: Mask, max_length: int, counts: Counter[str]
) -> list[EncodedSample]:
    """Parts made of whole exchanges (a question and all that answers it), as many per part as fit.

    An exchange that is too long alone is cut at max_length, and counted as truncated.
    """
    opening, exchanges = _exchanges(_fix_trained_replies(conversation, mask).messages)
    parts: list[EncodedSample] = []
    start = 0
    while start < len(exchanges):
        stop, encoded = _longest_part(conversation, opening, exchanges, start, encode, mask, max_length)
        parts += [_cut(sample, max_length, counts) for sample in encoded]
        start = stop
    return parts


def _longest_part(
    conversation: Conversation,
    opening: list[Message],
    exchanges: list[list[Message]],
    start: int,
    encode: Encode,
    mask: Mask,
    max_length: int,
) -> tuple[int, list[EncodedSample]]:
    """The exchanges start..stop that fit together, found by bisection; at least one."""

    def encode_until(stop: int) -> list[EncodedSample]:
        messages = [*opening, *(message for exchange in exchanges[start:stop] for message in exchange)]
        return encode(replace(conversation, messages=tuple(messages)), mask)

    low, best = start + 1, encode_until(start + 1)
    if max(len(sample) for sample in best) > max_length:
        return low, best
    high = len(exchanges)
    while low < high:
        middle = (low + high + 1) // 2
        encoded = encode_until(middle)
        if max(len(sample) for sample in encoded) <= max_length:
            low, best = middle, encoded
        else:
            high = middle - 1
    return low, best


def _exchanges(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """(system turns at the start, exchanges that each begin with a question)"""
    opening: list[Message] = []
    exchanges: list[list[Message]] = []
    for message in messages:
        if message.role == "system" and not exchanges:
            opening.append(message)
        elif not exchanges or (message.role == "user" and exchanges[-1][-1].role != "user"):
            exchanges.append([message])
        else:
            exchanges[-1].append(message)
    return opening, exchanges


def _fix_trained_replies(conversation: Conversation, mask: Mask) -> Conversation:
    """With mask `last` only the last reply of the whole is trained, not the last one of every part."""
    if mask != "last":
        return conversation
    replies = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    messages = tuple(
        replace(message, train=False) if index in replies[:-1] else message
        for index, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)
