"""A setting that had another name once is read under both; what it is called now is said once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from affina.catalog.renamed_settings import RENAMED_SETTINGS, with_current_names
from affina.config import load_config, load_mapping, load_stored_config
from affina.config.fields import all_fields
from affina.errors import AffinaErrors

FORMER = "quantization: {method: int8}\n"
CURRENT = "quantization: {format: int8}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_names_of_today_are_fields_and_names_of_before_are_not() -> None:
    assert RENAMED_SETTINGS
    for before, now in RENAMED_SETTINGS.items():
        assert now in all_fields()
        assert before not in all_fields()
        assert before.rpartition(".")[0] == now.rpartition(".")[0]


def test_a_file_with_the_name_of_before_is_the_same_config_and_says_the_new_name_with_its_line(file: Path) -> None:
    file.write_text(f"model: affina/nano\n{CURRENT}", encoding="utf-8")
    today = load_config(file)
    file.write_text(f"model: affina/nano\n{FORMER}", encoding="utf-8")
    before = load_config(file)
    assert (before.config, before.hash()) == (today.config, today.hash())
    assert today.warnings == ()
    (note,) = before.warnings
    assert note.path == "quantization.format"
    assert note.render() == (
        f"warning: quantization.method is called quantization.format now ({file}:2)\n"
        "  why: the name of before is still read, and means the same"
    )


def test_the_name_of_before_wins_over_a_preset_and_over_the_file_that_is_extended(file: Path) -> None:
    file.write_text(f"extends: starter\n{FORMER}", encoding="utf-8")
    assert load_config(file).config.quantization.format == "int8"
    upper = file.with_name("upper.yaml")
    upper.write_text("extends: run.yaml\nquantization: {format: none}\n", encoding="utf-8")
    assert load_config(upper).config.quantization.format == "none"
    assert not [note for note in load_config(upper).warnings if "is called" in note.what]


@pytest.mark.parametrize("override", ["quantization.method=fp8", "quantization={method: fp8}"])
def test_an_override_may_use_the_name_of_before(file: Path, override: str) -> None:
    file.write_text(FORMER, encoding="utf-8")
    resolved = load_config(file, [override])
    assert resolved.config.quantization.format == "fp8"
    assert resolved.origins["quantization.format"].kind == "override"
    assert [note.what for note in resolved.warnings if "is called" in note.what] == [
        "quantization.method is called quantization.format now"
    ]


def test_a_mapping_may_use_the_name_of_before() -> None:
    resolved = load_mapping({"quantization": {"method": "nf4"}})
    assert resolved.config.quantization.format == "nf4"
    assert [note.path for note in resolved.warnings if "is called" in note.what] == ["quantization.format"]


def test_both_names_at_once_are_refused_with_the_line_of_the_old_one(file: Path) -> None:
    file.write_text("quantization:\n  format: nf4\n  method: int8\n", encoding="utf-8")
    with pytest.raises(AffinaErrors) as refused:
        load_config(file)
    (error,) = refused.value.errors
    assert error.code == "unknown-key"
    assert error.where is not None
    assert error.where.line == 3
    assert error.fix == "it is the former name of quantization.format, which is written too: keep one"


def test_a_wrong_value_under_the_name_of_before_is_told_under_the_name_of_today(file: Path) -> None:
    file.write_text("quantization: {method: 4bit}\n", encoding="utf-8")
    with pytest.raises(AffinaErrors) as refused:
        load_config(file)
    (error,) = refused.value.errors
    assert error.what == 'quantization.format is "4bit"; it takes one of none, nf4, fp4, int8, fp8'
    assert error.fix == "did you mean nf4?"


def test_the_stored_config_of_a_run_of_before_is_read_with_its_origins(file: Path) -> None:
    resolved = load_mapping({"quantization": {"format": "nf4"}})
    file.write_text(resolved.to_yaml().replace("  format: nf4", "  method: nf4"), encoding="utf-8")
    assert "method: nf4" in file.read_text(encoding="utf-8")
    origins = {
        path.replace("quantization.format", "quantization.method"): origin
        for path, origin in resolved.origins_to_dict().items()
    }
    stored = load_stored_config(file, origins)
    assert stored.config == resolved.config
    assert stored.origins == resolved.origins
    assert stored.warnings == ()


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"quantization": {"method": "nf4", "x": 1}}, {"quantization": {"format": "nf4", "x": 1}}),
        ({"quantization": {"format": "nf4", "method": "int8"}}, {"quantization": {"format": "nf4"}}),
        ({"quantization": None, "adapter": {"method": "lora"}}, {"quantization": None, "adapter": {"method": "lora"}}),
        ({}, {}),
    ],
)
def test_plain_values_get_the_names_of_today(stored: dict[str, Any], expected: dict[str, Any]) -> None:
    assert with_current_names(stored) == expected
