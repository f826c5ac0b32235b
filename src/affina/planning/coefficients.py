"""Measured numbers of the forecast: those that ship, and what this machine's own runs have taught.

The local file lies in affina's cache and never leaves the machine. It holds one factor on the time for each card,
engine and weight format, and the largest ratio of measured to predicted memory that was seen there.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from affina.runs import atomic

_WEIGHT_OF_NEWEST = 0.5
_LARGEST_FACTOR = 20.0
"""A run that took twenty times its forecast says that the machine was busy, not how fast it is."""
_LARGEST_MEMORY_FACTOR = 1.25


@dataclass(frozen=True, slots=True)
class Coefficients:
    """assets/coefficients.json says where each comes from. time_factor, memory_factor: this machine's corrections."""

    context_bytes: int
    slack_fast: float
    slack_reference: float
    gemm_share: float
    gemm_half_tokens: float
    gemm_share_fp8: float
    attention_share: float
    traffic_share: float
    head_share: float
    overhead: float
    adapter_share: float
    layer_seconds_fast: float
    layer_seconds_reference: float
    reference_traffic: float
    reference_gemm_share: float
    small_card_share: float
    decode_seconds: float
    time_factor: float = 1.0
    memory_factor: float = 1.0


@lru_cache(maxsize=1)
def shipped_coefficients() -> Coefficients:
    """The defaults, measured on an H200 where they are measured."""
    text = files("affina.planning").joinpath("assets", "coefficients.json").read_text(encoding="utf-8")
    raw = json.loads(text)
    names = {field.name for field in fields(Coefficients)}
    return Coefficients(**{name: entry["value"] for name, entry in raw.items() if name in names})


def local_file() -> Path:
    """Where this machine's measurements are kept: AFFINA_CACHE, or ~/.cache/affina."""
    return Path(os.environ.get("AFFINA_CACHE") or "~/.cache/affina").expanduser() / "cards.json"


def coefficients_for(card: str, engine: str, format: str) -> Coefficients:
    """The defaults with what was measured here on that card; an unreadable local file counts as none."""
    learned = _read().get(_key(card, engine, format), {})
    time, memory = learned.get("time_factor", 1.0), learned.get("memory_factor", 1.0)
    if not (isinstance(time, int | float) and isinstance(memory, int | float) and time > 0 and memory >= 1):
        return shipped_coefficients()
    return replace(shipped_coefficients(), time_factor=float(time), memory_factor=float(memory))


def learn(
    card: str,
    engine: str,
    format: str,
    *,
    predicted_seconds: float | None,
    measured_seconds: float | None,
    predicted_bytes: int,
    measured_bytes: int | None,
) -> None:
    """Remember a finished run. Predictions are those without this machine's corrections. Never raises for the disk."""
    content = _read()
    entry = content.setdefault(_key(card, engine, format), {"runs": 0})
    if (
        predicted_seconds
        and measured_seconds
        and 1 / _LARGEST_FACTOR < measured_seconds / predicted_seconds < _LARGEST_FACTOR
    ):
        ratio, before = measured_seconds / predicted_seconds, entry.get("time_factor")
        entry["time_factor"] = ratio if before is None else before + _WEIGHT_OF_NEWEST * (ratio - before)
    if measured_bytes and predicted_bytes:
        ratio = min(max(measured_bytes / predicted_bytes, 1.0), _LARGEST_MEMORY_FACTOR)
        entry["memory_factor"] = max(ratio, entry.get("memory_factor", 1.0))
    entry["runs"] += 1
    with contextlib.suppress(OSError):
        local_file().parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(local_file(), content)


def _key(card: str, engine: str, format: str) -> str:
    return f"{card} {engine} {format}"


def _read() -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(local_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        return {}
    return content
