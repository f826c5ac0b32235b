"""Where a model's files are, and whether they are complete, before anything large is read."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from affina.catalog.embedded import embedded_model_path
from affina.errors import Location, ModelError

_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*")


def resolve_model_folder(
    path: str, *, revision: str | None = None, with_code: bool = False, with_weights: bool = True
) -> Path:
    """The local folder of a model: a directory, the embedded model, or a hub id whose files are fetched if need be.

    with_weights: False: of a hub id, fetch nothing but config.json

    Raises ModelError: model-not-found, model-unreachable (no network, not cached), model-gated.
    """
    embedded = embedded_model_path(path)
    if embedded is not None:
        return embedded
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(
            "model-not-found",
            f"model.path {path} is a file",
            fix="give the directory that holds config.json",
        )
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(
            "model-not-found",
            f'there is no directory "{path}"',
            why="it is not a hub id either: those are owner/name",
            fix="check model.path; affina/nano ships with affina",
        )
    patterns = [*_FILES, "*.py"] if with_code else list(_FILES)
    return _fetch(path, revision, patterns if with_weights else ["config.json"])


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            "model-gated",
            f"{repository} asks you to accept its licence first",
            fix=f"accept it on https://huggingface.co/{repository}, then: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(
            "model-not-found",
            f'{repository} has no revision "{revision}"',
            fix="check model.revision; leave it out for the newest",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            "model-not-found",
            f"there is no directory {repository} and no such model on the hub",
            why="it does not exist, or it is private and you are not logged in",
            fix="check model.path; for a private model: hf auth login",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            "model-unreachable",
            f"{repository} is not on this machine and the hub cannot be reached",
            why=str(error).splitlines()[0],
            fix="connect, unset HF_HUB_OFFLINE, or give a local directory; affina/nano needs no network",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it is. Raises ModelError when it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            "model-not-found",
            f"{folder} has no config.json",
            why="it is an adapter, not a model" if is_adapter else "it is no model directory",
            fix="give its base as model.path" if is_adapter else "give a directory with config.json and weights",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged_config(path, f"config.json is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _damaged_config(path, "config.json is not a JSON object")
    return content


def _damaged_config(path: Path, what: str) -> ModelError:
    return ModelError("config-damaged", what, fix="download or copy the model again", where=Location(path))


def find_config(path: str, *, revision: str | None = None) -> tuple[dict[str, Any], Path]:
    """A model's config.json and the folder that it lies in, with as little asked of the network as possible.

    A directory or the embedded model as it is; of a hub id the cached file, else the copy that ships with affina for
    the presets' model, else the hub's.

    Raises ModelError: model-not-found, model-unreachable, model-gated, config-damaged.
    """
    folder = local_config_folder(path, revision=revision)
    if folder is None:
        folder = resolve_model_folder(path, revision=revision, with_weights=False)
    return read_config(folder), folder


def local_config_folder(path: str, *, revision: str | None = None) -> Path | None:
    """Where `find_config` reads without a network; None: nothing of that name is on this machine."""
    folder = embedded_model_path(path) or Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or path.count("/") != 1:
        return None
    shipped = Path(str(files("affina.catalog").joinpath("assets", "configs", path.replace("/", "--"))))
    return _cached_folder(path, revision) or (shipped if revision is None and shipped.is_dir() else None)


def _cached_folder(repository: str, revision: str | None) -> Path | None:
    """The newest snapshot of a hub id in the hub's cache, if it has a config.json.

    Reads the cache's documented layout: importing huggingface_hub for it takes longer than a whole plan.
    """
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    folder = cache / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    try:
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and (snapshot / "config.json").is_file() else None
