"""Fixtures for all tests: real data where it is present, and no network anywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REAL_DATA = Path(os.environ.get("AFFINA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """The folder of a real data set, or a skip that says what is missing."""
    folder = REAL_DATA / name
    if not folder.exists():
        pytest.skip(f"real data set {name!r} is not on this machine (set AFFINA_TEST_DATA to its parent folder)")
    return folder


@pytest.fixture
def real_data_folder():  # type: ignore[no-untyped-def]
    """Function from a data set's name to its folder; skips the test where it is absent."""
    return real_data


@pytest.fixture(scope="session")
def qwen3_tokenizer_folder() -> Path:
    """The real Qwen3-4B tokenizer, template and config."""
    return real_data("qwen3_tokenizer") / "hf"
