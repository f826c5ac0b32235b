"""The schema's promises: help for every field, a JSON Schema that agrees with the reader, a page that is up to date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError
from ruamel.yaml import YAML

from affina.config import RunConfig, load_config, load_mapping
from affina.config.fields import all_fields, describe
from affina.config.json_schema import DIALECT, config_json_schema
from affina.config.layers import PRESETS, preset_text
from affina.config.reference import config_reference
from affina.errors import AffinaError

VALIDATOR = jsonschema.Draft202012Validator(config_json_schema())


def test_every_field_says_what_it_is_in_one_place() -> None:
    for path, field in all_fields().items():
        assert field.description, path
        assert field.description.endswith("."), path
        assert describe(field), path


def test_sections_are_frozen_and_refuse_unknown_keys_nan_and_infinity() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.adapter.rank = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        RunConfig.model_validate({"adapter": {"rnk": 3}})
    with pytest.raises(ValidationError, match="finite"):
        RunConfig.model_validate({"training": {"epochs": float("inf")}})


def test_the_json_schema_is_itself_valid_and_names_its_dialect() -> None:
    schema = config_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == DIALECT
    assert json.loads(json.dumps(schema)) == schema


def test_every_setting_of_the_json_schema_is_described() -> None:
    schema = config_json_schema()
    for section in schema["properties"].values():
        assert section["description"]
    for name, definition in schema["$defs"].items():
        for setting, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field, (name, setting)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_whole_configs_fulfil_the_json_schema(preset: str) -> None:
    VALIDATOR.validate(YAML(typ="safe", pure=True).load(preset_text(preset)))
    VALIDATOR.validate(YAML(typ="safe", pure=True).load(load_config(preset=preset).to_yaml()))


ACCEPTED: list[dict[str, Any]] = [
    {},
    {"extends": "production"},
    {"extends": "../team.yaml"},
    {"model": "a/b", "quantization": "nf4", "adapter": "rslora", "engine": "auto", "output": "x", "tracking": []},
    {"data": "a/b"},
    {"data": ["a/b", {"path": "c/d"}]},
    {"data": {"train": "a/b", "validation": {"path": "c/d", "columns": {"prompt": "q"}}}},
    {"data": {"validation": None}},
    {"training": None},
    {"adapter": {"targets": "q_proj"}},
    {"adapter": {"targets": ["q_proj"]}},
    {"quantization": {"format": "nf4", "skip_modules": "lm_head"}},
    {"training": {"gradient_checkpointing": True, "max_steps": None, "warmup_steps": None, "epochs": 3}},
]
REFUSED: list[dict[str, Any]] = [
    {"lora_r": 3},
    {"training": {"lr": 1}},
    {"training": 5},
    {"data": {"path": "a/b"}},
    {"data": 5},
    {"data": [{"format": "text"}]},
    {"adapter": {"rank": 0}},
    {"adapter": "qlora"},
    {"training": {"learning_rate": "fast"}},
    {"training": {"packing": True}},
    {"tracking": "tb"},
    {"extends": 3},
]


@pytest.mark.parametrize("mapping", ACCEPTED, ids=json.dumps)
def test_the_json_schema_accepts_what_the_reader_accepts(mapping: dict[str, Any]) -> None:
    VALIDATOR.validate(mapping)
    if mapping.get("extends") != "../team.yaml":  # a file that this test does not have
        load_mapping(mapping)


@pytest.mark.parametrize("mapping", REFUSED, ids=json.dumps)
def test_the_json_schema_refuses_what_the_reader_refuses(mapping: dict[str, Any]) -> None:
    assert not VALIDATOR.is_valid(mapping)
    with pytest.raises(AffinaError):
        load_mapping(mapping)


def test_the_reference_page_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "config.md"
    assert page.read_text(encoding="utf-8") == config_reference(), (
        "run `affina config-schema --markdown > docs/reference/config.md`"
    )


def test_the_reference_page_names_every_setting() -> None:
    page = config_reference()
    for path in all_fields():
        assert f"| `{path.rsplit('.', 1)[-1]}` |" in page, path
