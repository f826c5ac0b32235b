"""Where each value of a resolved config comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from affina.errors import Location

OriginKind = Literal["user", "override", "preset", "derived", "default"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Who set a value, where, and why it is what it is.

    kind:   user (a YAML file or the Python API), override (`--set`), preset, derived, or default (schema.py)
    where:  file and line, the override's text, or None for the Python API, derived values and defaults
    preset: the preset's name when kind is preset
    reason: why a derived value was chosen, what an open default waits for, or what a value amounts to
    """

    kind: OriginKind
    where: Location | None = None
    preset: str | None = None
    reason: str | None = None

    @property
    def is_explicit(self) -> bool:
        """Whether the user wrote this value for this run, in a file, through the API or as an override."""
        return self.kind in ("user", "override")

    @property
    def label(self) -> str:
        """The origin in a word or two, as `affina check` prints it."""
        match self.kind:
            case "user":
                return "you"
            case "override":
                return "you, --set"
            case "preset":
                return f"preset {self.preset}"
            case kind:
                return kind

    def with_reason(self, reason: str) -> Origin:
        return replace(self, reason=reason)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Origin:
        """The origin whose `to_dict` this is."""
        where = Location(fields["file"], fields["line"]) if fields["file"] is not None else None
        return cls(fields["kind"], where, fields["preset"], fields["reason"])

    def to_dict(self) -> dict[str, str | int | None]:
        """A flat JSON-ready mapping."""
        return {
            "kind": self.kind,
            "file": str(self.where.path) if self.where else None,
            "line": self.where.line if self.where else None,
            "preset": self.preset,
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True)
class Note:
    """A setting that is legal, and yet does nothing or not what it seems to do in this run."""

    path: str
    what: str
    why: str
    where: Location | None = None

    def render(self) -> str:
        """The note as the plain text that the command line prints."""
        place = f" ({self.where})" if self.where is not None else ""
        return f"warning: {self.what}{place}\n  why: {self.why}"

    def to_dict(self) -> dict[str, str | int | None]:
        """A flat JSON-ready mapping."""
        return {
            "path": self.path,
            "what": self.what,
            "why": self.why,
            "file": str(self.where.path) if self.where else None,
            "line": self.where.line if self.where else None,
        }
