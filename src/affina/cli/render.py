"""What the verbs have in common when they print: data to stdout, logs to stderr, colour only on a terminal.

A verb ends with either `print_json(result.to_dict())` (when `--json` is given) or with tables and lines on
`stdout()`. Everything said on the way goes through `log` or `stderr()`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from affina.errors import AffinaError, AffinaErrors

PIPE_WIDTH = 200
"""Columns when the output is not a terminal: wide enough that a line of a table stays one line for grep."""

_json_stream: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)


class Renderable(Protocol):
    """A note or an error: something with a plain text of its own."""

    def render(self) -> str: ...


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for progress, warnings and errors."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # Made anew each time: tests and `--json` exchange the streams. Rich itself honours NO_COLOR and COLUMNS.
    console = Console(file=stream, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console


def log(message: str) -> None:
    """One line to stderr."""
    stderr().print(Text(message), soft_wrap=True)


@contextlib.contextmanager
def json_only() -> Iterator[None]:
    """Keep stdout for the one JSON object: whatever else is printed meanwhile, by any library, goes to stderr."""
    token = _json_stream.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream.reset(token)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a verb that was called with `--json`. NaN and infinity, which JSON lacks, become null."""
    stream = _json_stream.get() or sys.stdout
    stream.write(json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    stream.flush()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def table(*columns: str, title: str | None = None, numeric: Sequence[str] = ()) -> Table:
    """A table without lines: readable without colour, and easy to cut apart. `numeric` columns are right-aligned."""
    result = Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), title=title, title_justify="left", title_style="bold"
    )
    for column in columns:
        result.add_column(column, justify="right" if column in numeric else "left", header_style="bold")
    return result


def print_error(error: AffinaError) -> None:
    """An error, or each of several, on stderr."""
    console = stderr()
    for index, one in enumerate(error.parts if isinstance(error, AffinaErrors) else (error,)):
        if index:
            console.print()
        console.print(_styled(one.render(), console, head="bold red"), soft_wrap=True)
    if isinstance(error, AffinaErrors) and len(error.errors) > 1:
        console.print(f"\n{len(error.errors)} errors", style="red")


def print_notes(notes: Iterable[Renderable], console: Console | None = None) -> None:
    """Warnings, on stderr if no console is given."""
    console = console or stderr()
    for note in notes:
        console.print(_styled(note.render(), console, head="yellow"), soft_wrap=True)


def _styled(rendered: str, console: Console, *, head: str) -> Text:
    """Colour for the part before the first colon, and for the words why and fix; words stay as they are.

    On a terminal, lines break between words and go on below the message; elsewhere they stay whole, for grep.
    """
    if console.is_terminal:
        rendered = "\n".join(_wrap(line, console.width) for line in rendered.splitlines())
    text = Text(rendered)
    text.stylize(head, 0, rendered.index(":") + 1)
    for word, style in (("why:", "dim"), ("fix:", "green")):
        for start in _line_starts(rendered, f"  {word}"):
            text.stylize(style, start, start + len(word) + 2)
    return text


def _wrap(line: str, width: int) -> str:
    # A path or a command is never broken: it would no longer be one when it is copied.
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=" " * 7, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
    return "\n".join(wrapped) if wrapped else line


def _line_starts(text: str, prefix: str) -> Iterator[int]:
    position = 0
    for line in text.splitlines(keepends=True):
        if line.startswith(prefix):
            yield position
        position += len(line)


def error_to_dict(error: AffinaError) -> dict[str, Any]:
    """What `--json` prints for an error: the fields of the summary or of the first one, and all errors in `errors`."""
    errors: Sequence[AffinaError] = error.errors if isinstance(error, AffinaErrors) else (error,)
    return {"error": {**error.to_dict(), "errors": [one.to_dict() for one in errors]}}


def print_bug(error: BaseException, *, as_json: bool, version: str) -> None:
    """An exception that nobody foresaw: the traceback, and how to report it."""
    trace = "".join(traceback.format_exception(error))
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if as_json:
        fields = {"code": "bug", "what": what, "why": "affina did not foresee this", "fix": "report it"}
        print_json({"error": {**fields, "file": None, "line": None, "version": version, "traceback": trace}})
        return
    stderr().print(Text(trace.rstrip(), style="dim"), soft_wrap=True)
    rendered = (
        f"error[bug]: {what}\n"
        "  why: affina did not foresee this; it is a mistake in affina, not in what you did\n"
        f"  fix: report it with the lines above, the command, and the version (affina {version})"
    )
    console = stderr()
    console.print(_styled(rendered, console, head="bold red"), soft_wrap=True)
