"""Refusals are checked and not believed; the script's own judgement of what it found."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

TRAINED: dict[str, Any] = {"outcome": "trained", "losses_are_finite": True}
REFUSED: dict[str, Any] = {"outcome": "refused", "losses_are_finite": None, "proposed": ["adapter.rank=8"]}
FAILED: dict[str, Any] = {"outcome": "failed", "losses_are_finite": None}
HELPLESS = {**REFUSED, "proposed": []}


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ({"first": TRAINED}, "trains"),
        ({"first": {**TRAINED, "losses_are_finite": False}}, "fails"),
        ({"first": FAILED}, "fails"),
        ({}, "fails"),
        ({"timed_out": True}, "not run"),
        ({"first": REFUSED, "fix": TRAINED, "forced": FAILED, "is_complete": True}, "refuses correctly"),
        ({"first": REFUSED, "fix": FAILED, "forced": FAILED, "is_complete": True}, "refuses wrongly"),
        ({"first": REFUSED, "fix": REFUSED, "forced": FAILED, "is_complete": True}, "refuses wrongly"),
        ({"first": REFUSED, "fix": TRAINED, "forced": TRAINED, "is_complete": True}, "refuses wrongly"),
        ({"first": HELPLESS, "forced": FAILED, "is_complete": True}, "refuses correctly"),
        ({"first": HELPLESS, "forced": TRAINED, "is_complete": True}, "refuses wrongly"),
        ({"first": REFUSED, "fix": TRAINED, "timed_out": True}, "refuses, not checked"),
    ],
)
def test_a_refusal_is_right_when_its_fix_trains_and_what_it_refuses_does_not(
    found: dict[str, Any], verdict: str
) -> None:
    from capped_memory import verdict_of

    assert verdict_of(found) == verdict


def test_the_settings_are_those_that_the_product_prints() -> None:
    from capped_memory import printed_settings

    from affina.config import load_mapping
    from affina.errors import TrainingError
    from affina.planning.admission import Device, admit
    from affina.planning.workload import estimated_workload

    config = load_mapping({"extends": "premium", "data": {"train": "affina/support"}}).config
    gib = 2**30
    with pytest.raises(TrainingError) as refusal:
        admit(config, estimated_workload(config), Device("NVIDIA H200", (9, 0), 140 * gib, 10 * gib, is_capped=True))
    settings = printed_settings(refusal.value.fix)
    assert settings
    changed = load_mapping({"extends": "premium", "data": {"train": "affina/support"}}, overrides=settings).config
    assert admit(changed, estimated_workload(changed), Device("NVIDIA H200", (9, 0), 140 * gib, 10 * gib)) is not None
    with pytest.raises(TrainingError) as refusal:
        admit(config, estimated_workload(config), Device("NVIDIA H200", (9, 0), 140 * gib, gib))
    assert printed_settings(refusal.value.fix) == []


def test_processes_side_by_side_never_have_caps_of_more_than_the_card() -> None:
    from capped_memory import Job, run_all

    lock, running, most, order = threading.Lock(), [], [], []

    def start(job: Job) -> dict[str, Any]:
        with lock:
            running.append(job.cap_gib)
            most.append((len(running), sum(running)))
        time.sleep(0.02)
        with lock:
            running.remove(job.cap_gib)
        return {}

    jobs = [Job("nf4", cap) for cap in (4, 6, 24, 90, 8, 12)]
    run_all(jobs, start, lambda job, found: order.append(job), num_at_once=3, total_gib=32)
    assert sorted(order, key=lambda job: job.cap_gib) == sorted(jobs, key=lambda job: job.cap_gib)
    assert max(count for count, _ in most) <= 3
    assert {total for _, total in most if total > 32} == {90}, "a cap above the limit runs, alone"


def test_chats_are_as_long_as_drawn_and_none_is_too_long(tmp_path: Path) -> None:
    from capped_memory import NUM_RECORDS, OVERHEAD_TOKENS, write_chats
    from systems.checkpoints import write_byte_tokenizer
    from transformers import AutoTokenizer

    write_byte_tokenizer(tmp_path)
    write_chats(tmp_path / "chats.jsonl", longest=2048)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer.apply_chat_template(line["messages"])["input_ids"]) for line in lines]
    assert len(lengths) == NUM_RECORDS
    assert max(lengths) <= 2048
    # 300 is the median that is drawn; 400 draws of \u03c3 0.75 put the sample's within 8% of it, two standard errors
    assert sorted(lengths)[NUM_RECORDS // 2] == pytest.approx(300, rel=0.15)
    # What is not text of a long record is what was reserved for it.
    longest = max(lines, key=lambda line: len(json.dumps(line)))
    text = sum(len(turn["content"]) for turn in longest["messages"])
    assert max(lengths) - text <= OVERHEAD_TOKENS


def test_the_script_runs_and_keeps_records_of_other_caps(tmp_path: Path) -> None:
    import capped_memory
    from results_table import capped_memory as table

    output = tmp_path / "capped_memory.json"
    old = {"format": "none", "cap_gib": 9.0, "verdict": "trains", "first": TRAINED}
    output.write_text(json.dumps({"records": [old], "t4": {"plan": {"fits": True}}}))
    command = ["--tiny", "--formats", "nf4", "--caps", "0.004,0.5", "--steps", "2", "--jobs", "2"]
    capped_memory.main([*command, "--output", str(output)])
    found = json.loads(output.read_text())
    small, large, kept = found["records"]
    assert kept == old
    assert found["t4"] == {"plan": {"fits": True}}
    assert (small["cap_gib"], small["verdict"]) == (0.004, "refuses correctly")
    assert small["first"]["error"]["code"] == "memory-too-small"
    assert small["first"]["proposed"][0].startswith("training.micro_batch_size=")
    assert small["fix"]["steps"] == 2
    assert small["fix"]["plan"]["allocated_gib"] <= 0.004
    assert "forced" not in small, "a stand-in for a cap cannot make an allocation fail"
    assert (large["cap_gib"], large["verdict"], large["first"]["steps"]) == (0.5, "trains", 2)
    assert "| nf4 | 0.004 | refuses correctly |" in table(tmp_path)


def test_what_a_t4_owner_gets_is_the_plan_of_the_command(tmp_path: Path) -> None:
    from capped_memory import t4_plan, t4_tensor_gib
    from systems.common import QWEN3_4B

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", **QWEN3_4B}))
    plan = t4_plan(
        {
            "model": str(tmp_path),
            "quantization": "nf4",
            "data": {"train": "affina/support", "max_length": 2048},
            "training": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
        }
    )
    assert (plan["fits"], plan["changes"], plan["engine"]) == (True, [], "reference")
    assert plan["allocated_gib"] < t4_tensor_gib() < 14.6


def test_what_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import capped_memory
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no GPU; --tiny"):
            capped_memory.main([])
    monkeypatch.setattr(capped_memory, "DEVICE", torch.device("cuda"))
    with pytest.raises(SystemExit, match="unknown formats: int2"):
        capped_memory.main(["--formats", "int2"])
    with pytest.raises(SystemExit, match="--caps are numbers by comma, not 'four'"):
        capped_memory.main(["--caps", "four"])
