"""Settings that had another name once: files that were written before are still read, and mean the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED_SETTINGS: dict[str, str] = {"quantization.method": "quantization.format"}
"""The dotted path of before and the one of today, in the same section."""


def current_name(path: str) -> str:
    """Today's path of a setting."""
    return RENAMED_SETTINGS.get(path, path)


def with_current_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's plain values, as a run has stored them, under the names of today. Of two names today's counts."""
    renamed = dict(config)
    for before, now in RENAMED_SETTINGS.items():
        section, old = before.split(".")
        new = now.split(".")[1]
        values = renamed.get(section)
        if isinstance(values, Mapping) and old in values:
            kept = {key: value for key, value in values.items() if key != old}
            renamed[section] = {new: values[old], **kept}
    return renamed
