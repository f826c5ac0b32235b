"""`affina runs`: the runs of a folder, or two runs side by side."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from affina.cli import render
from affina.cli.options import JsonOption
from affina.errors import AffinaError

if TYPE_CHECKING:
    from affina.runs.index import RunComparison, RunSummary

_STATUS_STYLES = {"finished": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "damaged": "red"}

RunsArgument = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[A B]", help="Two runs to compare. Without: list all runs.", show_default=False),
]
DirectoryOption = Annotated[
    Path, typer.Option("--directory", "-d", metavar="FOLDER", help="Folder that holds the run directories.")
]


def runs_command(
    runs: RunsArgument = None, directory: DirectoryOption = Path("runs"), as_json: JsonOption = False
) -> None:
    """List runs, or compare the settings and results of two of them."""
    from affina import api

    if runs and len(runs) != 2:
        raise AffinaError(
            "usage",
            f"`affina runs` compares two runs, {len(runs)} given",
            fix="name two runs, or none to list them all",
        )
    if runs:
        comparison = api.compare_runs(*(_find(run, directory) for run in runs))
        if as_json:
            render.print_json(comparison.to_dict())
        else:
            print_comparison(render.stdout(), comparison)
        return
    summaries = api.list_runs(directory)[::-1]  # the newest first: it is the one that is looked for
    if as_json:
        render.print_json({"directory": str(directory), "runs": [summary.to_dict() for summary in summaries]})
    else:
        print_runs(render.stdout(), summaries, directory)


def _find(run: Path, directory: Path) -> Path:
    """A run by its path, or by its name in the folder of runs."""
    return directory / run if not run.exists() and (directory / run).exists() else run


def print_runs(console: Console, summaries: list[RunSummary], directory: Path) -> None:
    """One line for each run, newest first."""
    if not summaries:
        console.print(f"no runs in {directory}")
        console.print("start one with `affina train`, or name another folder with --directory", style="dim")
        return
    table = render.table(
        "run", "when", "model", "method", "steps", "status", "loss", "val. loss", "accuracy",
        numeric=("steps", "loss", "val. loss", "accuracy"),
    )  # fmt: skip
    for column in table.columns:
        column.overflow = "fold"
    for summary in summaries:
        table.add_row(
            summary.name,
            show_when(summary.created),
            summary.model or "–",
            summary.method or "–",
            _steps(summary),
            Text(summary.status, style=_STATUS_STYLES.get(summary.status, "")),
            _number(summary.final_loss),
            _number(summary.validation_loss),
            _accuracy(summary),
        )
    console.print(table)
    if len(summaries) > 1:
        first, second = summaries[1].name, summaries[0].name
        console.print(Text(f"\ncompare two: affina runs {first} {second}", style="dim"), soft_wrap=True)


def print_comparison(console: Console, comparison: RunComparison) -> None:
    """The settings that differ, and the results of both."""
    first, second = comparison.first, comparison.second
    settings = _comparison_table("setting", first.name, second.name)
    for path, (before, after) in comparison.settings.items():
        settings.add_row(path, _setting(before), _setting(after))
    if comparison.settings:
        console.print(settings)
    else:
        console.print("all settings are equal")
    if "training.objective" in comparison.settings:
        console.print("the runs have different objectives: their losses do not compare", style="yellow")
    if not comparison.same_data:
        console.print("the runs saw different data: their losses and accuracies do not compare", style="yellow")
    console.print()
    results = _comparison_table("result", first.name, second.name)
    rows: list[tuple[str, Any, Any]] = [
        ("status", first.status, second.status),
        ("steps", _steps(first), _steps(second)),
        ("seconds", _number(first.seconds), _number(second.seconds)),
        ("loss", _number(first.final_loss), _number(second.final_loss)),
        ("validation loss", _number(first.validation_loss), _number(second.validation_loss)),
        ("perplexity", _number(first.tuned_perplexity), _number(second.tuned_perplexity)),
        ("accuracy", _accuracy(first), _accuracy(second)),
    ]
    for row in rows:
        results.add_row(*row)
    console.print(results)


def _comparison_table(what: str, first: str, second: str) -> Table:
    table = render.table(what, first, second)
    for column in table.columns:
        column.overflow = "fold"
    return table


def show_when(created: str | None) -> str:
    """`2026-11-24 10:15`, in local time."""
    if created is None:
        return "–"
    try:
        moment = datetime.fromisoformat(created.replace("Z", "+00:00"))
    except ValueError:
        return created
    return f"{moment.astimezone():%Y-%m-%d %H:%M}"


def _steps(summary: RunSummary) -> str:
    return "–" if summary.num_steps is None else f"{summary.num_steps:,}"


def _accuracy(summary: RunSummary) -> str:
    if summary.tuned_accuracy is None:
        return "–"
    base = f" (base {summary.base_accuracy:.0%})" if summary.base_accuracy is not None else ""
    return f"{summary.tuned_accuracy:.1%}{base}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _setting(value: object) -> str:
    from affina.evaluation.report import format_setting

    return format_setting(value)
