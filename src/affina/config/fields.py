"""What the schema says about a field, in words: used by messages, the JSON Schema and the reference."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from affina.catalog.methods import PeftName
from affina.config.schema import RunConfig, Section

SCALAR_FIELDS: dict[str, str] = {
    "model": "path",
    "quantization": "format",
    "adapter": "method",
    "data": "train",
    "tracking": "trackers",
    "output": "directory",
    "engine": "path",
}
"""`section: value` is short for `section: {field: value}`."""

SOURCE_LISTS = ("data.train", "data.validation")
"""Lists of sources; a path alone stands for a source."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The shape of a field: a section, a list of sections, or a leaf."""

    section: type[Section] | None = None
    items: type[Section] | None = None


def kind_of(field: FieldInfo) -> Kind:
    """Whether a field holds a section, a tuple of sections, or a plain value."""
    annotation = field.annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return Kind(section=annotation)
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and isinstance(arguments[0], type) and issubclass(arguments[0], Section):
        return Kind(items=arguments[0])
    return Kind()


@cache
def all_fields() -> dict[str, FieldInfo]:
    """Every leaf of the schema by its dotted path; fields of a list's items are written `data.train[].path`."""
    return dict(_walk(RunConfig, ""))


def _walk(section: type[Section], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        kind = kind_of(field)
        if kind.section is not None:
            yield from _walk(kind.section, f"{prefix}{name}.")
        elif kind.items is not None:
            yield f"{prefix}{name}", field
            yield from _walk(kind.items, f"{prefix}{name}[].")
        else:
            yield f"{prefix}{name}", field


def alternatives(annotation: Any, metadata: tuple[Any, ...] = ()) -> list[tuple[Any, tuple[Any, ...]]]:
    """The members of a union as (type, constraints) pairs, with Annotated unwrapped."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *extra = get_args(annotation)
        found: list[Any] = []
        for item in extra:
            found.extend(item.metadata if isinstance(item, FieldInfo) else [item])
        return alternatives(inner, (*metadata, *found))
    if origin in (Union, types.UnionType):
        return [pair for member in get_args(annotation) for pair in alternatives(member, metadata)]
    return [(annotation, metadata)]


def literals(field: FieldInfo) -> tuple[str, ...]:
    """The words that a field accepts, without those of a list's items."""
    return tuple(
        str(word)
        for kind, _ in alternatives(field.annotation)
        if get_origin(kind) is Literal
        for word in get_args(kind)
    )


def takes_text(field: FieldInfo) -> bool:
    """Whether any text is a valid value."""
    return any(kind is str for kind, _ in alternatives(field.annotation))


def takes_list(field: FieldInfo) -> bool:
    """Whether a list of plain values is valid."""
    return any(get_origin(kind) is tuple for kind, _ in alternatives(field.annotation))


def takes_null(field: FieldInfo) -> bool:
    """Whether `null` is valid."""
    return any(kind is type(None) for kind, _ in alternatives(field.annotation))


def describe(field: FieldInfo) -> str:
    """What a field accepts, in plain words: "a whole number of at least 1, or null"."""
    parts = [_describe_one(kind, (*metadata, *field.metadata)) for kind, metadata in alternatives(field.annotation)]
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def _describe_one(kind: Any, metadata: tuple[Any, ...]) -> str:
    if kind == PeftName:
        return "the PEFT name of another method (hra, vblora, …)"
    if get_origin(kind) is Literal:
        words = [str(word) for word in get_args(kind)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if get_origin(kind) is dict:
        return "a mapping of options"
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        among = "" if inner is str else f" out of {', '.join(map(str, get_args(inner)))}"
        return f"a list of names{among}"
    if kind is type(None):
        return "null"
    if kind is bool:
        return "true or false"
    if kind is str:
        return "text"
    noun = "a whole number" if kind is int else "a number"
    return f"{noun}{_describe_range(metadata)}"


def _describe_range(metadata: tuple[Any, ...]) -> str:
    low = high = None
    for constraint in metadata:
        match constraint:
            case Ge(ge=bound):
                low = f"of at least {bound:g}"
            case Gt(gt=bound):
                low = f"above {bound:g}"
            case Le(le=bound):
                high = f"at most {bound:g}"
            case Lt(lt=bound):
                high = f"below {bound:g}"
    words = [word for word in (low, high) if word]
    return f" {' and '.join(words)}" if words else ""
