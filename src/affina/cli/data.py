"""`affina data`: read the data as training would, and say what training would see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from affina.cli import render
from affina.cli.options import ConfigArgument, JsonOption, PresetOption, SetOption

if TYPE_CHECKING:
    from affina.data.prepare import PreparedData
    from affina.data.report import DataReport
    from affina.data.samples import Sample

ShowOption = Annotated[
    int, typer.Option("--show", min=0, metavar="N", help="Print N samples token by token; what is trained is marked.")
]

_LEVEL_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
# Neighbouring tokens alternate, so that one sees where each begins; no background, which some theme would hide.
_TRAINED_STYLES = ("bold green", "green")
_PROMPT_STYLES = ("bright_black", "dim")


def data_command(
    config: ConfigArgument = None,
    show: ShowOption = 0,
    overrides: SetOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the data as training would, and report lengths, masks, duplicates and leakage. Trains nothing.

    Prepared data is kept in the cache, so that training afterwards starts at once.
    """
    from affina.config import load_config
    from affina.data.build import prepare_from_config

    resolved = load_config(config, overrides or (), preset)
    with _progress(is_quiet=as_json) as progress:
        prepared = prepare_from_config(resolved.config, progress=progress)
    if as_json:
        samples = [_sample_to_dict(prepared, index) for index in _spread(len(prepared.train), show)]
        render.print_json({**prepared.report.to_dict(), "fingerprint": prepared.fingerprint, "samples": samples})
        return
    console = render.stdout()
    print_report(prepared.report, console)
    for index in _spread(len(prepared.train), show):
        print_sample(prepared, index, console)


class _progress:  # noqa: N801 - used like a function
    """Shows on stderr how far preparation is; nothing where stderr is no terminal."""

    def __init__(self, *, is_quiet: bool) -> None:
        console = render.stderr()
        self._status = console.status("reading") if console.is_terminal and not is_quiet else None

    def __enter__(self) -> _progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if self._status is not None:
            self._status.update(f"{stage}: {done:,}" + (f" of {total:,}" if total else ""))


def print_report(report: DataReport, console: Console) -> None:
    """The report as tables, what needs attention last."""
    _print_sources(report, console)
    _print_lengths(report, console)
    _print_facts(report, console)
    if report.notes:
        console.print()
        for note in report.notes:
            console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    console.print()
    if not report.findings:
        console.print("nothing found that needs attention", style="green")
    for finding in report.findings:
        text = Text()
        text.append(f"{finding.level}[{finding.code}]", style=_LEVEL_STYLES[finding.level])
        text.append(f": {finding.what}")
        if finding.fix:
            text.append("\n  fix: ", style="green")
            text.append(finding.fix)
        console.print(text, soft_wrap=True)


def _print_sources(report: DataReport, console: Console) -> None:
    table = render.table("source", "set", "format", "read", "kept", "skipped", numeric=("read", "kept", "skipped"))
    for source in report.sources:
        formats = ", ".join(format.partition(":")[0] for format in source.formats)
        counts = (f"{count:,}" for count in (source.num_read, source.num_kept, source.num_skipped))
        table.add_row(source.description, source.role, formats, *counts)
    console.print(table)


def _print_lengths(report: DataReport, console: Console) -> None:
    columns = ("samples", "tokens", "p50", "p95", "p99", "max", "supervised")
    table = render.table("\nset", *(f"\n{column}" for column in columns), numeric=[f"\n{column}" for column in columns])
    for name, lengths in (("train", report.train), ("validation", report.validation)):
        values = (lengths.num_samples, lengths.num_tokens, lengths.p50, lengths.p95, lengths.p99, lengths.max)
        share = f"{lengths.supervised_share:.1%}" if lengths.num_tokens else "–"
        table.add_row(name, *(f"{value:,}" for value in values), share)
    console.print(table)


def _print_facts(report: DataReport, console: Console) -> None:
    table = render.table()
    table.add_column(style="bold" if console.is_terminal else None, no_wrap=True)
    table.add_column(overflow="fold")
    table.show_header = False
    console.print()
    for name, fact in _facts(report):
        table.add_row(name, fact)
    console.print(table)


def _facts(report: DataReport) -> Iterator[tuple[str, str]]:
    counts = report.counts
    yield from _preferences(counts)
    replies, ends = counts.get("trained_replies", 0), counts.get("ends_of_turn", 0)
    if replies:
        end = " or ".join(report.template["end_of_turn"])
        yield "trained replies", f"{replies:,}; {ends:,} end with {end}, which is trained"
        yield "prompts as served", f"{replies - counts.get('prefix_mismatches', 0):,} of {replies:,}"
    if report.template["supports_thinking"]:
        parts = {"reasoning": "with reasoning", "empty_think": "with an empty block (masked)", "no_think": "without"}
        listed = ", ".join(f"{counts[key]:,} {words}" for key, words in parts.items() if counts.get(key))
        served = "on" if report.enable_thinking else "off"
        yield "thinking", f"{report.template['thinking']}: {listed or 'no replies'}; serve with thinking {served}"
    yield "truncation", _truncation(report.template["truncation"], counts)
    if report.packing is not None and report.packing.is_packed:
        packing = report.packing
        yield (
            "packing",
            f"{packing.num_rows:,} rows of {packing.tokens_per_row:,} tokens, {packing.efficiency:.2%} full "
            f"(no packing can exceed {packing.best_possible:.2%}; padding would give {packing.padded_efficiency:.1%})",
        )
    duplicates = report.duplicates
    removed = f", {report.num_duplicates_removed:,} removed" if report.num_duplicates_removed else ""
    yield (
        "duplicates",
        f"{duplicates['num_exact_duplicates']:,} exact, {duplicates['num_near_duplicates']:,} exact or near{removed}; "
        f"{duplicates['num_conflicts']:,} prompts with different answers",
    )
    if report.leakage:
        yield "leakage", _listed(report.leakage["counts"], "validation records that resemble training records")
    yield "personal data", _listed(report.pii, "finds")


def _preferences(counts: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if pairs := counts.get("pairs", 0):
        chosen, rejected = (counts[f"{side}_tokens"] / pairs for side in ("chosen", "rejected"))
        yield "pairs", f"{pairs:,}; a chosen reply has {chosen:,.0f} tokens, a rejected one {rejected:,.0f} (mean)"
    if labelled := counts.get("desirable", 0) + counts.get("undesirable", 0):
        yield (
            "labels",
            f"{counts.get('desirable', 0):,} wanted and {counts.get('undesirable', 0):,} unwanted of {labelled:,}",
        )


def _truncation(policy: str, counts: Mapping[str, int]) -> str:
    names = {
        "too_long": "too long",
        "dropped_too_long": "left out",
        "truncated": "cut",
        "split_records": "records split",
        "split_parts": "parts",
        "lost_end_of_turn": "replies without their end",
        "dropped_without_labels": "without a trained token left out",
    }
    listed = ", ".join(f"{counts[key]:,} {words}" for key, words in names.items() if counts.get(key))
    return f"{policy}: {listed or 'nothing is too long'}"


def _listed(counts: Mapping[str, int], what: str) -> str:
    listed = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{listed} {what}" if listed else "none"


# Samples


def _spread(num_samples: int, wanted: int) -> list[int]:
    """Indices spread over the whole set: the first records of a file are seldom like the rest."""
    count = min(wanted, num_samples)
    return [index * num_samples // count for index in range(count)]


def print_sample(prepared: PreparedData, index: int, console: Console) -> None:
    """One sample: trained tokens green, others grey; without colour, trained text stands in ⟦ ⟧."""
    sample, hf = prepared.train[index], prepared.template.tokenizer.hf
    heading = (
        f"sample {index:,} ({prepared.train.origin(index)}): {len(sample):,} tokens, {sample.num_supervised:,} trained"
    )
    console.print()
    console.print(Text(heading, style="bold"), soft_wrap=True)
    if sample.desirable is not None:
        console.print(f"the reply is {'wanted' if sample.desirable else 'unwanted'}", style="bold")
    documents = sample.split()
    for name, document in zip(_document_names(len(documents)), documents, strict=True):
        if name:
            console.print(Text(name, style="bold"))
        _print_document(document, hf, console)


def _document_names(num_documents: int) -> tuple[str, ...]:
    return ("chosen", "rejected") if num_documents == 2 else ("",) * num_documents


def _print_document(sample: Sample, hf: Any, console: Console) -> None:
    from affina.data.show import to_plain, view_tokens

    if not console.is_terminal or console.no_color or console.color_system is None:
        console.print(Text(to_plain(sample, hf)), soft_wrap=True)
        return
    text = Text()
    for number, view in enumerate(view_tokens(sample, hf)):
        styles = _TRAINED_STYLES if view.is_trained else _PROMPT_STYLES
        style = styles[0] + " underline" if view.is_control else styles[number % 2]
        text.append(view.text.replace("\n", "⏎\n"), style=style)
    console.print(text, soft_wrap=True)


def _sample_to_dict(prepared: PreparedData, index: int) -> dict[str, Any]:
    from affina.data.show import view_tokens

    sample = prepared.train[index]
    return {
        "index": index,
        "origin": prepared.train.origin(index),
        "num_tokens": len(sample),
        "num_supervised": sample.num_supervised,
        "documents": list(sample.document_lengths),
        "desirable": sample.desirable,
        "tokens": [
            {"ids": list(view.ids), "text": view.text, "trained": view.is_trained}
            for view in view_tokens(sample, prepared.template.tokenizer.hf)
        ],
    }
