"""Where the setting stands that an error of loading is about.

What loads a model, a tokenizer or data knows values and no files, and says so with a code. This table leads from the
code to the setting, and the config knows in which line that was written: the one place where the two meet.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from affina.config.resolved import ResolvedConfig, leaves
from affina.errors import AffinaError, AffinaErrors, ExportError, Location

_MODEL = ("model.path",)
_SOURCES = ("data.train[].path", "data.validation[].path")

SETTINGS_OF_ERRORS: Mapping[str, tuple[str, ...]] = {
    "model-not-found": ("model.revision", *_MODEL, "training.distillation.teacher"),
    "model-unreachable": _MODEL,
    "model-gated": _MODEL,
    "checkpoint-missing": _MODEL,
    "checkpoint-incomplete": _MODEL,
    "checkpoint-unsafe": _MODEL,
    "quantization-unsupported": _MODEL,
    "quantized-weights-unreadable": _MODEL,
    "weights-not-finite": _MODEL,
    "head-unknown": _MODEL,
    "tokenizer-not-found": _MODEL,
    "tokenizer-not-fast": _MODEL,
    "tokenizer-without-end": _MODEL,
    "template-without-end-of-turn": _MODEL,
    "longer-than-context": ("data.max_length", *_MODEL),
    "adapter-method-unknown": ("adapter.method",),
    "adapter-unsupported": ("adapter.method",),
    "target-unmatched": ("adapter.targets", "adapter.method"),
    "rank-above-layer": ("adapter.rank", "adapter.method"),
    "block-size-unfit": ("adapter.block_size", "adapter.method"),
    "adapter-option-wrong": ("adapter.options", "adapter.method"),
    "device-unavailable": ("training.device",),
    "precision-unsupported": ("training.precision", "model.dtype", "training.device"),
    "optimizer-unavailable": ("training.optimizer",),
    "tracker-unavailable": ("tracking.trackers",),
    "engine-unsupported": ("engine.path",),
    "teacher-tokenizer": ("training.distillation.teacher",),
    "no-teacher": ("training.objective",),
    "one-label": ("training.objective",),
    "packing-unsupported": ("data.packing",),
    "file-not-found": _SOURCES,
    "no-data-files": _SOURCES,
    "split-not-found": _SOURCES,
    "hub-dataset": _SOURCES,
    "hub-offline": _SOURCES,
    "all-too-long": ("data.max_length", "data.truncation"),
    "all-labels-masked": ("data.mask",),
    "cannot-split": ("data.validation_fraction",),
    "cache-not-writable": ("data.cache_directory",),
    "run-exists": ("output.name", "output.directory"),
    "run-not-writable": ("output.directory",),
    "disk-full": ("output.directory",),
}
"""By the error's code. Of several settings the one counts that the error names by its path or its value, else the first
that the user wrote; `[]` stands for every source."""


def place_error(error: AffinaError, resolved: ResolvedConfig) -> None:
    """Give an error that has no place yet the one of the setting that it is about, if the user wrote that setting."""
    if isinstance(error, AffinaErrors):
        for part in error.parts:
            place_error(part, resolved)
        error.where = error.parts[0].where
    elif error.where is None and not isinstance(error, ExportError):  # a merge's output is no setting
        error.where = _place(error, resolved)


def _place(error: AffinaError, resolved: ResolvedConfig) -> Location | None:
    values = dict(leaves(resolved.config))
    paths = [
        path for wanted in SETTINGS_OF_ERRORS.get(error.code, ()) for path in values if _without_index(path) == wanted
    ]
    # Stable: what the error does not tell apart stays in the order of the table.
    paths.sort(key=lambda path: (not _names(error.what, path), not _names(error.what, values[path])))
    for path in paths:
        origin = resolved.origins.get(path)
        if origin is not None and origin.is_explicit and origin.where is not None:
            return origin.where
    return None


def _without_index(path: str) -> str:
    return re.sub(r"\[\d+\]", "[]", path)


def _names(text: str, value: object) -> bool:
    """Whether a text has the value as a word or path of its own: `data` is not named by `data/train.jsonl`."""
    if not isinstance(value, str) or not value:
        return False
    return re.search(rf"(?<![\w./-]){re.escape(value)}(?![\w/-]|\.\w)", text) is not None
