from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from affina.cli.main import run as affina


def make_run(
    folder: Path, name: str, *, config: str = "", result: dict[str, Any] | None = None, **manifest: Any
) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    values = {"status": "finished", "model": "affina/nano", "method": "lora", "quantization": "nf4", **manifest}
    (path / "run.json").write_text(json.dumps(values))
    (path / "config.yaml").write_text(config)
    (path / "metrics.jsonl").write_text(
        '{"step": 90, "loss": 0.4321, "seconds": 61.0}\n{"step": 90, "validation_loss": 0.5}\n{"step": 100, "lo'
    )
    if result is not None:
        (path / "evaluation").mkdir()
        (path / "evaluation" / "result.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    make_run(
        folder,
        "first",
        created="2026-11-24T10:15:02Z",
        data_fingerprint="d",
        config="training: {epochs: 1.0, seed: 0}\noutput: {name: first}\n",
        result={"base": {"accuracy": 0.02, "perplexity": 12.0}, "tuned": {"accuracy": 0.93, "perplexity": 1.5}},
    )
    make_run(
        folder,
        "second",
        created="2026-11-24T11:15:02Z",
        data_fingerprint="d",
        status="running",
        config="training: {epochs: 3.0, seed: 0}\noutput: {name: second}\n",
    )
    return folder


def test_runs_lists_the_newest_first_with_status_loss_and_accuracy(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert affina(["runs", "-d", str(two_runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    second, first = lines[1], lines[2]
    # Marked running, but its process is gone.
    for part in ("second", "2026-11-24", "affina/nano", "lora on nf4", "90", "interrupted", "0.4321", "0.5"):
        assert part in second
    for part in ("first", "finished", "93.0% (base 2%)"):
        assert part in first
    assert lines[-1] == "compare two: affina runs first second"


def test_a_folder_without_runs_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", "--directory", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"no runs in {tmp_path}" in printed
    assert "start one with `affina train`" in printed


def test_runs_json_lists_every_run(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", "-d", str(two_runs), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in values["runs"]] == ["second", "first"]
    assert values["runs"][1]["tuned_accuracy"] == 0.93


def test_two_runs_are_compared_by_what_differs(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", "first", "second", "-d", str(two_runs)]) == 0
    printed = capsys.readouterr().out
    settings, results = printed.split("\n\n", 1)
    assert "training.epochs" in settings
    assert "training.seed" not in settings
    assert "output.name" not in settings
    assert "93.0% (base 2%)" in results
    assert "different data" not in printed


def test_two_runs_can_be_named_by_path_and_compared_as_json(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", str(two_runs / "first"), str(two_runs / "second"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["settings"] == {"training.epochs": [1.0, 3.0]}
    assert values["same_data"] is True


def test_a_setting_that_was_renamed_between_two_runs_is_no_difference(
    two_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, setting in (("first", "method"), ("second", "format")):
        file = two_runs / name / "config.yaml"
        file.write_text(f"{file.read_text()}quantization: {{{setting}: nf4}}\n")
    assert affina(["runs", str(two_runs / "first"), str(two_runs / "second"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"training.epochs": [1.0, 3.0]}


def test_runs_on_different_data_are_told_apart(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(two_runs, "third", data_fingerprint="other", config="training: {epochs: 1.0, seed: 0}\n")
    assert affina(["runs", "first", "third", "-d", str(two_runs)]) == 0
    printed = capsys.readouterr().out
    assert "all settings are equal" in printed
    assert "the runs saw different data: their losses and accuracies do not compare" in printed


@pytest.mark.parametrize("names", [["first"], ["first", "second", "third"]])
def test_comparing_needs_exactly_two(two_runs: Path, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", *names, "-d", str(two_runs)]) == 1
    assert f"error[usage]: `affina runs` compares two runs, {len(names)} given" in capsys.readouterr().err


def test_comparing_with_a_run_that_is_not_there_names_it(two_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["runs", "first", "nowhere", "-d", str(two_runs)]) == 1
    assert "error[run-missing]: nowhere is not a run directory" in capsys.readouterr().err
