"""How quantities are written for people, everywhere the same."""

from __future__ import annotations


def format_seconds(seconds: float) -> str:
    """`45 s`, `3:07 min`, `2:05 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


def format_bytes(num_bytes: float) -> str:
    """`812 MiB`, `5.31 GiB`."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def format_count(count: float) -> str:
    """`1.85 M`, `33.0 M`, `4.02 B`, `812`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
