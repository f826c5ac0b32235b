"""The report's numbers are checkable on paper, and its findings say what to do."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from affina.cli.data import print_report
from affina.data.report import (
    DataReport,
    LengthSummary,
    find_problems,
    summarize_lengths,
    summarize_packing,
)


def array(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def report(**fields: object) -> DataReport:
    defaults: dict[str, object] = {
        "sources": (),
        "num_records_read": 100,
        "num_records_skipped": 0,
        "num_records_repaired": 0,
        "num_duplicates_removed": 0,
        "train": LengthSummary(num_samples=100, num_tokens=1000, num_supervised=400, p50=10, p95=12, p99=13, max=14),
        "validation": LengthSummary(),
        "counts": {"trained_replies": 100, "ends_of_turn": 100},
        "validation_counts": {},
        "problems": {},
        "duplicates": {"num_exact_duplicates": 0, "num_near_duplicates": 0, "num_conflicts": 0, "num_records": 100},
        "leakage": {},
        "pii": {},
        "split": {},
        "template": {
            "end_of_turn": ["<|im_end|>"],
            "supports_thinking": True,
            "thinking": "keep",
            "truncation": "drop",
        },
        "enable_thinking": False,
        "max_length": 64,
    }
    return DataReport(**{**defaults, **fields})  # type: ignore[arg-type]


def test_percentiles_are_lengths_that_occur() -> None:
    summary = summarize_lengths(array(*range(1, 101)), array(*[1] * 100))
    assert (summary.p50, summary.p95, summary.p99, summary.max) == (51, 96, 100, 100)
    assert summary.supervised_share == pytest.approx(100 / 5050)


def test_a_set_without_samples_has_no_lengths() -> None:
    assert summarize_lengths(array(), array()) == LengthSummary()
    assert LengthSummary().supervised_share == 0.0


def test_packing_is_compared_with_padding_and_with_what_is_possible() -> None:
    summary = summarize_packing(array(64, 64, 128, 128), max_length=128, micro_batch_size=1, packing=True)
    assert (summary.num_rows, summary.tokens_per_row) == (3, 128)
    assert summary.efficiency == summary.best_possible == 1.0
    wide = summarize_packing(array(10, 118, 100, 28), max_length=128, micro_batch_size=1, packing=True)
    assert wide.num_rows == 2
    assert wide.padded_efficiency < 0.95


def test_without_packing_only_padding_is_lost() -> None:
    summary = summarize_packing(array(10, 30), max_length=128, micro_batch_size=2, packing=False)
    assert not summary.is_packed
    assert summary.padded_efficiency == pytest.approx(40 / 60)


def test_a_clean_report_has_no_findings() -> None:
    assert find_problems(report()) == ()


@pytest.mark.parametrize(
    ("fields", "level", "code", "words"),
    [
        ({"counts": {"dropped_too_long": 1}}, "note", "too-long-dropped", "data.truncation: split"),
        ({"counts": {"dropped_too_long": 5}}, "warning", "too-long-dropped", "raise data.max_length"),
        ({"counts": {"dropped_too_long": 50}}, "error", "too-long-dropped", "33.3%"),
        ({"counts": {"trained_replies": 100, "lost_end_of_turn": 20}}, "error", "lost-end-of-turn", "20.0%"),
        ({"counts": {"dropped_without_labels": 1}}, "warning", "without-labels", "no trained token"),
        ({"counts": {"dropped_without_labels": 10}}, "error", "without-labels", "data.mask"),
        ({"counts": {"trained_replies": 10, "prefix_mismatches": 4}}, "warning", "unlike-serving", "empty-masked"),
        ({"counts": {"lost_reasoning": 3}}, "note", "reasoning-not-rendered", "3 trained replies"),
        ({"counts": {"straddling_tokens": 2}}, "note", "straddling-tokens", "white space"),
        ({"counts": {"empty_replies": 2}}, "warning", "empty-replies", "not trained"),
        ({"counts": {"reasoning": 50, "no_think": 50}}, "note", "mixed-thinking", "50 have none"),
        (
            {"leakage": {"counts": {"pair": 3, "near": 0}, "leaked_share": 0.03}},
            "warning",
            "leakage",
            "3 validation records (3.0%)",
        ),
        ({"leakage": {"counts": {"pair": 30}, "leaked_share": 0.3}}, "error", "leakage", "columns.group"),
        ({"duplicates": {"num_conflicts": 2}}, "warning", "conflicting-answers", "2 prompts"),
        ({"duplicates": {"num_near_duplicates": 9, "num_records": 100}}, "warning", "duplicates", "data.deduplicate"),
        ({"pii": {"email": 2, "iban": 0}}, "warning", "personal-data", "2 × email"),
    ],
)
def test_each_finding_says_what_and_how_to_fix_it(fields: dict[str, object], level: str, code: str, words: str) -> None:
    (finding,) = find_problems(report(**fields))
    assert (finding.level, finding.code) == (level, code)
    assert words in f"{finding.what} {finding.fix}"


def test_findings_come_worst_first() -> None:
    found = find_problems(report(counts={"straddling_tokens": 1, "dropped_too_long": 90}, pii={"email": 1}))
    assert [finding.level for finding in found] == ["error", "warning", "note"]


def test_the_printed_report_reads_without_colour() -> None:
    console = Console(width=160, record=True, color_system=None)
    cleaned = report(counts={"trained_replies": 100, "ends_of_turn": 100, "empty_think": 100})
    with console.capture() as capture:
        print_report(cleaned, console)
    text = capture.get()
    assert "100; 100 end with <|im_end|>, which is trained" in text
    assert "keep: 100 with an empty block (masked); serve with thinking off" in text
    assert "nothing found that needs attention" in text
