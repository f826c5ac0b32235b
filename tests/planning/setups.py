"""Setups of Qwen3-4B on catalogued cards, as the benchmarks measured them."""

from __future__ import annotations

from typing import Any

from affina.catalog.gpus import gpus
from affina.catalog.model_files import find_config
from affina.catalog.shapes import ModelShape, read_shape
from affina.planning.setup import Adapter, StepSetup


def qwen3_4b() -> ModelShape:
    return read_shape(find_config("Qwen/Qwen3-4B")[0])


def setup(gpu: str | None = "h200", *, rows: int = 1, length: int = 2048, rank: int = 16, **changes: Any) -> StepSetup:
    lengths = changes.pop("lengths", (length,) * rows)
    options: dict[str, Any] = {
        "precision": "bf16",
        "format": "none",
        "num_predicted": rows * length - len(lengths),
        "validates": False,
        **changes,
    }
    return StepSetup(
        shape=changes.pop("shape", None) or options.pop("shape", None) or qwen3_4b(),
        adapter=options.pop("adapter", None) or Adapter(rank, dropout=options.pop("dropout", 0.0)),
        row_tokens=rows * length,
        gpu=gpus()[gpu] if gpu is not None else None,
        lengths=lengths,
        **{name: value for name, value in options.items() if name != "shape"},
    )
