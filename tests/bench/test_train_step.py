"""What bench/train_step.py measures, and what it keeps of earlier calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def record(case: str, system: str, setting: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"case": case, "system": system, "setting": setting, **values}


def test_every_entry_of_the_plan_is_a_case_of_its_own() -> None:
    from train_step import CASES, GROUPS, PLAN

    assert len({entry.key for entry in PLAN}) == len(PLAN)
    assert {entry.case for entry in PLAN} == set(CASES)
    assert {entry.group for entry in PLAN} == set(GROUPS)


def test_every_case_is_measured_with_a_peer_where_peers_have_it() -> None:
    """On fp8 weights no peer trains LoRA here; the lowest memory is a mode of affina's."""
    from train_step import CASES, PLAN

    alone = {case for case in CASES if not any(e.case == case and e.system != "affina" for e in PLAN)}
    assert alone == {case for case, spec in CASES.items() if spec.get("fp8") or spec.get("lowest")}


def test_a_case_a_setting_a_system_and_a_group_can_be_selected() -> None:
    from train_step import select

    assert {entry.group for entry in select("targets", None, None)} == {"targets"}
    (only,) = select(None, "bf16-lora-8x2048:memory_gib=11.2", None)
    assert (only.system, only.setting) == ("affina", {"memory_gib": 11.2})
    assert {entry.system for entry in select(None, "bf16-lora-8x2048", "liger")} == {"liger"}
    capped = select("more", "fp16-qlora-1x2048:cap_gib=7.5", None)
    assert [entry.setting for entry in capped] == [{"cap_gib": 7.5}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("target", None, None), "unknown group target"),
        ((None, "bf16-lora-8x2047", None), "unknown case bf16-lora-8x2047"),
        ((None, None, "axolotl"), "unknown system axolotl"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(arguments: tuple[str | None, ...], message: str) -> None:
    from train_step import select

    with pytest.raises(SystemExit, match=message):
        select(*arguments)


def test_a_new_record_replaces_the_old_one_of_the_same_measurement_and_no_other() -> None:
    from train_step import merged

    old = [
        record("bf16-lora-8x2048", "affina", {}, n=1),
        record("bf16-lora-8x2048", "affina", {"memory_gib": 11.2}, n=2),
    ]
    new = [record("bf16-lora-8x2048", "affina", {}, n=3), record("bf16-lora-8x2048", "unsloth", {}, n=4)]
    assert {found["n"] for found in merged(old, new)} == {2, 3, 4}


def test_running_out_of_the_calls_time_leaves_an_older_figure_standing() -> None:
    from train_step import merged

    old = [record("bf16-lora-8x2048", "affina", {}, tokens_per_second=1.0)]
    cut = record("bf16-lora-8x2048", "affina", {}, error="no result within 9 s", was_cut_off=True)
    failed = record("bf16-lora-8x2048", "affina", {}, error="out of memory")
    assert merged(old, [cut]) == old
    assert merged(old, [failed]) == [failed]
    assert merged([], [cut]) == [cut]


def test_one_measurement_runs_and_one_that_fails_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import records
    from train_step import main

    run = records.run

    def without_unsloth(command: list[str], **options: Any) -> tuple[int | None, str]:
        if "systems.unsloth" in command:
            return 1, "Traceback\nModuleNotFoundError: No module named 'unsloth'"
        return run(command, **options)

    monkeypatch.setattr(records, "run", without_unsloth)
    output = tmp_path / "found.json"
    cases = "fp16-qlora-1x2048:cap_gib=7.5,fp16-qlora-1x2048:cap_gib=7.5+checkpointing=true"
    main(["--tiny", "--cases", cases, "--systems", "affina,unsloth", "--output", str(output)])
    ours, theirs = json.loads(output.read_text())["records"]
    assert ours["tokens_per_second"] > 0
    assert 0 < ours["first_step_seconds"] < ours["wall_seconds"] + 1
    assert theirs["error"].endswith("No module named 'unsloth'")
    assert ours["call"] == theirs["call"]
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "failed: ModuleNotFoundError" in printed


def test_transformers_tells_the_documents_of_a_packed_row_apart() -> None:
    """The loss of a packed row with positions is the mean of its documents' losses, each by itself."""
    import torch
    from systems.common import random_model
    from systems.peers import batches_of, document_lengths_of

    spec = {"rows": 1, "length": 96, "packed": True, "model": "tiny", "dtype": "float32"}
    model = random_model(spec).eval()
    batch = batches_of(spec)[0]
    arguments, total, count, start = batch.arguments, 0.0, 0, 0
    with torch.no_grad():
        packed = float(model(**arguments, use_cache=False).loss)
        for length in document_lengths_of(batch).tolist():
            ids = arguments["input_ids"][:, start : start + length]
            labels = arguments["labels"][:, start : start + length]
            if supervised := int((labels != -100).sum()):
                total += supervised * float(model(input_ids=ids, labels=labels, use_cache=False).loss)
                count += supervised
            start += length
    assert start == 96
    assert packed == pytest.approx(total / count, rel=1e-5)  # float32, sums in another order
