"""Laws of the one loop, on a model small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from affina.errors import TrainingError
from affina.training.callbacks import BaseCallback, Observers, StepMetrics, ValidationMetrics
from affina.training.loop import LoopSettings, Validation, clip_gradients, seed_step, train
from affina.training.loss_scale import LossScale
from affina.training.objectives.sft import TokenObjective
from affina.training.schedule import Schedule
from affina.training.state import TrainState


@dataclass
class Rows:
    """A batch of a toy objective: sum of squared errors of a linear model over its rows."""

    inputs: Tensor
    targets: Tensor

    @property
    def num_supervised(self) -> int:
        return len(self.inputs)

    @property
    def num_tokens(self) -> int:
        return len(self.inputs)


def squared_error(model: nn.Module, batch: Rows) -> tuple[Tensor, int]:
    return ((model(batch.inputs)[:, 0] - batch.targets) ** 2).sum(), len(batch.inputs)


class ToySource:
    """24 rows a step, cut into micro-batches of the given sizes; a function of the step alone."""

    steps_per_epoch = 5.0

    def __init__(self, cuts: Sequence[int] = (24,)) -> None:
        self.cuts = cuts

    def step(self, step: int) -> list[Rows]:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(24, 3, generator=generator)
        targets = inputs @ torch.tensor([1.0, -2.0, 0.5])
        parts = zip(inputs.split(list(self.cuts)), targets.split(list(self.cuts)), strict=True)
        return [Rows(x, y) for x, y in parts if len(x)]

    def describe(self, step: int) -> str:
        return f"rows of step {step}"

    def state(self) -> dict[str, Any]:
        return {}


class Recorder(BaseCallback):
    def __init__(self) -> None:
        self.steps: list[StepMetrics] = []
        self.validations: list[ValidationMetrics] = []
        self.events: list[tuple[str, str]] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        self.validations.append(metrics)

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        self.events.append((kind, message))


class Toy:
    """A model, its optimiser and everything the loop wants, ready to run."""

    def __init__(self, cuts: Sequence[int] = (24,), *, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)
        self.source = ToySource(cuts)
        self.recorder = Recorder()
        self.saved: list[TrainState] = []
        self.objective: Callable[[nn.Module, Any], tuple[Tensor, int]] = squared_error
        self.validate: Callable[[], Validation] | None = None
        self.stop_requested: Callable[[], bool] = lambda: False
        self.loss_scale = LossScale.for_precision(is_float16=False)

    def run(
        self,
        num_steps: int = 10,
        state: TrainState | None = None,
        make_room: Callable[[], str | None] | None = None,
        **options: Any,
    ) -> TrainState:
        return train(
            self.model,
            list(self.model.parameters()),
            self.source,
            TokenObjective(self.objective),
            self.optimizer,
            Schedule("cosine", peak=0.05, num_steps=num_steps, warmup_steps=2),
            settings=LoopSettings(num_steps=num_steps, **options),
            state=state or TrainState(),
            loss_scale=self.loss_scale,
            validate=self.validate,
            save=lambda state: self.saved.append(replace(state)),
            observers=Observers([self.recorder]),
            stop_requested=self.stop_requested,
            memory_bytes=lambda: 0,
            make_room=make_room,
        )

    @property
    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


@given(cuts=st.lists(st.integers(0, 24), max_size=4).map(lambda points: [0, *sorted(points), 24]))
@settings(max_examples=20, deadline=None)
def test_cutting_a_step_into_micro_batches_does_not_change_it(cuts: list[int]) -> None:
    sizes = [after - before for before, after in pairwise(cuts)]
    whole, cut = Toy(), Toy(sizes)
    whole.run(5)
    cut.run(5)
    # float32 sums in another order: 24 terms, relative error about 24 · 2^-24 per gradient, amplified by Adam's 1/√v
    torch.testing.assert_close(cut.weights, whole.weights, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one() -> None:
    whole = Toy(dropout=0.3)
    whole.run(10)
    first = Toy(dropout=0.3)
    requests = iter([False] * 8 + [True] * 10)  # asked twice a step: stop after the fourth
    first.stop_requested = lambda: next(requests)
    state = first.run(10)
    assert state.stop_reason == "interrupted"
    second = Toy(dropout=0.3)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    resumed = TrainState.from_dict(state.to_dict())
    resumed.stop_reason = None
    torch.manual_seed(12345)  # whatever the process did before must not matter
    assert second.run(10, resumed).stop_reason == "completed"
    assert 0 < state.step < 10
    assert torch.equal(second.weights, whole.weights)
    losses = [entry.loss for entry in first.recorder.steps + second.recorder.steps]
    assert losses == [entry.loss for entry in whole.recorder.steps]


def test_the_loss_is_the_mean_over_the_whole_step() -> None:
    toy = Toy((1, 23))
    with torch.no_grad():
        expected = sum(float(squared_error(toy.model, batch)[0]) for batch in toy.source.step(0)) / 24
    toy.run(1)
    assert toy.recorder.steps[0].loss == pytest.approx(expected, rel=1e-6)


def test_frozen_parameters_do_not_move() -> None:
    toy = Toy()
    toy.model[1].bias.requires_grad_(False)
    before = toy.model[1].bias.clone()
    toy.run(5)
    assert torch.equal(toy.model[1].bias, before)


def poisoned(steps: set[int], toy: Toy) -> None:
    """Make the given steps' losses NaN."""
    calls = iter(range(1000))

    def objective(model: nn.Module, batch: Rows) -> tuple[Tensor, int]:
        value, count = squared_error(model, batch)
        return (value * math.nan if next(calls) in steps else value), count

    toy.objective = objective


def test_a_step_with_nan_is_skipped_counted_and_leaves_the_weights() -> None:
    toy = Toy()
    poisoned({3}, toy)
    weights: list[Tensor] = []
    toy.recorder.on_step = lambda metrics: weights.append(toy.weights.clone())  # type: ignore[method-assign]
    state = toy.run(6)
    assert state.num_skipped == 1
    assert state.step == 6
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[4], weights[3])
    assert toy.recorder.events == [
        ("step-skipped", "step 4 skipped: loss nan, gradients not finite; it saw rows of step 3")
    ]


def test_a_step_that_runs_out_of_memory_is_repeated_with_less_and_gives_the_same_result() -> None:
    plain, short = Toy(dropout=0.3), Toy(dropout=0.3)
    failures = [torch.OutOfMemoryError("too large"), torch.OutOfMemoryError("still too large")]
    inner = short.objective

    def short_of_memory(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        loss, count = inner(model, batch)
        if failures:
            loss.backward()  # gradients of the failed attempt must not remain
            raise failures.pop()
        return loss, count

    short.objective = short_of_memory
    plain.run(5)
    short.run(5, make_room=lambda: "half as much")
    assert torch.equal(plain.weights, short.weights)
    text = "step 1 ran out of memory and is repeated with more recomputation: layers keep half as much"
    assert short.recorder.events == [("out-of-memory-recovered", text)] * 2


def test_a_validation_that_runs_out_of_memory_is_repeated_too() -> None:
    toy = Toy()
    failures = [torch.OutOfMemoryError("too large")]

    def validate() -> Validation:
        assert not toy.model.training
        if failures:
            raise failures.pop()
        return Validation(0.5)

    toy.validate = validate
    state = toy.run(2, make_room=lambda: "less")
    text = "the validation ran out of memory and is repeated with more recomputation: layers keep less"
    assert toy.recorder.events == [("out-of-memory-recovered", text)]
    assert state.best_validation_loss == 0.5
    assert toy.model.training


def test_a_validation_for_which_nothing_is_left_to_save_ends_the_run() -> None:
    toy = Toy()

    def validate() -> Validation:
        raise torch.OutOfMemoryError("too large")

    toy.validate = validate
    room = ["less"]
    with pytest.raises(torch.OutOfMemoryError):
        toy.run(2, make_room=lambda: room.pop() if room else None)
    assert not room


def test_out_of_memory_with_nothing_left_to_save_ends_the_run() -> None:
    toy = Toy()
    room = ["less"]

    def out_of_memory(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        raise torch.OutOfMemoryError("too large")

    toy.objective = out_of_memory
    with pytest.raises(torch.OutOfMemoryError):
        toy.run(5, make_room=lambda: room.pop() if room else None)
    assert not room


def test_too_many_skipped_steps_end_the_run_with_advice() -> None:
    toy = Toy()
    poisoned(set(range(100)), toy)
    with pytest.raises(TrainingError) as caught:
        toy.run(10, max_skipped_steps=2)
    text = str(caught.value)
    assert text.startswith("error[loss-not-finite]: 3 steps had NaN or infinite gradients, the last at step 3")
    assert "learning_rate" in text


def test_a_float16_overflow_halves_the_scale_and_is_not_a_skipped_step() -> None:
    toy = Toy()
    toy.loss_scale = LossScale(enabled=True, scale=2.0**127)
    state = toy.run(6)
    assert state.num_skipped == 0
    assert state.num_overflows >= 1
    assert toy.loss_scale.scale < 2.0**127
    assert state.loss_scale == toy.loss_scale.scale


def test_scaling_the_loss_does_not_change_the_result() -> None:
    plain, scaled = Toy(), Toy()
    scaled.loss_scale = LossScale(enabled=True, scale=2.0**10)
    plain.run(6)
    scaled.run(6)
    assert torch.equal(scaled.weights, plain.weights), "powers of two are exact"


def test_the_scale_grows_after_many_good_steps() -> None:
    scale = LossScale(enabled=True, scale=4.0, growth_interval=3)
    for _ in range(3):
        scale.update(is_finite=True)
    assert (scale.scale, scale.good_steps) == (8.0, 0)
    scale.update(is_finite=False)
    assert scale.scale == 4.0


def test_the_best_validation_is_remembered_and_saved() -> None:
    toy = Toy()
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0])
    toy.validate = lambda: Validation(next(losses))
    state = toy.run(10, evaluate_every_steps=2, save_best=True)
    assert (state.best_validation_loss, state.best_step) == (1.0, 4)
    assert [entry.is_best for entry in toy.recorder.validations] == [True, True, False, False, False]
    assert [entry.step for entry in toy.saved] == [2, 4, 10]


def test_early_stopping_saves_and_says_why() -> None:
    toy = Toy()
    losses = iter([1.0, 2.0, 3.0, 4.0])
    toy.validate = lambda: Validation(next(losses))
    state = toy.run(100, evaluate_every_steps=5, early_stopping_patience=2)
    assert (state.stop_reason, state.step) == ("early-stopping", 15)
    assert toy.saved[-1].step == 15
    assert toy.recorder.events[-1][1].startswith("stopped at step 15: no better validation loss in 2 validations")


def test_a_stop_request_saves_once_and_returns() -> None:
    toy = Toy()
    toy.stop_requested = lambda: toy.recorder.steps != []
    state = toy.run(100, log_every_steps=3)
    assert state.stop_reason == "interrupted"
    assert [entry.step for entry in toy.saved] == [state.step]
    assert toy.saved[0].stop_reason == "interrupted"


def test_checkpoints_are_due_every_n_steps_and_at_the_end() -> None:
    toy = Toy()
    toy.run(7, save_every_steps=3)
    assert [entry.step for entry in toy.saved] == [3, 6, 7]


def test_a_failing_callback_is_reported_and_dropped() -> None:
    toy = Toy()

    class Broken(BaseCallback):
        def on_step(self, metrics: StepMetrics) -> None:
            raise ConnectionError("tracker is down")

    observers = Observers([Broken(), toy.recorder])
    metrics = StepMetrics(1, 0.1, 1.0, 0.1, 1.0, 1.0, 1, 1, 1.0, 0)
    observers.step(metrics)
    observers.step(metrics)
    assert len(toy.recorder.steps) == 2
    assert toy.recorder.events == [("callback-failed", "Broken stopped after ConnectionError: tracker is down")]


def test_clipping_scales_to_the_norm_and_reports_the_norm_before() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, 1.0, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]))
    assert clip_gradients(parameters, 0.0, 1.0) == pytest.approx(1.0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]))


def test_step_seeds_differ_between_steps_and_runs() -> None:
    draws = set()
    for seed in range(3):
        for step in range(50):
            seed_step(seed, step)
            draws.add(float(torch.rand(())))
    assert len(draws) == 150


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5))]),
    ],
)
def test_schedules_have_the_values_of_their_formulas(kind: Any, expected: list[float]) -> None:
    schedule = Schedule(kind, peak=1.0, num_steps=6, warmup_steps=2, min_ratio=0.1)
    assert [schedule(step) for step in range(6)] == pytest.approx(expected)
    assert schedule(600) == pytest.approx(1.0 if kind == "constant" else 0.1)
