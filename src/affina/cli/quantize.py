"""`affina quantize`: a model in 4 or 8 bits, written once, proven, and measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from affina.cli import render
from affina.cli.options import JsonOption
from affina.cli.progress import stage_progress

if TYPE_CHECKING:
    from affina.export.quantize import QuantizeReport

WORST_LAYERS_SHOWN = 5

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, a hub id, or affina/nano.", show_default=False)
]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="A new directory for the quantised model.", show_default=False),
]
FormatOption = Annotated[
    Literal["nf4", "fp4", "int8", "fp8"], typer.Option("--format", help="Weight format of the linear layers.")
]
DoubleOption = Annotated[
    bool | None,
    typer.Option("--double/--no-double", help="4 bits: block scales in 8 bits too.  [default: double]"),
]
SearchOption = Annotated[
    bool, typer.Option("--scale-search", help="4 bits: search each block's scale; less error, slower.")
]
SkipOption = Annotated[
    list[str] | None,
    typer.Option("--skip", metavar="NAME", help="A layer, or part of its name, that stays dense. Repeatable."),
]
ReportOption = Annotated[bool, typer.Option("--report/--no-report", help="Measure errors and divergence.")]
TextOption = Annotated[
    str | None,
    typer.Option(
        "--text", metavar="FILE", help="Held-out text or conversations, or a run; default: affina's own conversations."
    ),
]
MaxRecordsOption = Annotated[
    int, typer.Option("--max-records", min=1, metavar="N", help="Records of the text that are used.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
DeviceOption = Annotated[
    Literal["auto", "cuda", "mps", "cpu"], typer.Option("--device", help="Where layers are quantised.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings. Read it first.")
]


def quantize_command(
    model: ModelArgument,
    output: OutputOption,
    weight_format: FormatOption = "nf4",
    double_quantization: DoubleOption = None,
    scale_search: SearchOption = False,
    skip: SkipOption = None,
    report: ReportOption = True,
    text: TextOption = None,
    max_records: MaxRecordsOption = 64,
    revision: RevisionOption = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model in 4 or 8 bits, prove it, and measure what it costs.

    The model is read one tensor at a time. The result is loaded again and compared before it appears in DIR. Train on
    it with `model: DIR`. transformers reads it too, with bitsandbytes (nf4, fp4, int8) or compressed-tensors (fp8).
    """
    from affina import api

    with stage_progress(render.stderr(), "reading and quantising the model …") as progress:
        result = api.quantize(
            model,
            output,
            format=weight_format,
            double_quantization=double_quantization,
            scale_search=scale_search,
            skip_modules=skip or None,
            revision=revision,
            trust_remote_code=trust_remote_code,
            device=device,
            report=report,
            text=text,
            max_records=max_records,
            progress=progress,
        )
    if as_json:
        render.print_json(result.to_dict())
        return
    print_report(result)


def print_report(report: QuantizeReport) -> None:
    """The result as a few lines and a table of the worst layers."""
    from affina.runs.units import format_bytes

    console = render.stdout()
    files = f"{len(report.files)} file{'s' if len(report.files) != 1 else ''}"
    console.print(
        f"quantized  {report.output}  ({format_bytes(report.num_bytes)} in {_described(report)}, {files}; "
        f"{format_bytes(report.num_bytes_before)} before)"
    )
    dense = f"; in {report.dtype}: {', '.join(report.dense_layers[:4])}" if report.dense_layers else ""
    console.print(f"layers     {report.num_layers} at {report.bits_per_weight:.3f} bits per weight{dense}")
    console.print(
        f"proof      loaded again: codes and scales are the same bits, logits differ by {report.logits_difference:.1e} "
        f"of their spread ({report.num_probe_tokens} positions)"
    )
    notes = list(report.notes)
    if report.errors is not None:
        _print_errors(report.errors)
        notes += report.errors["notes"]
    for note in notes:
        console.print(f"note       {note}")
    console.print(f"next       write `model: {report.output}` in run.yaml, without a `quantization`")


def _described(report: QuantizeReport) -> str:
    parts = ["double quantisation"] if report.double_quantization else []
    parts += ["scale search"] if report.scale_search else []
    return report.format + (f" with {' and '.join(parts)}" if parts else "")


def _decibels(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}"


def _print_errors(errors: Mapping[str, Any]) -> None:
    console = render.stdout()
    console.print(
        f"weights    off by {errors['relative_error']:.2%} (RMSE over RMS of the weights), "
        f"signal to noise {_decibels(errors['snr_db'])} dB; the worst layers:"
    )
    table = render.table()
    for title in ("layer", "shape", "bits", "RMSE", "relative", "SNR dB"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    layers = {layer["name"]: layer for layer in errors["layers"]}
    for name in errors["worst_layers"][:WORST_LAYERS_SHOWN]:
        layer = layers[name]
        table.add_row(
            name,
            "×".join(map(str, layer["shape"])),
            f"{layer['bits_per_weight']:.3f}",
            f"{layer['rmse']:.2e}",
            f"{layer['relative_error']:.2%}",
            _decibels(layer["snr_db"]),
        )
    console.print(table)
    moved = errors["divergence"]
    if moved is None:
        return
    interval = "too few records for an interval"
    if moved["kl"]["interval"] is not None:
        low, high = moved["kl"]["interval"]
        interval = f"{moved['kl']['level']:.0%}: {low:.2e} to {high:.2e}"
    console.print(
        f"divergence KL(unquantised ‖ quantised) {moved['kl']['value']:.2e} nats per token "
        f"({interval}) on {moved['num_tokens']:,} tokens of {moved['num_records']:,} records of {moved['text']}"
    )
    console.print(
        f"           the same first choice for {moved['top_agreement']:.1%} of them; perplexity "
        f"{moved['perplexity_unquantized']:.4g} → {moved['perplexity_quantized']:.4g}"
    )
