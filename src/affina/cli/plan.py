"""`affina plan`: what a run will need and cost, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from affina.cli import render
from affina.cli.options import ConfigArgument, JsonOption, PresetOption, SetOption
from affina.errors import AffinaError


def plan_command(
    config: ConfigArgument = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Card: t4, rtx3060, rtx3090, rtx4090, a4000, l4, a10g, l40s, a100-40, a100-80, h100, h200, b200, "
            "this, all, or cpu. Repeatable, or with commas. Not given: this machine's card, or all.",
        ),
    ] = None,
    fit: Annotated[
        float | None,
        typer.Option(
            "--fit", metavar="GIB", min=0.1, help="Find the settings with which it runs within this much memory."
        ),
    ] = None,
    may_quantize: Annotated[
        bool, typer.Option("--may-quantize", help="Such settings may store the base's weights in another format.")
    ] = False,
    tokenize: Annotated[
        bool,
        typer.Option("--tokenize", help="Prepare the data as training would: exact steps and longest micro-batch."),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option(
            "--trace", help="Also run the reference engine's real step on fake tensors (seconds, needs torch)."
        ),
    ] = False,
    prices: Annotated[
        Path | None, typer.Option("--prices", metavar="FILE", help="Prices of your own, .csv or .json.")
    ] = None,
    recommend: Annotated[
        bool,
        typer.Option("--recommend", help="Write a complete run.yaml for --gpu, --model and --data, with its reasons."),
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="PATH", help="Of --recommend: the base model.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", metavar="PATH", help="Of --recommend: the data.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="RUN.YAML", help="Of --recommend: the file to write.")
    ] = Path("run.yaml"),
    overrides: SetOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a run will need and cost: peak memory by component, time, price, on any card.

    Nothing is loaded; of a hub model only config.json is read. Exits with 1 when the run fits none of the cards.
    """
    from affina import api

    if recommend:
        _recommend(gpu, model, data, output, as_json=as_json)
        return
    if model is not None or data is not None:
        raise AffinaError(
            "usage",
            "--model and --data belong to --recommend",
            fix="add --recommend, or name the run's config and change it: --set model.path=…",
        )
    forecast = api.plan(
        config,
        overrides=overrides or (),
        preset=preset,
        gpus=gpu or (),
        prices=prices,
        fit_gib=fit,
        may_quantize=may_quantize,
        tokenize=tokenize,
        trace=trace,
    )
    if as_json:
        render.print_json(forecast.to_dict())
    else:
        from affina.cli.plan_view import print_forecast

        print_forecast(render.stdout(), forecast)
    if not forecast.plan.fits_somewhere and forecast.fit is None:
        raise typer.Exit(1)


def _recommend(gpu: list[str] | None, model: str | None, data: str | None, output: Path, *, as_json: bool) -> None:
    from affina import api

    if model is None or data is None or not gpu or len(gpu) != 1:
        raise AffinaError(
            "usage",
            "--recommend needs --gpu, --model and --data, one of each",
            fix="affina plan --recommend --gpu t4 --model Qwen/Qwen3-4B --data my.jsonl",
        )
    recommendation = api.recommend(model=model, data=data, gpu=gpu[0], output=output)
    if as_json:
        render.print_json(recommendation.to_dict())
        return
    from affina.cli.plan_view import print_recommendation

    print_recommendation(render.stdout(), recommendation)
