"""Append-only JSON lines: metrics.jsonl and events.jsonl.

Each line is written with one `write` and flushed, so that a killed process leaves at most one partial last line,
which readers skip and the next writer cuts off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from affina.runs import atomic


def _finite(value: Any) -> Any:
    # NaN and Infinity are not JSON: other tools would choke on the very line that tells of the trouble.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLinesFile:
    """Appends mappings to a file. A full disk loses lines, never the run: `num_lost` counts them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_lost = 0

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps({key: _finite(value) for key, value in record.items()}, ensure_ascii=False, default=str)
        try:
            with open(self.path, "ab") as file:
                file.write(line.encode("utf-8") + b"\n")
        except OSError:
            self.num_lost += 1

    def keep_until_step(self, step: int) -> None:
        """Drop the partial last line and the lines of later steps: what a resumed run is going to write again."""
        if not self.path.exists():
            return
        kept = [record for record in read_json_lines(self.path) if record.get("step", 0) <= step]
        atomic.write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file; nothing when the file is absent; lines that do not parse are skipped."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            if isinstance(record, dict):
                yield record
