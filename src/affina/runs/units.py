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
    """`5.31 GiB`, `812 MiB`, `96 KiB`, `512 bytes`: powers of 1024, as memory is counted."""
    for size, unit, digits in ((2**30, "GiB", 2), (2**20, "MiB", 0), (2**10, "KiB", 0)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{digits}f} {unit}"
    return f"{num_bytes:.0f} bytes"


def format_count(count: float) -> str:
    """`1.85 M`, `33.0 M`, `4.02 B`, `812`."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
