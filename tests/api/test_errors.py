"""What a user can do wrong around a run is refused with a code, what it was, and a way on that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affina
from affina.errors import AffinaError, AffinaErrors, RunError, TrainingError
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory
from affina.training.callbacks import BaseCallback, RunFacts, StepMetrics
from affina.training.objectives.sft import sft_objective
from tests.api.test_train import adapter_weights, assert_same_result, losses, make_config


class FullDevice:
    """The objective of a device whose memory ends after `num_batches` micro-batches of training."""

    def __init__(self, num_batches: int) -> None:
        self.num_left = num_batches

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if not torch.is_grad_enabled():
            return sft_objective(model, batch)
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


class Stopper(BaseCallback):
    """Ends the process's training at a step, as a second Ctrl-C does: nothing is saved any more."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, metrics: StepMetrics) -> None:
        if metrics.step == self.step:
            raise KeyboardInterrupt


class Listener(BaseCallback):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def on_start(self, facts: RunFacts) -> None:
        self.told.append(f"start at {facts.first_step}")

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        self.told.append(f"{kind}: {message}")


def stop_before_a_checkpoint(config: dict[str, Any], *, step: int = 2) -> RunDirectory:
    """The run of a config, ended after `step` steps without a checkpoint."""
    with pytest.raises(KeyboardInterrupt):
        affina.train(config, callbacks=[Stopper(step)])
    run = RunDirectory(Path(config["output"]["directory"]) / config["output"]["name"])
    assert (run.status(), list_checkpoints(run.checkpoints)) == ("interrupted", [])
    assert [number for number, _ in losses(run.path)] == list(range(1, step + 1))
    return run


def test_a_run_that_ended_before_its_first_checkpoint_starts_again_with_the_same_result(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5)
    run = stop_before_a_checkpoint(config)
    stored, created = run.config_file.read_text(), run.read_manifest()["created"]
    (run.path / ".tmp-run.json-77").touch()
    with pytest.raises(RunError) as caught:
        affina.train(config)
    assert caught.value.code == "run-exists"
    assert f"`affina train --resume {run.path}` starts it from the beginning" in str(caught.value.fix)

    listener = Listener()
    result = affina.train(resume=run.path, callbacks=[listener])
    assert (result.status, result.run) == ("finished", run.path)
    assert listener.told[0] == "restarted: no checkpoint yet: starts from the beginning"
    assert "start at 0" in listener.told
    assert [event["message"] for event in run.events() if event["kind"] == "restarted"] == [
        "no checkpoint yet: starts from the beginning"
    ]
    assert run.config_file.read_text() == stored
    assert run.read_manifest()["created"] == created
    assert not list(run.path.glob(".tmp-*"))
    assert [step for step, _ in losses(run.path)] == [1, 2, 3, 4, 5], "the first attempt's records are gone"

    config["output"]["name"] = "never-stopped"
    assert_same_result(run.path, affina.train(config).run)


def test_a_run_that_starts_again_can_be_stopped_and_starts_again(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3)
    run = stop_before_a_checkpoint(config)
    with pytest.raises(KeyboardInterrupt):
        affina.train(config, resume=True, callbacks=[Stopper(1)])
    assert run.status() == "interrupted"
    assert [step for step, _ in losses(run.path)] == [1]
    assert affina.train(config, resume=True).steps == 3
    assert [step for step, _ in losses(run.path)] == [1, 2, 3]


def test_a_refused_start_leaves_the_records_of_the_first_attempt(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3)
    run = stop_before_a_checkpoint(config)
    run.update_manifest({"status": "running", "pid": 2**22 - 1})  # as a killed process leaves it
    before, metrics = chats_file.read_text(), run.metrics_file.read_bytes()
    chats_file.write_text(before + before.splitlines()[0].replace("say", "tell") + "\n")
    for _ in range(2):  # the second attempt is not refused because of the first
        with pytest.raises(RunError, match="resume-data-changed"):
            affina.train(resume=run.path)
    assert run.read_manifest()["status"] == "interrupted"
    assert run.metrics_file.read_bytes() == metrics
    chats_file.write_text(before)
    assert affina.train(resume=run.path).steps == 3


def test_a_run_that_failed_before_its_first_step_is_told_with_its_newest_error(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    data = tmp_path / "late.jsonl"
    data.write_text("[]\n")
    config = make_config(tiny_model_folder, data, tmp_path, training__max_steps=3)
    run = RunDirectory(tmp_path / "runs" / "first")
    with pytest.raises(AffinaError):
        affina.train(config)
    first = run.read_manifest()["error"]["code"]
    data.write_text("")
    with pytest.raises(AffinaError):
        affina.train(resume=run.path)
    assert run.status() == "failed"
    assert (first, run.read_manifest()["error"]["code"]) == ("wrong-extension", "empty-file")


def test_a_run_with_a_result_and_no_checkpoint_is_not_started_again(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    result = affina.train(make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3))
    weights = adapter_weights(result.run)
    shutil.rmtree(result.run / "checkpoints")
    with pytest.raises(RunError) as caught:
        affina.train(resume=result.run)
    assert caught.value.code == "checkpoint-missing"
    assert caught.value.fix == "start a new run: another output.name"
    with pytest.raises(RunError) as caught:
        affina.train(resume=result.run / "checkpoints" / "step-00000003")
    assert caught.value.fix == "the run has no checkpoint any more; start a new one"
    assert all(torch.equal(weights[name], value) for name, value in adapter_weights(result.run).items())


def test_a_checkpoint_of_a_run_that_has_none_yet_is_answered_with_the_way_to_start_again(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    run = stop_before_a_checkpoint(make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3))
    with pytest.raises(RunError) as caught:
        affina.train(resume=run.checkpoints / "step-00000003")
    assert caught.value.code == "checkpoint-missing"
    assert caught.value.fix == f"the run has no checkpoint yet: --resume {run.path} starts it from the beginning"
    with pytest.raises(RunError) as caught:
        affina.evaluate(run.path)
    assert caught.value.code == "run-unfinished"
    assert (
        caught.value.fix == f"it has no checkpoint yet: `affina train --resume {run.path}` starts it from the beginning"
    )


# What may be changed on the way


@pytest.fixture(scope="module")
def short_trial(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A preset tried for two steps: its warm-up never ends, which is legal in a preset and refused where a user writes
    it."""
    root = tmp_path_factory.mktemp("trial")
    overrides = ["training.max_steps=2", "training.learning_rate=0.005", "evaluation.enabled=false"]
    places = [f"output.directory={root}", "output.name=trial", f"data.cache_directory={root / 'cache'}"]
    few = ["data.train[0].max_records=20", "data.validation[0].max_records=8"]
    result = affina.train(overrides=[*overrides, *places, *few])
    with pytest.raises(AffinaErrors, match="warmup-too-long"):
        affina.check(result.run / "config.yaml")
    return RunDirectory(result.run)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["training.learning_rate=0.5"], "training.learning_rate (0.005 -> 0.5)"),
        (["training.max_steps=3"], "training.max_steps (2 -> 3)"),
        (["data.train=owner/other"], "data.train[0].path ("),
        (["training.log_every_steps=7"], "training.log_every_steps (1 -> 7)"),
        (["output.name=x", "evaluation.enabled=true"], "evaluation.enabled (false -> true)"),
        (["data.streaming=true", "data.deduplicate=exact"], "data.deduplicate (none -> exact), data.streaming ("),
    ],
)
def test_what_a_resume_may_not_change_is_reported_as_the_change_it_is(
    overrides: list[str], changed: str, short_trial: RunDirectory
) -> None:
    with pytest.raises(RunError) as caught:
        affina.train(resume=short_trial.path, overrides=overrides)
    assert caught.value.code == "resume-config-changed"
    prefix = f"the config differs from the one that {short_trial.path} was started with: "
    assert caught.value.what.startswith(prefix + changed)
    assert str(caught.value.where).startswith("--set ")
    assert short_trial.status() == "finished"


def test_a_config_that_is_given_with_a_resume_is_compared_before_its_combinations_are_judged(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3)
    affina.train(config)
    config["training"]["warmup_steps"] = 3  # never below max_steps
    with pytest.raises(RunError, match=r"resume-config-changed.*training.warmup_steps \(null -> 3\)"):
        affina.train(config, resume=True)


def test_a_wrong_override_of_a_resume_is_still_a_wrong_override(short_trial: RunDirectory) -> None:
    with pytest.raises(AffinaErrors, match=r"unknown-key\]: unknown key training\.epoch"):
        affina.train(resume=short_trial.path, overrides=["training.epoch=2"])


def test_trackers_and_workers_may_be_changed_by_a_resume_and_the_place_of_the_run_may_not(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=4, training__keep_best=False)
    result = affina.train(config)
    run, listener = RunDirectory(result.run), Listener()
    stored, weights = run.config_file.read_text(), adapter_weights(run.path)
    cache = tmp_path / "other-cache"
    affina.train(
        resume=list_checkpoints(run.checkpoints)[0].path,
        overrides=["data.num_workers=1", f"data.cache_directory={cache}", "output.name=elsewhere"],
        callbacks=[listener],
    )
    assert (cache / "prepared").is_dir()
    assert f"note: output.name has no effect: a resumed run stays in {run.path}" in listener.told
    assert [entry.name for entry in run.path.parent.iterdir()] == ["first"]
    assert run.config_file.read_text() == stored
    assert all(torch.equal(weights[name], value) for name, value in adapter_weights(run.path).items())


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
        patch.setattr(
            "affina.training.objectives.build.sft_objective", FullDevice(num_batches=4 * 2)
        )  # four steps of two
        with pytest.raises(TrainingError) as caught:
            affina.train(config)
    error = caught.value
    assert error.code == "out-of-memory"
    assert error.what == "the device ran out of memory in a training step"
    assert error.why == "Tried to allocate 2.00 GiB. 1.12 GiB is free."
    assert error.fix == (
        "start a new run with one of: training.micro_batch_size: 1 with gradient_accumulation_steps: 4 "
        "(the same effective batch); engine.memory: lowest; data.max_length: 32"
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


def test_memory_that_runs_out_while_the_model_is_loaded_is_an_error_with_advice_and_not_a_bug(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loading(config: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB. 1.12 GiB is free.")

    config = make_config(tiny_model_folder, chats_file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("affina.models.build.load_for_training", loading)
        with pytest.raises(TrainingError, match="out-of-memory") as caught:
            affina.train(config)
    assert caught.value.what == "the device ran out of memory while the model was loaded"
    assert caught.value.why == "Tried to allocate 2.00 GiB. 1.12 GiB is free."
    assert "engine.memory: lowest" in caught.value.fix
    assert RunDirectory(tmp_path / "runs" / "first").read_manifest()["error"]["code"] == "out-of-memory"
    assert affina.train(config).steps > 0, "it took no step: its name is free"


def test_memory_that_runs_out_names_every_setting_that_saves_some(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        tiny_model_folder,
        chats_file,
        tmp_path,
        training__max_steps=5,
        training__gradient_checkpointing=False,
        quantization__format="none",
    )
    monkeypatch.setattr("affina.training.objectives.build.sft_objective", FullDevice(num_batches=0))
    with pytest.raises(TrainingError, match="out-of-memory") as caught:
        affina.train(config)
    for advice in ("micro_batch_size: 1", "gradient_checkpointing: true", "format: nf4", "max_length: 32"):
        assert advice in str(caught.value.fix)
    monkeypatch.undo()
    assert affina.train(config).steps == 5, "it took no step: its name is free"


def test_memory_that_runs_out_names_no_setting_that_the_method_refuses(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, quantization__format="none")
    config["adapter"] = "full"
    monkeypatch.setattr("affina.training.objectives.build.sft_objective", FullDevice(num_batches=0))
    with pytest.raises(TrainingError, match="out-of-memory") as caught:
        affina.train(config)
    assert "max_length: 32" in str(caught.value.fix)
    assert "nf4" not in str(caught.value.fix)
    assert "lowest" not in str(caught.value.fix)


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
