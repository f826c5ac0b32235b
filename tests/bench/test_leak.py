"""The search for leaks: what it calls one, and that it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


def samples(**growth: int) -> list[dict[str, int]]:
    """20 samples of 1,000 steps; each named figure grows by so much a step, the others stay."""
    names = ("allocated_bytes", "reserved_bytes", "resident_bytes", "num_tensors")
    return [{"step": step, **{n: 10**9 + growth.get(n, 0) * step for n in names}} for step in range(50, 1001, 50)]


def test_memory_that_stays_is_no_leak() -> None:
    from leak import judge

    found = judge(samples(), 1000)
    assert found["is_leak_free"]
    assert found["allocated_bytes_growth"] == 0


@pytest.mark.parametrize("growth", [{"allocated_bytes": 1}, {"num_tensors": 1}, {"resident_bytes": 5000}])
def test_anything_that_grows_after_the_warm_up_is_a_leak(growth: dict[str, int]) -> None:
    from leak import judge

    assert not judge(samples(**growth), 1000)["is_leak_free"]


def test_growth_during_the_warm_up_and_pages_of_python_are_none() -> None:
    from leak import judge

    warming = samples(resident_bytes=400, reserved_bytes=1)
    for sample in warming[:3]:
        sample["allocated_bytes"] //= 2
    assert judge(warming, 1000)["is_leak_free"]


def test_too_few_samples_decide_nothing() -> None:
    from leak import judge

    assert judge(samples()[:2], 100)["is_leak_free"] is None


def test_all_phases_run_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    import leak

    output = tmp_path / "leak.json"
    leak.main(["--tiny", "--steps", "10", "--output", str(output), "--phases", "graphs,offloaded,reference,missing"])
    *phases, unknown = json.loads(output.read_text())["phases"]
    assert "unknown phase missing" in unknown["error"]
    assert [phase["phase"] for phase in phases] == ["graphs", "offloaded", "reference"]
    assert all(phase["is_repeatable"] and phase["is_finite"] for phase in phases)
    assert all(phase["largest_loss_difference"] == 0.0 for phase in phases)
    assert re.search(r"2 × (offloaded|parts)", phases[1]["engine"])
