"""Combinations that cannot train are refused, settings without effect are said, and what is right stays silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from affina.catalog.methods import METHODS
from affina.config import load_config, load_mapping, rules
from affina.errors import AffinaError, AffinaErrors


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    return tmp_path


@pytest.fixture(autouse=True)
def every_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_is_installed", lambda module: True)


def refusals(mapping: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        load_mapping(mapping)
    except AffinaErrors as caught:
        return [(error.code, error.what) for error in caught.errors]
    return []


def notes(mapping: dict[str, Any], preset: str | None = None) -> list[tuple[str, str, str]]:
    return [(note.path, note.what, note.why) for note in load_mapping(mapping, preset=preset).warnings]


STREAM: dict[str, Any] = {"data": {"train": "owner/a", "streaming": True}}


@pytest.mark.parametrize(
    ("mapping", "code", "what", "remedied"),
    [
        ({"model": "Qwen/Qwen3-4B-GGUF"}, "model-not-trainable",
         'model.path is "Qwen/Qwen3-4B-GGUF", whose weights are in the format GGUF', {"model": "Qwen/Qwen3-4B"}),
        ({"model": "x/y-GPTQ-Int4"}, "model-not-trainable",
         'model.path is "x/y-GPTQ-Int4", whose weights are in the format GPTQ',
         {"model": "unsloth/y-unsloth-bnb-4bit"}),
        (STREAM, "streaming-without-max-steps", "data.streaming is true and training.max_steps is not given",
         STREAM | {"training": {"max_steps": 10}}),
        ({"data": STREAM["data"] | {"validation_fraction": 0.1}, "training": {"max_steps": 10}}, "streaming-split",
         "data.streaming is true and data.validation_fraction is 0.1",
         {"data": STREAM["data"] | {"validation": "owner/b"}, "training": {"max_steps": 10}}),
        ({"data": STREAM["data"] | {"deduplicate": "near"}, "training": {"max_steps": 10}}, "streaming-deduplicate",
         "data.streaming is true and data.deduplicate is near", {"data": {"deduplicate": "near"}}),
        ({"quantization": {"scale_search": True}}, "scale-search-without-4bit",
         "quantization.scale_search is true and quantization.format is none",
         {"quantization": {"scale_search": True, "format": "nf4"}}),
        ({"quantization": {"scale_search": True, "format": "fp8"}}, "scale-search-without-4bit",
         "quantization.scale_search is true and quantization.format is fp8",
         {"quantization": {"scale_search": False, "format": "fp8"}}),
        ({"engine": {"memory": "lowest"}, "training": {"gradient_checkpointing": False}}, "lowest-keeps-activations",
         "engine.memory is lowest and training.gradient_checkpointing is false",
         {"engine": {"memory": "lowest"}, "training": {"gradient_checkpointing": True}}),
        ({"training": {"precision": "fp16", "device": "cpu"}}, "fp16-on-cpu",
         "training.precision is fp16 and training.device is cpu", {"training": {"precision": "bf16", "device": "cpu"}}),
        ({"model": {"dtype": "float16"}, "training": {"device": "cpu"}}, "fp16-on-cpu",
         "training.precision is fp16 and training.device is cpu", {"model": {"dtype": "float32"}}),
        ({"adapter": {"rank": 1025}}, "rank-too-large", "adapter.rank is 1025; the largest is 1024",
         {"adapter": {"rank": 1024}}),
        ({"adapter": {"alpha": 2000}}, "adapter-scale-too-large",
         "adapter.alpha 2000 with rank 16 scales the update by 125 (alpha / rank)", {"adapter": {"alpha": 1000}}),
        ({"adapter": {"alpha": 512, "rank": 16, "method": "rslora"}}, "adapter-scale-too-large",
         "adapter.alpha 512 with rank 16 scales the update by 128 (alpha / sqrt(rank))",
         {"adapter": {"alpha": 256, "rank": 16, "method": "rslora"}}),
        ({"adapter": {"targets": []}}, "no-targets", "adapter.targets is an empty list",
         {"adapter": {"targets": ["q"]}}),
        ({"training": {"warmup_steps": 5, "max_steps": 5}}, "warmup-too-long",
         "training.warmup_steps is 5 and training.max_steps is 5", {"training": {"warmup_steps": 4, "max_steps": 5}}),
        ({"data": []}, "no-training-data", "data.train is an empty list", {"data": "a.jsonl"}),
        ({"data": [{"path": "owner/a", "weight": 1}, "owner/b"]}, "weights-incomplete",
         "data.train[1] has no weight, other sources have one",
         {"data": [{"path": "owner/a", "weight": 1}, {"path": "owner/b", "weight": 1}]}),
        ({"data": ["owner/a", "owner/a"]}, "source-repeated", 'data.train[1] is "owner/a", as data.train[0] is',
         {"data": [{"path": "owner/a", "subset": "x"}, {"path": "owner/a", "subset": "y"}]}),
        ({"data": {"train": "owner/a", "validation": "owner/a"}}, "validation-is-training",
         'data.validation[0] is "owner/a", as data.train[0] is',
         {"data": {"train": "owner/a", "validation": {"path": "owner/a", "split": "test"}}}),
        ({"data": {"validation_fraction": 0}, "evaluation": {"enabled": True}}, "evaluation-without-records",
         "evaluation.enabled is true, and there are no validation records", {"data": {"validation_fraction": 0}}),
        ({"output": {"name": "a/b"}}, "name-not-usable", 'output.name is "a/b", which cannot be the name of a folder',
         {"output": {"name": "a b"}}),
        ({"output": {"name": ".."}}, "name-not-usable", 'output.name is "..", which cannot be the name of a folder',
         {"output": {"name": "..x"}}),
        ({"output": {"name": " "}}, "name-not-usable", 'output.name is " ", which cannot be the name of a folder',
         {"output": {"name": None}}),
    ],
)  # fmt: skip
def test_an_impossible_combination_is_refused_and_its_remedy_is_not(
    mapping: dict[str, Any], code: str, what: str, remedied: dict[str, Any]
) -> None:
    assert (code, what) in refusals(mapping)
    assert refusals(remedied) == []


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimiser_needs_its_package(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = {"training": {"optimizer": optimizer}}
    assert refusals(mapping) == []
    monkeypatch.setattr(rules, "_is_installed", lambda module: module != "bitsandbytes")
    with pytest.raises(AffinaErrors) as caught:
        load_mapping(mapping)
    assert caught.value.code == "optimizer-without-package"
    assert caught.value.what == f"training.optimizer is {optimizer}, and bitsandbytes is not installed"
    assert caught.value.fix == 'run `pip install "affina[gpu]"`, or write `optimizer: adamw`'
    assert refusals({"training": {"optimizer": "adafactor"}}) == []


def test_a_tracker_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_is_installed", lambda module: module == "tensorboard")
    assert refusals({"tracking": "tensorboard"}) == []
    with pytest.raises(AffinaErrors) as caught:
        load_mapping({"tracking": ["tensorboard", "wandb", "mlflow"]})
    assert caught.value.code == "tracker-without-package"
    assert caught.value.what == "tracking.trackers has wandb and mlflow, which are not installed"
    assert caught.value.fix == 'run `pip install "affina[wandb,mlflow]"`, or take them out'


def test_whether_a_package_is_installed_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert rules._is_installed("pydantic")
    assert not rules._is_installed("surely_not_installed")


def test_the_place_of_an_error_is_the_setting_that_the_user_wrote() -> None:
    Path("run.yaml").write_text("extends: starter\n\ntraining:\n  device: cpu\n")
    with pytest.raises(AffinaErrors) as caught:
        load_config(Path("run.yaml"))
    assert (caught.value.code, str(caught.value.where)) == ("fp16-on-cpu", "run.yaml:4")


def test_rules_know_the_fields_that_they_read() -> None:
    from affina.config.fields import all_fields

    assert {path for paths, _ in rules.RULES for path in paths} <= set(all_fields())


def test_each_tracker_of_the_schema_has_its_package() -> None:
    from affina.config.fields import all_fields

    annotation = str(all_fields()["tracking.trackers"].annotation)
    assert all(f"'{name}'" in annotation for name in rules.TRACKER_MODULES)
    assert annotation.count("'") == 2 * len(rules.TRACKER_MODULES)


# --- notes


@pytest.mark.parametrize(
    ("mapping", "path", "why"),
    [
        ({"quantization": {"double_quantization": True}}, "quantization.double_quantization",
         "quantization.format is none"),
        ({"quantization": {"skip_modules": ["x"]}}, "quantization.skip_modules", "quantization.format is none"),
        ({"quantization": {"format": "fp8", "skip_modules": ["x"], "double_quantization": True}},
         "quantization.double_quantization", "quantization.format is fp8"),
        ({"quantization": {"format": "int8", "scale_search": False}}, "quantization.scale_search",
         "quantization.format is int8"),
        ({"model": {"revision": "main"}}, "model.revision", "affina/nano ships with affina"),
        ({"model": {"trust_remote_code": True}}, "model.trust_remote_code", "affina/nano ships with affina"),
        ({"data": {"validation": "owner/v", "validation_fraction": 0.2}}, "data.validation_fraction",
         "data.validation is given"),
        ({"data": {"validation": "owner/v", "max_validation_records": 2}}, "data.max_validation_records",
         "data.validation is given, and used whole"),
        ({"data": {"validation_fraction": 0, "max_validation_records": 2}}, "data.max_validation_records",
         "data.validation_fraction is 0"),
        ({"data": {"train": "owner/a", "streaming": True}, "training": {"max_steps": 9, "epochs": 2}},
         "training.epochs", "a stream ends at training.max_steps"),
        ({"data": [{"path": "owner/a", "weight": 2}]}, "data.train[0].weight", "there is one source"),
        ({"data": {"validation": [{"path": "owner/v", "weight": 2}]}}, "data.validation[0].weight",
         "validation records are used as they are"),
        ({"data": [{"path": "affina/support", "split": "test"}]}, "data.train[0].split",
         "affina/support is not a hub dataset"),
        ({"data": {"train": [{"path": "owner/a", "format": "text"}], "mask": "last"}}, "data.mask",
         "plain text has no turns; every token is trained"),
        ({"training": {"optimizer": "adafactor", "adam_beta1": 0.8}}, "training.adam_beta1",
         "training.optimizer is adafactor"),
        ({"training": {"schedule": "constant", "min_learning_rate_ratio": 0.1}}, "training.min_learning_rate_ratio",
         "training.schedule is constant"),
        ({"training": {"max_steps": 9, "evaluate_every_steps": 10}}, "training.evaluate_every_steps",
         "the run ends at step 9; its only validation is at the end"),
        ({"training": {"max_steps": 9, "save_every_steps": 10}}, "training.save_every_steps",
         "the run ends at step 9; its only checkpoint is at the end"),
        ({"data": {"validation_fraction": 0}, "training": {"keep_best": True}}, "training.keep_best",
         "there are no validation records"),
        ({"data": {"validation_fraction": 0}, "training": {"early_stopping_patience": 2}},
         "training.early_stopping_patience", "there are no validation records"),
        ({"data": {"validation_fraction": 0}, "training": {"evaluate_every_steps": 2}},
         "training.evaluate_every_steps", "there are no validation records"),
        ({"evaluation": {"max_generations": 0, "match": "json"}}, "evaluation.match",
         "evaluation.max_generations is 0"),
        ({"tracking": {"project": "x"}}, "tracking.project", "tracking.trackers is empty"),
    ],
)  # fmt: skip
def test_a_setting_without_effect_is_said(mapping: dict[str, Any], path: str, why: str) -> None:
    assert notes(mapping) == [(path, f"{path} has no effect", why)]


@pytest.mark.parametrize(
    ("mapping", "what"),
    [
        ({"model": "owner/m"}, "owner/m is trained on the built-in data set"),
        ({"model": "owner/m", "data": "owner/a", "training": {"learning_rate": 2e-3}},
         "training.learning_rate 0.002 is high"),
        ({"model": "owner/m", "data": "owner/a", "training": {"learning_rate": 1e-5}},
         "training.learning_rate 1e-05 is low"),
        ({"training": {"micro_batch_size": 16, "gradient_accumulation_steps": 16}}, "a step has 256 rows"),
        ({"adapter": {"alpha": 160}}, "the adapter's update is scaled by 10"),
        ({"data": {"truncation": "split", "mask": "last"}}, "data.truncation split goes badly with data.mask last"),
        ({"training": {"optimizer": "paged_adamw_8bit", "device": "cpu"}},
         "training.optimizer paged_adamw_8bit does not page here"),
        ({"model": {"path": "Qwen/Qwen3-4B", "trust_remote_code": True}, "data": "owner/a"},
         "Qwen/Qwen3-4B needs no remote code"),
    ],
)  # fmt: skip
def test_a_setting_that_seldom_means_what_was_wished_is_said(mapping: dict[str, Any], what: str) -> None:
    assert [note[1] for note in notes(mapping)] == [what]


def test_rslora_on_a_preset_says_which_alpha_keeps_the_scale() -> None:
    (note,) = notes({"adapter": "rslora", "data": "owner/a"}, preset="premium")
    assert note == (
        "adapter.method",
        "the adapter's update is scaled by 16",
        "rslora divides alpha by sqrt(64), not by 64; lora's scale 2 needs alpha 16 here",
    )


def test_what_a_preset_sets_is_never_reported_as_without_effect() -> None:
    assert notes({"quantization": "none", "data": "owner/a"}, preset="production") == []


def test_a_note_carries_its_line_and_reads_like_an_error() -> None:
    Path("run.yaml").write_text("tracking:\n  project: x\n")
    (note,) = load_config(Path("run.yaml")).warnings
    assert note.render() == ("warning: tracking.project has no effect (run.yaml:2)\n  why: tracking.trackers is empty")
    assert note.to_dict()["line"] == 2


def test_a_revision_of_a_local_directory_has_no_effect(folder: Path) -> None:
    (folder / "m").mkdir()
    (note,) = notes({"model": {"path": "m", "revision": "main"}, "data": "owner/a"})
    assert note[1:] == ("model.revision has no effect", f"{folder / 'm'} is a directory")


def test_a_preset_s_warm_up_does_not_forbid_a_short_run_but_is_said() -> None:
    resolved = load_mapping({"extends": "laptop", "training": {"max_steps": 2}})
    assert [note.path for note in resolved.warnings] == ["training.warmup_steps"]
    assert "the learning rate does not reach its peak" in resolved.warnings[0].render()


# --- adapter methods


def resolve(preset: str | None = None, **sections: Any) -> Any:
    return load_mapping({"data": "owner/a", **sections}, preset=preset)


@pytest.mark.parametrize(
    ("adapter", "what", "why"),
    [
        (
            {"method": "prefix", "rank": 8},
            "adapter.rank is given, and prefix tuning has no such setting",
            "prefix has num_virtual_tokens, encoder_hidden_size; rank is a setting of lora, rslora",
        ),
        (
            {"method": "lora", "block_size": 8},
            "adapter.block_size is given, and LoRA has no such setting",
            "lora has rank, alpha, dropout, targets; block_size is a setting of oft, boft",
        ),
        (
            {"method": "layernorm", "targets": ["q_proj"]},
            "adapter.targets is given, and LayerNorm tuning has no such setting",
            "layernorm has no settings",
        ),
        (
            {"method": "lora", "options": {"r": 8}},
            "adapter.options is given, and LoRA has no such setting",
            "options is a setting of PEFT methods that affina does not verify",
        ),
    ],
)
def test_a_setting_that_the_method_has_not_is_an_error_that_lists_those_it_has(adapter, what, why) -> None:
    with pytest.raises(AffinaError) as caught:
        resolve(adapter=adapter)
    assert caught.value.code == "adapter-setting-unused"
    assert caught.value.what == what
    assert why in caught.value.why


@pytest.mark.parametrize(
    ("sections", "code", "fix"),
    [
        (
            {"adapter": "pissa", "quantization": "nf4"},
            "adapter-unsupported",
            "write `quantization: none`, or `adapter: loftq`",
        ),
        (
            {"adapter": "olora", "quantization": "int8"},
            "adapter-unsupported",
            "write `quantization: none`, or `adapter: lora`",
        ),
        ({"adapter": "loftq"}, "adapter-unsupported", "write `quantization: nf4`, or `adapter: pissa`"),
        (
            {"adapter": "full", "quantization": "nf4"},
            "adapter-unsupported",
            "write `quantization: none`, or `adapter: lora`",
        ),
        ({"adapter": "hra", "quantization": "int8"}, "adapter-unsupported", "write `quantization: none`"),
        (
            {"adapter": "prefix", "training": {"gradient_checkpointing": True}},
            "adapter-without-checkpointing",
            "write `adapter: prompt` or `adapter: ptuning`",
        ),
        (
            {"adapter": {"method": "adalora", "rank": 16, "initial_rank": 8}},
            "initial-rank-too-small",
            "write `initial_rank: 24`",
        ),
        (
            {
                "adapter": "eva",
                "data": {"train": "owner/a", "streaming": True, "validation_fraction": 0.0},
                "training": {"max_steps": 5},
            },
            "eva-with-streaming",
            "turn data.streaming off",
        ),
        (
            {
                "adapter": {"method": "prompt", "num_virtual_tokens": 600},
                "model": "affina/nano",
                "data": {"max_length": 512},
            },
            "longer-than-context",
            "write `max_length: 424` or less",
        ),
    ],
)
def test_what_a_method_cannot_do_is_an_error_with_the_nearest_that_works(sections, code, fix) -> None:
    with pytest.raises(AffinaError) as caught:
        resolve(**sections)
    assert caught.value.code == code
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (
            "full",
            "what full fine-tuning saves are weights of a causal language model, which has no reward model's",
        ),
        ("freeze", "what last-layer tuning saves are weights of a causal language model, which has no reward model's"),
        ("pissa", "PiSSA is a trained adapter beside a frozen one, and PEFT gives a head to one adapter alone"),
        ("prompt", "affina has not verified that prompt tuning keeps a reward model's head"),
        ("hra", "affina has not verified that hra of PEFT keeps a reward model's head"),
    ],
)
def test_a_method_that_keeps_no_head_is_refused_for_a_reward_model(method: str, why: str) -> None:
    with pytest.raises(AffinaError) as caught:
        resolve(adapter=method, training={"objective": "reward"})
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == f"adapter.method is {method} and training.objective is reward"
    assert why in caught.value.why
    assert caught.value.fix == "write `adapter: lora`, or an objective without a head, such as `objective: dpo`"
    for remedied in ({"adapter": "lora", "training": {"objective": "reward"}},
                     {"adapter": method, "training": {"objective": "dpo"}}):  # fmt: skip
        resolve(**remedied)


def test_full_fine_tuning_is_refused_where_the_vocabulary_is_kept_as_codes() -> None:
    with pytest.raises(AffinaError) as caught:
        resolve(adapter="full", engine={"memory": "lowest"})
    assert caught.value.code == "adapter-unsupported"
    assert caught.value.what == "adapter.method is full and engine.memory is lowest"
    assert caught.value.why == "lowest keeps embedding and head in int8, whose codes cannot be trained"
    assert caught.value.fix == "write `memory: auto`, or `adapter: lora`"
    for remedied in ({"adapter": "full"}, {"adapter": "lora", "engine": {"memory": "lowest"}},
                     {"adapter": "freeze", "engine": {"memory": "lowest"}}):  # fmt: skip
        resolve(**remedied)


def test_a_methods_own_defaults_are_derived_with_their_source() -> None:
    config = resolve(adapter="vera")
    assert config.config.adapter.rank == 256
    assert config.origins["adapter.rank"].kind == "derived"
    assert "arXiv:2310.11454" in config.origins["adapter.rank"].reason
    assert config.config.training.learning_rate == pytest.approx(2e-3)
    assert resolve(adapter="prefix").config.training.gradient_checkpointing is False
    assert resolve(adapter={"method": "adalora", "rank": 8}).config.adapter.initial_rank == 12
    assert resolve(adapter="ia3").config.adapter.targets == ("k_proj", "v_proj", "down_proj")
    assert resolve().config.adapter.initial_rank is None


def test_what_the_user_wrote_is_never_replaced_by_a_methods_default() -> None:
    config = resolve(adapter={"method": "vera", "rank": 32}, training={"learning_rate": 1e-3}).config
    assert (config.adapter.rank, config.training.learning_rate) == (32, 1e-3)


def test_a_presets_rank_is_meant_for_lora_and_its_relatives() -> None:
    config = resolve(preset="premium", adapter="dora").config
    assert config.adapter.rank == load_mapping({"data": "owner/a"}, preset="premium").config.adapter.rank
    assert resolve(preset="premium", adapter="vera").config.adapter.rank == 256
    assert resolve(preset="premium", adapter="prefix").config.adapter.rank == 16  # the schema's: it has none


@pytest.mark.parametrize("method", METHODS)
def test_the_written_config_of_every_method_loads_to_an_equal_one(method: str, tmp_path: Path) -> None:
    formats = METHODS[method].trains_on
    resolved = resolve(preset="premium", adapter=method, quantization="none" if "dense" in formats else "nf4")
    file = tmp_path / "run.yaml"
    file.write_text(resolved.to_yaml())
    assert load_config(file).config == resolved.config


def test_options_of_another_peft_method_come_through_and_it_is_noted_as_unverified() -> None:
    config = resolve(adapter={"method": "hra", "options": {"r": 8, "apply_GS": True}})
    assert config.config.adapter.options == {"r": 8, "apply_GS": True}
    assert [note.what for note in config.warnings] == ["adapter.method hra is not verified"]


def test_a_setting_with_its_default_value_is_only_noted() -> None:
    notes = [note.what for note in resolve(adapter={"method": "prefix", "rank": 16}).warnings]
    assert notes == ["adapter.rank has no effect"]
