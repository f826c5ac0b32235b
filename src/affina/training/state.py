"""What the loop knows of its own past: small, plain, and all that a checkpoint needs besides tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

StopReason = Literal["completed", "early-stopping", "interrupted"]


@dataclass(slots=True)
class TrainState:
    """step counts finished optimiser steps, skipped ones included; seconds count training alone, not validation."""

    step: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_skipped: int = 0
    num_overflows: int = 0
    seconds: float = 0.0
    last_loss: float | None = None
    best_validation_loss: float | None = None
    best_step: int | None = None
    num_validations_without_gain: int = 0
    loss_scale: float = 1.0
    loss_scale_good_steps: int = 0
    source_state: dict[str, Any] = field(default_factory=dict)
    stop_reason: StopReason | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that `to_dict` wrote; keys of other versions are ignored."""
        names = {entry.name for entry in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})
