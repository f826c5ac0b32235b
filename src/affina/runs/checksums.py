"""sha256 of every file of a folder, kept inside the folder, so that damage is found before it is used."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from affina.runs import atomic

CHECKSUMS_FILE = "checksums.json"


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits, reading 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Record the checksum of every file below `folder` in `folder/checksums.json`."""
    sums = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CHECKSUMS_FILE
    }
    atomic.write_json(folder / CHECKSUMS_FILE, sums)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a folder that `write_checksums` sealed, as half a sentence; None when it is whole."""
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{CHECKSUMS_FILE} is missing"
    except (OSError, ValueError):
        return f"{CHECKSUMS_FILE} cannot be read"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if file_sha256(path) != expected:
            return f"the checksum of {name} is wrong"
    return None
