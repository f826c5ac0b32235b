"""Time times price, and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from affina.catalog.gpus import Gpu
from affina.catalog.prices import Price


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run costs at one provider, by a price of `date`."""

    provider: str
    kind: str
    usd: float
    usd_per_hour: float
    date: str
    source: str


def costs(gpu: Gpu, seconds: float, prices: Sequence[Price]) -> tuple[Cost, ...]:
    """The run's cost at every provider that has the card, the cheapest first."""
    found = [
        Cost(
            price.provider,
            price.kind,
            price.usd_per_hour * seconds / 3600,
            price.usd_per_hour,
            price.date,
            price.source,
        )
        for price in prices
        if price.gpu == gpu.name
    ]
    return tuple(sorted(found, key=lambda cost: (cost.usd_per_hour, cost.provider)))


def energy_kwh(gpu: Gpu, seconds: float) -> float:
    """At most: the card at its power limit throughout; the rest of the computer is not in it."""
    return gpu.tdp_watts * seconds / 3.6e6
