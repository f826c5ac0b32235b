from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from affina import api
from affina.cli.chat import Chat, Screen
from affina.cli.main import run as affina
from affina.evaluation.chat import ChatSession
from tests.evaluation.fakes import FakeStream, FakeTemplate, decode_bytes


def make_session(stream: Any = None) -> ChatSession:
    return ChatSession(stream or FakeStream("fine"), FakeTemplate(), decode_bytes, run="support", model="affina/nano")


class Keyboard:
    """Lines of a user; KeyboardInterrupt is a Ctrl-C at the prompt."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self.lines = list(lines)

    def __call__(self) -> str | None:
        if not self.lines:
            return None
        line = self.lines.pop(0)
        if not isinstance(line, str):
            raise line
        return line


def talk(*lines: str | type[BaseException], session: ChatSession | None = None) -> tuple[str, Chat]:
    output = io.StringIO()
    console = Console(file=output, width=100, markup=False, emoji=False, highlight=False)
    chat = Chat(session or make_session(), Screen(console, is_interactive=True))
    chat.greet()
    chat.run(Keyboard(*lines))
    return output.getvalue(), chat


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """What `api.open_chat` gives to the command."""
    session = make_session()
    monkeypatch.setattr(api, "open_chat", lambda run: session)
    return session


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_a_pipe_gets_the_bare_replies(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "how are you?\n\nand now?\n")
    assert affina(["chat", "runs/a"]) == 0
    assert capsys.readouterr().out == "fine\nfine\n"
    assert [message.content for message in session.messages] == ["how are you?", "fine", "and now?", "fine"]


def test_base_in_a_pipe_is_labelled(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "how?\n/base\n/base why?\n")
    assert affina(["chat", "runs/a"]) == 0
    assert capsys.readouterr().out == "fine\nbase\nFINE\nbase\nFINE\ntuned\nfine\n"


def test_chat_json_gives_all_turns_at_the_end(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "how?\n/base\n/base why?\n")
    assert affina(["chat", "runs/a", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values == {
        "run": "runs/a",
        "turns": [
            {"user": "how?", "tuned": "fine", "base": "FINE", "error": None},
            {"user": "why?", "tuned": "fine", "base": "FINE", "error": None},
        ],
    }


def test_an_error_in_a_pipe_is_told_the_rest_goes_on_and_the_exit_code_is_1(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "/base\nhow?\n")
    assert affina(["chat", "runs/a"]) == 1
    caught = capsys.readouterr()
    assert caught.out == "fine\n"
    assert "error[chat-nothing-asked]" in caught.err


def test_options_reach_the_session(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, "")
    affina(["chat", "runs/a", "--max-new-tokens", "7", "-t", "0.5", "--system", "be brief"])
    assert (session.max_new_tokens, session.temperature) == (7, 0.5)
    assert [message.content for message in session.messages] == ["be brief"]


def test_a_terminal_is_greeted_with_the_run_and_the_commands() -> None:
    printed, _ = talk("/help")
    assert "support on affina/nano: type a message, /base to compare with the base model, /help for more." in printed
    for command in ("/base TEXT", "/reset", "/system TEXT", "/think on|off", "/quit"):
        assert command in printed


def test_quit_leaves_at_once() -> None:
    _, chat = talk("a", "/quit", "b")
    assert [turn.user for turn in chat.turns] == ["a"]


def test_base_repeats_the_last_message_on_the_base_and_keeps_the_conversation() -> None:
    printed, chat = talk("how?", "/base")
    assert "base\nFINE\n" in printed
    assert [message.content for message in chat.session.messages] == ["how?", "fine"]
    assert chat.turns[0].base == "FINE"


def test_base_with_text_asks_both_and_keeps_the_tuned_reply() -> None:
    stream = FakeStream("fine")
    printed, chat = talk("/base how?", session=make_session(stream))
    assert printed.index("FINE") < printed.index("fine\n")
    assert [call["use_adapter"] for call in stream.calls] == [False, True]
    assert stream.calls[0]["prompt"] == stream.calls[1]["prompt"] == "user:how?;"
    assert [message.content for message in chat.session.messages] == ["how?", "fine"]


def test_reset_system_and_think_say_what_they_did() -> None:
    printed, chat = talk("how?", "/reset", "/system be brief", "/think on", "/think auto", "/system")
    assert "new conversation with this system prompt" in printed
    assert "thinking on" in printed
    assert "thinking auto" in printed
    assert chat.session.messages == ()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bsae", "error[chat-unknown-command]: there is no command /bsae"),
        ("/think maybe", "error[chat-think]: /think maybe: not on, off or auto"),
        ("/base", "error[chat-nothing-asked]"),
    ],
)
def test_a_wrong_command_is_explained_and_the_chat_goes_on(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    printed, chat = talk(line, "how?")
    assert message in capsys.readouterr().err
    assert "fine" in printed
    assert chat.num_errors == 1


def test_ctrl_c_stops_the_reply_and_not_the_program() -> None:
    calls = 0

    def stream(_ids: Sequence[int], /, *, use_adapter: bool, **_options: Any) -> Iterator[int]:
        nonlocal calls
        calls += 1
        yield from b"half a re"
        if calls == 1:
            raise KeyboardInterrupt

    printed, chat = talk("tell me", "again", session=make_session(stream))
    assert "half a re\n(stopped)" in printed
    assert [turn.user for turn in chat.turns] == ["tell me", "again"]
    assert chat.session.messages[1].content == "half a re"


def test_ctrl_c_while_comparing_leaves_the_tuned_model_unasked() -> None:
    def stream(_ids: Sequence[int], /, *, use_adapter: bool, **_options: Any) -> Iterator[int]:
        assert not use_adapter
        yield from b"base"
        raise KeyboardInterrupt

    _, chat = talk("/base how?", session=make_session(stream))
    assert chat.turns[0].to_dict() == {"user": "how?", "tuned": None, "base": "base", "error": None}
    assert chat.session.messages == ()


def test_ctrl_c_at_the_prompt_says_how_to_leave() -> None:
    printed, chat = talk(KeyboardInterrupt, "how?")
    assert "(/quit or Ctrl-D leaves)" in printed
    assert len(chat.turns) == 1


def test_a_reply_cannot_move_the_cursor_or_ring_the_bell() -> None:
    printed, chat = talk("x", session=make_session(FakeStream("a\x1b[2Jb\x07c\td\ne")))
    assert "a[2Jbc\td\ne\n" in printed
    assert chat.turns[0].tuned == "a\x1b[2Jb\x07c\td\ne"


def test_chat_with_a_run_that_has_no_adapter_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch, "hello\n")
    (tmp_path / "run.json").write_text('{"status": "failed"}')
    assert affina(["chat", str(tmp_path)]) == 1
    assert "error[run-unfinished]" in capsys.readouterr().err
