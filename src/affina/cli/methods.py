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


_ABILITIES = ("trains on", "merges", "recomputes", "swap", "mix", "vLLM", "llama.cpp")
"""What a method can do, in the words of docs/reference/methods.md."""


def print_methods(console: Console, table: MethodTable) -> None:
    """One line for each method: its sizes on a model, else its title; both would be wider than a terminal."""
    columns = ("trained", "share", "file", "memory") if table.model is not None else ()
    last = () if table.model is not None else ("what it is",)
    rows = render.table("method", *columns, *_ABILITIES, "fast", *last, numeric=columns)
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
        abilities = (method.checkpointing, method.hot_swap, method.mixed_batch)
        served = ("–" if server == "no" else server for server in (method.vllm, method.llama_cpp))
        marks = (formats, merges, *map(_mark, abilities), *served, _mark(method.fast_engine))
        rows.add_row(*cells, *map(Text, marks), *([] if last == () else [Text(method.title)]))
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
    console.print(
        "recomputes: with gradient_checkpointing; swap, mix: PEFT exchanges it in place, uses several in one batch; "
        "vLLM, llama.cpp: what reads the adapter's file (a merged model, all do); fast: the fused engine trains it.",
        style="dim",
        soft_wrap=True,
    )
    console.print(f"also, unverified, by PEFT's names: {', '.join(table.unverified)}", style="dim", soft_wrap=True)


def _mark(value: bool) -> str:
    return "yes" if value else "–"


def _megabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
