"""A cache of its own, so that no test reads or writes what this machine has learned."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFFINA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
