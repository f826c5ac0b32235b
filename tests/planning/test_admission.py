"""A run that cannot fit is refused before its weights are loaded, and the refusal says with what it would."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import affina
from affina.catalog.model_files import find_config
from affina.catalog.shapes import ModelShape
from affina.config import load_mapping
from affina.config.schema import RunConfig
from affina.errors import TrainingError
from affina.planning.admission import Device, admit, cut_to_fit, measured_record, planned_record
from affina.planning.build import model_config, shape_of
from affina.planning.coefficients import coefficients_for
from affina.planning.fit import apply, memory_of
from affina.planning.workload import estimated_workload

GIB = 2**30


def config(**sections: Any) -> RunConfig:
    return load_mapping({"extends": "premium", "data": {"train": "affina/support"}, **sections}).config


def plan_shape(which: RunConfig) -> ModelShape:
    raw, folder = model_config(which)
    return shape_of(which, raw, folder)


def device(free_gib: float, name: str = "NVIDIA H100 80GB HBM3") -> Device:
    return Device(name, (9, 0), 80 * GIB, int(free_gib * GIB))


def test_a_run_that_fits_is_let_in_with_its_plan() -> None:
    which = config()
    plan = admit(which, estimated_workload(which), device(78))
    assert plan is not None
    assert plan.fits
    record = planned_record(plan)
    assert record["engine"] == "fast"
    assert record["allocated_bytes"] == plan.memory.allocated_bytes
    json.dumps(record)


def test_a_run_that_cannot_fit_is_refused_with_the_smallest_change() -> None:
    which = config(training={"micro_batch_size": 4, "gradient_accumulation_steps": 2})
    with pytest.raises(TrainingError, match=r"error\[memory-too-small\]: this run needs .* GiB") as error:
        admit(which, estimated_workload(which), device(11.0))
    assert "free are 11.00" in str(error.value)
    assert "training.micro_batch_size" in str(error.value)
    assert "then it needs" in str(error.value)


def test_with_automatic_memory_a_step_is_cut_into_smaller_micro_batches_and_into_nothing_else() -> None:
    which = config(training={"micro_batch_size": 8, "gradient_accumulation_steps": 2})
    small = device(12.0)
    with pytest.raises(TrainingError, match="memory-too-small"):
        admit(which, estimated_workload(which), small)
    changes = cut_to_fit(which, estimated_workload(which), small)
    assert [change.path for change in changes] == [
        "training.micro_batch_size",
        "training.gradient_accumulation_steps",
    ]
    assert changes[0].value * changes[1].value == 16
    cut = apply(which, changes)
    plan = admit(cut, estimated_workload(cut), small)
    assert plan is not None
    assert plan.fits
    size, count = (change.value for change in changes)
    larger = apply(which, (replace(changes[0], value=2 * size), replace(changes[1], value=count // 2)))
    assert not memory_of(larger, plan_shape(larger), small.card(), estimated_workload(larger)).fits


@pytest.mark.parametrize(
    ("sections", "free_gib"),
    [({}, 78), ({"engine": {"memory": 9.0}}, 78), ({}, 1.0)],
    ids=["it fits", "the limit is the user's own", "nothing helps"],
)
def test_otherwise_nothing_is_cut(sections: dict[str, Any], free_gib: float) -> None:
    which = config(training={"micro_batch_size": 8, "gradient_accumulation_steps": 2}, **sections)
    assert cut_to_fit(which, estimated_workload(which), device(free_gib)) == ()


def test_a_limit_of_the_users_own_refuses_too_and_is_named() -> None:
    which = config(engine={"memory": 6.0})
    with pytest.raises(TrainingError, match=r"engine\.memory allows 6\.00") as error:
        admit(which, estimated_workload(which), device(78))
    assert "quantization.format: nf4" in str(error.value)


def test_a_capped_process_is_told_of_its_cap_and_not_of_a_card_that_has_more_free() -> None:
    which = config(training={"micro_batch_size": 4, "gradient_accumulation_steps": 2})
    with pytest.raises(TrainingError, match=r"this process may take 11\.00") as error:
        admit(which, estimated_workload(which), replace(device(11.0), is_capped=True))
    assert "then it needs" in str(error.value)
    with pytest.raises(TrainingError, match="raise this process's share of the card") as error:
        admit(which, estimated_workload(which), replace(device(1.0), is_capped=True))
    assert "the smallest card that holds it" in str(error.value)
    limited = config(engine={"memory": 6.0})
    with pytest.raises(TrainingError, match=r"engine\.memory allows 6\.00"):
        admit(limited, estimated_workload(limited), replace(device(11.0), is_capped=True))


def test_the_parts_that_a_refusal_names_are_parts_of_what_it_says_is_needed() -> None:
    # 0.5 GiB of CUDA context would be the third largest, and no tensor.
    which = config(
        quantization={"format": "nf4"},
        adapter={"rank": 8},
        data={"train": "affina/support", "max_length": 256},
        training={"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    )
    with pytest.raises(TrainingError, match="its largest parts: base weights") as error:
        admit(which, estimated_workload(which), device(1.0))
    assert "CUDA context" not in str(error.value)
    assert "allocator slack" not in str(error.value)


def test_a_small_model_is_refused_with_figures_that_can_be_read() -> None:
    which = load_mapping({"extends": "laptop", "engine": {"memory": 0.02}, "training": {"device": "cpu"}}).config
    with pytest.raises(TrainingError, match=r"needs \d+ MiB on cpu, engine\.memory allows 20 MiB") as error:
        admit(which, estimated_workload(which), Device("cpu"))
    assert "0.0" not in str(error.value)


def test_the_least_memory_is_proposed_before_rows_are_shortened_and_not_instead_of_a_limit() -> None:
    small = {"quantization": {"format": "nf4"}, "adapter": {"rank": 16}, "evaluation": {"enabled": False}}
    small["data"] = {"train": "affina/support", "max_length": 2048}
    which = config(**small)
    with pytest.raises(TrainingError, match="memory-too-small") as error:
        admit(which, estimated_workload(which), device(2.6))
    assert "engine.memory: lowest: then it needs 2.42 GiB" in str(error.value)
    assert "max_length" not in str(error.value)
    limited = config(**small, engine={"memory": 2.6})
    with pytest.raises(TrainingError, match="memory-too-small") as error:
        admit(limited, estimated_workload(limited), device(78))
    assert "lowest" not in str(error.value)


def test_where_nothing_helps_the_smallest_card_is_named() -> None:
    which = config()
    with pytest.raises(TrainingError, match="the smallest card that holds it"):
        admit(which, estimated_workload(which), device(1.0))


def test_a_model_that_cannot_be_counted_is_tried_not_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    which = load_mapping({"model": str(tmp_path), "data": {"train": "affina/support"}}).config
    assert admit(which, estimated_workload(which), device(0.1)) is None


@pytest.mark.parametrize("sections", [{"adapter": {"method": "hra"}}, {"training": {"objective": "dpo"}}])
def test_a_run_that_is_not_counted_is_tried_not_refused(sections: dict[str, Any]) -> None:
    which = config(**sections)
    assert admit(which, estimated_workload(which), device(0.1)) is None


def test_full_fine_tuning_is_refused_where_weights_and_optimiser_alone_do_not_fit() -> None:
    which = config(adapter={"method": "full"}, training={"optimizer": "adamw_8bit"})
    with pytest.raises(TrainingError, match="memory-too-small") as error:
        admit(which, estimated_workload(which), device(22))
    assert "trained weights 14.98 GiB" in str(error.value)


def test_what_was_only_compared_on_a_cpu_does_not_refuse_a_run_and_does_not_teach() -> None:
    which = config(adapter={"method": "vera"}, data={"train": "affina/support", "max_length": 4096})
    plan = admit(which, estimated_workload(which), device(78))
    assert plan is not None
    between = (plan.certain_bytes + plan.memory.allocated_bytes) / 2 / GIB
    assert plan.certain_bytes < plan.memory.allocated_bytes
    assert admit(which, estimated_workload(which), device(between)) is not None
    measured_record(plan, engine="reference", peak_bytes=2 * plan.certain_bytes, training_seconds=9.0, num_steps=40)
    assert coefficients_for("h100", "reference", "none").memory_factor == 1.0


def test_measurements_are_kept_beside_the_plan_and_taught() -> None:
    which = config()
    plan = admit(which, estimated_workload(which), device(78))
    assert plan is not None and plan.step is not None  # noqa: PT018
    peak, seconds = int(plan.memory.allocated_bytes / 1.01), 2 * plan.step.step_seconds * 40
    record = measured_record(plan, engine="fast", peak_bytes=peak, training_seconds=seconds, num_steps=40)
    assert record["memory_error"] == pytest.approx(0.01, abs=1e-4)
    assert record["time_error"] == pytest.approx(-0.5)
    assert coefficients_for("h100", "fast", "none").time_factor == pytest.approx(2.0)


def test_a_stored_checkpoint_teaches_under_the_format_that_it_is_stored_in(tmp_path: Path) -> None:
    stored = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    raw = {**find_config("Qwen/Qwen3-4B")[0], "quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    which = config(model={"path": str(tmp_path)})
    assert which.quantization.format == "none"
    plan = admit(which, estimated_workload(which), device(78))
    assert plan is not None and plan.step is not None  # noqa: PT018
    seconds = 2 * plan.step.step_seconds * 40
    measured_record(plan, engine="fast", peak_bytes=1, training_seconds=seconds, num_steps=40)
    assert coefficients_for("h100", "fast", "nf4").time_factor == pytest.approx(2.0)
    assert coefficients_for("h100", "fast", "none").time_factor == 1.0


def test_another_engine_than_planned_teaches_nothing() -> None:
    which = config()
    plan = admit(which, estimated_workload(which), device(78))
    assert plan is not None
    measured_record(plan, engine="reference", peak_bytes=1, training_seconds=1.0, num_steps=40)
    assert coefficients_for("h100", "fast", "none").time_factor == 1.0


def test_training_refuses_before_weights_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("affina.models.build.load_for_training", loading)
    options = [f"output.directory={tmp_path}", "output.name=refused", "engine.memory=0.02"]
    with pytest.raises(TrainingError, match="memory-too-small"):
        affina.train(preset="laptop", overrides=options)
    manifest = json.loads((tmp_path / "refused" / "run.json").read_text())
    assert manifest["status"] == "failed"
    assert manifest["error"]["code"] == "memory-too-small"
