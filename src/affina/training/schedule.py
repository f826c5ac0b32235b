"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up to `peak`, then cosine or linear decay to `peak · min_ratio`, or constant.

    Step 0 is the first optimiser step. Warm-up step i of w has the rate peak · (i+1)/w, so that the first step is
    not wasted on a rate of zero; the last step of a decaying schedule is one step short of the minimum.
    Cosine without restarts: Loshchilov & Hutter, SGDR, arXiv 1608.03983, eq. 5.
    """

    kind: ScheduleKind
    peak: float
    num_steps: int
    warmup_steps: int
    min_ratio: float = 0.0

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = min((step - self.warmup_steps) / max(self.num_steps - self.warmup_steps, 1), 1.0)
        shape = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else 1.0 - progress
        return self.peak * (self.min_ratio + (1.0 - self.min_ratio) * shape)
