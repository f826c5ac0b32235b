"""Which tokens are trained: whole replies, with their ends, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.data.tiny_tokenizers import build_tokenizer

from affina.data.masking import TokenizedText, build_sample, invert, select_replies, tokens_inside
from affina.data.messages import Conversation, Message
from affina.data.samples import IGNORED_LABEL
from affina.data.show import to_plain, view_tokens
from affina.data.templates import ChatTemplate


def conversation(*, trained: tuple[bool, bool] = (True, True)) -> Conversation:
    return Conversation(
        (
            Message("user", "q1"),
            Message("assistant", "a1", train=trained[0]),
            Message("user", "q2"),
            Message("assistant", "a2", train=trained[1]),
        )
    )


def shown(mask: str, **options: tuple[bool, bool]) -> str:
    tokenizer = build_tokenizer("gemma")
    (encoded,) = ChatTemplate(tokenizer).encode(conversation(**options), mask=mask)  # type: ignore[arg-type]
    return to_plain(encoded.sample, tokenizer.hf)


def turn(role: str, content: str) -> str:
    return f"<start_of_turn>{role}\n{content}<end_of_turn>\n"


def trained(content: str) -> str:
    return f"<start_of_turn>model\n⟦{content}<end_of_turn>⟧\n"


def test_assistant_trains_every_reply() -> None:
    assert shown("assistant") == "<bos>" + turn("user", "q1") + trained("a1") + turn("user", "q2") + trained("a2")


def test_last_trains_the_last_reply_only() -> None:
    assert shown("last") == "<bos>" + turn("user", "q1") + turn("model", "a1") + turn("user", "q2") + trained("a2")


def test_a_message_with_train_false_is_context_only() -> None:
    expected = "<bos>" + turn("user", "q1") + turn("model", "a1") + turn("user", "q2") + trained("a2")
    assert shown("assistant", trained=(False, True)) == expected


def test_all_trains_everything_but_the_first_token() -> None:
    text = turn("user", "q1") + turn("model", "a1") + turn("user", "q2") + turn("model", "a2")
    assert shown("all") == f"<bos>⟦{text}⟧"


def test_all_leaves_out_replies_with_train_false_and_empty_think_blocks() -> None:
    assert shown("all", trained=(False, True)).count("⟦") == 2
    assert "⟧a1<end_of_turn>⟦" in shown("all", trained=(False, True))
    tokenizer = build_tokenizer("thinking")
    (encoded,) = ChatTemplate(tokenizer).encode(
        Conversation((Message("user", "q"), Message("assistant", "a"))), mask="all"
    )
    assert "⟧<think>\n\n</think>\n\n⟦a<|im_end|>\n⟧" in to_plain(encoded.sample, tokenizer.hf)


@pytest.mark.parametrize(("mask", "expected"), [("assistant", [1]), ("all", [1]), ("last", [])])
def test_last_with_train_false_selects_nothing(mask: str, expected: list[int]) -> None:
    assert select_replies(conversation(trained=(True, False)).messages, mask) == expected  # type: ignore[arg-type]


def tokens(*spans: tuple[int, int]) -> TokenizedText:
    starts, ends = (np.array(values, dtype=np.int32) for values in zip(*spans, strict=True))
    return TokenizedText(np.arange(len(spans), dtype=np.int32), starts, ends)


def test_tokens_across_a_border_are_left_out_and_counted() -> None:
    text = tokens((0, 3), (3, 6), (6, 9), (9, 12))
    assert tokens_inside(text, 3, 9) == (slice(1, 3), 0)
    assert tokens_inside(text, 4, 9) == (slice(2, 3), 1)
    assert tokens_inside(text, 3, 8) == (slice(1, 2), 1)
    assert tokens_inside(text, 4, 8) == (slice(2, 2), 2)


def test_tokens_that_share_a_character_stay_together() -> None:
    # An emoji that is cut into three tokens: each of them stands for the same character.
    assert tokens_inside(tokens((0, 1), (1, 2), (1, 2), (1, 2), (2, 3)), 1, 2) == (slice(1, 4), 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.data())
def test_inside_means_all_characters_inside(sizes: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(sizes)
    text = tokens(*zip((ends - sizes).tolist(), ends.tolist(), strict=True))
    start = data.draw(st.integers(0, int(ends[-1])))
    end = data.draw(st.integers(start, int(ends[-1])))
    part, _ = tokens_inside(text, start, end)
    inside = [i for i in range(len(sizes)) if text.starts[i] >= start and text.ends[i] <= end]
    assert list(range(len(sizes)))[part] == inside


@given(st.integers(1, 30), st.sets(st.integers(0, 30)))
def test_inverting_covers_exactly_the_rest(length: int, cuts: set[int]) -> None:
    borders = sorted(cut for cut in cuts if cut <= length)
    parts = [slice(a, b) for a, b in zip(borders[::2], borders[1::2], strict=False)]
    covered = {i for part in parts for i in range(length)[part]}
    rest = {i for part in invert(parts, length) for i in range(length)[part]}
    assert rest == set(range(length)) - covered


def test_the_first_label_is_ignored_even_when_everything_is_trained() -> None:
    sample = build_sample(np.array([5, 6, 7], dtype=np.int32), [slice(0, 3)])
    assert sample.labels.tolist() == [IGNORED_LABEL, 6, 7]
    assert sample.num_supervised == 2


def test_shown_tokens_put_split_characters_together() -> None:
    tokenizer = build_tokenizer("gemma")
    (encoded,) = ChatTemplate(tokenizer).encode(Conversation((Message("user", "🙂"), Message("assistant", "é🙂"))))
    views = list(view_tokens(encoded.sample, tokenizer.hf))
    assert "".join(view.text for view in views) == encoded.text
    assert not any("�" in view.text for view in views)
    assert [i for view in views for i in view.ids] == encoded.sample.input_ids.tolist()
