"""What a run's model is asked about its memory: the longest row, in the types and ranks of the pass."""

from __future__ import annotations

from typing import Any

import pytest

from affina.catalog.reference_memory import ReferenceRow
from affina.config.load import load_mapping
from affina.models import build


def reference_row(monkeypatch: pytest.MonkeyPatch, adapter: Any) -> ReferenceRow:
    """The row by which the reference engine decides whether activations are recomputed."""
    rows: list[ReferenceRow] = []
    monkeypatch.setattr(build, "wants_recomputation", lambda row, *rest, **more: bool(rows.append(row)))
    sections = {
        "adapter": adapter,
        "quantization": "none",
        "engine": "reference",
        "training": {"precision": "bf16", "device": "cpu", "gradient_checkpointing": "auto"},
    }
    build.load_for_training(load_mapping(sections, preset="laptop").config)
    (row,) = rows
    return row


@pytest.mark.parametrize("method", ["lora", "full", "freeze", "layernorm"])
def test_activations_have_the_type_of_the_pass_whatever_is_trained_in_float32(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert reference_row(monkeypatch, method).itemsize == 2


@pytest.mark.parametrize(
    ("adapter", "rank"),
    [
        ({"method": "lora", "rank": 4}, 4),
        ({"method": "pissa", "rank": 4}, 8),  # the initial factors are computed beside the trained ones
        ({"method": "olora", "rank": 4}, 8),
        ({"method": "adalora", "rank": 4, "initial_rank": 6}, 6),
        ("full", 0),
    ],
    ids=["lora", "pissa", "olora", "adalora", "full"],
)
def test_ranks_are_those_that_the_layers_compute_with(monkeypatch: pytest.MonkeyPatch, adapter: Any, rank: int) -> None:
    ranks = reference_row(monkeypatch, adapter).ranks
    assert (ranks.qkv, ranks.output, ranks.gate_up, ranks.down) == (3 * rank, rank, 2 * rank, rank)


def test_ranks_count_the_layers_that_are_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = reference_row(monkeypatch, {"method": "lora", "rank": 4, "targets": ["q_proj", "down_proj"]}).ranks
    assert (ranks.qkv, ranks.output, ranks.gate_up, ranks.down) == (4, 0, 0, 4)
