"""`affina train`: prepare, train, compare with the base, save."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from affina.catalog.methods import method_named
from affina.cli import render
from affina.cli.options import ConfigArgument, JsonOption, PresetOption, SetOption
from affina.cli.progress import stage_progress
from affina.config.objectives import OBJECTIVES
from affina.errors import AffinaError

if TYPE_CHECKING:
    from affina.api import TrainResult

_LATEST = "latest"
EXIT_STOPPED = 130


def train_command(
    config: ConfigArgument = None,
    overrides: SetOption = None,
    preset: PresetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            help="Continue a run: its directory, one of its checkpoints, or 'latest' for the one named by output.name. "
            "Without a checkpoint yet it starts from the beginning.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a model, compare it with its base on held-out records, and save the adapter.

    Without a config it fine-tunes the model that ships with affina, on this machine's CPU.
    """
    from affina import api
    from affina.cli.live import training_view

    console = render.stderr()
    if resume is None:
        render.print_notes(api.check(config, overrides=overrides or (), preset=preset).warnings)

    view = training_view(console)
    console.print("reading the data and the model …", style="dim")

    with ExitStack() as stack:
        shown: list[Callable[[str, int, int], None]] = []

        def progress(stage: str, done: int, total: int) -> None:
            if not shown:  # not before the evaluation: a spinner and the live view cannot share a terminal
                shown.append(stack.enter_context(stage_progress(console, "comparing with the base …")))
            shown[0](stage, done, total)

        stack.callback(view.on_end, {})
        try:
            result = api.train(
                config,
                overrides=overrides or (),
                preset=preset,
                resume=True if resume == _LATEST else resume,
                callbacks=(view,),
                progress=progress,
            )
        except (AffinaError, OSError, KeyboardInterrupt):
            if shown and view.facts is not None:  # the comparison had begun, hence training had ended
                stack.close()
                run = view.facts.directory
                render.log(f"training is finished and its adapter saved; the comparison again: affina eval {run}")
            raise
    if as_json:
        render.print_json(result.to_dict())
    else:
        print_train_result(render.stdout(), result)
    if result.status == "interrupted":
        raise typer.Exit(EXIT_STOPPED)


def print_train_result(console: Console, result: TrainResult) -> None:
    """How the run ended, what it brought, where things are, and what to type next."""
    from affina.evaluation.terminal import print_result
    from affina.runs.units import format_bytes, format_seconds

    if result.status == "interrupted":
        console.print(f"stopped at step {result.steps}; everything up to there is saved")
        console.print(f"continue with: affina train --resume {result.run}", style="bold")
        return
    saved = f", kept step {result.saved_step} (lowest validation loss)" if result.saved_step != result.steps else ""
    console.print(
        f"trained {result.steps} steps in {format_seconds(result.seconds)} "
        f"({result.tokens_per_second:,.0f} tokens/s, peak memory {format_bytes(result.peak_memory_bytes)}"
        f"{_against_plan(result)}){saved}"
    )
    if result.planned_step_seconds is not None and result.steps:
        step = result.seconds / result.steps
        console.print(
            f"a step took {step:.3g} s, planned {result.planned_step_seconds:.3g} s "
            f"({result.planned_step_seconds / step - 1:+.1%})"
        )
    if result.num_skipped_steps:
        events = result.run / "events.jsonl"
        console.print(f"{result.num_skipped_steps} steps were skipped: see {events}", style="yellow")
    if result.evaluation is not None:
        print_result(console, result.evaluation)
    console.print()
    console.print(f"adapter  {result.adapter}", soft_wrap=True)
    commands = next_commands(
        result.run,
        is_mergeable=method_named(result.method).merges != "no",
        can_write=OBJECTIVES[result.objective].can_write,
    )
    console.print("\nnext", style="bold")
    width = max(len(command) for command, _ in commands)
    for command, purpose in commands:
        console.print(f"  {command:<{width}}   {purpose}", soft_wrap=True)


def _against_plan(result: TrainResult) -> str:
    """`, planned 13.6 GiB (-0.2%)`, where the two can be compared."""
    from affina.runs.units import format_bytes

    planned = result.planned_memory_bytes
    if planned is None:
        return ""
    return f", planned {format_bytes(planned)} ({planned / result.peak_memory_bytes - 1:+.1%})"


def next_commands(run: Path, *, is_mergeable: bool = True, can_write: bool = True) -> list[tuple[str, str]]:
    """What a person does after training, with the run's own path in it."""
    commands = []
    if can_write:
        commands.append((f"affina chat {run}", "talk to it; /base asks the model it came from"))
    if can_write and is_mergeable:
        commands.append((f"affina merge {run} -o merged", "one plain model, verified against the adapter"))
    return [*commands, ("affina runs", "all runs; two names compare them")]
