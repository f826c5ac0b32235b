"""The arithmetic of the least memory is what is allocated, and what the documentation says."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from affina.catalog.lowest_memory import (
    bytes_at_work,
    bytes_per_token,
    num_head_groups,
    tokens_per_part,
)
from affina.catalog.save_policy import Keep, LayerRanks
from affina.models.families import DecoderSpec
from affina.models.fast import fast_engine_of
from tests.catalog.footprint import lowest_footprint
from tests.models.fast.allocations import AllocationTracker
from tests.models.fast.families import adapted_model, attach
from tests.models.tiny import batch_of, qwen3_config

SHAPE = {
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
}
RANK = 4
QWEN3_4B = DecoderSpec("qwen3", 36, 2560, 9728, 32, 8, 128, 151_936, 1e-6, True, (None,) * 36)
QWEN3_8B = DecoderSpec("qwen3", 36, 4096, 12_288, 32, 8, 128, 151_936, 1e-6, True, (None,) * 36)
PAGE = Path(__file__).parents[3] / "docs" / "concepts" / "engines.md"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that what grows with the row is what counts."""
    monkeypatch.setattr("affina.catalog.lowest_memory._SMALLEST_PART", 128)
    monkeypatch.setattr("affina.catalog.lowest_memory._PARTS_OF_A_LONG_ROW", 1_000_000)


@lru_cache
def measured(num_tokens: int, keep: Keep) -> tuple[int, int, DecoderSpec]:
    """Peak bytes of a forward pass, of both passes, and the decoder; rows of documents of 256 tokens."""
    model = adapted_model(qwen3_config(**SHAPE), rank=RANK)
    attach(model, keep)
    engine = fast_engine_of(model)
    assert engine is not None
    batch = batch_of([256] * (num_tokens // 256), supervised=1.0)
    for _ in range(2):  # the first step allocates what stays: host buffers
        with torch.no_grad(), AllocationTracker() as tracker:
            _, tape = engine.forward(batch)
            forward = tracker.peak_bytes
            engine.backward(tape, torch.ones(()))
            del tape
    return forward, tracker.peak_bytes, engine.decoder.spec


@pytest.mark.usefixtures("small_parts")
def test_the_bytes_per_token_are_those_that_are_allocated() -> None:
    small, large = measured(1024, Keep.PARTS), measured(2048, Keep.PARTS)
    assert tokens_per_part(1024) == tokens_per_part(2048)
    spec = small[2]
    counted = bytes_per_token(spec, itemsize=4, num_extra=0, sends_attention=False)
    kept = spec.num_layers * RANK * 4
    rows = 4  # a norm's factor
    # A CPU's attention returns tensors of its own, which are copied to their places.
    copies = (spec.query_size + 2 * spec.key_value_size) * 4 // num_head_groups(spec.num_kv_heads)
    # The log-sum-exp's partner in the backward pass (8 H) exists on a GPU only.
    only_on_gpu = 8 * spec.num_heads // num_head_groups(spec.num_kv_heads)
    backward = counted["backward, attention"] + copies - only_on_gpu + kept + rows
    assert (large[1] - small[1]) / 1024 == pytest.approx(backward, rel=0.01)
    # In the forward pass the layers below have left their t, and attention its output and log-sum-exp twice.
    twice = spec.query_size * 4 + 4 * spec.num_heads
    forward = counted["forward, attention"] + twice + (spec.num_layers - 1) * RANK * 4 + rows
    assert (large[0] - small[0]) / 1024 == pytest.approx(forward, rel=0.01)


@pytest.mark.usefixtures("small_parts")
def test_layers_in_parts_take_far_less_than_whole_ones() -> None:
    peaks = {keep: measured(2048, keep)[1] for keep in (Keep.PARTS, Keep.OFFLOADED, Keep.INPUT)}
    assert peaks[Keep.PARTS] < 0.6 * peaks[Keep.OFFLOADED] < peaks[Keep.INPUT]


def test_bytes_at_work_can_be_counted_on_paper() -> None:
    per_token = bytes_per_token(QWEN3_4B, itemsize=2, num_extra=16, sends_attention=False)
    x, heads, attended, angles, stream = 5120, 12_288, 8192 + 128, 512, 2 * 2624
    assert per_token["backward, MLP"] == stream + x + heads + attended + angles == 31_488
    group = (3 * 8192 + 2 * 2048 + 32 * 12) // 4
    assert per_token["backward, attention"] == 31_488 + group == 38_752
    ranks = LayerRanks(qkv=48, output=16, gate_up=32, down=16)
    part = 2048 * (2 * (19_520 + 9728 + 2560)) + (8 << 20)
    found = bytes_at_work(QWEN3_4B, num_tokens=2048, itemsize=2, ranks=ranks)
    assert found == 2048 * per_token["backward, MLP"] + part


@pytest.mark.parametrize(
    ("spec", "is_tied", "gibibytes"), [(QWEN3_4B, True, 2.39), (QWEN3_8B, False, 4.89)], ids=["4B", "8B"]
)
def test_a_row_of_2048_tokens_takes_what_the_documentation_says(
    spec: DecoderSpec, is_tied: bool, gibibytes: float
) -> None:
    footprint = lowest_footprint(spec, num_tokens=2048, rank=16, is_tied=is_tied)
    assert footprint.total / 2**30 == pytest.approx(gibibytes, abs=0.005)
    column = 1 if is_tied else 2
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    table = {row[0]: float(row[column]) for row in rows}
    parts = {
        "layers' weights, NF4": footprint.linears,
        "embedding and head, int8": footprint.vocabulary,
        "norms": footprint.norms,
        "one layer of the adapter": footprint.adapter,
        "the largest weight, expanded": footprint.expanded,
        "cuBLAS": footprint.products,
        "kept between the passes": footprint.kept,
        "a layer at work": footprint.at_work,
    }
    for name, num_bytes in parts.items():
        assert table[name] == pytest.approx(num_bytes / 1e6, abs=0.06), name
    assert table["sum"] == pytest.approx(footprint.total / 1e6, abs=0.06)


def test_parts_are_small_beside_long_rows_and_not_too_small() -> None:
    assert tokens_per_part(100) == 2048
    assert tokens_per_part(32_768) == 2048
    assert tokens_per_part(49_152) == 3072
    assert tokens_per_part(1_000_000) == 4096


def test_a_row_shorter_than_a_part_takes_no_more_than_its_own_tokens() -> None:
    ranks = LayerRanks(qkv=48, output=16, gate_up=32, down=16)
    per_token = bytes_per_token(QWEN3_4B, itemsize=2, num_extra=16, sends_attention=False)
    found = bytes_at_work(QWEN3_4B, num_tokens=1024, itemsize=2, ranks=ranks)
    assert found == 1024 * (per_token["backward, MLP"] + 2 * (19_520 + 9728 + 2560)) + (8 << 20)


def test_a_longer_row_takes_more() -> None:
    totals = [
        lowest_footprint(QWEN3_4B, num_tokens=tokens, rank=16, is_tied=True).total for tokens in range(128, 40_000, 512)
    ]
    assert totals == sorted(totals)
