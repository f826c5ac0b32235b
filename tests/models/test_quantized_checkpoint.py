"""Checkpoints of every weight format: read again to the same bits, and read by the libraries they belong to."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from affina.errors import ModelError
from affina.kernels import int8
from affina.models.compat import quiet_loading
from affina.models.load import load_causal_lm, load_notes
from affina.models.quantization_plan import plan_quantization
from affina.models.quantized_checkpoint import options_of_checkpoint, save_quantized
from affina.models.safetensors_file import PlannedTensor, read_header, read_tensor, write_file
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, quantized_layers
from tests.models.tiny import qwen3_config, random_model, save

OPTIONS = [Nf4Options(), Fp4Options(), Fp4Options(double_quantization=False), Int8Options(), Fp8Options()]
every_format = pytest.mark.parametrize("options", OPTIONS, ids=["nf4", "fp4", "fp4-single", "int8", "fp8"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Widths are multiples of 64: bitsandbytes' CPU kernel (0.50.2) decodes others unlike its own reference.
    return save(random_model(qwen3_config(intermediate_size=128)), tmp_path_factory.mktemp("dense"))


def load(folder, **options):
    return load_causal_lm(str(folder), dtype=torch.float32, device="cpu", **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(40).unsqueeze(0)).logits


def state_bits(model):
    return {name: tensor.contiguous().flatten().view(torch.uint8) for name, tensor in model.state_dict().items()}


def edit_tensors(folder, edit):
    """Rewrites the weights with `edit` applied to the mapping of names to tensors."""
    path = folder / "model.safetensors"
    tensors = {name: read_tensor(spec) for name, spec in read_header(path).items()}
    edit(tensors)
    planned = [
        PlannedTensor(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    write_file(path, planned)


@every_format
def test_a_saved_model_is_read_again_to_the_same_bits(folder, tmp_path, options):
    quantized = load(folder, weight_format=options)
    loaded = load(save_quantized(quantized, tmp_path))
    before, after = state_bits(quantized), state_bits(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(loaded), logits(quantized))
    assert {type(layer) for layer in quantized_layers(loaded)} == {options.layer}
    assert load_notes(loaded) == (f"the checkpoint is stored in {options.name} and stays in it",)


@every_format
def test_the_format_of_a_checkpoint_is_read_from_its_config(folder, tmp_path, options):
    save_quantized(load(folder, weight_format=options), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    read = options_of_checkpoint(stored, "m")
    assert type(read) is type(options)
    assert read.skips("lm_head")
    assert getattr(read, "double_quantization", None) == getattr(options, "double_quantization", None)


@every_format
def test_the_plan_knows_layers_and_size_before_anything_is_read(folder, tmp_path, options):
    plan = plan_quantization(folder, options, path="m")
    assert len(plan.layers) == 2 * 7
    assert plan.dense == ("lm_head",)
    assert plan.dtype == torch.float32
    quantized = load(folder, weight_format=options)
    size = (save_quantized(quantized, tmp_path) / "model.safetensors").stat().st_size
    tables = len(plan.layers) * (2048 + 7 * 300) + 40 * 300  # what the plan allows for tables, states and the header
    assert size <= plan.num_bytes <= size + tables
    layers = quantized_layers(quantized)
    assert [options.num_bytes(x.out_features, x.in_features) for x in layers] == [x.quantized.num_bytes for x in layers]


@pytest.mark.parametrize("options", [Fp4Options(), Int8Options()], ids=["fp4", "int8"])
def test_transformers_with_bitsandbytes_reads_what_we_write(folder, tmp_path, options):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of these formats, is not installed")
    quantized = load(folder, weight_format=options)
    save_quantized(quantized, tmp_path)
    with quiet_loading():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # its evaluation forward repacks the weight in place
    spread = logits(quantized).std()
    # bitsandbytes' 8-bit product also rounds the activations to 8 bits, 0.8% of their spread in each of 14 layers.
    tolerance = 1e-4 if options.name == "fp4" else 0.05
    assert float((logits(theirs) - logits(quantized)).square().mean().sqrt()) < tolerance * float(spread)


def test_eight_bit_checkpoints_of_bitsandbytes_are_read_without_it(folder, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle, is not installed")
    from transformers import BitsAndBytesConfig

    with quiet_loading():
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )
        theirs.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    layer = loaded.model.layers[1].mlp.up_proj
    expected = theirs.model.layers[1].mlp.up_proj
    dense = bitsandbytes.functional.int8_vectorwise_dequant(expected.weight.data, expected.weight.SCB)
    assert torch.equal(layer.weight, expected.weight.data)
    # Theirs multiplies with a rounded 1/127; ours divides: one unit in the last place.
    torch.testing.assert_close(layer.dequantize(torch.float32), dense, rtol=2e-7, atol=0)


def test_fp8_checkpoints_carry_the_names_and_the_config_of_compressed_tensors(folder, tmp_path):
    save_quantized(load(folder, weight_format=Fp8Options()), tmp_path)
    specs = read_header(tmp_path / "model.safetensors")
    weight, scale = (specs[f"model.layers.0.mlp.up_proj.{key}"] for key in ("weight", "weight_scale"))
    assert (weight.dtype, weight.shape) == (torch.float8_e4m3fn, (128, 64))
    assert (scale.dtype, scale.shape) == (torch.float32, (128, 1))
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format"], stored["ignore"]) == (
        "compressed-tensors", "float-quantized", ["lm_head"],
    )  # fmt: skip


def test_transformers_with_compressed_tensors_reads_fp8(folder, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors, the reader of this format, is not installed")
    quantized = load(folder, weight_format=Fp8Options())
    save_quantized(quantized, tmp_path)
    with quiet_loading():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", dtype=torch.float32)
    torch.testing.assert_close(logits(theirs), logits(quantized), rtol=1e-5, atol=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=50))
def test_stored_maxima_give_the_same_int8_scales_bit_for_bit(maxima):
    scale = int8.scale_of(torch.tensor(maxima, dtype=torch.float32))
    assert torch.equal(int8.scale_of(int8.maxima_of(scale)), scale)


def test_the_scale_of_a_row_of_zeros_survives():
    scale = torch.ones(3)
    assert torch.equal(int8.scale_of(int8.maxima_of(scale)), scale)


# Bad checkpoints
# ------------------------------------------------------------------------------------------------------------


def refusal(folder):
    with pytest.raises(ModelError) as caught:
        load(folder)
    return caught.value


@every_format
def test_codes_without_their_scales_are_refused(folder, tmp_path, options):
    save_quantized(load(folder, weight_format=options), tmp_path)
    layer = "model.layers.1.self_attn.v_proj"

    def drop(tensors):
        for key in options.layer.file_keys()[1:]:
            tensors.pop(f"{layer}.{key}", None)

    edit_tensors(tmp_path, drop)
    error = refusal(tmp_path)
    assert error.code == "quantized-weights-unreadable"
    assert f"{layer}.weight is stored as" in error.what
    assert "without its scales" in error.what
    assert "affina quantize" in error.fix


@pytest.mark.parametrize(
    ("options", "key"), [(Int8Options(), "SCB"), (Fp8Options(), "weight_scale")], ids=["int8", "fp8"]
)
def test_scales_of_the_wrong_number_are_refused(folder, tmp_path, options, key):
    save_quantized(load(folder, weight_format=options), tmp_path)

    def cut(tensors):
        name = f"model.layers.0.mlp.down_proj.{key}"
        tensors[name] = tensors[name][:-1].clone()

    edit_tensors(tmp_path, cut)
    error = refusal(tmp_path)
    assert error.code == "quantized-weights-unreadable"
    assert f"with 63 entries in {key}" in error.what
    assert "one scale per row" in error.what


def test_another_layout_of_int8_codes_is_refused(folder, tmp_path):
    save_quantized(load(folder, weight_format=Int8Options()), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_format"].fill_(2))
    error = refusal(tmp_path)
    assert error.code == "quantized-weights-unreadable"
    assert "model.layers.0.mlp.up_proj lie in bitsandbytes' layout 2" in error.what


@pytest.mark.parametrize(
    "change",
    [
        {"format": "int-quantized"},
        {"config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}},
        {"config_groups": {}},
    ],
)
def test_other_fp8_checkpoints_are_refused_with_what_is_read(change):
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    stored = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    stored |= {"config_groups": {"group_0": {"weights": weights}}}
    assert isinstance(options_of_checkpoint(stored, "m"), Fp8Options)
    with pytest.raises(ModelError) as caught:
        options_of_checkpoint(stored | change, "m")
    assert caught.value.code == "quantization-unsupported"
    assert "one scale per channel" in caught.value.why
