"""The small model and the small data set that ship inside affina, so that nothing must be downloaded to start."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from affina.errors import AffinaError

PREFIX = "affina/"
"""Names that begin so belong to affina; on a hub they would be an organisation of that name."""

EMBEDDED_MODELS: tuple[str, ...] = ("affina/nano",)
EMBEDDED_DATASETS: tuple[str, ...] = ("affina/support",)
DATASET_SPLITS: tuple[str, ...] = ("train", "validation")


class EmbeddedError(AffinaError):
    """A name asks for something embedded that affina does not have."""


def is_embedded_name(name: str) -> bool:
    """Whether the name is one that only affina itself can resolve."""
    return name.startswith(PREFIX)


def embedded_model_path(name: str) -> Path | None:
    """The folder of an embedded model, as `from_pretrained` takes it; None when the name is not affina's.

    Raises EmbeddedError (embedded-unknown) for an `affina/…` name that is not among EMBEDDED_MODELS.
    """
    if not is_embedded_name(name):
        return None
    if name not in EMBEDDED_MODELS:
        raise _unknown("model", name, EMBEDDED_MODELS)
    return _folder(name)


def embedded_dataset_path(name: str, split: str | None = None) -> Path | None:
    """The JSONL file of one split of an embedded data set ("train" when None); None when the name is not affina's.

    Raises EmbeddedError (embedded-unknown) for an unknown `affina/…` name or an unknown split.
    """
    if not is_embedded_name(name):
        return None
    if name not in EMBEDDED_DATASETS:
        raise _unknown("data set", name, EMBEDDED_DATASETS)
    chosen = "train" if split is None else split
    if chosen not in DATASET_SPLITS:
        raise EmbeddedError(
            "embedded-unknown",
            f'the embedded data set "{name}" has no split "{chosen}"',
            why=f"its splits are {', '.join(DATASET_SPLITS)}",
            fix=f"write split: {DATASET_SPLITS[0]} or split: {DATASET_SPLITS[1]}",
        )
    return _folder(name) / f"{chosen}.jsonl"


def dataset_manifest(name: str) -> dict[str, Any]:
    """manifest.json of an embedded data set: records, bytes and sha256 of each file."""
    path = embedded_dataset_path(name)
    assert path is not None, f"{name} is not an embedded name"
    manifest: dict[str, Any] = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _folder(name: str) -> Path:
    # Wheels are installed unpacked, so a resource of the package is a real folder.
    return Path(str(files("affina.catalog").joinpath("assets", name.removeprefix(PREFIX))))


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> EmbeddedError:
    others = [embedded for embedded in (*EMBEDDED_MODELS, *EMBEDDED_DATASETS) if embedded not in known]
    why = f"names that begin with {PREFIX} ship with affina; the only {kind} is {', '.join(known)}"
    if name in others:
        why += f", and {name} is a {'model' if name in EMBEDDED_MODELS else 'data set'}"
    return EmbeddedError(
        "embedded-unknown",
        f'affina has no embedded {kind} "{name}"',
        why=why,
        fix=f"write {known[0]}, or the path of a folder, or a hub id of another organisation",
    )
