"""RESULTS.md shows what the raw files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


def step(case: str, system: str, setting: dict[str, Any], call: str | None = "now", **values: Any) -> dict[str, Any]:
    figures = {"tokens_per_second": 1000.0, "peak_gib": 10.0, "milliseconds": 2.0, "first_step_seconds": 9.5}
    record = {"case": case, "system": system, "setting": setting, "device": "a card", "date": "2026-01-01", **figures}
    return record | values | ({"call": call} if call else {})


def write(folder: Path, name: str, content: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


def test_every_page_is_what_the_raw_files_give() -> None:
    from results_table import _MARKED, PAGES, figures_folder, rendered

    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert _MARKED.search(page)
        folder = figures_folder(path, BENCH / "results")
        assert rendered(page, BENCH / "results", folder=folder) == page, "run `python bench/results_table.py --write`"


def test_every_table_but_the_profile_is_on_the_page() -> None:
    from results_table import _MARKED, TABLES

    page = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    assert {match[2] for match in _MARKED.finditer(page)} >= set(TABLES) - {"step-profile"}


def test_targets_stand_beside_measurements_of_the_plan() -> None:
    from results_table import TARGETS, setting_of
    from train_step import PLAN

    planned = {
        (e.case, setting_of({"setting": e.setting})) for e in PLAN if e.system == "affina" and e.group == "targets"
    }
    assert set(TARGETS) <= planned


def test_figures_failures_and_targets_are_shown(tmp_path: Path) -> None:
    from results_table import train_step

    failed = {
        "case": "fp8-lora-8x2048",
        "system": "affina",
        "setting": {},
        "error": "Traceback\nOutOfMemoryError: a | b",
    }
    write(tmp_path, "train_step", {"records": [step("bf16-lora-8x2048", "affina", {}), failed]})
    table = train_step(tmp_path)
    assert "| bf16-lora-8x2048 | affina | default | 1,000 | 10.00 | 2.0 | 9.5 |  | 31,000 |" in table
    assert "| fp8-lora-8x2048 | affina | default | failed: OutOfMemoryError: a / b |" in table
    assert "a card; 2026-01-01.\n" in table


def test_ratios_are_those_of_one_call(tmp_path: Path) -> None:
    from results_table import ratios

    ours = step("bf16-lora-8x2048", "affina", {}, tokens_per_second=3000.0, peak_gib=5.0)
    fast = step("bf16-lora-8x2048", "unsloth", {"checkpointing": False}, tokens_per_second=2000.0, peak_gib=60.0)
    lean = step("bf16-lora-8x2048", "unsloth", {"checkpointing": True}, tokens_per_second=1500.0, peak_gib=10.0)
    write(tmp_path, "train_step", {"records": [ours, fast, lean]})
    table = ratios(tmp_path)
    assert "1.50× unsloth (checkpointing false: 2,000, 60.00 GiB)" in table
    assert "0.50× unsloth (checkpointing true: 1,500, 10.00 GiB)" in table
    write(tmp_path, "train_step", {"records": [ours, fast | {"call": "earlier"}, step("x", "affina", {}, call=None)]})
    assert "No call measured" in ratios(tmp_path)


def test_a_profile_that_counts_twice_is_not_shown(tmp_path: Path) -> None:
    from results_table import step_profile

    profile = {
        "case": "bf16-lora-8x2048",
        "milliseconds_eager": 575.0,
        "milliseconds_graphed": 574.0,
        "milliseconds_by_part": {"base products": 338.0, "attention": 94.0, "other": 130.0},
        "device": "a card",
    }
    write(tmp_path, "step_profile", profile)
    assert "| base products | 338.0 | 60.1% | 350 |" in step_profile(tmp_path)
    assert "| idle (of the step as trained) | 12.0 |" in step_profile(tmp_path)
    profile["milliseconds_by_part"] = {"base products": 338.0, "other": 280.0}
    write(tmp_path, "step_profile", profile)
    assert "attributes 618 ms of kernels to a step of 575 ms" in step_profile(tmp_path)


def test_the_other_tables_show_verdicts_in_words(tmp_path: Path) -> None:
    import results_table

    test = {"num_pairs": 5, "mean": 0.001, "interval_90": [-0.001, 0.003], "margin": 0.02, "is_equivalent": True}
    verdicts = {
        "reference-bf16": {"loss": 2.0, "num_seeds": 5},
        "fast-fp8": {"loss": 2.001, "test": test, "share_of_steps_within_spread": 0.97},
    }
    write(tmp_path, "loss_curves", {"verdicts": verdicts, "device": "a card"})
    row = "| fast-fp8 | 5 | 2.0010 | +0.00100 | -0.00100 … +0.00300 | ±0.02000 | yes | 97% |"
    assert row in results_table.loss_curves(tmp_path)
    long = {
        "shape": "qwen3-8b",
        "mode": "lowest",
        "cap_gib": 8,
        "tokens": 30_000,
        "peak_gib": 7.9,
        "reserved_gib": 7.95,
        "seconds": 5.0,
    }
    long |= {"measured_layers": 3, "num_layers": 36, "host_gib": 9.0, "unsloth_tokens": 2972}
    none = {
        "shape": "qwen3-8b",
        "mode": "nf4",
        "cap_gib": 12,
        "error": "no length fits",
        "measured_layers": 36,
        "num_layers": 36,
    }
    write(tmp_path, "long_context", {"records": [long, none], "device": "a card"})
    table = results_table.long_context(tmp_path)
    assert "| qwen3-8b | lowest | 8 | 30,000 | 7.90 | 7.95 | 5.0 | 3 of 36 layers | 9 | 2,972 |" in table
    assert "| qwen3-8b | nf4 | 12 | failed: no length fits |" in table
    phase = {"phase": "graphs", "num_steps": 1000, "is_leak_free": False, "is_repeatable": True, "engine": "all"}
    write(tmp_path, "leak", {"phases": [phase, {"phase": "reference", "error": "broken"}], "device": "a card"})
    assert "| graphs | 1,000 | 0 | 0 | 0 | **no** | yes | all |" in results_table.leak(tmp_path)
    results = {"num_right": 84, "num_cases": 84, "kernels": ["a", "b"]}
    tools = [{"tool": "memcheck", "is_clean": True, "num_cases": 84, "summary": ["ERROR SUMMARY: 0 errors"]}]
    write(tmp_path, "sanitizer", {"results": results, "tools": tools, "device": "a card"})
    table = results_table.sanitizer(tmp_path)
    assert "84 of 84 cases of 2 kernels" in table
    assert "| memcheck | yes | 84 | ERROR SUMMARY: 0 errors |" in table


def test_what_was_not_measured_names_its_command(tmp_path: Path) -> None:
    from results_table import TABLES

    texts = [table(tmp_path) for name, table in TABLES.items() if name != "ratios"]
    assert all(text.startswith("Not measured yet: `python bench/") for text in texts)


def test_a_page_that_differs_is_reported_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from results_table import main, rendered

    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: leak -->\nold\n<!-- end: leak -->\nafter\n")
    arguments = ["--page", str(page), "--results", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "-old" in capsys.readouterr().out
    main([*arguments, "--write"])
    main(arguments)
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("after\n")
    with pytest.raises(SystemExit, match="there is no table 'leaks'"):
        rendered("<!-- table: leaks -->\n<!-- end: leaks -->", tmp_path)


def test_caps_show_their_verdict_and_what_the_proposed_settings_took(tmp_path: Path) -> None:
    from results_table import capped_memory

    assert capped_memory(tmp_path) == "Not measured yet: `python bench/capped_memory.py`.\n"
    plan = {"engine": "fast", "keeps": "36 × input", "allocated_gib": 3.9, "reserved_gib": 4.0}
    ran = {"outcome": "trained", "plan": plan, "allocated_gib": 3.85, "reserved_gib": 3.95, "retries": 1}
    ran |= {"tokens_per_second": 4321.0}
    refused = {"outcome": "refused", "plan": None, "proposed": ["quantization.format=nf4"], "error": {"what": "no"}}
    failed = {"outcome": "failed", "plan": None, "error": {"what": "it broke"}}
    found = [
        {"format": "nf4", "cap_gib": 4.0, "verdict": "trains", "first": ran},
        {"format": "none", "cap_gib": 8.0, "verdict": "refuses correctly", "first": refused, "fix": ran},
        {"format": "none", "cap_gib": 12.0, "verdict": "fails", "first": failed},
        {"format": "none", "cap_gib": 16.0, "verdict": "not run", "timed_out": True, "error": "no time was left"},
    ]
    t4 = {"plan": {"fits": True, "changes": [], "allocated_gib": 9.1}, "run": ran, "cap_gib": 14.06}
    write(tmp_path, "capped_memory", {"device": "a card", "records": found, "t4": t4})
    table = capped_memory(tmp_path)
    measured = "fast | 3.90 | 3.85 | 4.00 | 3.95 | 4,321 | 1 | 36 × input |"
    assert f"| nf4 | 4 | trains |  | {measured}" in table
    assert f"| 16 bits | 8 | refuses correctly | `quantization.format=nf4` | {measured}" in table
    assert "| 16 bits | 12 | **fails** | it broke |" in table
    assert "| 16 bits | 16 | **not run** | no time was left |" in table
    assert f"| fits | 9.10 | trained | 14.06 | {measured}" in table
