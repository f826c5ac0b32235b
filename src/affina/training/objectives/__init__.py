"""Objectives: what a batch should teach, as a sum over its supervised tokens and their number.

An objective is a pure function. It returns a sum, not a mean, because only the loop knows the tokens of the whole
optimiser step: dividing there makes accumulation, micro-batch size and packing exact, once, for every objective.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """`(model, batch) -> (sum, count)`: sum [] float32 with a graph, count of the tokens it sums over."""

    def __call__(self, model: nn.Module, batch: Any, /) -> tuple[Tensor, int]: ...
