"""The frame of the command line: exit codes, errors as text and as JSON, and what is never imported."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from affina import __version__
from affina.cli import main, render
from affina.cli.options import JsonOption
from affina.errors import AffinaError, AffinaErrors, Location

HEAVY = ("torch", "transformers", "datasets", "peft", "pyarrow", "huggingface_hub", "numpy")


def affina(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user runs it, in a process of its own."""
    import os

    env = {**os.environ, **environment}
    command = [sys.executable, "-m", "affina", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=60)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Put a function in place of `affina runs`, which then takes --json as every verb does."""

    def install(function: Callable[..., None]) -> None:
        module = types.ModuleType("affina.cli.runs")
        module.runs_command = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "affina.cli.runs", module)

    return install


def raising(error: BaseException) -> Callable[..., None]:
    def command(as_json: JsonOption = False) -> None:
        raise error

    return command


# --- weight


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["-h"],
        ["--version"],
        ["check"],
        ["check", "--json"],
        ["check", "-h"],
        ["config-schema"],
        ["methods", "--model", "Qwen/Qwen3-4B"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_the_frame_never_imports_what_is_heavy(arguments: list[str]) -> None:
    code = (
        "import sys, json; from affina.cli.main import run\n"
        f"run({arguments!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('\\nLOADED', json.dumps(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.rsplit("LOADED", 1)[-1].strip() == "[]", done.stderr


def test_help_imports_no_verb() -> None:
    code = (
        "import sys; from affina.cli.main import run, VERBS\n"
        "run(['--help'])\n"
        "print('LOADED', [v.name for v in VERBS.values() if f'affina.cli.{v.identifier}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.rsplit("LOADED", 1)[-1].strip() == "[]"


# --- help, version, usage


def test_help_lists_every_verb_with_one_line() -> None:
    done = affina("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in main.VERBS.values():
        assert verb.name in done.stdout
        assert verb.help.split()[0] in done.stdout
    assert affina("-h").stdout == affina().stdout == done.stdout


def test_the_version_is_printed() -> None:
    done = affina("--version")
    assert (done.returncode, done.stdout) == (0, f"affina {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["trian"], "no such command 'trian'", "did you mean `affina train`?"),
        (["run.yaml"], "no such command 'run.yaml'", "did you mean `affina train run.yaml`?"),
        (
            ["zzz"],
            "no such command 'zzz'",
            "the verbs are train, check, plan, data, eval, chat, merge, quantize, runs, methods, config-schema",
        ),
        (["check", "--prset", "x"], "no such option: --prset", "see `affina check --help`"),
        (["check", "a", "b"], "got unexpected extra argument", "see `affina check --help`"),
        (["check", "--preset"], "requires an argument", "see `affina check --help`"),
    ],
)
def test_a_wrong_command_line_is_an_error_with_a_fix(
    arguments: list[str], what: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(arguments) == main.EXIT_USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error[usage]: ")
    assert what in captured.err
    assert captured.err.endswith(f"  fix: {fix}\n")


# --- errors


ERROR = AffinaError("some-code", "something is wrong", why="it is so", fix="do this", where=Location("run.yaml", 3))


def test_an_error_goes_to_stderr_and_exits_with_1(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(ERROR))
    assert main.run(["runs"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error[some-code]: something is wrong (run.yaml:3)\n  why: it is so\n  fix: do this\n"


def test_several_errors_are_counted(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(AffinaErrors([ERROR, AffinaError("other", "another")])))
    assert main.run(["runs"]) == 1
    assert capsys.readouterr().err.endswith("  fix: do this\n\nerror[other]: another\n\n2 errors\n")


def test_an_error_as_json_is_one_object_on_stdout(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(AffinaErrors([ERROR, AffinaError("other", "another")])))
    assert main.run(["runs", "--json"]) == 1
    captured = capsys.readouterr()
    error = json.loads(captured.out)["error"]
    assert (error["code"], error["file"], error["line"], error["fix"]) == ("some-code", "run.yaml", 3, "do this")
    assert [one["code"] for one in error["errors"]] == ["some-code", "other"]
    assert captured.err == ""


def test_a_wrong_command_line_as_json_is_one_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["check", "--nonsense", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "usage"


def test_what_libraries_print_meanwhile_does_not_mix_with_the_json(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(as_json: JsonOption = False) -> None:
        print("a library says hello")
        render.stdout().print("and a table")
        render.print_json({"loss": float("nan"), "path": Path("a"), "text": "è", "list": (1, float("inf"))})

    verb(chatty)
    assert main.run(["runs", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"loss": None, "path": "a", "text": "è", "list": [1, None]}
    assert captured.err == "a library says hello\nand a table\n"


def test_a_bug_shows_its_traceback_and_how_to_report_it(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(RuntimeError("a mistake of ours")))
    assert main.run(["runs"]) == main.EXIT_BUG
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert "error[bug]: RuntimeError: a mistake of ours\n  why: affina did not foresee this" in text
    assert f"fix: report it with the lines above, the command, and the version (affina {__version__})" in text


def test_a_bug_as_json_keeps_its_traceback(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(raising(AssertionError()))
    assert main.run(["runs", "--json"]) == main.EXIT_BUG
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["code"], error["what"]) == ("bug", "AssertionError")
    assert "Traceback" in error["traceback"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=lambda e: type(e).__name__)
def test_ctrl_c_exits_with_130(
    error: BaseException, verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(error))
    assert main.run(["runs"]) == 130
    assert capsys.readouterr().err == "error[interrupted]: stopped by Ctrl-C\n"


def test_a_verb_chooses_its_own_exit_code(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    for code in (3, 130):
        verb(raising(typer.Exit(code)))
        assert main.run(["runs"]) == code
        assert capsys.readouterr() == ("", "")


def test_a_verb_that_was_stopped_and_has_printed_its_json_prints_no_second_object(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(as_json: JsonOption = False) -> None:
        render.print_json({"status": "interrupted"})
        raise typer.Exit(130)

    verb(stopped)
    assert main.run(["runs", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"status": "interrupted"}


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "error[disk-full]: there is no space left on the disk (/x/y)\n"
         "  why: nothing that had been saved is damaged\n"),
        (errno.EACCES, "error[no-permission]: the system does not allow this (/x/y)\n"),
        (errno.EROFS, "error[no-permission]: the system does not allow this (/x/y)\n"),
    ],
)  # fmt: skip
def test_what_the_system_refuses_is_not_called_a_bug(
    number: int, text: str, verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(OSError(number, "the system's words", "/x/y")))
    assert main.run(["runs"]) == 1
    assert capsys.readouterr().err.startswith(text)


def test_another_error_of_the_system_is_shown_in_full(
    verb: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    verb(raising(OSError(errno.EINVAL, "invalid")))
    assert main.run(["runs"]) == main.EXIT_BUG
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_stops_early_causes_no_traceback() -> None:
    # `true` reads nothing and is gone before the first byte is written.
    command = f"{sys.executable} -m affina config-schema | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("", "")


# --- streams and colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_errors_are_coloured_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, is_coloured in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        render.print_error(ERROR)
        assert ("\x1b[" in stream.getvalue()) is is_coloured
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    render.print_error(ERROR)
    assert "\x1b[31m" not in terminal.getvalue()
    assert "\x1b[1;31m" not in terminal.getvalue()


def test_long_lines_of_an_error_are_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    what = "x " * 300 + "end"
    render.print_error(AffinaError("long", what))
    assert what in capsys.readouterr().err


def test_on_a_terminal_errors_break_between_words_and_go_on_below_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    render.print_error(
        AffinaError("code", "some words that are long enough", fix="run /a/very/long/path/of/a/file.yaml")
    )
    assert Text.from_ansi(terminal.getvalue()).plain.splitlines() == [
        "error[code]: some words that are long",
        "       enough",
        "  fix: run",
        "       /a/very/long/path/of/a/file.yaml",
    ]


def test_square_brackets_in_a_message_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_error(AffinaError("code", "data.train[0] is [red]x[/red] :smile:"))
    assert "data.train[0] is [red]x[/red] :smile:" in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_a_substitute_not_a_crash() -> None:
    done = affina("check", "--preset", "starter", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "the update is scaled by ?/r = 2" in done.stdout


def test_logs_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    render.log("loading [model]")
    assert capsys.readouterr() == ("", "loading [model]\n")


def test_tables_are_plain_and_align_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    table = render.table("name", "loss", numeric=["loss"])
    table.add_row("a", "1.5")
    table.add_row("long name", "10.25")
    render.stdout().print(table)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name        loss", "a            1.5", "long name  10.25"]


# --- the table of verbs


def test_every_verb_is_a_module_with_its_function() -> None:
    names: dict[str, Any] = {}
    for verb in main.VERBS.values():
        try:
            names[verb.name] = verb.function()
        except ModuleNotFoundError as error:
            pytest.fail(f"the verb {verb.name} has no module: {error}")
        assert names[verb.name].__doc__, f"{verb.name} explains itself in `--help`"
