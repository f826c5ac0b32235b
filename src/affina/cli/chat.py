"""`affina chat`: talk to a run's model, and ask its base the same."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.text import Text

from affina.cli import render
from affina.cli.options import JsonOption, RunArgument
from affina.errors import AffinaError

if TYPE_CHECKING:
    from affina.evaluation.chat import ChatSession

HELP = """\
/base            what the base model answers to your last message
/base TEXT       both models' answers to TEXT
/reset           start over; the system prompt stays
/system TEXT     start over with this system prompt; without TEXT: with none of your own
/think on|off    let the model think first, or not; /think auto: as it was trained
/help            these lines
/quit            leave (Ctrl-D does too). Ctrl-C stops a reply."""

MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, metavar="N", help="Longest reply, in tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", "-t", min=0.0, metavar="T", help="0 always takes the likeliest token.")
]
SystemOption = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System prompt to begin with.")]


def chat_command(
    run: RunArgument,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Talk to a run's model; /base compares with the model it came from.

    Reads from a pipe as well, one message per line; then only the replies are printed.
    """
    from affina import api

    session = api.open_chat(run)
    session.max_new_tokens, session.temperature = max_new_tokens, temperature
    if system:
        session.set_system(system)
    is_interactive = sys.stdin.isatty() and not as_json
    chat = Chat(session, Screen(render.stdout(), is_interactive=is_interactive, is_silent=as_json))
    if is_interactive:
        chat.greet()
    chat.run(_typed_lines() if is_interactive else _piped_lines())
    if as_json:
        render.print_json({"run": str(run), "turns": [turn.to_dict() for turn in chat.turns]})
    if chat.num_errors and not is_interactive:
        raise typer.Exit(1)


class Lines(Protocol):
    """Gives the next line the user typed, or None at the end. KeyboardInterrupt passes through."""

    def __call__(self) -> str | None: ...


def _typed_lines() -> Lines:
    """Lines from the terminal, with editing and history where readline is there."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)

    def read() -> str | None:
        try:
            return input("› ")
        except EOFError:
            return None

    return read


def _piped_lines() -> Lines:
    lines = iter(sys.stdin)

    def read() -> str | None:
        return next(lines, None)

    return read


@dataclass(slots=True)
class Turn:
    """What was asked and answered, for `--json`. An error takes the place of a reply."""

    user: str
    tuned: str | None = None
    base: str | None = None
    error: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"user": self.user, "tuned": self.tuned, "base": self.base, "error": self.error}


@dataclass(slots=True)
class Screen:
    """Where replies go. A pipe gets the bare replies; `--json` gets nothing until the end."""

    console: Console
    is_interactive: bool
    is_silent: bool = False

    def label(self, name: str) -> None:
        if not self.is_silent:
            self.console.print(Text(f"{name}", style="bold cyan" if name == "tuned" else "bold yellow"))

    def note(self, text: str) -> None:
        """Something about the chat itself; it would be in the way in a pipe."""
        if self.is_interactive:
            self.console.print(Text(text, style="dim"))

    def stream(self, pieces: Iterator[str]) -> tuple[str, bool]:
        """Show pieces as they come; the whole text, and whether Ctrl-C stopped it."""
        shown: list[str] = []
        is_stopped = False
        try:
            for piece in pieces:
                shown.append(piece)
                if not self.is_silent:
                    self.console.file.write(_printable(piece))
                    self.console.file.flush()
        except KeyboardInterrupt:
            is_stopped = True
            close = getattr(pieces, "close", None)
            if close is not None:
                close()
        if not self.is_silent:
            self.console.file.write("\n")
            if self.is_interactive:
                self.console.print(Text("(stopped)\n" if is_stopped else "", style="dim"))
            self.console.file.flush()
        return "".join(shown), is_stopped


@dataclass(slots=True)
class Chat:
    """The loop over the user's lines, and the commands in it."""

    session: ChatSession
    screen: Screen
    turns: list[Turn] = field(default_factory=list)
    num_errors: int = 0

    def greet(self) -> None:
        names = " on ".join(name for name in (self.session.run, self.session.model) if name)
        self.screen.note(f"{names or 'chat'}: type a message, /base to compare with the base model, /help for more.\n")

    def run(self, read: Lines) -> None:
        """Until /quit or the end of the input."""
        while True:
            try:
                line = read()
            except KeyboardInterrupt:
                self.screen.note("\n(/quit or Ctrl-D leaves)")
                continue
            if line is None:
                return
            line = line.strip()
            if line in ("/quit", "/exit", "/q"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """One line: a command, or a message to the tuned model. Errors are shown, and the chat goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            else:
                self._ask(line)
        except AffinaError as error:
            self.num_errors += 1
            self.turns.append(Turn(line, error=dict(error.to_dict())))
            if not self.screen.is_silent:
                render.print_error(error)

    def _ask(self, text: str) -> None:
        reply, _ = self.screen.stream(self.session.reply(text))
        self.turns.append(Turn(text, tuned=reply))

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "base": self._base,
            "reset": self._reset,
            "system": self._system,
            "think": self._think,
            "help": self._help,
            "?": self._help,
        }
        if name not in commands:
            raise AffinaError(
                "chat-unknown-command",
                f"there is no command /{name}",
                fix="/help lists them; a message that begins with / needs a space before it",
            )
        commands[name](rest.strip())

    def _base(self, text: str) -> None:
        if not text:
            asked = self.session.last_prompt
            pieces = self.session.base_reply()
            self.screen.label("base")
            reply, _ = self.screen.stream(pieces)
            if self.turns and self.turns[-1].user == asked:
                self.turns[-1].base = reply
            else:
                self.turns.append(Turn(asked or "", base=reply))
            return
        base_pieces = self.session.base_reply(text)
        self.screen.label("base")
        base, is_stopped = self.screen.stream(base_pieces)
        if is_stopped:
            self.turns.append(Turn(text, base=base))
            return
        tuned_pieces = self.session.reply(text)
        self.screen.label("tuned")
        tuned, _ = self.screen.stream(tuned_pieces)
        self.turns.append(Turn(text, tuned=tuned, base=base))

    def _reset(self, _rest: str) -> None:
        self.session.reset()
        self.screen.note("new conversation\n")

    def _system(self, text: str) -> None:
        self.session.set_system(text)
        self.screen.note("new conversation with this system prompt\n" if text else "new conversation\n")

    def _think(self, choice: str) -> None:
        modes = {"on": True, "off": False, "auto": None}
        if choice not in modes:
            raise AffinaError("chat-think", f"/think {choice}: not on, off or auto", fix="/think on, /think off")
        self.session.set_thinking(modes[choice])
        self.screen.note(f"thinking {choice}\n")

    def _help(self, _rest: str) -> None:
        if not self.screen.is_silent:
            self.screen.console.print(Text(HELP + "\n"))


def _printable(piece: str) -> str:
    """Without control characters but line feeds and tabs: a reply must not move the cursor or ring the bell."""
    return "".join(character for character in piece if character in "\n\t" or character.isprintable())
