"""`affina merge`: the adapter into its base, as one plain model that every tool loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from affina.cli import render
from affina.cli.options import JsonOption, RunArgument

if TYPE_CHECKING:
    from affina.export.merge import MergeReport

OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="A new directory for the merged model.", show_default=False),
]
DtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"], typer.Option("--dtype", help="Type of the merged weights.")
]


def merge_command(
    run: RunArgument,
    output: OutputOption,
    dtype: DtypeOption = "bfloat16",
    as_json: JsonOption = False,
) -> None:
    """Write the adapter into the base model, and prove that the two agree.

    The base is the original one, not its 4-bit copy. The merged model is loaded again and its logits are compared with
    the adapter's before it appears in DIR; when they differ by more than rounding, nothing is left behind.
    """
    from affina import api

    with render.stderr().status("merging, then comparing the result's logits with the adapter's …"):
        report = api.merge(run, output, dtype=dtype)
    if as_json:
        render.print_json(report.to_dict())
        return
    print_report(report)


def print_report(report: MergeReport) -> None:
    """The result as a few lines: where it is, that it was proven, what to know."""
    from affina.runs.units import format_bytes

    console = render.stdout()
    files = f"{len(report.files)} file{'s' if len(report.files) != 1 else ''}"
    console.print(f"merged   {report.output}  ({format_bytes(report.num_bytes)} in {report.dtype}, {files})")
    console.print(f"layers   {report.num_merged} of {report.num_tensors} tensors carry the adapter")
    console.print(
        f"proof    logits differ from base + adapter by {report.merge_error:.1e} of their spread "
        f"({report.num_probe_tokens} positions); the adapter itself moves them by {report.adapter_effect:.1e}"
    )
    for note in report.notes:
        console.print(f"note     {note}")
    console.print(f'next     AutoModelForCausalLM.from_pretrained("{report.output}")')
