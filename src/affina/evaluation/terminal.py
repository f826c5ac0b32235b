"""The result on a terminal: base against tuned, a few replies, where the files are, what to type next."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from affina.evaluation.compare import (
    ComparedReply,
    EvaluationResult,
    Verdict,
    format_perplexity,
    format_points,
    format_share,
)
from affina.evaluation.stats import Interval

_STYLES = {"better": "green", "worse": "red", "cannot tell": "yellow", "unchanged": "yellow"}
_MAX_LINES_OF_A_REPLY = 8
_NARROW = 72
"""Below this many columns the two replies stand under each other."""


def print_result(console: Console, result: EvaluationResult, *, next_commands: Sequence[tuple[str, str]] = ()) -> None:
    """Print a result. next_commands: what to type next, each with what it does."""
    console.print()
    console.print(_table(result))
    for verdict in (result.accuracy, result.perplexity):
        if verdict is not None:
            console.print(_verdict_line(verdict))
    for note in result.notes:
        console.print(Text(f"note: {note}", style="dim"))
    for number, sample in enumerate(result.samples, start=1):
        console.print()
        console.print(_sample(sample, number, console))
    places = [("report", result.report_path), ("all replies", result.samples_path)]
    if any(path for _, path in places):
        console.print()
        console.print(_pairs([(name, path) for name, path in places if path], "dim", ""))
    if next_commands:
        console.print()
        console.print(Text("next", style="bold"))
        console.print(Padding(_pairs(list(next_commands), "cyan", "dim"), (0, 0, 0, 2)))


def _table(result: EvaluationResult) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="dim")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("tuned", justify="right")
    table.add_column("change", justify="right")
    accuracy = result.accuracy
    if accuracy is not None and result.base.accuracy is not None and result.tuned.accuracy is not None:
        table.add_row(
            _two_lines("accuracy", f"of {result.num_replies:,} replies"),
            _two_lines(format_share(result.base.accuracy), _shares(result.base.accuracy_interval)),
            _two_lines(
                format_share(result.tuned.accuracy),
                _shares(result.tuned.accuracy_interval),
                _STYLES[accuracy.conclusion],
            ),
            _two_lines(
                f"{format_points(accuracy.change)} points",
                f"{format_points(accuracy.interval.low)} to {format_points(accuracy.interval.high)}",
            ),
        )
    perplexity = result.perplexity
    table.add_row(
        _two_lines("perplexity", f"{result.num_tokens:,} reply tokens"),
        _two_lines(format_perplexity(result.base.perplexity), _perplexities(result.base.perplexity_interval)),
        _two_lines(
            format_perplexity(result.tuned.perplexity),
            _perplexities(result.tuned.perplexity_interval),
            _STYLES[perplexity.conclusion],
        ),
        _two_lines(f"× {perplexity.change:.3f}", _ratios(perplexity.interval)),
    )
    table.caption = f"{result.num_records:,} validation records; ranges are {result.confidence:.0%} intervals"
    table.caption_justify = "left"
    table.caption_style = "dim"
    return table


def _two_lines(value: str, range_text: str, style: str = "") -> Text:
    return Text.assemble((value, f"bold {style}".strip()), "\n", (range_text, "dim"))


def _shares(interval: Interval | None) -> str:
    return f"{format_share(interval.low)} to {format_share(interval.high)}" if interval is not None else ""


def _perplexities(interval: Interval) -> str:
    return f"{format_perplexity(interval.low)} to {format_perplexity(interval.high)}"


def _ratios(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}" if interval.high < float("inf") else "0 to ∞"


def _verdict_line(verdict: Verdict) -> Text:
    word, colon, rest = verdict.sentence.partition(":")
    return Text.assemble((word, f"bold {_STYLES[verdict.conclusion]}"), colon, rest)


def _sample(sample: ComparedReply, number: int, console: Console) -> RenderableType:
    is_wide = console.width >= _NARROW
    width = min(console.width, 120)
    prompt = Table.grid(padding=(0, 1, 0, 0))
    prompt.add_column(style="dim", no_wrap=True, min_width=7)
    prompt.add_column(overflow="fold", max_width=width - 9)
    prompt.add_row(f"{number}", Text(_shortened(sample.prompt, _MAX_LINES_OF_A_REPLY, width), style="bold"))
    prompt.add_row("wanted", Text(_shortened(sample.reference, _MAX_LINES_OF_A_REPLY, width)))
    answers = [
        ("base", sample.base, sample.base_is_right, sample.base_is_complete),
        ("tuned", sample.tuned, sample.tuned_is_right, sample.tuned_is_complete),
    ]
    if not is_wide:
        for name, text, is_right, is_complete in answers:
            prompt.add_row(name, _answer(text, is_right, is_complete, width))
        return prompt
    column = (width - 11) // 2
    sides = Table.grid(padding=(0, 2, 0, 0))
    for _ in answers:
        sides.add_column(width=column, overflow="fold")
    sides.add_row(*(_heading(name, is_right) for name, _, is_right, _ in answers))
    sides.add_row(*(_text(text, is_complete, column) for _, text, _, is_complete in answers))
    return Group(prompt, Padding(sides, (0, 0, 0, 8)))


def _heading(name: str, is_right: bool) -> Text:
    return Text.assemble((f"{name} ", "dim"), _mark(is_right))


def _mark(is_right: bool) -> tuple[str, str]:
    return ("right", "bold green") if is_right else ("wrong", "bold red")


def _answer(text: str, is_right: bool, is_complete: bool, width: int) -> Text:
    return Text.assemble(_mark(is_right), "  ", _text(text, is_complete, width))


def _text(text: str, is_complete: bool, width: int) -> Text:
    if not text:
        return Text("(empty)", style="dim italic")
    shown = Text(_shortened(text, _MAX_LINES_OF_A_REPLY, width))
    if not is_complete:
        shown.append(" (cut off at the token limit)", style="dim")
    return shown


def _shortened(text: str, num_lines: int, width: int) -> str:
    """What fits into about `num_lines` lines, without control characters (a reply must not move the cursor)."""
    printable = "".join(character for character in text if character == "\n" or character.isprintable()).strip()
    lines = printable.split("\n")
    kept = "\n".join(lines[:num_lines])
    limit = num_lines * width
    if len(kept) > limit:
        return kept[: limit - 1] + "…"
    return kept if len(lines) <= num_lines else kept + " …"


def _pairs(pairs: Sequence[tuple[str, str | None]], first: str, second: str) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=first, no_wrap=True)
    grid.add_column(style=second, overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(name), Text(value or ""))
    return grid
