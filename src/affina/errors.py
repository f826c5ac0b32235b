"""The one base error: a stable code, what happened, why, and how to fix it.

Every error that a user can cause is an `AffinaError`. The command line prints it as

    error[target-unmatched]: adapter.targets "q_porj" matches nothing (run.yaml:14)
      why: the model has q_proj, k_proj, v_proj; nothing would train
      fix: did you mean q_proj?

and exits with 1. An assertion or any other exception is a bug of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Location:
    """Where in a user's file a problem is: `run.yaml:14`, or only the file when `line` is None."""

    path: Path | str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line is not None else str(self.path)


class AffinaError(Exception):
    """An error with a code, what happened, why it matters, how to fix it, and where.

    code:  stable kebab-case name, documented in docs/reference/errors.md
    what:  one sentence with the offending values
    why:   the reason, when the sentence does not already hold it
    fix:   what the user can type or change
    where: file and line, when there is one
    """

    def __init__(
        self,
        code: str,
        what: str,
        *,
        why: str | None = None,
        fix: str | None = None,
        where: Location | None = None,
    ) -> None:
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix
        self.where = where
        super().__init__(self.render())

    def __str__(self) -> str:
        return self.render()  # not what __init__ was given: the place may have been found later

    def render(self) -> str:
        """The error as the plain text that the command line prints."""
        place = f" ({self.where})" if self.where is not None else ""
        lines = [f"error[{self.code}]: {self.what}{place}"]
        if self.why:
            lines.append(f"  why: {self.why}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, str | int | None]:
        """The same as a flat JSON-ready mapping, for `--json`."""
        return {
            "code": self.code,
            "what": self.what,
            "why": self.why,
            "fix": self.fix,
            "file": str(self.where.path) if self.where else None,
            "line": self.where.line if self.where else None,
        }

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes send errors back by pickling; keyword-only arguments need help.
        return (_rebuild, (type(self), self.code, self.what, self.why, self.fix, self.where))


def _rebuild(
    kind: type[AffinaError],
    code: str,
    what: str,
    why: str | None,
    fix: str | None,
    where: Location | None,
) -> AffinaError:
    return kind(code, what, why=why, fix=fix, where=where)


class AffinaErrors(AffinaError):
    """Several errors found in one pass, reported together.

    summary: one sentence about all of them, told first; it is no error of its own and is not among `errors`
    """

    def __init__(self, errors: list[AffinaError], summary: AffinaError | None = None) -> None:
        assert errors, "an error group needs at least one error"
        self.errors = errors
        self.summary = summary
        first = summary or errors[0]
        super().__init__(first.code, first.what, why=first.why, fix=first.fix, where=first.where)

    @property
    def parts(self) -> list[AffinaError]:
        """What is printed, in order: the summary, where there is one, and every error."""
        return [self.summary, *self.errors] if self.summary is not None else list(self.errors)

    def render(self) -> str:
        return "\n\n".join(error.render() for error in self.parts)

    def __reduce__(self) -> tuple[object, ...]:
        return (AffinaErrors, (self.errors, self.summary))


class ConfigError(AffinaError):
    """The YAML file, an override, or a combination of settings is wrong."""


class DataError(AffinaError):
    """A data file, a record or a template is wrong."""


class ModelError(AffinaError):
    """A model, a tokenizer, a weight format or an adapter cannot be used."""


class TrainingError(AffinaError):
    """Training cannot start or cannot go on."""


class RunError(AffinaError):
    """A run directory or a checkpoint is missing, damaged, or in the way."""


class EvaluationError(AffinaError):
    """An evaluation cannot be carried out."""


class ExportError(AffinaError):
    """A merge or a conversion failed, or its result does not do what the adapter does."""
