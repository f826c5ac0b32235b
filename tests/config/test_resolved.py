"""Origins, reasons, the YAML that a resolved config writes, and its hash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.config import ResolvedConfig, RunConfig, load_config, load_mapping
from affina.config.resolved import differences, has_influence, leaves
from affina.errors import AffinaError

from . import yaml_oracle


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- origins


def test_every_leaf_has_an_origin_and_nothing_else_has() -> None:
    resolved = load_config(preset="starter", overrides=["data.train=[owner/a, owner/b]"])
    assert list(resolved.origins) == [path for path, _ in leaves(resolved.config)]
    assert "data.train[1].columns.messages" in resolved.origins
    assert "data.train" not in resolved.origins
    assert resolved.origins["data.validation"].kind == "default"


def test_each_kind_of_origin_says_who_and_where(folder: Path) -> None:
    Path("run.yaml").write_text("extends: production\ntraining:\n  epochs: 2\n")
    origins = load_config(Path("run.yaml"), ["adapter.rank=8"]).origins
    assert (origins["training.epochs"].label, str(origins["training.epochs"].where)) == ("you", "run.yaml:3")
    assert (origins["adapter.rank"].label, str(origins["adapter.rank"].where)) == ("you, --set", "--set adapter.rank=8")
    assert origins["data.packing"].label == "preset production"
    assert (origins["model.dtype"].label, origins["model.dtype"].reason) == ("derived", "training.precision is bf16")
    assert origins["evaluation.match"].label == "default"
    assert origins["training.epochs"].to_dict() == {
        "kind": "user", "file": "run.yaml", "line": 3, "preset": None, "reason": None,
    }  # fmt: skip


# --- derivation


def derived(**sections: Any) -> dict[str, tuple[object, str | None]]:
    resolved = load_mapping(sections)
    values = dict(leaves(resolved.config))
    return {
        path: (values[path], origin.reason) for path, origin in resolved.origins.items() if origin.kind == "derived"
    }


def test_precision_and_dtype_follow_from_each_other() -> None:
    assert derived(training={"precision": "fp16"})["model.dtype"] == ("float16", "training.precision is fp16")
    assert derived(model={"dtype": "bfloat16"})["training.precision"] == ("bf16", "model.dtype is bfloat16")
    assert "model.dtype" not in derived(training={"precision": "bf16"}, model={"dtype": "float32"})
    assert "training.precision" not in derived()


def test_a_cpu_computes_in_float32_unless_told_otherwise() -> None:
    found = derived(training={"device": "cpu"})
    assert found["training.precision"] == ("fp32", "training.device is cpu")
    assert found["model.dtype"] == ("float32", "training.precision is fp32")
    assert "training.precision" not in derived(training={"device": "cpu", "precision": "bf16"})


def test_without_validation_records_nothing_is_measured() -> None:
    found = derived(data={"validation_fraction": 0})
    why = "there are no validation records"
    assert found["training.keep_best"] == (False, why)
    assert found["evaluation.enabled"] == (False, why)


def test_a_separate_validation_set_leaves_the_training_data_whole() -> None:
    found = derived(data={"train": "owner/a", "validation": "owner/b"})
    assert found["data.validation_fraction"] == (0.0, "data.validation is a set of its own")


def test_a_stream_has_its_steps_laid_out_at_once() -> None:
    data = {"train": "owner/a", "validation": "owner/b", "streaming": True}
    found = derived(data=data, training={"max_steps": 1000})
    assert found["training.warmup_steps"] == (30, "3% of 1000 steps")
    assert found["training.evaluate_every_steps"] == (100, "about 10 times in 1000 steps")
    assert found["training.save_every_steps"] == (100, "with every validation")


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (10, 1), (50, 2), (10_000, 300)])
def test_warm_up_is_three_percent_at_least_one_and_never_the_whole_run(steps: int, warmup: int) -> None:
    data = {"train": "owner/a", "streaming": True}
    assert derived(data=data, training={"max_steps": steps})["training.warmup_steps"][0] == warmup


def test_a_stream_without_validation_holds_nothing_out() -> None:
    found = derived(data={"train": "owner/a", "streaming": True}, training={"max_steps": 10})
    assert found["data.validation_fraction"] == (0.0, "a stream cannot be split; give data.validation to measure")
    assert found["evaluation.enabled"][0] is False


def test_steps_that_depend_on_the_data_stay_open_and_say_so() -> None:
    resolved = load_mapping({})
    assert resolved.config.training.evaluate_every_steps is None
    assert resolved.origins["training.evaluate_every_steps"].reason == "about 10 times per run"
    assert resolved.origins["training.warmup_steps"].reason == "3% of the steps, at least 1"
    assert derived(training={"evaluate_every_steps": 7})["training.save_every_steps"] == (7, "with every validation")


def test_the_engine_is_chosen_when_the_model_is_known() -> None:
    resolved = load_mapping({})
    assert resolved.config.engine.path == "auto"
    reason = "the fused decoder where it runs this model, else the reference"
    assert resolved.origins["engine.path"].reason == reason


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"rank": 16, "alpha": 32}, "the update is scaled by α/r = 2"),
        ({"rank": 64, "alpha": 32}, "the update is scaled by α/r = 0.5"),
        ({"rank": 64, "alpha": 16, "method": "rslora"}, "the update is scaled by α/√r = 2"),
    ],
)
def test_the_scale_of_the_update_is_said(adapter: dict[str, Any], reason: str) -> None:
    assert load_mapping({"adapter": adapter}).origins["adapter.alpha"].reason == reason


def test_the_rows_of_a_step_are_said() -> None:
    origins = load_config(preset="production").origins
    assert origins["training.gradient_accumulation_steps"].reason == "8 rows of up to 4096 tokens per step"


# --- round trip

_words = st.text(st.characters(codec="utf-8"), max_size=30)
_names = st.from_regex(r"[A-Za-z][A-Za-z0-9_\-]{0,8}/[A-Za-z][A-Za-z0-9_.\-]{0,8}", fullmatch=True).filter(
    lambda name: not name.startswith("affina/") and "." not in name and not _is_packed(name)
)


def _is_packed(name: str) -> bool:
    return any(word in name.lower() for word in ("gguf", "awq", "gptq", "exl", "mlx"))


_sources = st.fixed_dictionaries(
    {"path": _names},
    optional={
        "format": st.sampled_from(["auto", "messages", "text"]),
        "split": _words,
        "max_records": st.integers(1, 10**6),
        "columns": st.fixed_dictionaries({}, optional={"prompt": _words, "group": _words}),
    },
)


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """Valid configs of every section, with texts and numbers as odd as they may be."""
    positive = st.floats(1e-12, 1e6)
    return draw(
        st.fixed_dictionaries(
            {
                "data": st.fixed_dictionaries(
                    {"train": st.lists(_sources, min_size=1, max_size=3, unique_by=lambda s: s["path"])},
                    optional={
                        "system_prompt": st.none() | _words,
                        "validation_fraction": st.floats(0, 0.5),
                        "cache_directory": st.none() | _words,
                        "packing": st.booleans(),
                        "seed": st.integers(-(10**12), 10**12),
                    },
                )
            },
            optional={
                "model": st.fixed_dictionaries({"path": _names}, optional={"revision": st.none() | _words}),
                "quantization": st.fixed_dictionaries(
                    {"method": st.just("nf4")},  # the one method with which every other field has an effect
                    optional={"scale_search": st.booleans(), "skip_modules": st.lists(_words, max_size=3)},
                ),
                "adapter": st.fixed_dictionaries(
                    {},
                    optional={
                        "method": st.sampled_from(["lora", "rslora"]),
                        "rank": st.integers(1, 1024),
                        "alpha": st.floats(1e-9, 60),
                        "targets": st.just("all-linear") | st.lists(_words, min_size=1, max_size=4),
                    },
                ),
                "training": st.fixed_dictionaries(
                    {},
                    optional={
                        "epochs": positive,
                        "learning_rate": st.floats(1e-15, 0.99),
                        "adam_epsilon": positive,
                        "max_steps": st.none() | st.integers(1, 10**9),
                        "gradient_checkpointing": st.sampled_from(["auto", True, False]),
                        "precision": st.sampled_from(["auto", "bf16", "fp32"]),
                        "device": st.sampled_from(["auto", "cpu", "cuda"]),
                    },
                ),
                "tracking": st.fixed_dictionaries({"project": _words}),
                "output": st.fixed_dictionaries({"directory": _words}),
            },
        )
    )


def _resolve(mapping: dict[str, Any]) -> ResolvedConfig:
    return load_mapping(mapping)


@settings(max_examples=80, deadline=None)
@given(mappings(), st.booleans())
def test_a_config_written_as_yaml_loads_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory, mapping: dict[str, Any], comments: bool
) -> None:
    resolved = _resolve(mapping)
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(resolved.to_yaml(comments=comments), encoding="utf-8")
    again = load_config(path)
    assert again.config == resolved.config
    assert again.hash() == resolved.hash()
    assert again.to_yaml(comments=False) == resolved.to_yaml(comments=False)
    assert RunConfig.model_validate(json.loads(json.dumps(resolved.to_dict()["config"]))) == resolved.config


@settings(max_examples=40, deadline=None)
@given(mappings())
def test_readers_of_old_yaml_read_the_same_values(mapping: dict[str, Any]) -> None:
    resolved = _resolve(mapping)
    assert yaml_oracle.read_1_1(resolved.to_yaml()) == resolved.config.model_dump(mode="json")


@pytest.mark.parametrize(
    "text",
    ["yes", "null", "1e5", "0x1", ".5", "~", "- a", "a: b", "a #b", "", " a ", "é", "𝄞", "\x85",
     "\n", "'", '"', "\\", "2026-01-01", "=", "<<", "!x", "&a", "*a", "%", "@", "`", "0o7", "1:2"],
)  # fmt: skip
def test_texts_that_look_like_something_else_stay_texts(folder: Path, text: str) -> None:
    resolved = load_mapping({"data": {"system_prompt": text}})
    Path("run.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
    assert load_config(Path("run.yaml")).config.data.system_prompt == text
    assert yaml_oracle.read_1_1(resolved.to_yaml())["data"]["system_prompt"] == text


def test_the_yaml_says_where_values_come_from() -> None:
    text = load_config(preset="premium", overrides=["adapter.rank=8"]).to_yaml()
    assert "\n  rank: 8  # you, --set\n" in text
    assert "\n  format: none  # preset premium\n" in text
    assert "\n  dtype: bfloat16  # derived: training.precision is bf16\n" in text
    assert "\n  mask: assistant\n" in text
    assert "#" not in load_config(preset="premium").to_yaml(comments=False)


# --- hash


def test_the_hash_changes_with_what_can_change_a_result_only() -> None:
    base = load_config().hash()
    assert len(base) == 64
    for override in ("output.name=x", "tracking.project=x", "data.num_workers=3", "data.cache_directory=x"):
        assert load_config(overrides=[override]).hash() == base, override
    for override in ("adapter.rank=8", "training.seed=1", "data.seed=1", "evaluation.max_records=3"):
        assert load_config(overrides=[override]).hash() != base, override


def test_what_has_no_influence_on_a_result_is_what_the_hash_leaves_out() -> None:
    without = {"output.name", "output.directory", "tracking.trackers", "tracking.project", "data.num_workers",
               "data.cache_directory"}  # fmt: skip
    paths = [path for path, _ in leaves(load_config().config)]
    assert {path for path in paths if not has_influence(path)} == without


def test_differences_name_the_settings_and_both_values() -> None:
    first = load_mapping({"data": ["owner/a", "owner/b"], "adapter": {"rank": 8}}).config
    second = load_mapping({"data": ["owner/a"], "adapter": {"targets": ["q"]}}).config
    found = differences(first, second)
    assert list(found.values())[:3] == ["adapter.rank (8 -> 16)", "adapter.targets (all-linear -> [q])",
                                        "data.train[1].path (owner/b -> nothing)"]  # fmt: skip
    assert list(found)[:3] == ["adapter.rank", "adapter.targets", "data.train[1].path"]
    assert all(path.startswith("data.train[1].") for path in list(found)[3:])
    assert differences(first, first) == {}


# --- weight


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from affina.config import load_config; load_config().to_yaml();"
        "print([m for m in ('torch', 'transformers', 'datasets', 'peft', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_resolved_config_survives_pickling() -> None:
    import pickle

    resolved = load_config()
    assert pickle.loads(pickle.dumps(resolved)) == resolved
    with pytest.raises(AffinaError) as caught:
        load_mapping({"adapter": {"rank": 0}, "x": 1})
    assert pickle.loads(pickle.dumps(caught.value)).render() == caught.value.render()
