"""From a config to a run: the files it leaves, and that stopping, killing and resuming change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import affina
from affina.errors import AffinaError, RunError
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory


def make_config(model: Path, data: Path, root: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model": {"path": str(model)},
        "quantization": {"format": "nf4"},
        "adapter": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "train": [{"path": str(data)}],
            "validation_fraction": 0.2,
            "max_length": 64,
            "cache_directory": str(root / "cache"),
            "num_workers": 0,
        },
        "training": {
            "device": "cpu",
            "epochs": 4,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 5e-3,
            "evaluate_every_steps": 4,
            "save_every_steps": 3,
            "keep_last": 3,
        },
        "evaluation": {"enabled": False},
        "output": {"directory": str(root / "runs"), "name": "first"},
    }
    for path, value in changes.items():
        section, key = path.split("__")
        config[section][key] = value
    return config


def adapter_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in RunDirectory(run).metrics() if "loss" in record]


def assert_same_result(first: Path, second: Path) -> None:
    """Equal bits in every adapter weight and every logged loss."""
    left, right = adapter_weights(first), adapter_weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses(first) == losses(second)


@pytest.fixture(scope="module")
def uninterrupted(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[affina.TrainResult, Path]:
    root = tmp_path_factory.mktemp("uninterrupted")
    data = root / "chats.jsonl"
    with open(data, "w", encoding="utf-8") as lines:
        for number in range(60):
            reply = f"number {number} it is" + "!" * (number % 5)
            turns = [("user", f"say number {number}"), ("assistant", reply)]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")
    return affina.train(make_config(tiny_model_folder, data, root)), data


def test_a_run_leaves_the_files_that_the_contract_names(uninterrupted: tuple[affina.TrainResult, Path]) -> None:
    result, _ = uninterrupted
    run = RunDirectory(result.run)
    assert result.status == "finished"
    assert result.stop_reason == "completed"
    assert result.adapter == run.adapter
    for path in (run.manifest_file, run.config_file, run.origins_file, run.metrics_file, run.events_file):
        assert path.is_file(), path
    for name in ("adapter_model.safetensors", "adapter_config.json", "affina.json"):
        assert (run.adapter / name).is_file()
    assert (run.data / "report.json").is_file()
    assert (run.data / "splits.json").is_file()
    manifest = run.read_manifest()
    assert manifest["status"] == "finished"
    assert manifest["data_fingerprint"]
    assert manifest["environment"]["torch"] == torch.__version__
    json.dumps(result.to_dict())


def test_the_loss_falls(uninterrupted: tuple[affina.TrainResult, Path]) -> None:
    result, _ = uninterrupted
    values = [loss for _, loss in losses(result.run)]
    # A random model with a frozen head can only learn which tokens are frequent: from ln(8192) = 9.0 to about 8.1.
    assert sum(values[-3:]) / 3 < 0.95 * values[0]


def test_the_adapter_with_the_best_validation_loss_is_kept(uninterrupted: tuple[affina.TrainResult, Path]) -> None:
    result, _ = uninterrupted
    records = [record for record in RunDirectory(result.run).metrics() if "validation_loss" in record]
    best = min(records, key=lambda record: record["validation_loss"])
    assert (result.best_step, result.saved_step) == (best["step"], best["step"])
    checkpoint = load_file(result.run / "checkpoints" / f"step-{best['step']:08d}" / "adapter_model.safetensors")
    assert all(torch.equal(checkpoint[name], value) for name, value in adapter_weights(result.run).items())


def test_the_same_config_gives_the_same_bits(
    uninterrupted: tuple[affina.TrainResult, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    result, data = uninterrupted
    again = affina.train(make_config(tiny_model_folder, data, tmp_path))
    assert_same_result(again.run, result.run)


def start_process(config: dict[str, Any], root: Path, *arguments: str) -> subprocess.Popen[str]:
    file = root / "run.yaml"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "affina", "train", *(arguments or (str(file),))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_step(run: RunDirectory, step: int, process: subprocess.Popen[str], *, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if any(record.get("step", 0) >= step for record in run.metrics()):
            return
        time.sleep(0.01)
    assert process.poll() is not None, f"step {step} was not reached in {seconds} s"


@pytest.mark.slow
def test_killed_at_random_instants_and_resumed_equals_never_killed(
    uninterrupted: tuple[affina.TrainResult, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    result, data = uninterrupted
    config = make_config(tiny_model_folder, data, tmp_path)
    run = RunDirectory(tmp_path / "runs" / "first")
    # Wherever the kills land the result must be the same, so the places may differ from one test run to the next.
    chance = random.Random(int.from_bytes(os.urandom(4), "little"))
    num_killed = 0
    process = start_process(config, tmp_path)
    for target in sorted(chance.sample(range(4, result.steps), 2)):
        wait_for_step(run, target, process)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        num_killed += process.returncode == -signal.SIGKILL
        assert list_checkpoints(run.checkpoints), "the first checkpoint is at step 3"
        process = start_process(config, tmp_path, "--resume", str(run.path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert num_killed >= 1
    assert_same_result(run.path, result.run)
    assert any(event["kind"] == "resumed" for event in run.events())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_cleanly_and_can_be_resumed(
    number: signal.Signals, uninterrupted: tuple[affina.TrainResult, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    result, data = uninterrupted
    run = RunDirectory(tmp_path / "runs" / "first")
    process = start_process(make_config(tiny_model_folder, data, tmp_path), tmp_path)
    wait_for_step(run, 5, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert run.status() == "interrupted"
    assert "continue with: affina train --resume" in output
    assert not run.adapter.exists()
    (state_step,) = [record.step for record in list_checkpoints(run.checkpoints)[-1:]]
    assert state_step == max(step for step, _ in losses(run.path)), "nothing that was computed is lost"
    resumed = affina.train(resume=run.path)
    assert resumed.status == "finished"
    assert_same_result(run.path, result.run)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint_and_resumed_equals_never_killed(
    uninterrupted: tuple[affina.TrainResult, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    result, data = uninterrupted
    run = RunDirectory(tmp_path / "runs" / "first")
    # A run that saves seldom, so that the kill surely comes first; when it saves does not change what it learns.
    config = make_config(tiny_model_folder, data, tmp_path, training__save_every_steps=1000)
    process = start_process(config, tmp_path)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if process.returncode != -signal.SIGKILL or list_checkpoints(run.checkpoints):
        pytest.skip("the run was faster than the kill")
    assert run.read_manifest()["status"] == "running", "nobody was left to write another one"
    process = start_process(config, tmp_path, "--resume", str(run.path))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "restarted: no checkpoint yet: starts from the beginning" in output
    assert_same_result(run.path, result.run)
    assert run.status() == "finished"


def test_a_second_run_of_the_same_name_is_refused(
    uninterrupted: tuple[affina.TrainResult, Path], tiny_model_folder: Path
) -> None:
    result, data = uninterrupted
    config = make_config(tiny_model_folder, data, result.run.parent.parent)
    with pytest.raises(RunError, match="run-exists"):
        affina.train(config)


def test_resuming_with_other_settings_is_refused_and_names_them(uninterrupted: tuple[affina.TrainResult, Path]) -> None:
    result, _ = uninterrupted
    with pytest.raises(RunError) as caught:
        affina.train(resume=result.run, overrides=["training.learning_rate=1e-4"])
    text = str(caught.value)
    assert "error[resume-config-changed]" in text
    assert "training.learning_rate" in text


def test_resuming_on_other_data_is_refused(tiny_model_folder: Path, chats_file: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=3)
    result = affina.train(config)
    chats_file.write_text(chats_file.read_text() + chats_file.read_text().splitlines()[0].replace("say", "tell") + "\n")
    with pytest.raises(RunError, match="resume-data-changed"):
        affina.train(resume=result.run)


def test_a_damaged_checkpoint_is_refused_with_the_previous_one(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__keep_best=False)
    result = affina.train(config)
    previous, newest = list_checkpoints(result.run / "checkpoints")[-2:]
    content = bytearray((newest.path / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (newest.path / "optimizer.pt").write_bytes(bytes(content))
    with pytest.raises(RunError) as caught:
        affina.train(resume=result.run)
    assert "error[checkpoint-damaged]" in str(caught.value)
    assert f"--resume {previous.path}" in str(caught.value)
    before = adapter_weights(result.run)
    affina.train(resume=previous.path)
    assert all(torch.equal(before[name], value) for name, value in adapter_weights(result.run).items())


def test_an_error_before_training_is_recorded_in_the_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = make_config(tiny_model_folder, tmp_path / "absent.jsonl", tmp_path)
    with pytest.raises(AffinaError):
        affina.train(config)
    runs = affina.list_runs(tmp_path / "runs")
    assert [entry.status for entry in runs] in ([], ["failed"])


def test_streaming_trains_and_resumes_to_the_same_bits(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(chats_file.read_text().replace("say", "tell me"))

    def config(name: str, **changes: Any) -> dict[str, Any]:
        made = make_config(
            tiny_model_folder,
            chats_file,
            tmp_path,
            data__streaming=True,
            data__validation=[{"path": str(held_out)}],
            training__max_steps=6,
            output__name=name,
            **changes,
        )
        made["data"].pop("validation_fraction")
        return made

    whole = affina.train(config("whole"))
    part = affina.train(config("part"))
    assert whole.steps == 6
    for checkpoint in list_checkpoints(part.run / "checkpoints"):
        if checkpoint.step == 3:
            affina.train(resume=checkpoint.path)
    assert_same_result(part.run, whole.run)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # plain PEFT's
def test_a_real_trained_model_of_another_family_is_fine_tuned(real_data_folder: Any, tmp_path: Path) -> None:
    """stories260K, a Llama without chat template: plain text is learnt and the adapter loads in PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = real_data_folder("stories260k_hf")
    story = "Once upon a time, there was a little robot named Affina. She loved to learn new words every day. "
    data = tmp_path / "stories"
    data.mkdir()
    for number in range(24):
        (data / f"{number:02d}.txt").write_text(story * 3 + f"Today she learned {number} words. The end.")
    config = make_config(folder, data, tmp_path, data__mask="all", training__epochs=6, data__max_length=256)
    result = affina.train(config)
    values = [loss for _, loss in losses(result.run)]
    assert values[-1] < 0.7 * values[0]
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, str(result.adapter))(ids).logits
    assert float((after - before).abs().max()) > 0.1
