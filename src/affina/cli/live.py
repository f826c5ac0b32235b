"""How training looks: a live view on a terminal, plain lines anywhere else. Both are callbacks of the loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from affina.runs.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:  # training imports torch; the command line must start without it
    from affina.training.callbacks import RunFacts, StepMetrics, ValidationMetrics

_BLOCKS = "▁▂▃▄▅▆▇█"
_ASCII_BLOCKS = "_.-=*#"


_MEASURES = {
    "reward_margin": "margin",
    "reward_accuracy": "in order",
    "reward_chosen": "chosen",
    "reward_rejected": "rejected",
    "reward_desirable": "wanted",
    "reward_undesirable": "unwanted",
    "kl_estimate": "KL",
    "chosen_nll": "chosen NLL",
}
"""What is shown of an objective's own metrics, and how it is called on a line."""


def measures(metrics: StepMetrics | ValidationMetrics) -> list[tuple[str, str]]:
    """(name, value) of an objective's metrics that are worth a place on the screen; empty for supervised training."""
    return [
        (name, f"{value:.0%}" if key == "reward_accuracy" else f"{value:.3f}")
        for key, name in _MEASURES.items()
        if (value := metrics.objective.get(key)) is not None
    ]


def sparkline(values: list[float], width: int, *, blocks: str = _BLOCKS) -> str:
    """The course of `values` in one line of at most `width` characters; each is the mean of its stretch."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(blocks[min(int((mean - low) / span * len(blocks)), len(blocks) - 1)] for mean in means)


_FORWARD_SHARE = 1 / 3
"""Time of a token in a validation over that in a training step, as long as none has been measured."""


class _Progress:
    """What both views show: counters, smoothed speed, time left."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._step_shown = 0.0
        self._validations: list[float] = []
        self.facts: RunFacts | None = None
        self.last: StepMetrics | None = None
        self.validation: ValidationMetrics | None = None
        self.first_validation: float | None = None
        self.losses: list[float] = []
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=20)

    def on_start(self, facts: RunFacts) -> None:
        self.facts = facts

    def on_step(self, metrics: StepMetrics) -> None:
        self.last = metrics
        self.losses.append(metrics.loss)
        self._recent.append((metrics.seconds, metrics.step, metrics.num_tokens))
        self._step_shown = self._clock()

    def on_validation(self, metrics: ValidationMetrics) -> None:
        self.validation = metrics
        if self.last is not None and self.last.step == metrics.step:  # nothing else is between the two
            self._validations.append(self._clock() - self._step_shown)
        if self.first_validation is None:
            self.first_validation = metrics.validation_loss

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        """Shown by the views that want to."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Shown by the views that want to."""

    def seconds_left(self) -> float | None:
        """Time to the last step and its validation.

        At the speed of the last 20 logged steps, by tokens where the run's are known: without packing steps differ in
        length. The first step, which loads kernels, is only where the count begins.
        """
        if self.facts is None or self.last is None or len(self._recent) < 2:
            return None
        (seconds_before, step_before, tokens_before), (seconds, step, tokens) = self._recent[0], self._recent[-1]
        if step == step_before or tokens == tokens_before:
            return None
        spent = seconds - seconds_before
        steps_left = self.facts.num_steps - step
        by_token = spent / (tokens - tokens_before)
        if self.facts.num_samples:
            training = steps_left * self.facts.tokens_per_step * by_token
        else:  # a stream: only what a step may hold is known
            training = steps_left * spent / (step - step_before)
        return training + self._validations_left(step) * self._validation_seconds(by_token)

    def _validations_left(self, step: int) -> int:
        """After every so many steps, and after the last."""
        assert self.facts is not None
        total, every = self.facts.num_steps, self.facts.evaluate_every_steps
        if not self.facts.validation_tokens or step >= total:
            return 0
        return -(-total // every) - step // every if every is not None else 1

    def _validation_seconds(self, by_token: float) -> float:
        """Of the validations so far; before the first, a forward pass at the speed of training."""
        assert self.facts is not None
        if self._validations:
            return sum(self._validations) / len(self._validations)
        return self.facts.validation_tokens * by_token * _FORWARD_SHARE


_QUIET_EVENTS = frozenset({"checkpoint", "loss-scale-halved"})


class PlainLines(_Progress):
    """One line at the start, at most one every few seconds, and one for each validation and event."""

    def __init__(
        self, console: Console, *, seconds_between: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(clock)
        self._console = console
        self._seconds_between = seconds_between
        self._printed = -seconds_between

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_start(self, facts: RunFacts) -> None:
        super().on_start(facts)
        for line in start_lines(facts):
            self._print(line)

    def on_step(self, metrics: StepMetrics) -> None:
        super().on_step(metrics)
        assert self.facts is not None
        is_last = metrics.step == self.facts.num_steps
        if not is_last and self._clock() - self._printed < self._seconds_between:
            return
        self._printed = self._clock()
        left = self.seconds_left()
        self._print(
            f"step {metrics.step}/{self.facts.num_steps}  loss {metrics.loss:.4f}  {_listed(metrics)}"
            f"lr {metrics.learning_rate:.2e}  {metrics.tokens_per_second:,.0f} tokens/s  "
            f"{format_bytes(metrics.memory_bytes)}" + (f"  {format_seconds(left)} left" if left and not is_last else "")
        )

    def on_validation(self, metrics: ValidationMetrics) -> None:
        super().on_validation(metrics)
        best = "  (best so far)" if metrics.is_best else ""
        self._print(
            f"step {metrics.step}  validation loss {metrics.validation_loss:.4f}  {_listed(metrics)}".rstrip() + best
        )

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        if kind not in _QUIET_EVENTS:
            self._print(f"{kind}: {message}")


def _listed(metrics: StepMetrics | ValidationMetrics) -> str:
    """The first two measures, with the spaces that follow; "" where there are none."""
    return "".join(f"{name} {value}  " for name, value in measures(metrics)[:2])


def start_lines(facts: RunFacts) -> list[str]:
    """The run in two lines, before the first step; its notes come as events."""
    share = facts.num_trainable / facts.num_parameters
    return [
        f"{facts.model} on {facts.device}, {facts.precision}: trains {format_count(facts.num_trainable)} "
        f"of {format_count(facts.num_parameters)} parameters ({share:.2%})",
        f"{facts.num_samples:,} samples, {facts.num_steps - facts.first_step} steps of about "
        f"{facts.tokens_per_step:,.0f} tokens, into {facts.directory}",
    ]


class LiveView(_Progress):
    """A small dashboard that redraws in place: progress, losses, speed, memory, time left, the loss curve."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self.render, transient=False)
        self._is_live = False
        self._messages: deque[str] = deque(maxlen=3)

    def on_start(self, facts: RunFacts) -> None:
        super().on_start(facts)
        for line in start_lines(facts):
            self._console.print(line, highlight=False, markup=False)
        self._live.start()
        self._is_live = True

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        if kind in _QUIET_EVENTS:
            return
        if self._is_live:
            self._messages.append(f"{kind}: {message}")
        else:  # above the dashboard, where it stays
            self._console.print(f"{kind}: {message}", highlight=False, markup=False)

    def on_end(self, summary: dict[str, Any]) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the last picture on the screen. Safe to call twice."""
        if self._is_live:
            self._is_live = False
            self._live.stop()

    def render(self) -> RenderableType:
        if self.facts is None:
            return Text("")
        if self.last is None:
            return Text("first step …", style="dim")
        width = min(self._console.width, 100)
        blocks = _BLOCKS if self._console.encoding.lower().startswith("utf") else _ASCII_BLOCKS
        done, total = self.last.step, self.facts.num_steps
        left = self.seconds_left()
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=total, completed=done, width=max(width - 46, 10)),
            Text(f"{done}/{total}"),
            Text(f"epoch {self.last.epoch:.2f}"),
            Text("done" if done == total else f"{format_seconds(left)} left" if left is not None else "", style="bold"),
        )
        numbers = Table.grid(padding=(0, 3))
        for _ in range(3):
            numbers.add_column(min_width=24)
        validation = "-"
        if self.validation is not None:
            validation = f"{self.validation.validation_loss:.4f}" + (" (best)" if self.validation.is_best else "")
        numbers.add_row(
            self._number("loss", f"{self.last.loss:.4f}"),
            self._number("tokens/s", f"{self.last.tokens_per_second:,.0f}"),
            self._number("learning rate", f"{self.last.learning_rate:.2e}"),
        )
        numbers.add_row(
            self._number("validation", validation),
            self._number("memory", format_bytes(self.last.memory_bytes)),
            self._number("time", format_seconds(self.last.seconds)),
        )
        shown = measures(self.last)
        for start in range(0, len(shown), 3):
            numbers.add_row(*(self._number(name, value) for name, value in shown[start : start + 3]))
        curve = Text(sparkline(self.losses, width - 6, blocks=blocks), style="cyan")
        parts: list[RenderableType] = [Text(""), bar, numbers, Text.assemble(("loss  ", "dim"), curve)]
        parts += [Text(message, style="yellow") for message in self._messages]
        return Group(*parts)

    @staticmethod
    def _number(name: str, value: str) -> Text:
        return Text.assemble((f"{name} ", "dim"), (value, "bold"))


def training_view(console: Console) -> LiveView | PlainLines:
    """The live view on a terminal that can redraw, plain lines otherwise."""
    return LiveView(console) if console.is_terminal and not console.is_dumb_terminal else PlainLines(console)
