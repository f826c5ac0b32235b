"""data.max_length and the model's context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from affina.config import load_mapping
from affina.errors import AffinaErrors


@pytest.fixture
def small_model(tmp_path: Path) -> str:
    """A model folder whose config.json allows 512 tokens."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return str(tmp_path)


def test_the_default_length_fits_a_small_model(small_model: str) -> None:
    resolved = load_mapping({"model": small_model})
    assert resolved.config.data.max_length == 512
    origin = resolved.origins["data.max_length"]
    assert (origin.kind, origin.reason) == ("derived", f"{small_model} reads 512 tokens")


def test_a_length_of_the_users_or_of_a_preset_is_refused_and_not_changed(small_model: str) -> None:
    for mapping, preset in (({"data": {"max_length": 513}}, None), ({}, "starter")):
        with pytest.raises(AffinaErrors) as caught:
            load_mapping({"model": small_model, **mapping}, preset=preset)
        assert [error.code for error in caught.value.errors] == ["longer-than-context"]
        assert "write `max_length: 512` or less" in str(caught.value)


def test_a_length_that_fits_and_a_model_that_is_not_here_are_left_alone(small_model: str) -> None:
    assert load_mapping({"model": small_model, "data": {"max_length": 512}}).config.data.max_length == 512
    assert load_mapping({"model": "owner/name", "data": {"max_length": 99999}}).config.data.max_length == 99999


@pytest.mark.parametrize("validation", [None, "own"])
def test_a_presets_validation_set_goes_with_its_training_set(validation: str | None, tmp_path: Path) -> None:
    for name in ("mine", "own"):
        (tmp_path / f"{name}.jsonl").touch()
    mapping = {"extends": "laptop", "data": {"train": str(tmp_path / "mine.jsonl")}}
    if validation is not None:
        mapping["data"]["validation"] = str(tmp_path / "own.jsonl")  # type: ignore[index]
    found = load_mapping(mapping).config.data
    assert [Path(source.path).stem for source in found.validation] == ([validation] if validation else [])
    untouched = load_mapping({"extends": "laptop", "data": {"max_length": 256}}).config.data
    assert [source.path for source in untouched.validation] == ["affina/support"]
