"""A forecast for people: one card in detail, several as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from affina.catalog.formats import FOUR_BIT_FORMATS
from affina.catalog.gpus import gpus
from affina.cli import render
from affina.runs.units import format_seconds

if TYPE_CHECKING:
    from affina.planning.forecast import Forecast
    from affina.planning.plan import CardPlan, Plan
    from affina.planning.recommend import Recommendation

_GIB = 2**30


def print_forecast(console: Console, forecast: Forecast) -> None:
    """The plan, and the fit and the trace where they were asked for."""
    plan = forecast.plan
    _print_head(console, plan)
    if len(plan.cards) == 1:
        _print_card(console, plan.cards[0])
    else:
        _print_table(console, plan)
    if forecast.fit is not None:
        console.print(f"\nwithin {forecast.fit_gib:g} GiB", style="bold")
        for reason in forecast.fit.reasons:
            console.print(f"  {reason}", soft_wrap=True)
        if forecast.fit.changes:
            settings = " ".join(f"--set {change.path}={change.value}" for change in forecast.fit.changes)
            console.print(f"  affina train … {settings}", soft_wrap=True)
    if forecast.trace is not None:
        trace = forecast.trace
        kind = "recomputed" if trace.recomputes else "kept"
        console.print(
            f"\ntrace    {_gib(trace.peak_bytes)} at the peak of the reference engine's step on a CPU, "
            f"{_gib(trace.static_bytes)} of it weights and adapter; {trace.row_tokens:,} tokens, activations {kind}, "
            f"{trace.num_operations:,} operations"
            + (
                f"; of a dense base: quantising to {trace.untraced_format} looks at weights, and a trace has none"
                if trace.untraced_format is not None
                else ""
            ),
            soft_wrap=True,
        )
    for note in plan.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)


def _print_head(console: Console, plan: Plan) -> None:
    shape, data = plan.shape, plan.workload
    share = min(1.0, plan.num_trainable / shape.num_parameters)
    console.print(
        f"model    {plan.model}: {shape.num_parameters:,} parameters, {plan.num_trainable:,} trained ({share:.2%})",
        soft_wrap=True,
    )
    about = "" if data.is_exact else "about "
    samples = f"{about}{data.num_samples:,} samples" if data.num_samples is not None else "samples unknown"
    tokens = f", {about}{data.num_tokens:,} tokens an epoch" if data.num_tokens is not None else ""
    steps = f", {about}{data.num_steps:,} steps" if data.num_steps is not None else ", steps unknown"
    console.print(f"data     {samples}{tokens}{steps}", soft_wrap=True)
    longest = f"; longest sample {data.longest:,}" if data.longest is not None else ""
    console.print(
        f"batch    micro-batches of {plan.row_tokens:,} tokens, {plan.effective_rows} rows a step{longest}",
        soft_wrap=True,
    )
    console.print(
        f"files    adapter {_size(plan.adapter_bytes)}, merged {_size(plan.merged_bytes)}, run directory up to "
        f"{_size(plan.disk_bytes)}"
        + (f", download {_size(plan.download_bytes)}" if plan.download_bytes else "")
        + f"; main memory {_size(plan.host_bytes)}",
        soft_wrap=True,
    )


def _print_card(console: Console, card: CardPlan) -> None:
    memory = card.memory
    console.print(f"\n{_title(card)}", style="bold")
    reason = f" ({memory.engine_reason})" if memory.engine_reason else ""
    console.print(f"engine   {memory.engine}{reason}; layers keep {memory.keeps}", soft_wrap=True)
    unit, size = ("GiB", _GIB) if memory.peak_bytes >= _GIB else ("MiB", 2**20)
    table = render.table("peak memory", unit, "", numeric=(unit,))
    for component in memory.components:
        table.add_row(f"  {component.name}", f"{component.num_bytes / size:.2f}", Text(component.note, style="dim"))
    table.add_row("  total", f"{memory.total_bytes / size:.2f}", Text(_stages(card, size), style="dim"), style="bold")
    console.print(table)
    if card.fits:
        _print_time_and_cost(console, card)
    _print_verdict(console, card)


def _title(card: CardPlan) -> str:
    """The card, and what the process may take of it."""
    title, capacity = card.gpu.title if card.gpu is not None else "CPU", card.memory.capacity_bytes
    if capacity is None:
        return title
    whole = gpus().get(card.name)
    return f"{title}, {_gib(capacity)}" + (" of it" if whole is not None and capacity < whole.memory_bytes else "")


def _print_time_and_cost(console: Console, card: CardPlan) -> None:
    if card.step is not None:
        console.print(
            f"time     {format_seconds(card.step.step_seconds)} a step, {card.step.tokens_per_second:,.0f} tokens/s"
            + (f"; {_duration(card)}" if card.seconds is not None else ""),
            soft_wrap=True,
        )
    elif card.gpu is None:
        console.print("time     unknown: a CPU's speed is learned from its first steps")
    if card.energy_kwh is not None:
        console.print(f"energy   at most {card.energy_kwh:.2f} kWh of the card")
    for cost in card.costs:
        console.print(
            f"cost     {cost.usd:>8.2f} USD  {cost.provider}, {cost.kind}, {cost.usd_per_hour:.2f}/h on {cost.date}"
            + (f", {cost.source}" if cost.source else ""),
            soft_wrap=True,
        )


def _stages(card: CardPlan, size: int) -> str:
    memory = card.memory
    parts = []
    if memory.validation_bytes:
        parts.append(f"validation {memory.validation_bytes / size:.2f}")
    if memory.generation_bytes:
        wanted = f" ({memory.num_replies} at once instead of {memory.wanted_replies})"
        fewer = wanted if memory.num_replies < memory.wanted_replies else ""
        parts.append(f"generating replies {memory.generation_bytes / size:.2f}{fewer}")
    return "; ".join(parts)


def _busiest(card: CardPlan) -> str:
    """When most is needed, if that is not while training."""
    memory = card.memory
    if memory.peak_bytes == memory.total_bytes:
        return ""
    return " while replies are generated" if memory.peak_bytes == memory.generation_bytes else " while validating"


def _duration(card: CardPlan) -> str:
    assert card.seconds is not None
    sides = [
        f"{format_seconds(seconds)} {name}"
        for seconds, name in ((card.validation_seconds, "validation"), (card.generation_seconds, "comparison at most"))
        if seconds
    ]
    return f"{format_seconds(card.seconds)} in all" + (f" ({', '.join(sides)})" if sides else "")


def _print_verdict(console: Console, card: CardPlan) -> None:
    if card.memory.capacity_bytes is None:
        return
    if card.fits:
        free = card.memory.capacity_bytes - card.memory.peak_bytes
        console.print(f"fits     {_free(free)} stay free{_busiest(card)}", style="green")
        return
    console.print(f"does not fit: {_gib(card.memory.peak_bytes)} are needed{_busiest(card)}", style="bold red")
    if card.changes:
        console.print("it fits with", style="bold")
        for change in card.changes:
            console.print(f"  {change.path}: {change.value}   {change.why}", soft_wrap=True)
    else:
        may_help = not card.may_quantize and card.format not in FOUR_BIT_FORMATS
        advice = (
            "; --may-quantize allows other weight formats" if may_help else ": take a larger card or a smaller model"
        )
        console.print(f"  no setting makes it fit{advice}", soft_wrap=True)


def _print_table(console: Console, plan: Plan) -> None:
    table = render.table("card", "has", "needs", "verdict", "time", "USD", "at", numeric=("has", "needs", "USD"))
    for card in plan.cards:
        memory = card.memory
        cost = card.costs[0] if card.costs else None
        usable = card.fits
        table.add_row(
            card.name,
            f"{memory.capacity_bytes / _GIB:.1f}" if memory.capacity_bytes is not None else "–",
            f"{memory.peak_bytes / _GIB:.1f}",
            Text(_verdict(card), style="green" if card.fits else "yellow" if card.changes else "red"),
            format_seconds(card.seconds) if card.seconds is not None and usable else "–",
            f"{cost.usd:.2f}" if cost is not None and usable else "–",
            f"{cost.provider} {cost.kind} ({cost.date})" if cost is not None and usable else "",
        )
    console.print()
    console.print(table)
    console.print("GiB; the cheapest price that is known, as quoted on its date", style="dim")
    _print_prices(console, plan)


def _print_prices(console: Console, plan: Plan) -> None:
    """USD of the whole run at every provider that has one of the cards on which it fits."""
    offers = {(cost.provider, cost.kind, card.name): cost for card in plan.cards if card.fits for cost in card.costs}
    cards = [card.name for card in plan.cards if any(name == card.name for _, _, name in offers)]
    places = sorted({(provider, kind) for provider, kind, _ in offers})
    if not places:
        return
    table = render.table("USD of the run at", *cards, "quoted", numeric=tuple(cards))
    for provider, kind in places:
        row = [offers.get((provider, kind, card)) for card in cards]
        dates = sorted({cost.date for cost in row if cost is not None})
        quoted = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        table.add_row(f"{provider}, {kind}", *(f"{cost.usd:.2f}" if cost is not None else "" for cost in row), quoted)
    console.print()
    console.print(table)


def _verdict(card: CardPlan) -> str:
    if card.fits:
        return f"fits ({card.memory.engine})"
    if card.changes:
        return "fits with " + ", ".join(f"{change.path.split('.')[1]} {change.value}" for change in card.changes)
    return "does not fit"


def print_recommendation(console: Console, recommendation: Recommendation) -> None:
    """Where the file is, every choice with its reason, and what it will take."""
    console.print(f"written  {recommendation.path}", style="bold")
    table = render.table()
    table.show_header = False
    for _ in range(3):
        table.add_column(overflow="fold")
    for choice in recommendation.choices:
        table.add_row(f"  {choice.path}", str(choice.value), Text(choice.why, style="dim"))
    console.print(table)
    console.print()
    _print_head(console, recommendation.plan)
    _print_card(console, recommendation.plan.cards[0])
    console.print(f"\nnext     affina train {recommendation.path}", soft_wrap=True)


def _free(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= 0.1 * _GIB else f"{num_bytes / 2**20:.0f} MiB"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"


def _size(num_bytes: int) -> str:
    if num_bytes >= 10**9:
        return f"{num_bytes / 10**9:.1f} GB"
    return f"{num_bytes / 10**6:,.1f} MB"
