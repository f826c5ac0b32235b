"""Runs on an 8-bit or FP4 base: from the command line to the merged model, and resumed to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import affina
from affina.cli.main import run as command_line
from affina.models.load import load_causal_lm
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory
from tests.api.test_train import assert_same_result, make_config


def test_the_laptop_preset_trains_and_merges_on_an_fp8_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("quantization=fp8", "training.max_steps=3", "evaluation.enabled=false", "output.name=eight")
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    assert command_line(["train", "--preset", "laptop", *arguments]) == 0
    said = capsys.readouterr().err
    assert "fp32 on FP8: trains 430 k of 6.66 M parameters" in said
    assert "note: fp8: this CPU does not multiply 8-bit floats" in said
    run = RunDirectory(tmp_path / "runs" / "eight")
    losses = [record["loss"] for record in run.metrics() if "loss" in record]
    assert losses[-1] < losses[0]
    manifest = run.read_manifest()
    assert (manifest["status"], manifest["quantization"]) == ("finished", "fp8")
    identity = json.loads((run.adapter / "affina.json").read_text())["base"]
    assert identity["quantization"]["format"] == "fp8"

    assert command_line(["merge", "runs/eight", "-o", "merged"]) == 0
    assert "the adapter was trained against the FP8 base" in " ".join(capsys.readouterr().out.split())
    merged = load_causal_lm("merged", dtype=torch.float32, device="cpu")
    assert all(parameter.dtype == torch.float32 for parameter in merged.parameters())


@pytest.mark.parametrize("method", ["fp4", "fp8", "int8"])
@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    method: str, engine: str, tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    results = []
    for name in ("whole", "part"):
        config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5, output__name=name)
        config |= {"quantization": method, "engine": engine, "adapter": {"rank": 4, "alpha": 8}}
        results.append(affina.train(config))
    whole, part = results
    (third,) = [saved for saved in list_checkpoints(part.run / "checkpoints") if saved.step == 3]
    affina.train(resume=third.path)
    assert_same_result(part.run, whole.run)


def test_a_run_that_stored_the_format_under_its_name_of_before_goes_on_and_loads(
    tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    results = []
    for name in ("whole", "part"):
        config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5, output__name=name)
        results.append(affina.train(config | {"quantization": "int8", "adapter": {"rank": 4, "alpha": 8}}))
    whole, part = (RunDirectory(result.run) for result in results)
    for file, now, before in (
        (part.config_file, "  format: int8", "  method: int8"),
        (part.origins_file, '"quantization.format"', '"quantization.method"'),
        (part.adapter / "affina.json", '"format": "int8"', '"method": "int8"'),
    ):
        text = file.read_text(encoding="utf-8")
        assert now in text, file
        file.write_text(text.replace(now, before), encoding="utf-8")
    (third,) = [saved for saved in list_checkpoints(part.checkpoints) if saved.step == 3]
    affina.train(config | {"quantization": {"method": "int8"}, "adapter": {"rank": 4, "alpha": 8}}, resume=third.path)
    assert_same_result(part.path, whole.path)
    assert "  method: int8" in part.config_file.read_text(encoding="utf-8")
    assert affina.merge(part.path, tmp_path / "merged").output == tmp_path / "merged"
