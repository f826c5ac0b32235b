"""Reading: shorthands, layers, overrides, paths, and the config that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest

from affina.config import ResolvedConfig, RunConfig, load_config, load_mapping, load_stored_config
from affina.config.layers import PRESETS, preset_text
from affina.errors import AffinaError, AffinaErrors, Location


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text), encoding="utf-8")
    return path.relative_to(Path.cwd())


def resolve(folder: Path, text: str, *overrides: str) -> ResolvedConfig:
    return load_config(write(folder, text), overrides)


def test_without_a_file_the_preset_is_laptop(folder: Path) -> None:
    resolved = load_config()
    assert resolved.config.model.path == "affina/nano"
    assert resolved.config.data.train[0].path == "affina/support"
    assert resolved.config.quantization.format == "nf4"
    assert resolved.origins["quantization.format"].preset == "laptop"


def test_a_file_without_extends_stands_on_the_defaults_alone(folder: Path) -> None:
    resolved = resolve(folder, "training: {epochs: 2}\n")
    assert resolved.config.quantization.format == "none"
    assert all(origin.kind != "preset" for origin in resolved.origins.values())


def test_every_section_has_its_shorthand(folder: Path) -> None:
    (folder / "my.jsonl").touch()
    config = resolve(
        folder,
        """\
        model: Qwen/Qwen3-4B
        quantization: nf4
        adapter: rslora
        data: my.jsonl
        tracking: []
        output: elsewhere
        engine: reference
        training:
        """,
    ).config
    assert config.model.path == "Qwen/Qwen3-4B"
    assert config.quantization.format == "nf4"
    assert config.adapter.method == "rslora"
    assert [source.path for source in config.data.train] == [str(folder / "my.jsonl")]
    assert config.output.directory == "elsewhere"
    assert config.engine.path == "reference"
    assert config.training.epochs == 1.0


@pytest.mark.parametrize(
    "text",
    ["data: a.jsonl", "data: [a.jsonl]", "data: {train: a.jsonl}", "data: {train: [{path: a.jsonl}]}",
     "data: {train: {path: a.jsonl}}"],
)  # fmt: skip
def test_a_source_may_be_a_path_a_mapping_or_a_list_of_them(folder: Path, text: str) -> None:
    (folder / "a.jsonl").touch()
    config = resolve(folder, text).config
    assert [source.path for source in config.data.train] == [str(folder / "a.jsonl")]


def test_paths_and_sources_mix_in_one_list(folder: Path) -> None:
    (folder / "a.jsonl").touch()
    text = "data:\n  train:\n    - {path: a.jsonl, weight: 3}\n    - {path: owner/general, weight: 1, subset: it}\n"
    first, second = resolve(folder, text).config.data.train
    assert (first.path, first.weight) == (str(folder / "a.jsonl"), 3.0)
    assert (second.path, second.weight, second.subset) == ("owner/general", 1.0, "it")


def test_one_name_stands_for_a_list_of_one(folder: Path) -> None:
    config = resolve(folder, "adapter: {targets: q_proj}\nquantization: {format: nf4, skip_modules: head}\n").config
    assert config.adapter.targets == ("q_proj",)
    assert config.quantization.skip_modules == ("head",)


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4", "1.e-4"])
def test_every_way_to_write_a_small_number_is_a_number(folder: Path, written: str) -> None:
    resolved = resolve(folder, f"training:\n  learning_rate: {written}\n")
    assert resolved.config.training.learning_rate == 1e-4


def test_a_date_and_a_quoted_number_are_text(folder: Path) -> None:
    assert resolve(folder, "output: {name: 2026-01-31}\n").config.output.name == "2026-01-31"
    assert resolve(folder, 'output: {name: "001"}\n').config.output.name == "001"


def test_byte_order_marks_and_windows_line_ends_are_read(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"\xef\xbb\xbfadapter:\r\n  rank: 8\r\n")
    resolved = load_config(Path("run.yaml"))
    assert resolved.config.adapter.rank == 8
    assert resolved.origins["adapter.rank"].where == Location(Path("run.yaml"), 2)


def test_anchors_are_read(folder: Path) -> None:
    config = resolve(folder, "training: {seed: &seed 7}\ndata: {seed: *seed}\n").config
    assert config.training.seed == config.data.seed == 7


# --- layers


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_loads_without_a_warning_once_data_is_given(folder: Path, preset: str) -> None:
    (folder / "a.jsonl").touch()
    resolved = load_config(preset=preset, overrides=["data=a.jsonl"])
    assert resolved.warnings == ()
    assert resolved.origins["adapter.rank"].label == f"preset {preset}"


def test_presets_hold_what_they_promise() -> None:
    def facts(name: str) -> tuple[object, ...]:
        c = load_config(preset=name).config
        return (
            c.quantization.format, c.training.precision, c.model.dtype, c.adapter.rank, c.adapter.alpha,
            c.adapter.targets, c.data.max_length, c.training.micro_batch_size,
            c.training.gradient_accumulation_steps, c.training.learning_rate, c.training.schedule,
        )  # fmt: skip

    assert facts("starter") == ("nf4", "fp16", "float16", 16, 32, "all-linear", 2048, 1, 4, 2e-4, "cosine")
    assert facts("production") == ("nf4", "bf16", "bfloat16", 32, 64, "all-linear", 4096, 2, 4, 1.9e-4, "cosine")
    assert facts("premium")[:9] == ("none", "bf16", "bfloat16", 64, 128, "all-linear", 8192, 4, 2)
    laptop = load_config(preset="laptop").config
    assert (laptop.training.device, laptop.training.precision, laptop.data.max_length) == ("cpu", "fp32", 512)
    assert load_config(preset="starter").config.training.warmup_steps == 5
    assert load_config(preset="production").config.data.packing


def test_presets_explain_themselves() -> None:
    for name in PRESETS:
        comments = [line for line in preset_text(name).splitlines() if "#" in line]
        assert len(comments) >= 8, name


def test_a_file_changes_single_values_of_the_preset_that_it_extends(folder: Path) -> None:
    resolved = resolve(folder, "extends: production\nadapter:\n  rank: 8\n")
    assert (resolved.config.adapter.rank, resolved.config.adapter.alpha) == (8, 64)
    assert resolved.origins["adapter.rank"].kind == "user"
    assert resolved.origins["adapter.rank"].where == Location(Path("run.yaml"), 3)
    assert resolved.origins["adapter.alpha"].preset == "production"


def test_files_extend_each_other_in_a_chain_and_the_nearest_wins(folder: Path) -> None:
    write(folder, "extends: starter\nadapter: {rank: 4, alpha: 4}\n", "shared/base.yaml")
    write(folder, "extends: base.yaml\nadapter: {alpha: 8}\n", "shared/team.yaml")
    resolved = resolve(folder, "extends: shared/team.yaml\ntraining: {epochs: 3}\n")
    adapter = resolved.config.adapter
    assert (adapter.rank, adapter.alpha, resolved.config.training.epochs) == (4, 8, 3)
    assert resolved.origins["adapter.rank"].where == Location(Path("shared/base.yaml"), 2)
    assert resolved.config.quantization.format == "nf4"


def test_a_preset_of_the_command_line_goes_below_the_file(folder: Path) -> None:
    path = write(folder, "adapter: {rank: 8}\n")
    resolved = load_config(path, preset="premium")
    assert (resolved.config.adapter.rank, resolved.config.adapter.alpha) == (8, 128)


def test_the_same_preset_twice_is_no_conflict(folder: Path) -> None:
    path = write(folder, "extends: premium\n")
    assert load_config(path, preset="premium").config == load_config(path).config


def test_a_list_of_an_upper_layer_replaces_the_lower_one(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.jsonl").touch()
    write(folder, "data: [a.jsonl, b.jsonl]\n", "base.yaml")
    config = resolve(folder, "extends: base.yaml\ndata: {train: c.jsonl, max_length: 99}\n").config
    assert [Path(source.path).name for source in config.data.train] == ["c.jsonl"]


def test_null_takes_a_value_back_to_not_given(folder: Path) -> None:
    resolved = resolve(folder, "extends: starter\ntraining: {warmup_steps: null}\n")
    assert resolved.config.training.warmup_steps is None


# --- overrides


def test_overrides_win_over_the_file_and_the_last_of_two_wins(folder: Path) -> None:
    resolved = resolve(
        folder, "training: {learning_rate: 3e-4}\n", "training.learning_rate=1e-4", "training.learning_rate=2e-5"
    )
    assert resolved.config.training.learning_rate == 2e-5
    origin = resolved.origins["training.learning_rate"]
    assert (origin.kind, str(origin.where)) == ("override", "--set training.learning_rate=2e-5")


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("data.packing=false", "data", "packing", False),
        ("training.max_steps=null", "training", "max_steps", None),
        ("training.max_steps=", "training", "max_steps", None),
        ("adapter.targets=[q_proj, v_proj]", "adapter", "targets", ("q_proj", "v_proj")),
        ("adapter.targets=q_proj", "adapter", "targets", ("q_proj",)),
        ("engine=reference", "engine", "path", "reference"),
        ("output.name=001", "output", "name", "001"),
        ("output=2026", "output", "directory", "2026"),
        ("data.system_prompt=Answer: in one word", "data", "system_prompt", "Answer: in one word"),
        ("data.system_prompt=@you", "data", "system_prompt", "@you"),
        ("data.system_prompt=a=b", "data", "system_prompt", "a=b"),
        ("data.system_prompt='quoted'", "data", "system_prompt", "quoted"),
    ],
)
def test_the_value_of_an_override_is_yaml_or_text(
    folder: Path, override: str, section: str, name: str, value: object
) -> None:
    resolved = load_config(overrides=[override])
    assert getattr(getattr(resolved.config, section), name) == value


def test_an_override_reaches_into_the_list_of_sources(folder: Path) -> None:
    (folder / "a.jsonl").touch()
    text = "data: [a.jsonl, owner/b]\n"
    resolved = resolve(folder, text, "data.train[1].max_records=5", "data.validation=owner/c")
    assert [source.max_records for source in resolved.config.data.train] == [None, 5]
    assert resolved.origins["data.train[1].max_records"].kind == "override"
    assert resolved.config.data.validation[0].path == "owner/c"
    assert resolve(folder, text, "data.train[0]=owner/z").config.data.train[0].path == "owner/z"


# --- paths


def test_a_path_is_looked_for_beside_the_yaml_file_first(folder: Path) -> None:
    for place in (folder, folder / "configs"):
        place.mkdir(exist_ok=True)
        (place / "a.jsonl").touch()
    (folder / "only-here.jsonl").touch()
    path = write(folder, "data: [a.jsonl, only-here.jsonl, ../only-here.jsonl]\n", "configs/run.yaml")
    with pytest.raises(AffinaErrors, match="source-repeated"):
        load_config(path)
    path = write(folder, "data: [a.jsonl, only-here.jsonl]\n", "configs/run.yaml")
    first, second = load_config(path).config.data.train
    assert first.path == str(folder / "configs" / "a.jsonl")
    assert second.path == str(folder / "only-here.jsonl")


def test_folders_patterns_and_hub_ids_are_told_apart(folder: Path) -> None:
    (folder / "chats").mkdir()
    (folder / "chats" / "1.jsonl").touch()
    sources = resolve(folder, 'data: [chats, "chats/*.jsonl", owner/name, gsm8k]\n').config.data.train
    assert [source.path for source in sources] == [
        str(folder / "chats"),
        str(folder / "chats" / "*.jsonl"),
        "owner/name",
        "gsm8k",
    ]


def test_a_model_directory_beside_the_file_becomes_absolute_and_a_hub_id_stays(folder: Path) -> None:
    (folder / "models" / "tiny").mkdir(parents=True)
    assert resolve(folder, "model: models/tiny\n").config.model.path == str(folder / "models" / "tiny")
    assert resolve(folder, "model: Qwen/Qwen3-4B\n").config.model.path == "Qwen/Qwen3-4B"


def test_a_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "a.jsonl").touch()
    assert resolve(folder, "data: ~/a.jsonl\n").config.data.train[0].path == str(folder / "a.jsonl")


def test_what_a_run_writes_stays_relative_to_where_it_runs(folder: Path) -> None:
    path = write(folder, "output: results\ndata: {cache_directory: cache}\n", "configs/run.yaml")
    config = load_config(path).config
    assert (config.output.directory, config.data.cache_directory) == ("results", "cache")


# --- the Python API


def test_a_mapping_reads_like_a_file(folder: Path) -> None:
    (folder / "a.jsonl").touch()
    mapping = {"extends": "starter", "data": Path("a.jsonl"), "training": {"learning_rate": np.float64(1e-4)}}
    resolved = load_mapping(mapping, ["adapter.rank=4"])
    assert resolved.config.data.train[0].path == str(folder / "a.jsonl")
    assert type(resolved.config.training.learning_rate) is float
    assert (resolved.config.adapter.rank, resolved.config.adapter.alpha) == (4, 32)
    assert resolved.origins["training.learning_rate"].where is None
    assert mapping["extends"] == "starter", "the caller's mapping is left alone"


def test_a_mapping_may_extend_a_file(folder: Path) -> None:
    write(folder, "extends: starter\nadapter: {rank: 2}\n", "base.yaml")
    config = load_mapping({"extends": "base.yaml"}).config
    assert (config.adapter.rank, config.adapter.alpha) == (2, 32)


def test_a_config_object_keeps_only_what_was_set_as_the_users(folder: Path) -> None:
    resolved = load_mapping(RunConfig.model_validate({"adapter": {"rank": 4}}), preset="premium")
    assert resolved.origins["adapter.rank"].kind == "user"
    assert (resolved.config.adapter.rank, resolved.config.adapter.alpha) == (4, 128)


def test_a_mapping_with_other_objects_is_refused() -> None:
    with pytest.raises(AffinaError) as caught:
        load_mapping({"training": {"epochs": {1, 2}}})
    assert caught.value.what == "training.epochs is a set"
    with pytest.raises(AffinaError, match="1 is not a name"):
        load_mapping({1: "x"})  # type: ignore[dict-item]


def test_a_stored_config_is_read_even_when_its_data_is_gone(folder: Path) -> None:
    (folder / "a.jsonl").touch()
    resolved = resolve(folder, "data: a.jsonl\n")
    stored = folder / "config.yaml"
    stored.write_text(resolved.to_yaml())
    (folder / "a.jsonl").unlink()
    with pytest.raises(AffinaErrors, match="path-missing"):
        load_config(stored)
    assert load_stored_config(stored).config == resolved.config
    assert load_stored_config(stored).hash() == resolved.hash()


def test_a_stored_config_keeps_the_origins_that_were_stored_with_it(folder: Path) -> None:
    resolved = resolve(folder, "extends: starter\nadapter: {rank: 8}\n", "training.seed=1")
    (folder / "config.yaml").write_text(resolved.to_yaml())
    origins = json.loads(json.dumps(resolved.origins_to_dict()))
    stored = load_stored_config(folder / "config.yaml", origins)
    assert stored.to_yaml() == resolved.to_yaml()
    assert stored.origins_to_dict() == resolved.origins_to_dict()
    assert [origin.label for origin in stored.origins.values()] == [o.label for o in resolved.origins.values()]


def test_a_damaged_stored_config_is_refused(folder: Path) -> None:
    (folder / "config.yaml").write_text("adapter: {rank: none}\nfuture: 1\n")
    with pytest.raises(AffinaErrors) as caught:
        load_stored_config(folder / "config.yaml")
    assert [error.code for error in caught.value.errors] == ["wrong-type", "unknown-key"]


# --- configs that are compared, not run


def test_a_stored_config_takes_overrides_without_judging_combinations(folder: Path) -> None:
    stored = load_config(overrides=["training.warmup_steps=4"])
    Path("config.yaml").write_text(stored.to_yaml())
    resolved = load_stored_config(Path("config.yaml"), overrides=["training.max_steps=2"])
    assert resolved.config.training.max_steps == 2
    assert str(resolved.origins["training.max_steps"].where) == "--set training.max_steps=2"
    kept = load_stored_config(Path("config.yaml"), stored.origins_to_dict(), ["training.max_steps=2"])
    assert kept.origins["training.warmup_steps"] == stored.origins["training.warmup_steps"]
    assert kept.origins["training.max_steps"].kind == "override"
    with pytest.raises(AffinaErrors) as caught:
        load_stored_config(Path("config.yaml"), overrides=["training.max_step=2", "training.epochs=two"])
    assert [error.code for error in caught.value.errors] == ["wrong-type", "unknown-key"]


def test_the_overridden_paths_of_a_stored_config_alone_are_looked_for(folder: Path) -> None:
    Path("gone.jsonl").touch()
    Path("config.yaml").write_text(load_config(overrides=["data.train=gone.jsonl"]).to_yaml())
    Path("gone.jsonl").unlink()
    Path("here.jsonl").touch()
    resolved = load_stored_config(Path("config.yaml"), overrides=["data.train=here.jsonl"])
    assert resolved.config.data.train[0].path == str(folder / "here.jsonl")
    assert load_stored_config(Path("config.yaml")).config.data.train[0].path == str(folder / "gone.jsonl")
    with pytest.raises(AffinaErrors, match="path-missing"):
        load_stored_config(Path("config.yaml"), overrides=["data.train=gone.jsonl"])


def test_without_rules_values_are_still_checked_one_by_one() -> None:
    combination = ["training.max_steps=2", "training.warmup_steps=4"]
    assert load_config(overrides=combination, with_rules=False).config.training.warmup_steps == 4
    with pytest.raises(AffinaErrors, match="warmup-too-long"):
        load_config(overrides=combination)
    with pytest.raises(AffinaErrors, match="wrong-type"):
        load_mapping({"training": {"max_steps": "two"}}, with_rules=False)
