"""`affina methods`: the adapter methods side by side, with their sizes on a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from affina.catalog.methods import EVERY_FORMAT
from affina.cli import render
from affina.cli.options import JsonOption

if TYPE_CHECKING:
    from rich.console import Console

    from affina.catalog.method_table import MethodTable

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Count for this model: a folder, affina/nano, or a known hub id."),
]


def methods_command(
    model: ModelOption = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the reference page of the methods instead, in Markdown.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the adapter methods: what each can do, and what it costs on a model.

    Counts from the model's config.json alone; nothing is loaded or downloaded.
    """
    from affina import api
    from affina.catalog.method_table import method_reference

    if markdown:
        text = method_reference()
        if as_json:
            render.print_json({"markdown": text})
        else:
            sys.stdout.write(text)
        return
    table = api.methods(model)
    if as_json:
        render.print_json(table.to_dict())
    else:
        print_methods(render.stdout(), table)


def print_methods(console: Console, table: MethodTable) -> None:
    """One line for each method."""
    columns = ("trained", "share", "file", "memory") if table.model is not None else ()
    rows = render.table("method", *columns, "trains on", "merges", "vLLM", "fast", "what it is", numeric=columns)
    rows.columns[-1].overflow = "fold"
    for row in table.rows:
        method, sizes = row.method, row.sizes
        cells = [Text(method.name, style="bold")]
        if sizes is not None:
            cells += [
                Text(f"{sizes.num_trainable:,}"),
                Text(f"{100 * sizes.share:.3g}%"),
                Text(_megabytes(sizes.file_bytes)),
                Text(_megabytes(sizes.training_bytes)),
            ]
        formats = "all" if method.trains_on == EVERY_FORMAT else ", ".join(sorted(method.trains_on))
        merges = {"exact": "yes", "dequantised base": "into nf4"}.get(method.merges, "no")
        served = {"yes": "yes", "converted": "converted"}.get(method.vllm, "–")
        marks = (formats, merges, served, "yes" if method.fast_engine else "–", method.title)
        rows.add_row(*cells, *map(Text, marks))
    console.print(rows)
    if table.model is not None:
        console.print(
            f"\n{table.model}: {table.num_parameters:,} parameters. Default settings; files in float32; "
            "memory is what comes beside the base and its activations with AdamW.",
            style="dim",
            soft_wrap=True,
        )
    else:
        console.print("\n--model Qwen/Qwen3-4B adds parameters, file and memory", style="dim")
    console.print(f"also, unverified, by PEFT's names: {', '.join(table.unverified)}", style="dim", soft_wrap=True)


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
