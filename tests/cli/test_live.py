"""What a person sees while training runs."""

from __future__ import annotations

import io
import random
from dataclasses import replace

import pytest
from rich.console import Console

from affina.cli.live import LiveView, PlainLines, sparkline, training_view
from affina.runs.units import format_bytes, format_count, format_seconds
from affina.training.callbacks import RunFacts, StepMetrics, ValidationMetrics

FACTS = RunFacts(
    name="support",
    directory="runs/support",
    model="affina/nano",
    device="CPU, 2 threads",
    precision="fp32",
    num_trainable=2_000_000,
    num_parameters=8_000_000,
    num_steps=40,
    first_step=0,
    num_samples=1000,
    tokens_per_step=4096.0,
)
STEP = StepMetrics(1, 0.1, 2.5, 1e-3, 0.5, 3456.0, 4096, 800, 1.0, 1 << 30)


def text_console(*, terminal: bool = False, width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, _environ={})


def printed(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_pipe_gets_plain_lines_and_a_terminal_the_live_view() -> None:
    assert isinstance(training_view(text_console()), PlainLines)
    assert isinstance(training_view(text_console(terminal=True)), LiveView)


def test_plain_lines_tell_the_run_the_step_the_validation_and_events() -> None:
    console = text_console()
    view = PlainLines(console, seconds_between=0.0)
    view.on_start(FACTS)
    view.on_step(STEP)
    view.on_step(replace(STEP, step=11, seconds=11.0, num_tokens=11 * 4096))
    view.on_validation(ValidationMetrics(11, 0.1, 2.25, is_best=True))
    view.on_event("step-skipped", "step 12 skipped", {})
    view.on_event("checkpoint", "checkpoint at step 11", {})
    assert printed(console).splitlines() == [
        "affina/nano on CPU, 2 threads, fp32: trains 2 M of 8 M parameters (25.00%)",
        "1,000 samples, 40 steps of about 4,096 tokens, into runs/support",
        "step 1/40  loss 2.5000  lr 1.00e-03  3,456 tokens/s  1.00 GiB",
        "step 11/40  loss 2.5000  lr 1.00e-03  3,456 tokens/s  1.00 GiB  29 s left",
        "step 11  validation loss 2.2500  (best so far)",
        "step-skipped: step 12 skipped",
    ]


def test_plain_lines_are_few() -> None:
    console = text_console()
    view = PlainLines(console, seconds_between=3600.0)
    view.on_start(FACTS)
    for step in range(1, 41):
        view.on_step(replace(STEP, step=step))
    steps = [line for line in printed(console).splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/40", "40/40"], "the first and the last"


def test_the_live_view_says_everything_once() -> None:
    console = text_console(terminal=True)
    view = LiveView(console)
    view.on_event("note", "said before the start", {})
    view.on_start(FACTS)
    view.on_event("step-skipped", "step 2 skipped", {})
    view.on_step(STEP)
    picture = text_console()
    picture.print(view.render())
    view.stop()
    assert printed(console).count("said before the start") == 1
    assert "said before the start" not in printed(picture)
    assert printed(picture).count("step 2 skipped") == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    console = text_console(terminal=True, width=width)
    view = LiveView(console)
    view.facts = FACTS
    for step in range(1, 41):
        view.on_step(replace(STEP, step=step, loss=3.0 / step, seconds=float(step)))
    view.on_validation(ValidationMetrics(40, 1.0, 0.5, is_best=True))
    picture = text_console(width=width)
    picture.print(view.render())
    lines = printed(picture).splitlines()
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    for words in ("40/40", "done", "loss 0.0750", "tokens/s 3,456", "0.5000 (best)", "1.00 GiB"):
        assert words in text


def test_numbers_read_like_a_person_writes_them() -> None:
    assert [format_seconds(value) for value in (3.4, 65, 7265)] == ["3 s", "1:05 min", "2:01 h"]
    sizes = (512, 96 * 2**10, 5 * 2**20, 1.5 * 2**30)
    assert [format_bytes(value) for value in sizes] == ["512 bytes", "96 KiB", "5 MiB", "1.50 GiB"]
    assert [format_count(value) for value in (812, 33_030_144, 4_022_468_096)] == ["812", "33 M", "4.02 B"]


def test_a_sparkline_falls_with_its_values_and_keeps_to_its_width() -> None:
    assert sparkline([3.0, 2.0, 1.0], 10, blocks="123") == "321"
    assert len(sparkline([float(value) for value in range(1000)], 40)) == 40
    assert sparkline([], 10) == ""
    assert sparkline([1.0, 1.0], 10, blocks="12") == "11"


REWARDS = {"reward_margin": 0.5, "reward_accuracy": 0.75, "reward_chosen": 0.2, "reward_rejected": -0.3, "x": 1.0}


def test_plain_lines_tell_margin_and_order_of_preferences() -> None:
    console = text_console()
    view = PlainLines(console, seconds_between=0.0)
    view.on_start(FACTS)
    view.on_step(replace(STEP, objective=REWARDS))
    view.on_validation(ValidationMetrics(11, 0.1, 0.5, False, {"reward_margin": 1.25, "reward_accuracy": 1.0}))
    assert printed(console).splitlines()[2:] == [
        "step 1/40  loss 2.5000  margin 0.500  in order 75%  lr 1.00e-03  3,456 tokens/s  1.00 GiB",
        "step 11  validation loss 0.5000  margin 1.250  in order 100%",
    ]


def test_the_live_view_shows_every_measure_of_the_objective() -> None:
    console = text_console(terminal=True)
    view = LiveView(console)
    view.facts = FACTS
    view.on_step(replace(STEP, objective=REWARDS))
    console.print(view.render())
    text = printed(console)
    for shown in ("margin 0.500", "in order 75%", "chosen 0.200", "rejected -0.300"):
        assert shown in text
    view.on_step(STEP)
    console.print(view.render())
    assert "margin" not in printed(console)[len(text) :]


class Clock:
    """Time that only a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("every", [None, 50])
def test_after_20_steps_the_time_left_is_right_within_10_percent(every: int | None) -> None:
    """Rows of 200 to 4,000 tokens, 0.1 ms a token, a slow first step, and validations of 3 s each."""
    clock, total, rng = Clock(), 400, random.Random(5)
    tokens = [sum(rng.randint(50, 1000) for _ in range(4)) for _ in range(total)]
    view = PlainLines(text_console(), seconds_between=1e9, clock=clock)
    facts = replace(FACTS, num_steps=total, tokens_per_step=sum(tokens) / total)
    view.on_start(replace(facts, evaluate_every_steps=every, validation_tokens=90_000))
    seen, seconds, told = 0, 0.0, {}
    for step, count in enumerate(tokens, 1):
        took = count * 1e-4 + (30.0 if step == 1 else 0.0)
        seen, seconds, clock.now = seen + count, seconds + took, clock.now + took
        view.on_step(replace(STEP, step=step, seconds=seconds, num_tokens=seen))
        told[step] = (clock.now, view.seconds_left())
        if step == total or (every is not None and step % every == 0):
            clock.now += 3.0
            view.on_validation(ValidationMetrics(step, 0.1, 2.0, False))
    for step in (20, 60, 200, 380):
        at, left = told[step]
        assert left == pytest.approx(clock.now - at, rel=0.1), step


def test_a_stream_counts_steps_because_its_tokens_are_not_known() -> None:
    view = PlainLines(text_console(), seconds_between=1e9, clock=Clock())
    view.on_start(replace(FACTS, num_samples=0, num_steps=100, tokens_per_step=1e6))
    for step in range(1, 21):
        view.on_step(replace(STEP, step=step, seconds=2.0 * step, num_tokens=500 * step))
    assert view.seconds_left() == pytest.approx(160.0)
