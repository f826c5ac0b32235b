"""The cache of prepared data: folders named by a hash of everything that decides their content.

A folder appears complete or not at all. Its manifest holds the size and checksum of every file, so that a damaged
folder is found when it is opened, and made again. A lock keeps two runs from doing the same work twice; correctness
does not depend on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from affina.errors import DataError, Location
from affina.runs import atomic

MANIFEST = "manifest.json"


def default_cache_directory() -> Path:
    """AFFINA_CACHE, or ~/.cache/affina."""
    return Path(os.environ.get("AFFINA_CACHE") or "~/.cache/affina").expanduser()


def open_or_build(cache_directory: Path, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """(the folder for `key`, whether it was there already).

    build: fills an empty folder; what it leaves becomes the cached content

    Raises DataError `cache-not-writable`.
    """
    folder = cache_directory / "prepared" / key
    if is_intact(folder):
        return folder, True
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(folder.parent / f"{key}.lock")
        with lock:
            if is_intact(folder):  # another run has made it while this one waited
                return folder, True
            with atomic.new_directory(folder) as unfinished:
                build(unfinished)
                _write_manifest(unfinished)
    except PermissionError as error:
        raise DataError(
            "cache-not-writable",
            f"prepared data cannot be written to {cache_directory}",
            why=str(error),
            fix="set data.cache_directory (or the environment variable AFFINA_CACHE) to a folder you may write to",
            where=Location(cache_directory),
        ) from error
    return folder, False


def is_intact(folder: Path) -> bool:
    """Whether the folder is there and every file is as it was written."""
    try:
        files: dict[str, list[int]] = json.loads((folder / MANIFEST).read_text())["files"]
        return all(
            (folder / name).stat().st_size == size and _checksum(folder / name) == checksum
            for name, (size, checksum) in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_manifest(folder: Path) -> None:
    files = {
        path.name: [path.stat().st_size, _checksum(path)]
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return checksum


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock that the system releases when the process ends, however it ends. No lock where there is none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
