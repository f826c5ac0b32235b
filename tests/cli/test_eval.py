from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from affina import api
from affina.cli.main import run as affina
from affina.errors import EvaluationError
from affina.evaluation.compare import CompareSettings, Contestant, EvaluationResult, compare
from affina.evaluation.tasks.exact_match import ReplyTask
from tests.evaluation.fakes import FakeGenerate, FakeScore, sample


def result() -> EvaluationResult:
    samples = [sample(4, 4, identity=index) for index in range(8)]
    tasks = [ReplyTask((1, index), f"Question {index}?", "Rome", "normalized", "v.jsonl:3") for index in range(8)]
    return compare(
        Contestant(FakeScore({index: 2.0 + index / 10 for index in range(8)}), FakeGenerate("Milan")),
        Contestant(FakeScore(0.5), FakeGenerate("Rome.")),
        samples,
        tasks,
        settings=CompareSettings(num_resamples=200),
    ).with_files(run="runs/a", report_path="runs/a/evaluation/report.html", samples_path=None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `api.evaluate` was called with."""
    seen: dict[str, Any] = {}

    def evaluate(run: Path, **options: Any) -> EvaluationResult:
        seen.update(run=run, **options)
        return result()

    monkeypatch.setattr(api, "evaluate", evaluate)
    return seen


def test_eval_prints_both_models_the_verdict_a_reply_and_where_the_report_is(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert affina(["eval", "runs/a"]) == 0
    printed = capsys.readouterr().out
    assert "Better: accuracy rose from 0% to 100%" in printed
    assert "Better: perplexity on reply tokens fell from 10.49 to 1.65" in printed
    assert "Question 0?" in printed
    assert "base wrong" in printed
    assert "tuned right" in printed
    assert "runs/a/evaluation/report.html" in printed
    assert asked["run"] == Path("runs/a")


def test_eval_json_is_one_object_with_both_models(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["eval", "runs/a", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["base"]["accuracy"] == 0.0
    assert values["tuned"]["accuracy"] == 1.0
    assert values["n"] == 8
    assert values["ci"]["level"] == 0.95
    assert values["report"] == "runs/a/evaluation/report.html"


def test_eval_hands_its_limits_on_and_leaves_the_rest_to_the_run_s_config(asked: dict[str, Any]) -> None:
    affina(["eval", "runs/a", "--max-records", "5", "--max-generations", "0"])
    assert (asked["max_records"], asked["max_generations"]) == (5, 0)
    affina(["eval", "runs/a"])
    assert (asked["max_records"], asked["max_generations"]) == (None, None)


def test_eval_shows_an_error_with_its_fix_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(run: Path, **_options: Any) -> EvaluationResult:
        raise EvaluationError("evaluation-no-records", "no validation records", fix="set data.validation")

    monkeypatch.setattr(api, "evaluate", evaluate)
    assert affina(["eval", "runs/a"]) == 1
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "error[evaluation-no-records]: no validation records" in caught.err
    assert "fix: set data.validation" in caught.err


def test_eval_of_something_that_is_no_run_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert affina(["eval", str(tmp_path / "nothing")]) == 1
    assert "error[run-missing]" in capsys.readouterr().err


def test_eval_of_a_run_without_an_adapter_says_how_to_get_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "a" / "run.json").write_text('{"status": "interrupted"}')
    assert affina(["eval", str(tmp_path / "a")]) == 1
    printed = capsys.readouterr().err
    assert "error[run-unfinished]" in printed
    assert "affina train --resume" in printed
