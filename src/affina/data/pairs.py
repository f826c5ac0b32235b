"""Preferences as samples: a chosen and a rejected text that are always in the same row, or a text with a label or with
a teacher's distributions.

Both texts of a pair are rendered and masked by the chat template exactly as conversations are, so that what is compared
is what serving would have written. A pair counts as one sample: `data.max_length` holds for both texts together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from affina.data.messages import Conversation
from affina.data.preference_formats import TEACHER
from affina.data.samples import TeacherTokens, join_documents
from affina.data.templates import EncodedSample
from affina.data.truncation import Encode, FittedSamples, Truncation, where_of
from affina.errors import DataError


def fit_pairs(conversation: Conversation, *, encode: Encode, max_length: int, truncation: Truncation) -> FittedSamples:
    """One sample for each rejected reply: the chosen text and the rejected one, together at most max_length tokens.

    counts: pairs, chosen_tokens and rejected_tokens (of the replies), too_long, dropped_too_long, lost_tokens,
            dropped_without_labels, and what `ChatTemplate.encode` counted. A pair is never cut: what is cut off a reply
            would change which one is better

    Raises DataError `sample-too-long` when truncation is "raise", `pair-not-one-text`, and what `encode` raises.
    """
    counts: Counter[str] = Counter()
    samples: list[EncodedSample] = []
    chosen = _one_text(replace(conversation, rejected=()), encode)
    for turns in conversation.rejected:
        rejected = _one_text(replace(conversation, messages=turns, rejected=()), encode)
        length = len(chosen) + len(rejected)
        if length > max_length:
            counts["too_long"] += 1
            if truncation == "raise":
                raise DataError(
                    "sample-too-long",
                    f"a pair has {length:,} tokens (chosen {len(chosen):,}, rejected {len(rejected):,}), "
                    f"data.max_length is {max_length:,}",
                    why="a pair is one sample: both texts are in one row, each with its own copy of the prompt",
                    fix=f"write data.max_length: {-(-length // 128) * 128}, or data.truncation: drop to leave it out",
                    where=where_of(conversation.origin),
                )
            counts["dropped_too_long"] += 1
            counts["lost_tokens"] += length
            continue
        if not chosen.sample.num_supervised or not rejected.sample.num_supervised:
            counts["dropped_without_labels"] += 1
            continue
        samples.append(_join(chosen, rejected))
        counts["pairs"] += 1
        counts["chosen_tokens"] += chosen.sample.num_supervised
        counts["rejected_tokens"] += rejected.sample.num_supervised
        counts.update(chosen.counts)
        counts.update(rejected.counts)
    return FittedSamples(tuple(samples), counts)


def with_label(fitted: FittedSamples, *, is_desirable: bool) -> FittedSamples:
    """The samples of a record whose reply is wanted or unwanted (KTO)."""
    counts = Counter(fitted.counts)
    counts["desirable" if is_desirable else "undesirable"] += len(fitted.samples)
    samples = tuple(replace(entry, sample=replace(entry.sample, desirable=is_desirable)) for entry in fitted.samples)
    return FittedSamples(samples, counts)


def with_teacher(fitted: FittedSamples, conversation: Conversation, *, vocabulary_size: int) -> FittedSamples:
    """The sample of a record together with its teacher's distributions.

    Raises DataError `teacher-length` when these are not one for each trained token, `teacher-vocabulary`.
    """
    entry = conversation.metadata[TEACHER]
    teacher = TeacherTokens(np.array(entry["token_ids"], np.int32), np.array(entry["values"], np.float32))
    samples = []
    for encoded in fitted.samples:
        num_trained = encoded.sample.num_supervised
        if len(fitted.samples) > 1 or len(teacher.token_ids) != num_trained:
            raise DataError(
                "teacher-length",
                f"the teacher speaks about {len(teacher.token_ids):,} tokens, and {num_trained:,} are trained",
                why="they were made with another tokenizer, chat template, data.mask or data.thinking",
                fix="make them again with these settings (recipes/teacher_log_probabilities.py), or name a teacher "
                "model: training.distillation.teacher",
                where=where_of(conversation.origin),
            )
        if (largest := int(teacher.token_ids.max())) >= vocabulary_size:
            raise DataError(
                "teacher-vocabulary",
                f"the teacher's token {largest:,} is not in this vocabulary of {vocabulary_size:,}",
                why="its probabilities are for other tokens",
                fix="take a teacher with the same tokenizer",
                where=where_of(conversation.origin),
            )
        samples.append(replace(encoded, sample=replace(encoded.sample, teacher=teacher)))
    return FittedSamples(tuple(samples), fitted.counts)


def _one_text(conversation: Conversation, encode: Encode) -> EncodedSample:
    encoded = encode(conversation, "assistant")
    if len(encoded) > 1:
        raise DataError(
            "pair-not-one-text",
            f"a conversation of a pair would be trained as {len(encoded)} texts",
            why="data.thinking: empty-masked renders each reply that serving would see differently on its own",
            fix="write data.thinking: strip, or compare one reply at a time",
            where=where_of(conversation.origin),
        )
    return encoded[0]


def _join(chosen: EncodedSample, rejected: EncodedSample) -> EncodedSample:
    return EncodedSample(
        sample=join_documents([chosen.sample, rejected.sample]),
        text=chosen.text + rejected.text,
        reply_ends=(*chosen.reply_ends, *(end + len(chosen) for end in rejected.reply_ends)),
        counts=chosen.counts + rejected.counts,
        origin=chosen.origin,
        source=chosen.source,
    )
