"""Objectives: what a step should teach, as sums over its examples and their number.

An objective turns the micro-batches of one optimiser step into losses. It returns sums, not means, and says over how
many tokens (or pairs, or replies) the whole step sums: the loop divides, so that accumulation, micro-batch size and
packing are exact, once, for every objective. What all micro-batches have in common (KTO's reference point, replies that
the student writes itself) is made once per step, in `prepare`; after that the losses are pure functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LossSum:
    """The loss of one micro-batch, before it is divided by the step's count.

    loss:    [] float32, with a graph
    metrics: name → (sum, count), each [] float32 without one: what is worth watching besides the loss
    """

    loss: Tensor
    metrics: Mapping[str, tuple[Tensor, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """One optimiser step: its micro-batches, the loss of each, and what the sum of all losses is divided by."""

    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], LossSum]
    count: int


class Objective(Protocol):
    """What a run learns."""

    def prepare(self, model: nn.Module, batches: Sequence[Any], *, step: int | None) -> PreparedStep:
        """The step over these micro-batches. step: None for validation, where nothing may depend on chance."""
        ...


class MetricSums:
    """Adds up metrics of micro-batches and gives their means."""

    def __init__(self) -> None:
        self._sums: dict[str, list[tuple[Tensor, float]]] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, float]]) -> None:
        for name, entry in metrics.items():
            self._sums.setdefault(name, []).append(entry)

    def means(self) -> dict[str, float]:
        """Name → mean; waits for the device. A metric whose count is 0 is left out."""
        totals = {
            name: (float(sum(float(value) for value, _ in entries)), sum(count for _, count in entries))
            for name, entries in self._sums.items()
        }
        return {name: total / count for name, (total, count) in totals.items() if count}
