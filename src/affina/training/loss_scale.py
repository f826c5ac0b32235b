"""Dynamic loss scaling for float16 (Micikevicius et al., arXiv 1710.03740, section 3.2).

Gradients below 2^-24 vanish in float16; multiplying the loss lifts them. The scale halves when a gradient
overflows and doubles after 2,000 steps without overflow. Written out, instead of torch's GradScaler, because its
whole state is two numbers that belong in a checkpoint, and because the loop counts overflow apart from NaN.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LossScale:
    """`scale` multiplies the loss. A disabled scale stays 1."""

    enabled: bool
    scale: float = 1.0
    good_steps: int = 0
    growth_interval: int = 2000

    @classmethod
    def for_precision(cls, *, is_float16: bool) -> LossScale:
        return cls(enabled=is_float16, scale=2.0**15 if is_float16 else 1.0)

    def update(self, *, is_finite: bool) -> None:
        """Take note of a step's gradients."""
        if not self.enabled:
            return
        if not is_finite:
            self.scale = max(self.scale / 2.0, 1.0)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale *= 2.0
            self.good_steps = 0

    @property
    def can_shrink(self) -> bool:
        """True while an overflow may still be cured by a smaller scale."""
        return self.enabled and self.scale > 1.0
