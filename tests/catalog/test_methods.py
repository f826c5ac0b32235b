"""The registry: complete, consistent, right about sizes, and light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.embedded import embedded_model_path
from affina.catalog.known_models import shape_of_model
from affina.catalog.method_table import method_reference, method_table
from affina.catalog.methods import (
    FIELDS,
    METHODS,
    UNVERIFIED,
    MethodName,
    PeftName,
    method_named,
    methods_that_train_on,
)
from affina.catalog.model_files import find_config
from affina.catalog.shapes import read_shape
from affina.config.schema import AdapterConfig
from affina.errors import ModelError

QWEN = shape_of_model("Qwen/Qwen3-4B")


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen3-4B-Instruct-2507", 4_022_468_096),
        ("Qwen/Qwen3-8B", 8_190_735_360),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
    ],
)
def test_parameters_of_known_models_are_those_that_their_authors_state(model, count):
    assert shape_of_model(model).num_parameters == count


@pytest.mark.parametrize(
    ("method", "changes", "count"),
    [
        ("lora", {"rank": 1}, 2_064_384),
        ("lora", {}, 33_030_144),
        ("lora", {"targets": ("q_proj", "v_proj"), "rank": 8}, 2_949_120),
        ("lora", {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}, 11_796_480),
        ("dora", {}, 34_136_064),
        ("loha", {"rank": 16}, 66_060_288),
        ("lokr", {"rank": 64}, 1_931_904),
        ("vera", {}, 1_170_432),
        ("ia3", {}, 423_936),
        ("oft", {"block_size": 64}, 30_191_616),
        ("prefix", {}, 1_474_560),
        ("prefix", {"encoder_hidden_size": 2560}, 191_461_888),
        ("prompt", {}, 51_200),
        ("ptuning", {}, 725_760),
        ("houlsby", {}, 23_781_888),
        ("pfeiffer", {}, 11_890_944),
        ("full", {}, 4_022_468_096),
    ],
)
def test_parameters_on_qwen3_4b_are_those_that_peft_makes(method, changes, count):
    # Counted on a meta model with PEFT 0.21.2, affina's own methods by hand.
    entry = METHODS[method]
    assert entry.num_parameters(QWEN, entry.settings(**changes)) == count


def test_sixteen_ranks_of_lora_are_33_million_parameters_and_132_megabytes():
    row = next(row for row in method_table("Qwen/Qwen3-4B").rows if row.method.name == "lora")
    assert row.sizes is not None
    assert (row.sizes.num_trainable, row.sizes.file_bytes) == (33_030_144, 132_120_576)
    assert row.sizes.share == pytest.approx(0.0082, abs=1e-4)
    assert row.sizes.training_bytes == 16 * 33_030_144


def test_the_names_of_the_config_are_those_of_the_registry():
    assert get_args(MethodName) == tuple(METHODS)
    assert get_args(PeftName) == tuple(UNVERIFIED)


def test_every_field_is_a_setting_of_the_config_and_of_some_method():
    assert set(FIELDS) == set(AdapterConfig.model_fields) - {"method"}
    used = {name for method in (*METHODS.values(), *UNVERIFIED.values()) for name in method.fields}
    assert used == set(FIELDS)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_an_entry_is_complete_and_consistent(method):
    assert set(method.fields) <= set(FIELDS)
    assert set(method.defaults) <= set(method.fields)
    assert method.trains_on <= {"dense", "nf4", "fp4", "fp8", "int8"}
    assert method.trains_on
    assert all((method.title, method.paper, method.summary, method.source, method.cost))
    assert isinstance(method.settings(), AdapterSettings)
    assert method.num_parameters(QWEN, method.settings()) > 0
    assert method.packs == (method.kind != "virtual tokens")
    if method.fast_engine:
        assert method.packs
    # What a server reads as it is, is a LoRA file; what is mixed in one batch too: PEFT mixes nothing else rightly.
    if method.vllm == "yes" or method.mixed_batch:
        assert method.kind == "low-rank"


def test_an_unknown_method_is_an_error_with_the_nearest_name():
    with pytest.raises(ModelError) as caught:
        method_named("adalorra")
    assert caught.value.code == "adapter-method-unknown"
    assert caught.value.fix == "did you mean adalora?"


def test_the_methods_that_train_on_a_format_are_listed():
    assert "pissa" not in methods_that_train_on("nf4")
    assert methods_that_train_on("int8") == tuple(
        n for n in METHODS if n not in ("pissa", "olora", "loftq", "full", "freeze")
    )


def test_a_model_that_is_not_known_is_an_error_that_lists_the_known_ones(tmp_path):
    with pytest.raises(ModelError) as caught:
        shape_of_model("someone/something")
    assert caught.value.code == "shape-unknown"
    assert "Qwen/Qwen3-4B" in caught.value.fix
    sizes = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    with pytest.raises(ModelError, match="is a gpt2 model, whose layers are not known"):
        shape_of_model(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "model-not-found"),
        ("{", "config-damaged"),
        ('{"model_type": "qwen3"}', "config-incomplete"),
        ('{"model_type": "llama", "hidden_size": "x"}', "config-incomplete"),
    ],
)
def test_a_config_that_is_missing_damaged_or_incomplete_is_told(tmp_path, content, code):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        shape_of_model(str(tmp_path))
    assert caught.value.code == code


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_snapshot_that_a_plan_reads_is_the_one_that_is_counted(tmp_path, monkeypatch, variable):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    below = {"HF_HUB_CACHE": "", "HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub"}[variable]
    cached = tmp_path / below / "models--me--mine"
    nano = json.loads((embedded_model_path("affina/nano") / "config.json").read_text())
    for commit, layers in (("abc", 2), ("fed", 4)):  # main is the first, by its name the second would be newer
        folder = cached / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**nano, "num_hidden_layers": layers, "layer_types": None}))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert shape_of_model("me/mine").num_layers == 2
    assert read_shape(find_config("me/mine")[0]) == shape_of_model("me/mine")


def test_the_reference_page_is_up_to_date():
    page = Path(__file__).parents[2] / "docs" / "reference" / "methods.md"
    assert page.read_text(encoding="utf-8") == method_reference(), (
        "run `affina methods --markdown > docs/reference/methods.md`"
    )


def test_the_command_takes_less_than_a_second_and_no_torch():
    code = (
        "import sys; from affina.cli.main import run\n"
        "status = run(['methods', '--model', 'Qwen/Qwen3-4B', '--json'])\n"
        "assert status == 0\n"
        "loaded = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import time; print(time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Of one core, whatever else runs on the machine; about 0.4 s.
    assert float(done.stderr.split()[-1]) < 1.0
    table = json.loads(done.stdout)
    assert (table["num_parameters"], len(table["methods"])) == (4_022_468_096, len(METHODS))
    assert table["methods"][0]["sizes"]["num_trainable"] == 33_030_144


def test_the_table_is_readable_in_a_terminal(capsys):
    from affina.cli.main import run

    assert run(["methods", "--model", "affina/nano"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sizes, abilities = "trained share file memory", "trains on merges recomputes swap mix vLLM llama.cpp fast"
    assert lines[0].split() == f"method {sizes} {abilities}".split()
    assert max(map(len, lines[: len(METHODS) + 1])) < 140
    assert lines[2].split()[-7:] == ["yes", "yes", "yes", "yes", "yes", "converted", "yes"]  # rslora
    assert lines[1].split()[0] == "lora"
    assert "all" in lines[1].split()  # the formats that it trains on
    assert run(["methods", "--model", "nowhere"]) == 1
    assert "shape-unknown" in capsys.readouterr().err
    assert run(["methods", "--markdown", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["markdown"].startswith("# Adapter methods")
