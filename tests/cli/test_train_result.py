"""The last lines of a run say what was foreseen beside what was measured."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from affina.api import TrainResult
from affina.cli.train import print_train_result


def result(**changes: Any) -> TrainResult:
    values: dict[str, Any] = {
        "run": Path("runs/x"), "method": "lora", "adapter": Path("runs/x/adapter"), "status": "finished",
        "stop_reason": "completed", "steps": 100, "seconds": 50.0, "tokens_per_second": 900.0, "num_tokens": 45_000,
        "final_loss": 1.0, "best_validation_loss": None, "best_step": None, "saved_step": 100, "num_skipped_steps": 0,
        "peak_memory_bytes": 10 * 2**30, "planned_memory_bytes": 11 * 2**30, "num_trainable": 1, "num_parameters": 2,
        "evaluation": None, "report": None, "planned_step_seconds": 0.55,
    }  # fmt: skip
    return TrainResult(**{**values, **changes})


def printed(which: TrainResult) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    print_train_result(console, which)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_memory_and_time_are_shown_beside_the_plan() -> None:
    text = printed(result())
    assert "peak memory 10.00 GiB, planned 11.00 GiB (+10.0%)" in text
    assert "a step took 0.5 s, planned 0.55 s (+10.0%)" in text


def test_a_cpu_has_no_plan_to_compare_with() -> None:
    assert "planned" not in printed(result(planned_memory_bytes=None, planned_step_seconds=None))
