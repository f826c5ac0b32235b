"""What wants to know how training goes: metrics files, the live view, trackers.

Callbacks observe; they never change the run. A callback that fails is reported once and dropped (`Observers`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from affina.runs.directory import RunDirectory, now
from affina.runs.jsonlines import JsonLinesFile


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is known when training starts.

    evaluate_every_steps, validation_tokens: what validations there will be, for the time that is left; 0: none
    """

    name: str
    directory: str
    model: str
    device: str
    precision: str
    num_trainable: int
    num_parameters: int
    num_steps: int
    first_step: int
    num_samples: int
    tokens_per_step: float
    evaluate_every_steps: int | None = None
    validation_tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step. seconds: since the run's start.

    loss:      mean over the step's supervised tokens, pairs or replies, in nats
    objective: what the objective measures besides: rewards, their margin, …
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    num_tokens: int
    num_supervised: int
    seconds: float
    memory_bytes: int
    objective: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ValidationMetrics:
    """validation_loss: the objective's own, over the whole validation set. objective: as in `StepMetrics`."""

    step: int
    epoch: float
    validation_loss: float
    is_best: bool
    objective: Mapping[str, float] = field(default_factory=dict)


class Callback(Protocol):
    """Gets told; must not block for long."""

    def on_start(self, facts: RunFacts) -> None: ...
    def on_step(self, metrics: StepMetrics) -> None: ...
    def on_validation(self, metrics: ValidationMetrics) -> None: ...
    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None: ...
    def on_end(self, summary: dict[str, Any]) -> None: ...


class BaseCallback:
    """Does nothing; override what you need."""

    def on_start(self, facts: RunFacts) -> None:
        """Training is about to take its first step."""

    def on_step(self, metrics: StepMetrics) -> None:
        """An optimiser step was taken and is due for logging."""

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """The validation loss was measured."""

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        """Something worth telling happened."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Training ended, in whatever way."""


class RunFiles(BaseCallback):
    """Writes metrics.jsonl and events.jsonl of a run directory."""

    def __init__(self, run: RunDirectory) -> None:
        self._metrics = JsonLinesFile(run.metrics_file)
        self._events = JsonLinesFile(run.events_file)

    def on_step(self, metrics: StepMetrics) -> None:
        values = asdict(metrics)
        measured = values.pop("objective")
        self._metrics.append(values | measured)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        values = asdict(metrics)
        measured = {f"validation_{name}": value for name, value in values.pop("objective").items()}
        self._metrics.append(values | measured)

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        self._events.append({"time": now(), "kind": kind, "message": message, **facts})


class Observers:
    """Hands every notice to each callback. A tracker that is down must not end a night's training."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def _tell(self, method: str, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(*arguments)
            except Exception as error:  # noqa: BLE001 - third-party trackers raise anything; the run goes on
                self._callbacks.remove(callback)
                name = type(callback).__name__
                self.event("callback-failed", f"{name} stopped after {type(error).__name__}: {error}", callback=name)

    def start(self, facts: RunFacts) -> None:
        self._tell("on_start", facts)

    def step(self, metrics: StepMetrics) -> None:
        self._tell("on_step", metrics)

    def validation(self, metrics: ValidationMetrics) -> None:
        self._tell("on_validation", metrics)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        self._tell("on_event", kind, message, facts)

    def end(self, summary: dict[str, Any]) -> None:
        self._tell("on_end", summary)
