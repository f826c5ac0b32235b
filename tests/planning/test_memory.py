"""The closed form of memory: against measurements on an H200, against the traced step, and against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.catalog.decoder import DecoderSpec
from affina.planning.coefficients import shipped_coefficients
from affina.planning.memory import MemoryPlan, plan_memory, static_bytes
from affina.planning.setup import StepSetup
from affina.planning.time import plan_time
from tests.catalog.footprint import lowest_footprint
from tests.planning.setups import setup

RESULTS = Path(__file__).parents[2] / "bench" / "results"
MEASURED = {
    (record["case"], json.dumps(record["setting"])): record
    for record in json.loads((RESULTS / "train_step.json").read_text())["records"]
    if record["system"] == "affina" and "error" not in record
}
# Without a limit the save policy is `everything` then and now; with one the engine chooses more exactly today.
UNLIMITED = [key for key in MEASURED if key[1] == "{}"]


def plan(which: StepSetup) -> MemoryPlan:
    return plan_memory(which, shipped_coefficients())


def setup_of(case: str) -> StepSetup:
    shapes = int(MEASURED[case, "{}"]["note"].split()[-2])  # `…; 2 graphs`
    if case.startswith("bf16-packed-16384"):
        return setup(length=16_384, lengths=(300,) * 54 + (184,), row_shapes=shapes)
    rows = 8 if "8x2048" in case else 1
    format = next((name for name in ("nf4", "fp8") if case.startswith(name)), "none")
    lengths = (300,) * 6 + (248,) if "packed" in case else (2048,) * rows
    return setup(rows=rows, format=format, lengths=lengths, row_shapes=shapes)


@pytest.mark.parametrize("case", [key[0] for key in UNLIMITED])
def test_allocated_memory_is_within_a_third_of_a_percent_of_what_an_h200_measured(case: str) -> None:
    measured = MEASURED[case, "{}"]
    planned = plan(setup_of(case)).allocated_bytes / 2**30
    # 0.03% on the large cases; on the small ones a third workspace of the matrix library is planned that was smaller.
    assert planned == pytest.approx(measured["peak_gib"], rel=0.0033)


@pytest.mark.parametrize("case", [key[0] for key in UNLIMITED if "packed" not in key[0]])
def test_reserved_memory_is_within_2_percent_of_what_an_h200_measured(case: str) -> None:
    # The packed case was measured before captured rows shared a pool; all of them with chunks of 441 rows of logits,
    # which are 256 since: 0.2 GiB less.
    measured = MEASURED[case, "{}"]["reserved_gib"]
    assert plan(setup_of(case)).reserved_bytes / 2**30 == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("case", [key[0] for key in UNLIMITED])
def test_step_time_is_within_7_percent_of_what_an_h200_measured(case: str) -> None:
    which = setup_of(case)
    step = plan_time(which, plan(which), shipped_coefficients())
    assert step is not None
    # The coefficients come from the same runs, so this says that a handful of them explains all of these at once.
    assert step.micro_seconds * 1e3 == pytest.approx(MEASURED[case, "{}"]["milliseconds"], rel=0.07)


@pytest.mark.parametrize("gib", [10.0, 11.2, 16.0, 24.0, 48.0])
def test_within_a_limit_the_tensors_stay_below_it(gib: float) -> None:
    which = setup(rows=8, memory_bytes=int(gib * 2**30))
    found = plan(which)
    assert found.allocated_bytes <= gib * 2**30
    assert found.fits == (found.reserved_bytes <= gib * 2**30)


def test_components_add_up_to_the_total() -> None:
    for changes in ({}, {"format": "nf4"}, {"engine": "reference", "recompute": True}, {"micro_batches": 4}):
        found = plan(setup(rows=2, **changes))
        assert sum(component.num_bytes for component in found.components) == found.total_bytes, changes


def test_the_weights_are_counted_as_published() -> None:
    parts = static_bytes(setup(format="nf4", engine="reference"))
    assert parts["linear"] / 2**30 == pytest.approx(1.746, abs=0.001)
    assert parts["embedding"] / 2**30 == pytest.approx(0.7245, abs=0.0001)
    assert parts["adapter"] == 33_030_144 * 4
    dense = static_bytes(setup(engine="reference"))
    assert (dense["linear"] + dense["embedding"] + dense["other"]) / 2**30 == pytest.approx(7.4925, abs=0.001)


def test_a_card_before_ampere_gets_the_reference_engine_and_says_why() -> None:
    found = plan(setup("t4", precision="fp16", format="nf4"))
    assert (found.engine, found.recomputes) == ("reference", True)
    assert found.engine_reason == "its attention needs compute capability 8.0, the card has 7.5"
    assert found.fits


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout": 0.1}, "the adapter has dropout"),
        ({"engine": "reference"}, "engine.path is reference"),
        (
            {"format": "nf4", "skipped": ("q_proj",)},
            "projections with a common input keep their weights in different formats",
        ),
        ({"gpu": None}, "on a CPU it computes in float32, not bf16"),
    ],
)
def test_what_the_fast_engine_does_not_run_is_planned_for_the_reference(changes: dict[str, Any], reason: str) -> None:
    assert plan(setup(**changes)).engine_reason == reason


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 8),
    length=st.sampled_from([128, 512, 2048, 4096]),
    format=st.sampled_from(["none", "nf4", "fp8", "int8"]),
    engine=st.sampled_from(["fast", "reference"]),
    rank=st.sampled_from([8, 64, 128]),
)
def test_more_memory_never_hurts_and_a_larger_batch_never_needs_less(
    rows: int, length: int, format: str, engine: str, rank: int
) -> None:
    options: dict[str, Any] = {"length": length, "format": format, "engine": engine, "rank": rank, "recompute": True}
    small, large = plan(setup(rows=rows, **options)), plan(setup(rows=rows + 1, **options))
    assert small.total_bytes <= large.total_bytes
    tight, roomy = plan(setup("rtx3060", rows=rows, **options)), plan(setup("h200", rows=rows, **options))
    assert roomy.fits or not tight.fits


def test_generation_counts_keys_and_values_of_the_whole_batch() -> None:
    without, with_replies = plan(setup()), plan(setup(generation=(16, 2304)))
    cache = 16 * 2304 * 2 * 1024 * 36 * 2
    assert with_replies.generation_bytes - without.generation_bytes > cache
    assert with_replies.total_bytes == without.total_bytes


def test_the_lowest_memory_is_that_of_its_own_arithmetic() -> None:
    which = setup(format="nf4", is_lowest=True, recompute=True, num_predicted=2048)
    spec = which.shape.fused
    assert isinstance(spec, DecoderSpec)
    counted = lowest_footprint(spec, num_tokens=2048, rank=16, is_tied=True).total
    # The plan counts a second workspace of the matrix library.
    assert plan(which).allocated_bytes == pytest.approx(counted + (32 << 20), rel=0.005)
