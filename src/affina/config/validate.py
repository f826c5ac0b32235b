"""A tree of nodes against the schema: every unknown key, wrong type and value out of range, in plain words."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from math import isfinite
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from affina.catalog.renamed_settings import RENAMED_SETTINGS
from affina.config.fields import (
    SCALAR_FIELDS,
    SOURCE_LISTS,
    all_fields,
    alternatives,
    describe,
    kind_of,
    literals,
    takes_list,
    takes_null,
    takes_text,
)
from affina.config.names import suggest_key, suggest_value
from affina.config.origins import Origin
from affina.config.schema import RunConfig, Section
from affina.config.tree import Node
from affina.errors import ConfigError

_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_SHARES = {"dropout", "validation_fraction", "min_learning_rate_ratio", "confidence"}
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


def expand_shorthands(root: Node) -> Node:
    """The same tree with `model: name`, `data: file.jsonl`, `engine: fast` … written out as sections, and with today's
    names of settings that had another.

    A section without content (`training:`) is an empty section. Anything else is left for `validate` to judge.
    """
    assert isinstance(root.value, dict)
    sections: dict[str, Node] = {}
    for name, node in root.value.items():
        if name not in RunConfig.model_fields:
            sections[name] = node
        elif node.value is None:
            sections[name] = Node({}, node.origin)
        elif name in SCALAR_FIELDS and not isinstance(node.value, dict):
            sections[name] = Node({SCALAR_FIELDS[name]: node}, node.origin)
        else:
            sections[name] = node
    for path in SOURCE_LISTS:
        section, name = path.split(".")
        parent = sections.get(section)
        if parent is not None and isinstance(parent.value, dict) and name in parent.value:
            expanded = {**parent.value, name: expand_sources(parent.value[name])}
            sections[section] = Node(expanded, parent.origin)
    for before, now in RENAMED_SETTINGS.items():
        section = before.split(".")[0]
        if section in sections:
            sections[section] = _renamed(sections[section], before, now)
    return Node(sections, root.origin)


def _renamed(section: Node, before: str, now: str) -> Node:
    """The section with the name of today, unless both names are in it: that is left for `validate` to refuse."""
    old, new = before.split(".")[1], now.split(".")[1]
    if not isinstance(section.value, dict) or old not in section.value or new in section.value:
        return section
    return Node(
        {
            new if name == old else name: replace(node, former_path=before) if name == old else node
            for name, node in section.value.items()
        },
        section.origin,
    )


def expand_sources(node: Node) -> Node:
    """A path, a source, or a list of both, as a list of sources."""
    items = node.value if isinstance(node.value, list) else [] if node.value is None else [node]
    return Node(
        [Node({"path": item}, item.origin) if isinstance(item.value, str) else item for item in items], node.origin
    )


@dataclass(slots=True)
class Validated:
    """What is left of a tree after validation.

    values:  nested plain values that the schema accepts; what was refused is missing
    origins: origin of each leaf that was written, by dotted path (`data.train[0].path`)
    renamed: origin of each leaf that was written under a name of before, by that name
    invalid: paths whose value was refused
    errors:  one for each refusal
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    renamed: dict[str, Origin] = field(default_factory=dict)
    invalid: set[str] = field(default_factory=set)
    errors: list[ConfigError] = field(default_factory=list)

    def refuse(self, code: str, path: str, node: Node, what: str, *, why: str | None = None, fix: str) -> None:
        self.invalid.add(path)
        self.errors.append(ConfigError(code, what, why=why, fix=fix, where=node.origin.where))


def validate(root: Node) -> Validated:
    """Check a tree whose shorthands are expanded."""
    result = Validated()
    assert isinstance(root.value, dict)
    result.values = _validate_section(RunConfig, root.value, "", "", result)
    return result


def _validate_section(
    section: type[Section], entries: dict[str, Node], path: str, schema_path: str, result: Validated
) -> dict[str, Any]:
    """Values of one section. `schema_path` is `path` with `[]` in place of list indices."""
    values: dict[str, Any] = {}
    for name, node in entries.items():
        here = f"{path}.{name}" if path else name
        there = f"{schema_path}.{name}" if schema_path else name
        if name not in section.model_fields:
            siblings = list(section.model_fields) + ([] if path else ["extends"])
            place = f"unknown key {path}.{name}" if path else f"unknown key {name}"
            result.refuse("unknown-key", here, node, place, fix=suggest_key(name, path, siblings))
            continue
        schema_field = section.model_fields[name]
        kind = kind_of(schema_field)
        if kind.section is not None:
            children = {} if node.value is None else node.value
            if isinstance(children, dict):
                values[name] = _validate_section(kind.section, children, here, there, result)
            else:
                _refuse_section(kind.section, here, node, result)
        elif kind.items is not None:
            values[name] = _validate_items(kind.items, node, here, there, result)
        else:
            _validate_leaf(schema_field, name, node, here, there, values, result)
    return values


def _refuse_section(section: type[Section], path: str, node: Node, result: Validated) -> None:
    names = list(section.model_fields)
    result.refuse(
        "wrong-type",
        path,
        node,
        f"{path} is {show(node.plain())}; it is a section",
        fix=f"indent its settings below it: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}",
    )


def _validate_items(section: type[Section], node: Node, path: str, schema_path: str, result: Validated) -> Any:
    if not isinstance(node.value, list):
        result.refuse(
            "wrong-type",
            path,
            node,
            f"{path} is {show(node.plain())}; it takes a path, a source, or a list of them",
            fix=f"write `{path.rsplit('.', 1)[-1]}: file.jsonl`",
        )
        return ()
    result.origins[path] = node.origin
    items = []
    for index, item in enumerate(node.value):
        here = f"{path}[{index}]"
        if not isinstance(item.value, dict):
            result.refuse(
                "wrong-type",
                here,
                item,
                f"{here} is {show(item.plain())}; it takes a path or a source",
                fix="write a file name, or a mapping with `path:`",
            )
            continue
        values = _validate_section(section, item.value, here, f"{schema_path}[]", result)
        for name, schema_field in section.model_fields.items():
            if schema_field.is_required() and name not in item.value:
                result.refuse(
                    "missing-key", f"{here}.{name}", item, f"{here} has no {name}", fix=f"add `{name}:` to this source"
                )
        items.append(values)
    return tuple(item for item in items if "path" in item)


def _validate_leaf(
    schema_field: FieldInfo,
    name: str,
    node: Node,
    path: str,
    schema_path: str,
    values: dict[str, Any],
    result: Validated,
) -> None:
    value = node.plain()
    result.origins[path] = node.origin
    if node.former_path is not None:
        result.renamed[node.former_path] = node.origin
    if takes_list(schema_field):
        value = _as_tuple(schema_field, schema_path, value)
    try:
        values[name] = _adapter(schema_path).validate_python(value)
    except ValidationError as error:
        kinds = {str(item["type"]) for item in error.errors()}
        code = (
            "out-of-range" if kinds & _RANGE_ERRORS else "unknown-value" if kinds == {"literal_error"} else "wrong-type"
        )
        result.refuse(
            code,
            path,
            node,
            f"{path} is {_show_leaf(node)}; it takes {describe(schema_field)}",
            fix=_fix_value(schema_field, schema_path, node),
        )


def _as_tuple(schema_field: FieldInfo, schema_path: str, value: Any) -> Any:
    """A list as the tuple that the schema wants; one name as a list of one, unless it is a slip of a known word."""
    if isinstance(value, list):
        return tuple(value)
    words = literals(schema_field)
    if (
        isinstance(value, str)
        and value not in words
        and suggest_value(schema_path, value, words) is None
        and "," not in value
    ):
        return (value,)
    return value


@cache
def _adapter(schema_path: str) -> TypeAdapter[Any]:
    """The strict validator of one field: no text as number, no number as text, no NaN or infinity."""
    schema_field = all_fields()[schema_path]
    annotation: Any = schema_field.annotation
    for constraint in schema_field.metadata:
        annotation = Annotated[annotation, constraint]
    return TypeAdapter(annotation, config=_STRICT)


def show(value: Any) -> str:
    """A value as the user would recognise it, shortened."""
    match value:
        case None:
            return "empty"
        case bool():
            return "true" if value else "false"
        case str():
            text = f'"{value}"'
        case dict():
            text = "a mapping (" + ", ".join(f"{key}: …" for key in list(value)[:3]) + ")"
        case list() | tuple():
            text = "[" + ", ".join(show(item) for item in value) + "]"
        case _:
            text = str(value)
    # A control character in a message would reach the terminal.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return _shorten(text)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}…"


def _show_leaf(node: Node) -> str:
    """A value as it stands in the file: 001 and 1e400 are not what YAML made of them."""
    if isinstance(node.value, int | float) and node.written:
        return _shorten(node.written)
    return show(node.plain())


def _fix_value(schema_field: FieldInfo, schema_path: str, node: Node) -> str:
    value, kinds = node.plain(), describe(schema_field)
    if isinstance(value, str) and value.lower() in ("none", "null", "~", "nil") and takes_null(schema_field):
        return "write null, or leave the key out"
    if schema_path == "adapter.method" and str(value).lower() == "qlora":
        return "write `adapter: lora` and `quantization: nf4`; together they are QLoRA"
    words = literals(schema_field) or _item_words(schema_field)
    wrong = [item for item in value if item not in words] if isinstance(value, list) and words else [value]
    if words and len(wrong) == 1 and (word := suggest_value(schema_path, wrong[0], words)) is not None:
        return f"did you mean {word}?"
    if "true or false" in kinds and isinstance(value, str | int) and (truth := _as_truth(value)) is not None:
        return f"write {truth}"
    if isinstance(value, str) and takes_list(schema_field) and "," in value:
        return f"write a list: [{', '.join(part.strip() for part in value.split(','))}]"
    if takes_text(schema_field) and isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{node.written or value}"'
    if schema_path.rsplit(".", 1)[-1] in _SHARES and isinstance(value, int | float) and 1 < value < 100:
        return f"write {value / 100:g} for {value:g}%"
    if "number" in kinds and (number := _as_number(value, whole="whole number" in kinds)) is not None:
        return f"write {number}"
    if value is None:
        return "write a value, or remove the key to get the default"
    if schema_field.is_required():
        return f"write {kinds}"
    return f"write such a value, or remove the key: the default is {_show_default(schema_field)}"


def _show_default(schema_field: FieldInfo) -> str:
    value = schema_field.default
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str) else "null" if value is None else show(value)


def _item_words(schema_field: FieldInfo) -> tuple[str, ...]:
    """The words that the items of a list may be."""
    for kind, _ in alternatives(schema_field.annotation):
        for inner in get_args(kind):
            if words := get_args(inner):
                return tuple(map(str, words))
    return ()


def _as_truth(value: str | int) -> str | None:
    return {"yes": "true", "on": "true", "1": "true", "true": "true", "no": "false", "off": "false", "0": "false"}.get(
        str(value).lower(), "false" if str(value).lower() == "false" else None
    )


def _as_number(value: Any, *, whole: bool) -> str | None:
    """The number that a text or a fraction such as 3.0 stands for, None when there is none."""
    if isinstance(value, str):
        text = value.strip().replace(",", ".") if value.count(",") == 1 and "." not in value else value.strip()
        try:
            value = float(text.replace("_", ""))
        except ValueError:
            return None
        if not isfinite(value):
            return None
        if not whole:
            return text
    if isinstance(value, float) and whole and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return None
