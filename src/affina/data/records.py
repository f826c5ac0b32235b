"""Raw records and what is wrong with them: the values that sources, formats and validation hand to each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from affina.errors import DataError, Location

Severity = Literal["error", "repaired", "warning"]
"""error: the record cannot be used. repaired: it was used after a harmless change. warning: used as it is."""


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as the file has it, before any format is applied.

    value:     the decoded object; every key is a string
    location:  `file:line` where lines exist, `file#index` (from 0) elsewhere
    raw_bytes: size in the uncompressed file, or an estimate for columnar files
    """

    value: dict[str, Any]
    location: Location
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class RecordProblem:
    """What is wrong with one record, and what its owner can do about it."""

    code: str
    location: Location
    reason: str
    fix: str
    severity: Severity = "error"

    def to_error(self) -> DataError:
        """The same as an error, for `on_error: fail`."""
        return DataError(self.code, self.reason, fix=self.fix, where=self.location)

    def to_dict(self) -> dict[str, str | int | None]:
        """A flat JSON-ready mapping."""
        return {
            "code": self.code,
            "severity": self.severity,
            "file": str(self.location.path),
            "line": self.location.line,
            "reason": self.reason,
            "fix": self.fix,
        }

    def __str__(self) -> str:
        return f"{self.location}: {self.code}: {self.reason}. {self.fix}"


ProblemReporter = Callable[[RecordProblem], None]


def raise_problem(problem: RecordProblem) -> None:
    """The reporter that turns the first problem into a `DataError`."""
    raise problem.to_error()


def shorten(value: object, *, limit: int = 60) -> str:
    """`repr(value)` cut to `limit` characters, for messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
