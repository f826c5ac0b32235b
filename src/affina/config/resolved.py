"""A complete, valid config together with where each of its values comes from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from affina.config.origins import Note, Origin
from affina.config.schema import RunConfig

_DEFAULT = Origin("default")

# Words that some YAML reader, old or new, would take for something else than text.
_PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./\-]*")
_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", ".inf", ".nan"}

# Not part of the hash: they say where results go, not what they are.
_WITHOUT_INFLUENCE: dict[str, tuple[str, ...] | None] = {
    "output": None,
    "tracking": None,
    "data": ("num_workers", "cache_directory"),
}


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """What a run is made of.

    config:   every value, valid
    origins:  origin of every leaf by dotted path (`training.epochs`, `data.train[0].path`)
    warnings: settings without effect, and settings that seldom mean what was wished
    """

    config: RunConfig
    origins: dict[str, Origin] = field(default_factory=dict)
    warnings: tuple[Note, ...] = ()

    def to_yaml(self, *, comments: bool = True) -> str:
        """The whole config as YAML that loads to an equal config; comments give the origins that are not defaults."""
        lines: list[str] = []
        for name in RunConfig.model_fields:
            lines.append(f"{name}:")
            lines.extend(self._section_lines(getattr(self.config, name), name, "  ", comments))
        return "\n".join(lines) + "\n"

    def _section_lines(self, section: BaseModel, path: str, indent: str, comments: bool) -> Iterator[str]:
        for name, value in section:
            here = f"{path}.{name}"
            if isinstance(value, BaseModel):
                yield f"{indent}{name}:"
                yield from self._section_lines(value, here, indent + "  ", comments)
            elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
                yield f"{indent}{name}:"
                for index, item in enumerate(value):
                    first, *rest = self._section_lines(item, f"{here}[{index}]", indent + "    ", comments)
                    yield f"{indent}  - {first.lstrip()}"
                    yield from rest
            else:
                yield f"{indent}{name}: {_yaml_value(value)}{self._comment(here) if comments else ''}"

    def _comment(self, path: str) -> str:
        origin = self.origins.get(path, _DEFAULT)
        if origin.kind == "default":
            return ""
        # A reason or a path may hold anything; a comment is one line of printable text.
        text = f"{origin.label}: {origin.reason}" if origin.reason else origin.label
        return f"  # {' '.join(''.join(c if c.isprintable() else ' ' for c in text).split())}"

    def to_dict(self) -> dict[str, Any]:
        """Config, origins, warnings and hash, JSON-ready."""
        return {
            "config": self.config.model_dump(mode="json"),
            "origins": self.origins_to_dict(),
            "warnings": [note.to_dict() for note in self.warnings],
            "hash": self.hash(),
        }

    def origins_to_dict(self) -> dict[str, dict[str, str | int | None]]:
        """The origin of every leaf, JSON-ready: what `origins.json` of a run holds."""
        return {path: origin.to_dict() for path, origin in self.origins.items()}

    def hash(self) -> str:
        """sha256 over every value that can change a result: all but output, tracking, workers and cache."""
        values = self.config.model_dump(mode="json")
        for section, names in _WITHOUT_INFLUENCE.items():
            if names is None:
                del values[section]
            else:
                for name in names:
                    del values[section][name]
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def leaves(section: BaseModel, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a config with its dotted path, in the order of the schema. An empty list of sources is a leaf."""
    for name, value in section:
        here = f"{path}.{name}" if path else name
        if isinstance(value, BaseModel):
            yield from leaves(value, here)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, item in enumerate(value):
                yield from leaves(item, f"{here}[{index}]")
        else:
            yield here, value


def has_influence(path: str) -> bool:
    """Whether the setting of that dotted path can change a result, and so is part of a config's hash."""
    section, name = path.split(".", 1)
    names = _WITHOUT_INFLUENCE.get(section, ())
    return names is not None and name not in names


def differences(before: RunConfig, after: RunConfig) -> dict[str, str]:
    """Every leaf that two configs do not have in common, with a text such as `training.epochs (1 -> 2)`, in the order
    of the schema."""
    first, second = dict(leaves(before)), dict(leaves(after))
    absent = object()

    def text(values: dict[str, Any], path: str) -> str:
        return _yaml_value(values[path]) if path in values else "nothing"

    return {
        path: f"{path} ({text(first, path)} -> {text(second, path)})"
        for path in dict.fromkeys((*first, *second))
        if first.get(path, absent) != second.get(path, absent)
    }


def _yaml_value(value: Any) -> str:
    """One value in YAML that both YAML 1.1 and 1.2 readers understand alike."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            text = repr(value)
            # YAML 1.1 takes 1e-05 for text; a number needs a point there.
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case tuple() | list():
            return f"[{', '.join(_yaml_value(item) for item in value)}]"
        case dict():
            return f"{{{', '.join(f'{_yaml_text(key)}: {_yaml_value(item)}' for key, item in value.items())}}}"
        case str():
            return _yaml_text(value)
    raise AssertionError(f"a config cannot hold {type(value).__name__}")


def _yaml_text(text: str) -> str:
    if _PLAIN_TEXT.fullmatch(text) and text.isascii() and text.lower() not in _NOT_TEXT and not _is_number(text):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # JSON leaves these as they are; YAML allows them in a text only as escapes.
    return "".join(
        c if c.isprintable() or c == " " else (f"\\u{ord(c):04x}" if ord(c) <= 0xFFFF else f"\\U{ord(c):08x}")
        for c in quoted
    )


def _is_number(text: str) -> bool:
    try:
        float(text.replace("_", ""))
    except ValueError:
        return text[0] == "." and any(c.isdigit() for c in text)
    return True
