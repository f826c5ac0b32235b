"""The run directory: created once, readable after a crash, never written over."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest

from affina.errors import RunError
from affina.runs import checkpoints
from affina.runs.directory import create_run, list_runs, open_run, process_identity, require_free_space
from affina.runs.jsonlines import JsonLinesFile, read_json_lines


def make_run(root: Path, name: str = "first", **manifest: object):  # type: ignore[no-untyped-def]
    run = create_run(root, name)
    run.update_manifest({"status": "running", "created": "2026-01-01T00:00:00Z", **process_identity(), **manifest})
    return run


def make_checkpoint(folder: Path, step: int) -> None:
    with checkpoints.new_checkpoint(folder, step) as temporary:
        (temporary / "adapter_model.safetensors").write_bytes(os.urandom(64))


def test_a_directory_that_holds_a_run_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(RunError) as caught:
        create_run(tmp_path, "first")
    text = str(caught.value)
    assert text.startswith(f"error[run-exists]: {tmp_path / 'first'} already holds a run")
    assert f"fix: continue it with `affina train --resume {tmp_path / 'first'}`, or choose another output.name" in text


def test_a_run_that_ended_before_its_first_checkpoint_is_offered_to_start_again(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="interrupted")
    JsonLinesFile(run.metrics_file).append({"step": 1, "loss": 1.0})
    again = f"it has no checkpoint yet: `affina train --resume {run.path}` starts it from the beginning"
    with pytest.raises(RunError) as caught:
        create_run(tmp_path, "first")
    assert caught.value.code == "run-exists"
    assert caught.value.fix == f"{again}, or choose another output.name"
    make_checkpoint(run.checkpoints, 3)
    with pytest.raises(RunError, match="fix: continue it with `affina train --resume"):
        create_run(tmp_path, "first")


def test_what_a_process_leaves_that_is_killed_while_it_makes_a_run_is_used_again(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "first").path
    (folder / ".tmp-run.json-77").write_text("{")
    assert create_run(tmp_path, "first").path == folder
    make_run(tmp_path, status="failed")
    (folder / ".tmp-config.yaml-77").write_text("model:")
    create_run(tmp_path, "first")
    assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoints", "data"]
    (folder / "data" / "mine.jsonl").touch()
    with pytest.raises(RunError, match="already holds files that are not a run of affina's"):
        create_run(tmp_path, "first")


def test_a_directory_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(RunError, match="already holds files that are not a run of affina's"):
        create_run(tmp_path, "photos")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_directory_is_found_before_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="run-not-writable"):
        create_run(tmp_path, "first")


def test_a_root_that_is_a_file_is_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(RunError, match=r"run-not-writable.*cannot write into"):
        create_run(tmp_path / "runs", "first")


def test_an_unknown_run_names_the_runs_that_exist(tmp_path: Path) -> None:
    make_run(tmp_path, "support")
    with pytest.raises(RunError) as caught:
        open_run(tmp_path / "suport")
    assert "is not a run directory" in str(caught.value)
    assert "support" in str(caught.value)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.manifest_file.write_text("{")
    with pytest.raises(RunError, match="run-unreadable"):
        run.read_manifest()


def test_a_run_whose_process_is_gone_counts_as_interrupted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert run.status() == "running"
    run.update_manifest({"pid": 2**22 - 1})
    assert run.status() == "interrupted"
    run.update_manifest({"pid": os.getpid(), "process_started": 1.0})
    assert run.status() == "interrupted", "the number was taken over by another process"


def test_runs_are_listed_oldest_first(tmp_path: Path) -> None:
    make_run(tmp_path, "b", created="2026-01-02T00:00:00Z")
    make_run(tmp_path, "a", created="2026-01-03T00:00:00Z")
    make_run(tmp_path, "c", created="2026-01-01T00:00:00Z")
    assert [run.name for run in list_runs(tmp_path)] == ["c", "b", "a"]
    assert list_runs(tmp_path / "absent") == []


def test_too_little_disk_is_found_before_training(tmp_path: Path) -> None:
    require_free_space(tmp_path, 1)
    with pytest.raises(RunError) as caught:
        require_free_space(tmp_path, shutil.disk_usage(tmp_path).total * 2)
    assert "error[disk-full]" in str(caught.value)
    assert "keep_last" in str(caught.value)
    assert re.search(r"has \d+\.\d\d GiB free; this run's checkpoints need \d+\.\d\d GiB", caught.value.what)


def test_metrics_survive_a_partial_last_line_and_a_resume(tmp_path: Path) -> None:
    file = JsonLinesFile(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.append({"step": step, "loss": 1.0 / step})
    with open(file.path, "ab") as raw:
        raw.write(b'{"step": 6, "lo')
    assert [record["step"] for record in read_json_lines(file.path)] == [1, 2, 3, 4, 5]
    file.keep_until_step(3)
    file.append({"step": 4, "loss": math.nan})
    records = list(read_json_lines(file.path))
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] is None, "NaN is not JSON"
    assert "NaN" not in file.path.read_text()


def test_a_full_disk_loses_lines_but_not_the_run(tmp_path: Path) -> None:
    file = JsonLinesFile(tmp_path / "absent" / "metrics.jsonl")
    file.append({"step": 1})
    assert file.num_lost == 1


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        make_checkpoint(tmp_path, step)
    checkpoints.prune_checkpoints(tmp_path, keep_last=2, keep_steps=frozenset({10}))
    assert [entry.step for entry in checkpoints.list_checkpoints(tmp_path)] == [10, 30, 40]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030", "step-00000040"]


def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        make_checkpoint(tmp_path, step)
    for step in (20, 30):
        (tmp_path / f"step-000000{step}" / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(RunError) as caught:
        checkpoints.latest_checkpoint(tmp_path)
    text = str(caught.value)
    assert "error[checkpoint-damaged]" in text
    assert "the checksum of adapter_model.safetensors is wrong" in text
    assert f"--resume {tmp_path / 'step-00000010'}" in text, "20 is damaged too, so 10 is offered"


def test_no_whole_checkpoint_is_said(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    (tmp_path / "step-00000005" / "checksums.json").unlink()
    with pytest.raises(RunError, match="no whole checkpoint is left"):
        checkpoints.latest_checkpoint(tmp_path)
    shutil.rmtree(tmp_path / "step-00000005")
    with pytest.raises(RunError, match="checkpoint-missing") as caught:
        checkpoints.latest_checkpoint(tmp_path)
    assert caught.value.why == "nothing is left to continue from, and the run's adapter is not written over"
    assert caught.value.fix == "start a new run: another output.name"


def test_events_carry_a_kind_a_sentence_and_facts(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.log_event("resumed", "continues from step 4", step=4)
    (event,) = run.events()
    assert {key: event[key] for key in ("kind", "message", "step")} == {
        "kind": "resumed",
        "message": "continues from step 4",
        "step": 4,
    }
    json.dumps(event)
