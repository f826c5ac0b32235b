"""Trackers get the numbers that metrics.jsonl gets."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from affina.errors import TrainingError
from affina.training.callbacks import RunFacts, StepMetrics, ValidationMetrics
from affina.training.trackers import _ScalarTracker, build_tracker

FACTS = RunFacts("support", "runs/support", "affina/nano", "cpu", "fp32", 10, 100, 5, 0, 50, 512.0)
STEP = StepMetrics(3, 0.5, 1.25, 1e-3, 0.7, 1000.0, 4096, 512, 2.5, 10_000)
VALIDATION = ValidationMetrics(3, 0.5, 1.5, True)


def tell(tracker: Any) -> None:
    tracker.on_start(FACTS)
    tracker.on_step(STEP)
    tracker.on_validation(VALIDATION)
    tracker.on_end({})


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_says_what_to_install(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=rf'"{kind}" needs the package') as caught:
        build_tracker(kind, directory=tmp_path, project="affina", name="support")
    assert caught.value.code == "tracker-unavailable"
    assert f'pip install "affina[{kind}]"' in str(caught.value.fix)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    tell(build_tracker("tensorboard", directory=tmp_path, project="affina", name="support"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(entry.step, entry.value) for entry in events.Scalars("train/loss")] == [(3, 1.25)]
    assert [(entry.step, entry.value) for entry in events.Scalars("validation/loss")] == [(3, 1.5)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_shows_a_step_that_is_taken_again_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, (first_step, steps) in enumerate(((0, (1, 2, 3, 4)), (2, (3, 4)), (0, (1, 2)))):
        tracker: Any = build_tracker("tensorboard", directory=tmp_path, project="affina", name="support")
        tracker.on_start(replace(FACTS, first_step=first_step))
        for step in steps:
            tracker.on_step(replace(STEP, step=step, loss=float(attempt)))
        tracker.on_end({})
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        shown = [(entry.step, entry.value) for entry in events.Scalars("train/loss")]
        expected = {0: [(1, 0), (2, 0), (3, 0), (4, 0)], 1: [(1, 0), (2, 0), (3, 1), (4, 1)], 2: [(1, 2), (2, 2)]}
        assert shown == expected[attempt]


class FakeModule(types.ModuleType):
    """Records the calls that a tracker's client library would get."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.__spec__ = importlib.util.spec_from_loader(name, loader=None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> FakeModule:
            self.calls.append((name, arguments, options))
            return self

        return call


@pytest.mark.parametrize(
    ("kind", "log_call", "end_call"),
    [("wandb", "log", "finish"), ("trackio", "log", "finish"), ("mlflow", "log_metrics", "end_run")],
)
def test_client_libraries_get_names_values_and_steps(
    kind: Any, log_call: str, end_call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeModule(kind)
    monkeypatch.setitem(sys.modules, kind, fake)
    tell(build_tracker(kind, directory=tmp_path, project="shop", name="support"))
    logged = [(arguments[0], options["step"]) for name, arguments, options in fake.calls if name == log_call]
    assert logged[0][0]["train/loss"] == 1.25
    assert logged[1] == ({"validation/loss": 1.5}, 3)
    assert fake.calls[-1][0] == end_call


def test_what_an_objective_measures_is_logged_beside_the_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    logged: dict[str, float] = {}

    class Recorder(_ScalarTracker):
        def log_scalars(self, scalars: dict[str, float], step: int) -> None:
            logged.update(scalars)

    tracker = Recorder()
    tracker.on_step(replace(STEP, objective={"reward_margin": 0.5}))
    tracker.on_validation(replace(VALIDATION, objective={"reward_margin": 0.25}))
    assert logged["train/reward_margin"] == 0.5
    assert logged["validation/reward_margin"] == 0.25
    assert logged["validation/loss"] == 1.5
