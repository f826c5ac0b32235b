"""Parameters are counted from config.json exactly as transformers builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from affina.api import quantize
from affina.catalog.decoder import DecoderSpec
from affina.catalog.embedded import embedded_model_path
from affina.catalog.formats import FOUR_BIT_BLOCK, FOUR_BIT_NESTED_BLOCK, weight_tensors
from affina.catalog.model_files import find_config
from affina.catalog.shapes import read_shape
from affina.errors import ModelError
from affina.kernels import four_bit
from affina.kernels.code_tables import NF4
from affina.kernels.double_quantization import GROUP_SIZE
from affina.models.families import read_decoder
from affina.planning.build import checkpoint_bytes_of
from affina.planning.setup import Adapter, StepSetup


def count_on_meta(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


# The sizes of released models, as their config.json has them.
RELEASED: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151_936, tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=False,
    ),
    "Mistral-7B": MistralConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32_000, tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_as_many_parameters_as_transformers_builds(name: str) -> None:
    config = RELEASED[name]
    shape = read_shape({**config.to_dict(), "model_type": config.model_type})
    assert shape.num_parameters == count_on_meta(config)
    assert shape.is_exact


def test_the_published_counts_are_met() -> None:
    counts = {
        name: read_shape({**c.to_dict(), "model_type": c.model_type}).num_parameters for name, c in RELEASED.items()
    }
    assert counts["Llama-3.1-8B"] == 8_030_261_248
    assert counts["Mistral-7B"] == 7_241_732_096


def test_the_real_config_of_qwen3_4b_has_4_022_468_096_parameters() -> None:
    raw, _ = find_config("Qwen/Qwen3-4B")
    shape = read_shape(raw)
    assert shape.num_parameters == 4_022_468_096
    assert (shape.embedding_parameters, shape.linear_weights, shape.head_parameters) == (388_956_160, 3_633_315_840, 0)


def test_the_embedded_model_is_counted_from_its_file() -> None:
    folder = embedded_model_path("affina/nano")
    assert folder is not None
    raw = json.loads((folder / "config.json").read_text())
    assert read_shape(raw).num_parameters == count_on_meta(AutoConfig.from_pretrained(folder))


_HEADS = st.sampled_from([(2, 1), (4, 2), (4, 4), (6, 3)])


@settings(max_examples=25, deadline=None)
@given(
    family=st.sampled_from([Qwen3Config, Qwen2Config, LlamaConfig, MistralConfig]),
    heads=_HEADS,
    head_dim=st.sampled_from([8, 16, 24]),
    layers=st.integers(1, 3),
    intermediate=st.integers(1, 9),
    ties=st.booleans(),
    bias=st.booleans(),
    mlp_bias=st.booleans(),
)
def test_any_small_config_is_counted_exactly(
    family: type[PretrainedConfig], heads: tuple[int, int], head_dim: int, layers: int, intermediate: int, ties: bool,
    bias: bool, mlp_bias: bool,
) -> None:  # fmt: skip
    options: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": heads[0] * head_dim,
        "intermediate_size": 16 * intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "tie_word_embeddings": ties,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family in (Qwen3Config, LlamaConfig):
        options["attention_bias"] = bias
    if family in (Qwen3Config, MistralConfig):
        options["head_dim"] = head_dim
    if family is LlamaConfig:
        options["mlp_bias"] = mlp_bias
    config = family(**options)
    # As a config.json has it: transformers leaves out what equals its defaults.
    raw = {**json.loads(config.to_json_string(use_diff=True)), "model_type": config.model_type}
    raw.setdefault("vocab_size", 97)
    shape = read_shape(raw)
    assert shape.num_parameters == count_on_meta(config)
    assert shape.fused == read_decoder(config)


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_a_head_size_that_a_qwen3_config_leaves_out_is_that_of_its_class_whatever_its_rotation(rope: str) -> None:
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    raw = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    scaling = {"rope_type": rope, "rope_theta": 1e4} | ({"factor": 2.0} if rope == "dynamic" else {})
    shape = read_shape({**raw, "model_type": "qwen3", "rope_parameters": scaling})
    assert isinstance(shape.fused, DecoderSpec) == (rope == "default")
    assert (shape.head_dim, shape.is_exact) == (128, True)
    assert shape.num_parameters == count_on_meta(Qwen3Config(**raw, rope_parameters=scaling))


@pytest.mark.parametrize(
    ("targets", "num_linears"),
    [("all-linear", 7), (("all-linear",), 7), (("q_proj", "mlp.down_proj"), 2), ("o_proj", 1), (("proj",), 0)],
)
def test_targets_mean_the_same_layers_to_the_registry_and_to_the_plan(
    targets: str | tuple[str, ...], num_linears: int
) -> None:
    shape = read_shape(find_config("Qwen/Qwen3-4B")[0])
    setup = StepSetup(shape, Adapter(16, targets), "bf16", "none", 128, None)
    assert len(shape.linears_named(targets)) == num_linears
    assert sum(is_adapted for _, _, is_adapted in setup.linears) == num_linears * shape.num_layers


def test_a_family_that_is_not_described_is_read_like_llama_and_says_so() -> None:
    shape = read_shape({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100})
    assert not shape.is_exact
    assert (shape.hidden_size, shape.num_layers, shape.intermediate_size) == (64, 2, 256)
    assert not isinstance(shape.fused, DecoderSpec)


def test_experts_count_as_often_as_there_are() -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    moe = {**sizes, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 16, "intermediate_size": 96}
    assert sum(linear.num_weights for linear in read_shape(moe).linears[4:]) == 8 * 3 * 64 * 16


def test_a_multimodal_models_language_part_is_read() -> None:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    assert read_shape({"model_type": "gemma3", "text_config": text}).num_layers == 2


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "fp8"])
def test_a_stored_checkpoint_is_counted_as_it_is_stored(tmp_path: Path, format: Any) -> None:
    quantize("affina/nano", tmp_path / "base", format=format, report=False)
    shape = read_shape(find_config(str(tmp_path / "base"))[0])
    assert shape.stored_format == format
    on_disk = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    # A header for each tensor, and for each layer its code table: 2 KB for each of 42.
    assert 0 < on_disk - checkpoint_bytes_of(shape) < 42 * 2048


def test_a_config_without_sizes_is_refused_with_the_missing_name() -> None:
    with pytest.raises(
        ModelError, match=r"error\[config-incomplete\]: config.json does not say num_hidden_layers"
    ) as e:
        read_shape({"model_type": "llama", "hidden_size": 64}, where=Path("m/config.json"))
    assert "(m/config.json)" in str(e.value)
    assert "whole config.json" in str(e.value)


def test_blocks_are_as_large_as_the_codec_makes_them() -> None:
    assert (FOUR_BIT_BLOCK, FOUR_BIT_NESTED_BLOCK) == (four_bit.BLOCK_SIZE, GROUP_SIZE)


@pytest.mark.parametrize("double", [True, False])
@given(rows=st.integers(1, 40), columns=st.integers(1, 90))
@example(rows=257, columns=64)  # a block more than share a nested scale
@example(rows=256, columns=64)
@settings(max_examples=20, deadline=None)
def test_the_bytes_of_nf4_are_those_that_the_codec_makes(double: bool, rows: int, columns: int) -> None:
    quantized = four_bit.quantize(torch.randn(rows, columns), NF4, double_quantization=double)
    expected = weight_tensors("nf4", rows, columns, itemsize=2, double_quantization=double)
    assert sum(expected) == quantized.num_bytes


def test_double_quantisation_costs_0_127_bits_a_weight() -> None:
    assert sum(weight_tensors("nf4", 2560, 9728, itemsize=2)) * 8 / (2560 * 9728) == pytest.approx(4.127, abs=5e-4)
    assert sum(weight_tensors("int8", 256, 1024, itemsize=2)) == 256 * 1024 + 4 * 256


@pytest.mark.parametrize(
    ("stored", "format"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}, "int8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}, "fp8"),
        ({"quant_method": "gptq"}, "gptq"),
    ],
)
def test_the_format_of_a_quantised_checkpoint_is_known(stored: dict[str, object], format: str) -> None:
    _, folder = find_config("affina/nano")
    config = json.loads((folder / "config.json").read_text())
    assert read_shape({**config, "quantization_config": stored}).stored_format == format
