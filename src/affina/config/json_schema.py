"""The config as JSON Schema (draft 2020-12), with the shorthands that the reader accepts, for editors and checks."""

from __future__ import annotations

from typing import Any

from affina.config.fields import SCALAR_FIELDS
from affina.config.layers import PRESETS
from affina.config.schema import RunConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def config_json_schema() -> dict[str, Any]:
    """The schema of a YAML file: sections or their shorthands, and `extends`; nothing is required."""
    schema = RunConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for definition in definitions.values():
        for field in definition.get("properties", {}).values():
            field.pop("title", None)
            _allow_single_item(field)
    _allow_source_shorthand(definitions["DataConfig"]["properties"])
    sections = {name: _section(name, definitions) for name in RunConfig.model_fields}
    return {
        "$schema": DIALECT,
        "title": "affina run",
        "description": "One fine-tuning run of affina. Every section and every setting may be left out.",
        "type": "object",
        "properties": {"extends": _extends(), **sections},
        "additionalProperties": False,
        "$defs": definitions,
    }


def _extends() -> dict[str, Any]:
    return {
        "description": "A preset, or the path of another YAML file, whose settings this file changes.",
        "anyOf": [{"enum": list(PRESETS)}, {"type": "string"}, {"type": "null"}],
    }


def _section(name: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """A section, its shorthand if it has one, or nothing at all below its name."""
    annotation = RunConfig.model_fields[name].annotation
    assert annotation is not None
    forms: list[dict[str, Any]] = [{"$ref": f"#/$defs/{annotation.__name__}"}, {"type": "null"}]
    if name in SCALAR_FIELDS:
        field = dict(definitions[annotation.__name__]["properties"][SCALAR_FIELDS[name]])
        field.pop("default", None)
        if name == "data":
            # A mapping below `data:` is always the section, never a source.
            field["anyOf"] = [form for form in field["anyOf"] if "$ref" not in form and form.get("type") != "null"]
        forms.insert(0, field)
    description = definitions[annotation.__name__].get("description", "")
    return {"description": description, "anyOf": forms}


def _allow_single_item(field: dict[str, Any]) -> None:
    """A list of plain values may be written as its only item."""
    if field.get("type") == "array" and "$ref" not in field["items"]:
        kept = {key: field.pop(key) for key in ("type", "items")}
        field["anyOf"] = [kept, kept["items"]]
    elif any(form.get("type") == "array" for form in field.get("anyOf", ())):
        field["anyOf"].append({"type": "string"})


def _allow_source_shorthand(data: dict[str, Any]) -> None:
    """A path stands for a source, and one source for a list of them."""
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/SourceConfig"}]}
    for name in ("train", "validation"):
        for key in ("type", "items"):
            data[name].pop(key)
        data[name]["anyOf"] = [*source["anyOf"], {"type": "array", "items": source}, {"type": "null"}]
