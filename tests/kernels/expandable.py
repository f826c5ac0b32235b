"""A head whose rows are expanded when they are asked for, for tests of what is computed tile by tile."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rows:
    """A dense weight that is handed out row by row, as a quantised one is. largest: rows asked for at once."""

    weight: Tensor
    largest: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def rows_into(self, start: int, out: Tensor) -> Tensor:
        self.largest = max(self.largest, out.shape[0])
        return out.copy_(self.weight[start : start + out.shape[0]])
