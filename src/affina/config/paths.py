"""Which paths of a config are files here, and which are ids on a hub.

What a run *reads* (model, data) is looked for beside the YAML file first and in the current folder second, and becomes
an absolute path, so that a resolved config means the same from everywhere. What a run *writes* (output.directory,
data.cache_directory) stays as written, relative to where the command runs: a shared YAML file does not write into its
own folder.
"""

from __future__ import annotations

import difflib
import glob
import os.path
import re
from pathlib import Path

from affina.config.origins import Origin, OriginKind
from affina.config.validate import Validated, show
from affina.errors import ConfigError

BUILT_IN_PREFIX = "affina/"
BUILT_IN_MODELS = ("affina/nano",)
TEACHER_PATH = "training.distillation.teacher"
BUILT_IN_DATA = ("affina/support",)

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz", ".zst", ".arrow")
_HUB_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.\-]+/[\w.\-]+)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def resolve_paths(checked: Validated, only: OriginKind | None = None) -> None:
    """Make the paths of models and sources absolute where they exist; a file that is missing is an error.

    only: leave the paths of every other origin as they are
    """

    def is_meant(path: str) -> bool:
        return only is None or checked.origins[path].kind == only

    model = checked.values.get("model", {})
    if "path" in model and is_meant("model.path"):
        model["path"] = _resolve(model["path"], "model.path", checked, BUILT_IN_MODELS, suffixes=())
    teaching = checked.values.get("training", {}).get("distillation", {})
    if teaching.get("teacher") is not None and is_meant(TEACHER_PATH):
        teaching["teacher"] = _resolve(teaching["teacher"], TEACHER_PATH, checked, BUILT_IN_MODELS, suffixes=())
    for name in ("train", "validation"):
        for index, source in enumerate(checked.values.get("data", {}).get(name, ())):
            path = f"data.{name}[{index}].path"
            if is_meant(path):
                source["path"] = _resolve(source["path"], path, checked, BUILT_IN_DATA, suffixes=_DATA_SUFFIXES)


def _resolve(value: str, path: str, checked: Validated, built_in: tuple[str, ...], *, suffixes: tuple[str, ...]) -> str:
    origin = checked.origins[path]
    if value in built_in:
        return value
    found = _find(value, origin)
    if found is not None:
        return found
    problem = _missing(value, path, origin, built_in, suffixes)
    if problem is not None:
        checked.invalid.add(path)
        checked.errors.append(problem)
    return value


def _folders(origin: Origin) -> list[Path]:
    """Where a relative path is looked for, in order."""
    folders = [Path.cwd()]
    # Only a file's location is a path with a line; an override's is a text.
    if origin.kind == "user" and origin.where is not None and isinstance(origin.where.path, Path):
        folders.insert(0, Path.cwd() / origin.where.path.parent)
    return folders


def _find(value: str, origin: Origin) -> str | None:
    if not value or "\0" in value:
        return None
    # "~nobody/x" of an unknown user stays as it is, and is then missing.
    written = Path(value.replace("~", str(Path.home()), 1)) if value.startswith(("~/", "~\\")) else Path(value)
    for folder in _folders(origin):
        candidate = folder / written
        try:
            if candidate.exists() or (_is_pattern(value) and glob.glob(str(candidate), recursive=True)):
                return str(_normalize(candidate))
        except OSError:  # a name too long for the file system, or a folder that may not be entered
            continue
    return None


def _normalize(path: Path) -> Path:
    """Without `.` and `..`, but with symbolic links as the user wrote them."""
    return Path(os.path.normpath(path))


def _is_pattern(value: str) -> bool:
    return any(character in value for character in "*?[")


def _missing(
    value: str, path: str, origin: Origin, built_in: tuple[str, ...], suffixes: tuple[str, ...]
) -> ConfigError | None:
    """The error for a path that is not here and cannot be a hub id; None for one that can."""
    where = origin.where
    if value.startswith(BUILT_IN_PREFIX):
        return ConfigError(
            "unknown-built-in",
            f"{path} is {show(value)}, which is not part of affina",
            why=f"the names that begin with {BUILT_IN_PREFIX} ship with affina",
            fix=f"write {' or '.join(built_in)}",
            where=where,
        )
    if not value.strip():
        return ConfigError("path-empty", f"{path} is empty", fix="write a file, a folder or a hub id", where=where)
    if "://" in value:
        match = _HUB_URL.match(value)
        return ConfigError(
            "path-is-url",
            f"{path} is the address {show(value)}",
            why="a run reads files and hub ids, so that it can be repeated",
            fix=f"write {match[1]}" if match else "download it, and write the file's path",
            where=where,
        )
    has_suffix = value.lower().endswith(suffixes) if suffixes else False
    if _is_pattern(value):
        return ConfigError(
            "path-missing",
            f"{path}: no file matches {show(value)}",
            why=f"looked in {_folder_list(origin, value)}",
            fix=f"try `ls {value}`",
            where=where,
        )
    if _HUB_ID.fullmatch(value) and not has_suffix:
        return None
    return ConfigError(
        "path-missing",
        f"{path}: {show(value)} does not exist",
        why=f"looked in {_folder_list(origin, value)}; a hub id looks like owner/name",
        fix=_neighbour(value, origin) or "check the spelling; relative paths start at the folder of the YAML file",
        where=where,
    )


def _folder_list(origin: Origin, value: str) -> str:
    if Path(value).is_absolute() or value.startswith("~"):
        return str(Path(value).parent)
    return " and ".join(dict.fromkeys(str(_normalize(folder)) for folder in _folders(origin)))


def _neighbour(value: str, origin: Origin) -> str | None:
    """A question about the file that is there and has nearly this name."""
    for folder in _folders(origin):
        wanted = folder / value
        try:
            names = sorted(entry.name for entry in wanted.parent.iterdir())
        except OSError:
            continue
        if matches := difflib.get_close_matches(wanted.name, names, 1, 0.6):
            return f"did you mean {Path(value).parent / matches[0]}?"
    return None
