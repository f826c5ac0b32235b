"""The benchmark scripts as modules, and torch's global settings put back after them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import leak` finds bench/leak.py; determinism, which scripts switch on, ends with the test."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(before)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
