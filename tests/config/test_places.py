"""An error of loading is told with the line, or the override, of the setting that it is about."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from affina.config import ResolvedConfig, load_config, load_mapping, load_stored_config
from affina.config.fields import all_fields
from affina.config.places import SETTINGS_OF_ERRORS, place_error
from affina.errors import AffinaErrors, DataError, ExportError, Location, ModelError

SOURCE = Path(__file__).parents[2] / "src" / "affina"

TEXT = """\
extends: starter
model:
  path: owner/model
  revision: main
adapter:
  targets: [q_porj]
data:
  train:
    - owner/first
    - owner/second
    - owner/second-part
  validation: owner/held-out
  max_length: 512
training:
  device: cuda
"""


@pytest.fixture
def resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResolvedConfig:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(TEXT)
    return load_config(Path("run.yaml"), ["training.precision=fp16"])


def place(code: str, what: str, resolved: ResolvedConfig) -> str:
    error = ModelError(code, what, fix="do this")
    place_error(error, resolved)
    return str(error.where)


@pytest.mark.parametrize(
    ("code", "what", "where"),
    [
        ("target-unmatched", 'adapter.targets "q_porj" matches nothing', "run.yaml:6"),
        ("device-unavailable", "training.device is cuda, but torch sees no CUDA device", "run.yaml:15"),
        ("precision-unsupported", "training.precision is fp16 on a CPU", "--set training.precision=fp16"),
        ("longer-than-context", "data.max_length is 512 tokens; owner/model reads 256", "run.yaml:13"),
        ("model-unreachable", "owner/model is not on this machine", "run.yaml:3"),
        ("model-not-found", "there is no directory owner/model and no such model on the hub", "run.yaml:3"),
        ("model-not-found", 'owner/model has no revision "main"', "run.yaml:4"),
        ("hub-dataset", "owner/second is neither a file nor a folder here", "run.yaml:10"),
        ("hub-dataset", "owner/second-part is neither a file nor a folder here", "run.yaml:11"),
        ("hub-offline", "owner/held-out is neither a file nor a folder here", "run.yaml:12"),
        ("packing-unsupported", "X is not causal; packed attention is", "None"),  # the preset's choice, not the user's
        ("out-of-memory", "the device ran out of memory", "None"),
    ],
)
def test_an_error_leads_to_the_setting_it_is_about(code: str, what: str, where: str, resolved: ResolvedConfig) -> None:
    assert place(code, what, resolved) == where


def test_the_place_is_part_of_the_text_and_of_the_json(resolved: ResolvedConfig) -> None:
    error = ModelError("target-unmatched", 'adapter.targets "q_porj" matches nothing', fix="did you mean q_proj?")
    place_error(error, resolved)
    assert str(error).splitlines()[0] == (
        'error[target-unmatched]: adapter.targets "q_porj" matches nothing (run.yaml:6)'
    )
    assert (error.to_dict()["file"], error.to_dict()["line"]) == ("run.yaml", 6)


def test_an_error_that_knows_its_place_keeps_it(resolved: ResolvedConfig) -> None:
    error = ModelError("model-not-found", "x", where=Location("config.json"))
    place_error(error, resolved)
    assert str(error.where) == "config.json"


def test_where_a_merge_writes_is_no_setting(resolved: ResolvedConfig) -> None:
    error = ExportError("disk-full", "the merged model needs more")
    place_error(error, load_config(Path("run.yaml"), ["output.directory=elsewhere"]))
    assert error.where is None


def test_each_error_of_several_gets_its_own_place(resolved: ResolvedConfig) -> None:
    summary = DataError("bad-records", "2 bad records")
    group = AffinaErrors([ModelError("model-gated", "owner/model"), DataError("hub-dataset", "owner/first")], summary)
    place_error(group, resolved)
    assert [str(part.where) for part in group.parts] == ["None", "run.yaml:3", "run.yaml:9"]
    assert "(run.yaml:9)" in str(group)


def test_values_from_python_have_no_place() -> None:
    resolved = load_mapping({"model": "owner/model", "training": {"device": "cuda"}})
    assert place("device-unavailable", "training.device is cuda", resolved) == "None"


def test_the_values_of_a_run_are_in_its_own_config(resolved: ResolvedConfig) -> None:
    Path("config.yaml").write_text(resolved.to_yaml())
    line = resolved.to_yaml().splitlines().index("  device: cuda  # you") + 1
    stored = load_stored_config(Path("config.yaml"))
    assert place("device-unavailable", "training.device is cuda", stored) == f"config.yaml:{line}"


def test_the_table_names_settings_and_codes_that_exist() -> None:
    fields = set(all_fields())
    assert {path for paths in SETTINGS_OF_ERRORS.values() for path in paths} <= fields
    texts = {
        node.value
        for file in SOURCE.rglob("*.py")
        if file.name != "places.py"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(SETTINGS_OF_ERRORS) <= texts
