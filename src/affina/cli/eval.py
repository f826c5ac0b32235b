"""`affina eval`: a run's adapter against its base on the same validation records."""

from __future__ import annotations

from typing import Annotated

import typer

from affina.cli import render
from affina.cli.options import JsonOption, RunArgument
from affina.cli.progress import stage_progress

MaxRecordsOption = Annotated[
    int | None,
    typer.Option("--max-records", min=1, metavar="N", help="Records whose perplexity is measured; as configured."),
]
MaxGenerationsOption = Annotated[
    int | None,
    typer.Option("--max-generations", min=0, metavar="N", help="Replies generated and compared; 0: perplexity only."),
]


def eval_command(
    run: RunArgument,
    max_records: MaxRecordsOption = None,
    max_generations: MaxGenerationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a run's adapter against its base on the validation records.

    Perplexity on reply tokens and accuracy of generated replies, with intervals, and what they allow to conclude.
    Writes evaluation/result.json, samples.jsonl and report.html into the run.
    """
    from affina import api
    from affina.evaluation.files import next_commands
    from affina.evaluation.terminal import print_result
    from affina.runs.directory import RunDirectory

    with stage_progress(render.stderr(), "reading the data and the model …") as progress:
        result = api.evaluate(run, max_records=max_records, max_generations=max_generations, progress=progress)
    if as_json:
        render.print_json(result.to_dict())
        return
    commands = [(command.text, command.purpose) for command in next_commands(RunDirectory(run))]
    print_result(render.stdout(), result, next_commands=commands)
