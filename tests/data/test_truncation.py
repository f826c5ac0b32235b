"""Samples that are too long: nothing is lost without being counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.tiny_tokenizers import build_tokenizer

from affina.data.encoding import Encoder, EncodeSettings
from affina.data.messages import Conversation, Message
from affina.data.samples import IGNORED_LABEL
from affina.data.show import to_plain
from affina.data.templates import ChatTemplate
from affina.data.truncation import FittedSamples, fit_record
from affina.errors import DataError


def fit(
    conversation: Conversation, max_length: int, truncation: str, mask: str = "assistant", kind: str = "gemma"
) -> FittedSamples:
    template = ChatTemplate(build_tokenizer(kind))
    return fit_record(
        conversation,
        encode=lambda part, part_mask: template.encode(part, mask=part_mask),
        mask=mask,  # type: ignore[arg-type]
        max_length=max_length,
        truncation=truncation,  # type: ignore[arg-type]
    )


def exchanges(count: int, *, system: bool = False, words: int = 3) -> Conversation:
    messages = [Message("system", "S")] if system else []
    for number in range(count):
        messages += [Message("user", f"q{number} " * words), Message("assistant", f"a{number} " * words + "end")]
    return Conversation(tuple(messages), origin="data.jsonl:12")


def text_of(fitted: FittedSamples, kind: str = "gemma") -> list[str]:
    return [to_plain(encoded.sample, build_tokenizer(kind).hf) for encoded in fitted.samples]


LENGTH_OF_ONE = len(fit(exchanges(1), 10_000, "drop").samples[0])


@pytest.mark.parametrize("truncation", ["drop", "truncate", "split", "raise"])
def test_what_fits_is_left_alone(truncation: str) -> None:
    fitted = fit(exchanges(1), LENGTH_OF_ONE, truncation)
    assert len(fitted.samples) == 1
    assert fitted.counts["too_long"] == 0
    assert fitted.counts["ends_of_turn"] == 1


def test_drop_leaves_the_record_out_and_counts_its_tokens() -> None:
    fitted = fit(exchanges(1), LENGTH_OF_ONE - 1, "drop")
    assert fitted.samples == ()
    assert fitted.counts == {"too_long": 1, "dropped_too_long": 1, "lost_tokens": LENGTH_OF_ONE}


def test_raise_names_the_record_and_both_lengths() -> None:
    with pytest.raises(
        DataError, match=rf"has {LENGTH_OF_ONE} tokens, data.max_length is 10 \(data.jsonl:12\)"
    ) as caught:
        fit(exchanges(1), 10, "raise")
    assert caught.value.code == "sample-too-long"
    assert "drop, truncate or split" in str(caught.value)


def test_a_reply_that_loses_its_end_is_counted() -> None:
    fitted = fit(exchanges(2), len(fit(exchanges(2), 10_000, "drop").samples[0]) - 3, "truncate")
    (encoded,) = fitted.samples
    assert fitted.counts["truncated"] == 1
    assert fitted.counts["lost_end_of_turn"] == 1
    assert fitted.counts["ends_of_turn"] == 1
    assert encoded.sample.labels[-1] != IGNORED_LABEL


def test_a_sample_that_loses_all_its_labels_is_dropped_and_counted() -> None:
    # Regression: with every label cut off, other trainers report a loss of 0 or NaN and go on.
    fitted = fit(exchanges(1), 8, "truncate")
    assert fitted.samples == ()
    assert fitted.counts["dropped_without_labels"] == 1
    assert fitted.counts["lost_end_of_turn"] == 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 8), max_length=st.integers(20, 200), system=st.booleans())
def test_split_keeps_every_reply_once_whole_or_counted(count: int, max_length: int, system: bool) -> None:
    fitted = fit(exchanges(count, system=system), max_length, "split")
    shown = "".join(text_of(fitted))
    whole = [number for number in range(count) if f"a{number} " * 3 + "end<end_of_turn>⟧" in shown]
    assert all(len(encoded) <= max_length for encoded in fitted.samples)
    assert len(whole) == fitted.counts["ends_of_turn"] == count - fitted.counts["lost_end_of_turn"]
    for text in text_of(fitted):
        assert text.startswith("<bos><start_of_turn>system\nS<end_of_turn>\n" if system else "<bos><start_of_turn>user")


def test_split_puts_as_many_exchanges_into_a_part_as_fit() -> None:
    two = len(fit(exchanges(2), 10_000, "drop").samples[0])
    fitted = fit(exchanges(5), two, "split")
    assert [encoded.counts["trained_replies"] for encoded in fitted.samples] == [2, 2, 1]
    assert fitted.counts["split_records"] == 1
    assert fitted.counts["split_parts"] == 3


def test_split_never_separates_a_tool_result_from_its_question() -> None:
    chain = (
        Message("user", "q " * 5),
        Message("assistant", "I look " * 3),
        Message("tool", "result"),
        Message("assistant", "done " * 3),
    )
    whole = fit(Conversation(chain), 10_000, "drop", kind="thinking")
    fitted = fit(Conversation(chain * 3), len(whole.samples[0]), "split", kind="thinking")
    assert len(fitted.samples) == 3
    assert all(text.count("tool\nresult") == 1 for text in text_of(fitted, "thinking"))


def test_split_with_mask_last_trains_the_last_reply_of_the_whole_only() -> None:
    fitted = fit(exchanges(4), LENGTH_OF_ONE, "split", mask="last")
    assert len(fitted.samples) == 1
    assert "⟦a3 " in text_of(fitted)[0]
    assert fitted.counts["dropped_without_labels"] == 3


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="abc de\n", min_size=1, max_size=200), max_length=st.integers(2, 40))
def test_windows_of_plain_text_predict_every_token_exactly_once(text: str, max_length: int) -> None:
    tokenizer = build_tokenizer(None)
    (whole,) = ChatTemplate(tokenizer).encode(Conversation(text=text))
    fitted = fit(Conversation(text=text), max_length, "split", kind="gemma")
    predicted = [sample.sample.labels[1:] for sample in fitted.samples]
    assert np.concatenate(predicted).tolist() == whole.sample.labels[1:].tolist()
    assert all(len(sample) <= max_length and sample.sample.labels[0] == IGNORED_LABEL for sample in fitted.samples)


def test_a_record_without_trained_tokens_is_dropped_and_counted_even_when_short() -> None:
    conversation = Conversation((Message("user", "q"), Message("assistant", "a", train=False)))
    fitted = fit(conversation, 100, "drop")
    assert fitted.samples == ()
    assert fitted.counts == {"dropped_without_labels": 1}


def test_errors_of_records_come_back_as_values() -> None:
    encoder = Encoder(build_tokenizer("gemma"), EncodeSettings(max_length=10, truncation="raise"))
    good, bad = encoder.encode_chunk([Conversation((Message("user", "q"), Message("assistant", "a"))), exchanges(3)])
    # "q" and "a" with a BOS, two openings, two ends and four newlines are more than ten tokens as well.
    assert isinstance(good.error, DataError)
    assert isinstance(bad.error, DataError)
    assert bad.error.code == "sample-too-long"
