"""`affina check`: the table, the warnings, the JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from affina.cli.main import run
from affina.config import load_config
from affina.config.schema import RunConfig


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "my.jsonl").touch()
    (tmp_path / "run.yaml").write_text(
        "extends: starter\ndata: my.jsonl\ntraining:\n  epochs: 3\ntracking:\n  project: demo\n"
    )
    return tmp_path


def table(output: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Section, then setting, then value and origin, out of the printed lines."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    current = ""
    for line in output.split("\nwarning:", maxsplit=1)[0].splitlines():
        if line.startswith("  "):
            name, value, origin = (part for part in line.rstrip().split("  ") if part)
            sections[current][name.strip()] = (value.strip(), origin.strip())
        elif line.strip() and line != "ok":
            current = line.strip()
            sections[current] = {}
    return sections


def test_every_value_is_shown_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "run.yaml", "--set", "adapter.rank=8"]) == 0
    captured = capsys.readouterr()
    shown = table(captured.out)
    assert list(shown) == list(RunConfig.model_fields)
    assert shown["training"]["epochs"] == ("3", "you (run.yaml:4)")
    assert shown["adapter"]["rank"] == ("8", "you, --set")
    assert shown["adapter"]["alpha"] == ("32", "preset starter: the update is scaled by α/r = 4")
    assert shown["model"]["dtype"] == ("float16", "derived: training.precision is fp16")
    assert shown["evaluation"]["match"] == ("auto", "default")
    assert shown["training"]["max_steps"] == ("–", "default")
    assert captured.err == ""


def test_settings_of_a_source_are_shown_only_when_somebody_set_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--set", "data.train=[{path: owner/a, columns: {prompt: q}}]"]) == 0
    shown = table(capsys.readouterr().out)["data"]
    assert shown["train[0].columns.prompt"] == ("q", "you, --set")
    assert "train[0].columns.messages" not in shown


def test_warnings_come_after_the_table_and_ok_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "run.yaml"]) == 0
    assert capsys.readouterr().out.endswith(
        "\nwarning: tracking.project has no effect (run.yaml:6)\n  why: tracking.trackers is empty\n\nok\n"
    )


def test_a_wrong_file_is_refused_with_all_its_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("lora_r: 3\nadapter: {rank: x}\n")
    assert run(["check", "run.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error[unknown-key]: unknown key lora_r (run.yaml:1)" in captured.err
    assert 'error[wrong-type]: adapter.rank is "x"' in captured.err
    assert captured.err.endswith("\n2 errors\n")


def test_json_holds_config_origins_warnings_and_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "run.yaml", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    resolved = load_config(Path("run.yaml"))
    assert found["ok"] is True
    assert RunConfig.model_validate(found["config"]) == resolved.config
    assert found["origins"]["training.epochs"] == {
        "kind": "user", "file": "run.yaml", "line": 4, "preset": None, "reason": None,
    }  # fmt: skip
    assert found["warnings"][0]["path"] == "tracking.project"
    assert found["hash"] == resolved.hash()
    assert captured.err == ""


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_line_is_wider_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from affina.cli import check, render

    console = render.stdout()
    console.width = columns
    check.print_resolved(load_config(Path("run.yaml")), console)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("gradient_accumulation_steps" in line for line in lines), "names are never broken"


def test_a_preset_is_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--preset", "premium", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["adapter"]["rank"] == 64


def test_config_schema_prints_the_schema_with_and_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config-schema"]) == 0
    plain = capsys.readouterr().out
    assert json.loads(plain)["properties"]["extends"]
    assert run(["config-schema", "--json"]) == 0
    assert capsys.readouterr().out == plain


def test_config_schema_prints_the_reference_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config-schema", "--markdown"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("# The config")
    assert run(["config-schema", "--markdown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"markdown": page}
