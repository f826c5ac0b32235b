from __future__ import annotations

import json
from pathlib import Path

import pytest

from affina.evaluation.files import method_name, next_commands, read_report_data, save_result
from affina.evaluation.report import render_report
from affina.runs.directory import RunDirectory
from tests.evaluation.test_terminal import make


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A finished run as training leaves it."""
    run = RunDirectory(tmp_path / "support")
    run.path.mkdir()
    (run.path / "adapter").mkdir()
    run.manifest_file.write_text(
        json.dumps(
            {
                "status": "finished",
                "created": "2026-11-24T10:05:02Z",
                "affina": "0.1.0",
                "model": "affina/nano",
                "environment": {"python": "3.11.2", "torch": "2.13.0", "device": "CPU, 2 threads"},
                "training": {
                    "num_steps": 240,
                    "saved_step": 200,
                    "seconds": 72.4,
                    "tokens_per_second": 5812.3,
                    "peak_memory_bytes": 900_000_000,
                    "num_trainable": 1_032_192,
                    "num_parameters": 9_400_000,
                },
            }
        )
    )
    run.config_file.write_text(
        "model: {path: affina/nano}\nquantization: {format: nf4}\n"
        "adapter: {method: lora, rank: 16, alpha: 32.0, targets: all-linear}\ntraining: {epochs: 3.0}\n"
    )
    run.origins_file.write_text(json.dumps({"training.epochs": {"kind": "user", "file": "run.yaml", "line": 9}}))
    run.metrics_file.write_text(
        '{"step": 240, "epoch": 3.0, "loss": 0.3, "seconds": 72.0}\n{"step": 240, "validation_loss": 0.4}\n'
    )
    run.events_file.write_text('{"time": "2026-11-24T10:06:00Z", "kind": "note", "message": "hello"}\n')
    run.data.mkdir()
    (run.data / "report.json").write_text(
        json.dumps(
            {
                "train": {
                    "num_samples": 900,
                    "num_tokens": 60_000,
                    "p50": 61,
                    "p95": 118,
                    "p99": 151,
                    "max": 170,
                    "supervised_share": 0.38,
                },
                "validation": {"num_samples": 100, "num_tokens": 6_000},
                "packing": {"is_packed": True, "efficiency": 0.996, "padded_efficiency": 0.61},
                "num_records_skipped": 2,
                "num_duplicates_removed": 1,
                "counts": {"dropped_too_long": 4},
                "leakage": {"leaked_share": 0.02},
                "duplicates": {"num_exact_duplicates": 3, "num_near_duplicates": 5, "num_conflicts": 1},
                "pii": {"email": 3, "iban": 0},
                "findings": [{"level": "warning", "code": "leakage", "what": "2 records leak", "fix": "remove them"}],
            }
        )
    )
    return run


def test_an_evaluation_leaves_result_replies_and_report(run: RunDirectory) -> None:
    placed = save_result(run, make())
    assert sorted(path.name for path in run.evaluation.iterdir()) == ["report.html", "result.json", "samples.jsonl"]
    assert placed.report_path == str(run.evaluation / "report.html")
    assert json.loads((run.evaluation / "result.json").read_text()) == placed.to_dict()
    replies = [json.loads(line) for line in (run.evaluation / "samples.jsonl").read_text().splitlines()]
    assert len(replies) == 8
    assert {reply["tuned_is_right"] for reply in replies} == {True}
    assert "Better: accuracy rose" in (run.evaluation / "report.html").read_text()


def test_replies_of_an_earlier_evaluation_do_not_stay(run: RunDirectory) -> None:
    save_result(run, make())
    from affina.evaluation.compare import Contestant, compare
    from tests.evaluation.fakes import FakeScore, sample

    only = compare(Contestant(FakeScore(2.0)), Contestant(FakeScore(1.0)), [sample(2, 2) for _ in range(6)])
    assert save_result(run, only).samples_path is None
    assert sorted(path.name for path in run.evaluation.iterdir()) == ["report.html", "result.json"]


def test_the_report_tells_the_run_in_figures(run: RunDirectory) -> None:
    data = read_report_data(run)
    facts = {fact.label: (fact.value, fact.note) for fact in data.facts}
    assert data.title == "support"
    assert data.subtitle == "24 November 2026, 10:05 UTC"
    assert facts["Method"] == ("LoRA r16 on NF4", "α 32, all linear layers")
    assert facts["Trainable parameters"] == ("1,032,192", "10.98% of the model's 9,400,000")
    assert facts["Steps"] == ("240", "3 epochs")
    assert facts["Adapter of step"] == ("200", "the lowest validation loss")
    assert facts["Training time"][0] == "1:12 min"
    assert facts["Speed"][0] == "5,812 tokens/s"
    assert facts["Peak memory"][0] == "858 MiB"
    assert facts["Device"][0] == "CPU, 2 threads"
    assert {fact.label: fact.value for fact in data.environment}["affina"] == "0.1.0"
    assert [row.origin for row in data.config if row.path == "training.epochs"] == ["you, run.yaml:9"]


def test_the_report_tells_the_data_and_its_findings(run: RunDirectory) -> None:
    data = read_report_data(run)
    facts = {fact.label: (fact.value, fact.note) for fact in data.data_facts}
    assert facts["Training samples"] == ("900", "60,000 tokens")
    assert facts["Length in tokens"][0] == "61 · 118 · 151 · 170"
    assert facts["Rows filled"] == ("99.6%", "padded batches: 61.0%")
    assert facts["Left out"][0] == "7"
    assert facts["Repeated"] == ("5", "3 exactly, 2 nearly")
    assert facts["Contradictions"][0] == "1"
    assert facts["Leakage"][0] == "2.0%"
    assert facts["Personal data"] == ("3 hits", "email 3")
    assert [event["message"] for event in data.events] == ["2 records leak", "hello"]
    assert "remove them" in render_report(data)


def test_a_run_that_crashed_at_birth_still_gives_a_report(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "broken")
    run.path.mkdir()
    run.manifest_file.write_text('{"status": "run')
    run.config_file.write_text("a: [1,\n")
    data = read_report_data(run)
    assert data.status == "damaged"
    assert "affina train --resume" in data.commands[0].text
    assert render_report(data)


def test_an_error_of_the_run_is_among_its_facts(run: RunDirectory) -> None:
    run.manifest_file.write_text('{"status": "failed", "error": {"what": "no space left", "fix": "free some"}}')
    facts = {fact.label: (fact.value, fact.note) for fact in read_report_data(run).facts}
    assert facts["Error"] == ("no space left", "free some")


def test_what_to_type_next_depends_on_whether_there_is_an_adapter(run: RunDirectory) -> None:
    assert next_commands(run)[0].text == f"affina chat {run.path}"
    (run.path / "adapter").rmdir()
    assert [command.text for command in next_commands(run)] == [f"affina train --resume {run.path}"]


def test_a_run_of_before_the_setting_was_renamed_gives_the_same_page(run: RunDirectory) -> None:
    origins = {"quantization.format": {"kind": "preset", "preset": "starter"}}
    run.origins_file.write_text(json.dumps(origins))
    today = read_report_data(run)
    run.config_file.write_text(run.config_file.read_text().replace("{format: nf4}", "{method: nf4}"))
    run.origins_file.write_text(json.dumps({"quantization.method": origins["quantization.format"]}))
    assert read_report_data(run) == today
    (row,) = [row for row in today.config if row.path == "quantization.format"]
    assert (row.value, row.origin) == ("nf4", "preset starter")


def test_a_method_is_named_with_its_rank() -> None:
    settings = {"adapter": {"method": "rslora", "rank": 64}, "quantization": {"format": "none"}}
    assert method_name(settings) == "rsLoRA r64"
