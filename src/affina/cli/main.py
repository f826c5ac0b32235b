"""The command line: which verbs there are, and what happens to errors.

A verb lives in a module of its own, `affina/cli/<verb>.py`, as one function `<verb>_command` (a dash becomes an
underscore) that typer reads: annotated parameters are its options, the docstring is its help. The module is imported
when the verb is used, never for `--help`; what needs torch is imported inside the function.
"""

from __future__ import annotations

import difflib
import errno
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from affina import __version__
from affina.cli import render
from affina.errors import AffinaError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h
EXIT_INTERRUPTED = 130  # 128 + SIGINT

# typer does not export these two, and its own copy of click and click itself are different packages by version.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
CommandLineError: type[Exception] = UsageError.__bases__[0]


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb by its name and the line that `affina --help` shows."""

    name: str
    help: str

    @property
    def identifier(self) -> str:
        return self.name.replace("-", "_")

    def function(self) -> Callable[..., None]:
        """Import the verb's module and return its function."""
        module = importlib.import_module(f"affina.cli.{self.identifier}")
        function: Callable[..., None] = getattr(module, f"{self.identifier}_command")
        return function


VERBS: dict[str, Verb] = {
    verb.name: verb
    for verb in (
        Verb("train", "Fine-tune a model, compare it with its base, and save the adapter."),
        Verb("check", "Validate a config and show every value with its origin. Loads nothing."),
        Verb("plan", "What a run will need and cost: memory, time and price on any card, before anything is loaded."),
        Verb("data", "Read the data as training would, and report lengths, masks, duplicates and leakage."),
        Verb("eval", "Measure a run's adapter against its base on the validation records."),
        Verb("chat", "Talk to a run's model; /base compares with the model it came from."),
        Verb("merge", "Write the adapter into the base model, and prove that the two agree."),
        Verb("quantize", "Write a model in 4 or 8 bits, prove it, and measure what it costs."),
        Verb("runs", "List runs, or compare two of them."),
        Verb("methods", "Compare the adapter methods, and count their parameters on a model."),
        Verb("config-schema", "Print the JSON Schema of the config, for editors."),
    )
}

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class LazyGroup(TyperGroup):
    """Lists verbs by name and help alone, and imports the one that is called."""

    # The contexts are typer's, whose class has moved between its versions; hence Any.
    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        verb = VERBS.get(cmd_name)
        return TyperCommand(name=verb.name, help=verb.help) if verb is not None else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            return args[0], load_command(VERBS[args[0]]), args[1:]
        return super().resolve_command(ctx, args)


def load_command(verb: Verb) -> Any:
    """The verb as a command that parses its options."""
    single = typer.Typer(add_completion=False, context_settings=HELP_OPTIONS)
    single.command(verb.name)(_telling_ctrl_c_apart(verb.function()))
    return typer.main.get_command(single)


class _Interrupted(Exception):
    """Ctrl-C inside a verb. typer turns KeyboardInterrupt into the exit code that a verb may have chosen itself."""


def _telling_ctrl_c_apart(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def verb(*arguments: Any, **options: Any) -> None:
        try:
            function(*arguments, **options)
        except KeyboardInterrupt:
            raise _Interrupted from None

    return verb


app = typer.Typer(
    cls=LazyGroup,
    help="Fine-tune language models on the hardware you have, and trust the result.",
    context_settings=HELP_OPTIONS,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"affina {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 error, 2 wrong usage, 70 bug, 130 interrupted."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code. No exception leaves, and none is lost."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal that cannot show √ gets a question mark, not a crash.
            stream.reconfigure(errors="replace")
    as_json = "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
    if not as_json:
        return _run(arguments, as_json=False)
    with render.json_only():
        return _run(arguments, as_json=True)


def _run(arguments: list[str], *, as_json: bool) -> int:
    try:
        result = app(arguments or ["--help"], prog_name="affina", standalone_mode=False)
        sys.stdout.flush()
    except AffinaError as error:
        _print_error(error, as_json)
        return EXIT_ERROR
    except CommandLineError as error:
        _print_error(_usage_error(error, arguments), as_json)
        return EXIT_USAGE
    except (_Interrupted, KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ERROR
    except OSError as error:
        known = _system_error(error)
        if known is None:
            render.print_bug(error, as_json=as_json, version=__version__)
            return EXIT_BUG
        _print_error(known, as_json)
        return EXIT_ERROR
    except Exception as error:  # noqa: BLE001 - the last line of defence: shown in full, with how to report it
        render.print_bug(error, as_json=as_json, version=__version__)
        return EXIT_BUG
    return result if isinstance(result, int) else 0


def _print_error(error: AffinaError, as_json: bool) -> None:
    if as_json:
        render.print_json(render.error_to_dict(error))
    else:
        render.print_error(error)


def _interrupted(as_json: bool) -> int:
    _print_error(AffinaError("interrupted", "stopped by Ctrl-C"), as_json)
    return EXIT_INTERRUPTED


def _usage_error(error: Exception, arguments: list[str]) -> AffinaError:
    """A wrong verb, option or argument in our form."""
    message = getattr(error, "format_message", error.__str__)().rstrip(".")
    verb = next((word for word in arguments if word in VERBS), None)
    fix = f"see `affina {verb} --help`" if verb else f"the verbs are {', '.join(VERBS)}"
    if verb is None and arguments:
        matches = difflib.get_close_matches(arguments[0], VERBS, 1, 0.6)
        if matches:
            fix = f"did you mean `affina {matches[0]}`?"
        elif arguments[0].endswith((".yaml", ".yml")):
            fix = f"did you mean `affina train {arguments[0]}`?"
    return AffinaError("usage", message[:1].lower() + message[1:], fix=fix)


def _system_error(error: OSError) -> AffinaError | None:
    """What the operating system refused, where the cause lies outside of affina."""
    file = f" ({error.filename})" if error.filename else ""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return AffinaError(
                "disk-full",
                f"there is no space left on the disk{file}",
                why="nothing that had been saved is damaged",
                fix="free some space, or write elsewhere with --set output.directory=/another/disk",
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AffinaError(
                "no-permission",
                f"the system does not allow this{file}",
                why=(error.strerror or "").lower() or None,
                fix="check who owns it; where results go is output.directory, -o for merge and quantize, "
                "data.cache_directory for prepared data",
            )
    return None
