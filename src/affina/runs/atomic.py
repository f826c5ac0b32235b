"""Writing so that a reader sees the old content or the new, never half of it.

POSIX: write under a temporary name in the same folder, fsync the file, rename over the target, fsync the folder.
A process killed at any instant leaves the target as it was and at most a `.tmp-…` leftover that `remove_leftovers`
clears away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".tmp-"


def fsync_path(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, all or nothing. Raises OSError and leaves the old file when the disk is full."""
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_text(path: Path, content: str) -> None:
    """Replace a text file, all or nothing, in UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, all or nothing, indented and with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends without an error, and vanishes otherwise.

    Every file in it is fsynced before the rename, so that a visible folder is a complete folder. An existing
    `target` is replaced; between the two renames a reader may see neither, never a mixture.
    """
    temporary = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            fsync_path(path)
        fsync_path(temporary)
        if target.exists():
            replaced = target.parent / f"{TEMPORARY_PREFIX}{target.name}-{os.getpid()}-replaced"
            os.rename(target, replaced)
            os.rename(temporary, target)
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(temporary, target)
        fsync_path(target.parent)
    except BaseException:  # also KeyboardInterrupt: nothing half-written may stay behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left behind in `folder`."""
    for path in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
