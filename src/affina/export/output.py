"""The new directory of an export: nothing is overwritten, the disk is large enough, and what belongs to a model comes
along."""

from __future__ import annotations

import shutil
from pathlib import Path

from affina.errors import ExportError
from affina.runs.units import format_bytes

_COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def check_output(target: Path, *, why: str) -> None:
    """Refuse a directory that holds something or cannot be made; an empty one is removed, so that its name is free.

    why: for the message; Raises ExportError: output-exists, output-not-writable.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExportError(
            "output-exists",
            f"{target} already holds something",
            why=why,
            fix="name a new directory with -o",
        )
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            target.rmdir()  # an empty one is as good as none; the rename at the end needs the name free
    except OSError as error:
        reason = "it is a file" if parent.is_file() else (error.strerror or type(error).__name__).lower()
        raise ExportError(
            "output-not-writable",
            f"cannot write into {parent}: {reason}",
            fix="name a directory that you may write to with -o",
        ) from error


def check_space(target: Path, needed_bytes: int, *, what: str) -> None:
    """Raises ExportError[disk-full] when the disk of `target` has less than `needed_bytes` free for `what`."""
    free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        raise ExportError(
            "disk-full",
            f"{what} needs {format_bytes(needed_bytes)}, {target.parent} has {format_bytes(free)} free",
            fix="free space, or name a directory on another disk with -o",
        )


def copy_companions(source: Path, folder: Path, *, with_code: bool) -> None:
    """Tokenizer, template, generation settings, licence: all that is small and not weights."""
    patterns = (*_COPIED, "*.py") if with_code else _COPIED
    for path in sorted({path for pattern in patterns for path in source.glob(pattern) if path.is_file()}):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
