"""An optimiser's state on disk: one entry per adapter matrix, whichever engine trains.

The fast engine's optimiser sees one flat parameter, the reference's one per matrix. The file has the second form, in
the model's own order, so a run that began on one engine can be resumed on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from affina.models.fast.parameters import FlatAdapter


class OptimizerState:
    """What a checkpoint stores of `optimizer`.

    flat:  the flat adapter that the optimiser trains, or None when it trains the matrices of `order` themselves
    order: the adapter's matrices in the model's order
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, flat: FlatAdapter | None, order: Sequence[nn.Parameter]
    ) -> None:
        self._optimizer = optimizer
        self._flat = flat
        self._order = tuple(order)

    def to_dict(self) -> dict[str, Any]:
        """In the form of `torch.optim.Optimizer.state_dict` for one parameter per matrix."""
        state = self._optimizer.state_dict()
        if self._flat is None:
            return state
        (entry,) = state["state"].values() or ({},)
        split = {name: self._split(value) for name, value in entry.items()}
        numbers = range(len(self._order))
        by_matrix = {number: {name: values[number] for name, values in split.items()} for number in numbers}
        (group,) = state["param_groups"]
        return {"state": by_matrix if entry else {}, "param_groups": [{**group, "params": list(numbers)}]}

    def load(self, saved: dict[str, Any]) -> None:
        """The inverse of `to_dict`. Raises ValueError when `saved` belongs to another optimiser or adapter."""
        if self._flat is None:
            self._optimizer.load_state_dict(saved)
            return
        (group,) = saved["param_groups"]
        if len(group["params"]) != len(self._order):
            raise ValueError(f"{len(group['params'])} parameters saved, {len(self._order)} to be trained")
        entries = [saved["state"][number] for number in group["params"]] if saved["state"] else []
        names = entries[0].keys() if entries else ()
        joined = {name: self._join([entry[name] for entry in entries]) for name in names}
        self._optimizer.load_state_dict(
            {"state": {0: joined} if joined else {}, "param_groups": [{**group, "params": [0]}]}
        )

    def _split(self, value: Any) -> list[Any]:
        assert self._flat is not None
        if isinstance(value, Tensor) and value.shape == self._flat.parameter.shape:
            return self._flat.split(value, self._order)
        # Copies: an optimiser counts up each matrix's own step in place.
        return [value.clone() if isinstance(value, Tensor) else value for _ in self._order]

    def _join(self, values: list[Any]) -> Any:
        assert self._flat is not None
        first = values[0]
        if not (isinstance(first, Tensor) and first.dim() > 0):
            return first
        for value, parameter in zip(values, self._order, strict=True):
            if value.shape != parameter.shape:
                raise ValueError(f"a matrix of {tuple(value.shape)} saved, one of {tuple(parameter.shape)} trained")
        return self._flat.join(values, self._order)
