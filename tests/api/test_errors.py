"""What a user can do wrong around a run is refused with a code, what it was, and a way on that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affina
from affina.errors import AffinaError, AffinaErrors, RunError, TrainingError
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory
from affina.training.callbacks import BaseCallback, StepMetrics
from affina.training.objectives.sft import sft_objective
from tests.api.test_train import adapter_weights, losses, make_config


class FullDevice:
    """The objective of a device whose memory ends after `num_batches` micro-batches."""

    def __init__(self, num_batches: int) -> None:
        self.num_left = num_batches

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if not self.num_left:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. 1.12 GiB is free.\nSee the allocator's manual")
        self.num_left -= 1
        return sft_objective(model, batch)


def edit_stored_config(run: Path, old: str, new: str) -> None:
    file = run / "config.yaml"
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


# Resuming


def test_resuming_the_latest_run_of_a_config_without_a_name_asks_for_the_run(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError) as caught:
        affina.train(make_config(tiny_model_folder, chats_file, tmp_path, output__name=None), resume=True)
    assert caught.value.code == "resume-unnamed"
    assert "output.name" in caught.value.what
    assert "--resume runs/NAME" in str(caught.value.fix)
    assert not (tmp_path / "runs").exists()


class Resumer(BaseCallback):
    """Tries to continue the run that it watches, as a second terminal might."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.refusals: list[AffinaError] = []

    def on_step(self, metrics: StepMetrics) -> None:
        try:
            affina.train(resume=self.run)
        except AffinaError as error:
            self.refusals.append(error)


def test_a_run_that_is_being_trained_is_not_resumed_a_second_time(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    watcher = Resumer(tmp_path / "runs" / "first")
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3)
    result = affina.train(config, callbacks=[watcher])
    assert result.status == "finished"
    assert [error.code for error in watcher.refusals] == ["run-running"] * 3
    pid = RunDirectory(result.run).read_manifest()["pid"]
    assert watcher.refusals[0].what == f"{result.run} is still being trained by process {pid}"
    assert watcher.refusals[0].fix == "wait for it, or stop it first"


def test_a_checkpoint_that_does_not_exist_is_answered_with_those_that_do(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    result = affina.train(make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3))
    wrong = result.run / "checkpoints" / "step-00000099"
    with pytest.raises(RunError) as caught:
        affina.train(resume=wrong)
    assert caught.value.code == "checkpoint-missing"
    assert caught.value.what == f"{wrong} is not a checkpoint"
    assert caught.value.fix == "checkpoints of this run: step-00000003"
    assert RunDirectory(result.run).status() == "finished"


def test_a_checkpoint_beyond_the_end_of_a_shortened_run_is_refused_and_nothing_is_lost(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=6, training__keep_best=False)
    result = affina.train(config)
    run = RunDirectory(result.run)
    weights, metrics = adapter_weights(run.path), run.metrics_file.read_bytes()
    edit_stored_config(run.path, "  max_steps: 6", "  max_steps: 2")
    with pytest.raises(RunError) as caught:
        affina.train(resume=list_checkpoints(run.checkpoints)[0].path)
    assert caught.value.code == "resume-past-end"
    assert caught.value.what == "the checkpoint is at step 3, the run has only 2"
    assert "config.yaml of the run was changed" in str(caught.value.why)
    assert "training.max_steps" in str(caught.value.fix)
    assert run.status() == "finished"
    assert run.metrics_file.read_bytes() == metrics
    edit_stored_config(run.path, "  max_steps: 2", "  max_steps: 6")
    assert affina.train(resume=list_checkpoints(run.checkpoints)[0].path).steps == 6
    assert all(torch.equal(weights[name], value) for name, value in adapter_weights(run.path).items())


# Memory


def test_memory_that_runs_out_is_answered_with_settings_of_the_same_effective_batch(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5)
    with monkeypatch.context() as patch:
        patch.setattr("affina.training.run.sft_objective", FullDevice(num_batches=4 * 2))  # four steps of two
        with pytest.raises(TrainingError) as caught:
            affina.train(config)
    error = caught.value
    assert error.code == "out-of-memory"
    assert error.what == "the device ran out of memory in a training step"
    assert error.why == "Tried to allocate 2.00 GiB. 1.12 GiB is free."
    assert error.fix == (
        "start a new run with one of: training.micro_batch_size: 1 with gradient_accumulation_steps: 4 "
        "(the same effective batch); data.max_length: 32"
    )
    run = RunDirectory(tmp_path / "runs" / "first")
    assert run.status() == "failed"
    assert run.read_manifest()["error"]["code"] == "out-of-memory"
    assert [entry.step for entry in list_checkpoints(run.checkpoints)] == [3, 4]  # 4 is the best so far
    # The advised settings are another run: the same one goes on with its own settings only, once there is memory.
    with pytest.raises(RunError, match="resume-config-changed"):
        affina.train(resume=run.path, overrides=["training.micro_batch_size=1"])
    assert affina.train(resume=run.path).steps == 5
    assert [step for step, _ in losses(run.path)] == [1, 2, 3, 4, 5]
    advised = make_config(
        tiny_model_folder,
        chats_file,
        tmp_path,
        training__max_steps=5,
        training__micro_batch_size=1,
        training__gradient_accumulation_steps=4,
        output__name="second",
    )
    assert affina.train(advised).steps == 5


def test_memory_that_runs_out_names_every_setting_that_saves_some(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tiny_model_folder,
        chats_file,
        tmp_path,
        training__max_steps=5,
        training__gradient_checkpointing=False,
        quantization__method="none",
    )
    monkeypatch.setattr("affina.training.run.sft_objective", FullDevice(num_batches=0))
    with pytest.raises(TrainingError, match="out-of-memory") as caught:
        affina.train(config)
    for advice in ("micro_batch_size: 1", "gradient_checkpointing: true", "method: nf4", "max_length: 32"):
        assert advice in str(caught.value.fix)
    with pytest.raises(RunError) as missing:
        affina.train(resume=tmp_path / "runs" / "first")
    assert missing.value.code == "checkpoint-missing"
    assert "holds no checkpoint" in missing.value.what
    assert missing.value.why == "the run ended before its first one"
    assert "start it again without --resume" in str(missing.value.fix)
    monkeypatch.undo()
    assert affina.train(config).steps == 5, "the way on that was named"


# Data


def test_samples_longer_than_the_models_context_are_refused_before_anything_is_loaded(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, data__max_length=1025)
    with pytest.raises(AffinaErrors) as caught:
        affina.check(config)
    assert caught.value.code == "longer-than-context"
    assert caught.value.what == f"data.max_length is 1,025 tokens; {tiny_model_folder} reads 1,024"
    assert "`max_length: 1024` or less" in str(caught.value.fix)
    config["data"]["max_length"] = 1024
    assert affina.check(config).config.data.max_length == 1024


def test_other_validation_records_than_those_held_out_in_training_are_refused(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    result = affina.train(make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3))
    before = chats_file.read_text()
    chats_file.write_text(before + before.replace("say", "tell me"))
    with pytest.raises(RunError) as caught:
        affina.evaluate(result.run)
    assert caught.value.code == "validation-changed"
    assert f"the data of {result.run} has changed" in caught.value.what
    assert "some of them were trained on" in str(caught.value.why)
    assert "put the data back" in str(caught.value.fix)
    chats_file.write_text(before)
    assert affina.evaluate(result.run, max_generations=1).run == str(result.run)


def test_a_stream_of_which_every_record_is_left_out_ends_the_run(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    faulty = tmp_path / "faulty.jsonl"
    faulty.write_text(json.dumps({"messages": [{"role": "user", "content": "nobody answers"}]}) + "\n")
    config = make_config(
        tiny_model_folder,
        faulty,
        tmp_path,
        data__streaming=True,
        data__on_error="skip",
        data__validation=[{"path": str(chats_file)}],
        training__max_steps=6,
    )
    config["data"].pop("validation_fraction")
    with pytest.raises(TrainingError) as caught:
        affina.train(config)
    assert caught.value.code == "stream-empty"
    assert caught.value.what == "the data stream ended before step 1 of 6"
    assert "data.on_error: skip leaves faulty ones out" in str(caught.value.why)
    config["data"]["on_error"] = "fail"
    config["output"]["name"] = "second"
    with pytest.raises(AffinaError, match="no-reply"):
        affina.train(config)
