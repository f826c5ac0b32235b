from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affina.errors import EvaluationError
from affina.evaluation.chat import ChatSession, stream_text
from tests.evaluation.fakes import FakeStream, FakeTemplate, decode_bytes


def session(reply: str = "fine", **options: object) -> tuple[ChatSession, FakeStream, FakeTemplate]:
    stream, template = FakeStream(reply), FakeTemplate()
    return ChatSession(stream, template, decode_bytes, **options), stream, template  # type: ignore[arg-type]


def say(chat: ChatSession, text: str) -> str:
    return "".join(chat.reply(text))


def test_a_reply_comes_in_pieces_and_both_turns_are_remembered() -> None:
    chat, _, _ = session("fine")
    assert list(chat.reply("how?")) == ["f", "i", "n", "e"]
    assert [(message.role, message.content) for message in chat.messages] == [("user", "how?"), ("assistant", "fine")]


def test_the_next_prompt_holds_the_turns_before() -> None:
    chat, stream, _ = session("b")
    say(chat, "a")
    say(chat, "c")
    assert stream.calls[1]["prompt"] == "user:a;assistant:b;user:c;"


def test_the_base_answers_the_same_prompt_without_the_adapter_and_changes_nothing() -> None:
    chat, stream, _ = session("fine")
    say(chat, "a")
    say(chat, "how?")
    before = chat.messages
    assert "".join(chat.base_reply()) == "FINE"
    assert chat.messages == before
    tuned, base = stream.calls[1:]
    assert base["prompt"] == tuned["prompt"] == "user:a;assistant:fine;user:how?;"
    assert (tuned["use_adapter"], base["use_adapter"]) == (True, False)


def test_the_base_can_be_asked_something_new() -> None:
    chat, stream, _ = session("fine")
    say(chat, "a")
    assert "".join(chat.base_reply("b")) == "FINE"
    assert stream.calls[-1]["prompt"] == "user:a;assistant:fine;user:b;"
    assert chat.last_prompt == "a"


def test_the_base_has_nothing_to_answer_before_the_first_message() -> None:
    chat, _, _ = session()
    with pytest.raises(EvaluationError) as caught:
        chat.base_reply()
    assert caught.value.render() == (
        "error[chat-nothing-asked]: there is no message yet that the base model could answer\n"
        "  fix: ask something first, or type /base followed by a question"
    )


def test_a_stopped_reply_stays_as_far_as_it_came() -> None:
    chat, _, _ = session("a long reply")
    reply = chat.reply("go")
    assert [next(reply) for _ in range(6)] == list("a long")
    reply.close()  # type: ignore[attr-defined]
    assert chat.messages[-1].content == "a long"


def test_a_failure_while_generating_keeps_the_conversation_whole() -> None:
    def failing(_ids: object, /, **_options: object) -> Iterator[int]:
        yield ord("x")
        raise KeyboardInterrupt

    chat = ChatSession(failing, FakeTemplate(), decode_bytes)
    with pytest.raises(KeyboardInterrupt):
        say(chat, "go")
    assert [message.content for message in chat.messages] == ["go", "x"]


def test_a_system_prompt_starts_over_and_stands_first() -> None:
    chat, stream, _ = session("b")
    say(chat, "a")
    chat.set_system(" be brief ")
    say(chat, "c")
    assert stream.calls[-1]["prompt"] == "system:be brief;user:c;"
    "".join(chat.base_reply())
    assert stream.calls[-1]["prompt"] == "system:be brief;user:c;"
    chat.set_system("")
    assert chat.messages == ()


def test_reset_forgets_the_turns_and_keeps_the_system_prompt() -> None:
    chat, _, _ = session()
    chat.set_system("be brief")
    say(chat, "a")
    chat.reset()
    assert [message.role for message in chat.messages] == ["system"]
    assert chat.last_prompt is None


def test_thinking_is_passed_to_the_template() -> None:
    chat, _, template = session()
    say(chat, "a")
    chat.set_thinking(True)
    say(chat, "b")
    chat.set_thinking(None)
    say(chat, "c")
    assert [thinking for _, thinking in template.asked] == [None, True, None]


def test_thoughts_go_into_the_message_s_reasoning_as_the_template_expects_them() -> None:
    chat, _, _ = session("<think>\nhm\n</think>\n\n42")
    say(chat, "what?")
    assert (chat.messages[-1].content, chat.messages[-1].reasoning) == ("42", "hm")


def test_an_empty_think_block_is_no_reasoning() -> None:
    chat, _, _ = session("<think>\n\n</think>\n\n42")
    say(chat, "what?")
    assert chat.messages[-1].reasoning is None


def test_a_conversation_longer_than_the_context_is_refused_and_not_remembered() -> None:
    chat, _, _ = session(context_tokens=12)
    with pytest.raises(EvaluationError) as caught:
        say(chat, "too long for it")
    assert caught.value.render() == (
        "error[chat-too-long]: the conversation has 21 tokens; the model reads 12\n  fix: /reset starts a new one"
    )
    assert chat.messages == ()


def test_a_reply_is_never_longer_than_the_context_has_room_for() -> None:
    chat, stream, _ = session("fine", context_tokens=10, max_new_tokens=512)
    assert say(chat, "a") == "fin"
    assert stream.calls[0]["max_new_tokens"] == 10 - len("user:a;")


@given(st.text(max_size=40))
def test_streamed_pieces_join_to_the_text_and_never_show_half_a_character(text: str) -> None:
    pieces = list(stream_text(iter(text.encode("utf-8")), decode_bytes))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    assert list(stream_text(iter(b"a\xe2\x82"), decode_bytes)) == ["a", "\ufffd"]


def test_a_tokenizer_that_drops_the_space_of_a_first_token_keeps_it_in_a_stream() -> None:
    words = ["▁Hello", "▁world", "!", "▁How"]

    def decode(ids: list[int]) -> str:  # as SentencePiece does
        return "".join(words[index] for index in ids).replace("▁", " ").removeprefix(" ")

    assert list(stream_text(iter(range(4)), decode)) == ["Hello", " world", "!", " How"]  # type: ignore[arg-type]
