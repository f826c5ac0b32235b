"""Models load from directories, dense or quantised, and bad ones are refused with a fix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoModelForCausalLM, GPT2Config

from affina.errors import ModelError
from affina.models.compat import quiet_loading
from affina.models.load import describe_model, load_causal_lm, load_notes
from affina.models.quantized_checkpoint import save_quantized
from affina.models.safetensors_file import PlannedTensor, write_sharded
from affina.models.weights import (
    Fp4Options,
    Fp8Options,
    Int8Options,
    Nf4Linear,
    Nf4Options,
    format_of,
    quantize_linears,
    quantized_layers,
)
from tests.models.tiny import VOCABULARY, qwen3_config, random_model, save

IDS = torch.arange(20).unsqueeze(0) * 5 % VOCABULARY


def load(folder, **options):
    settings = {"dtype": torch.float32, "device": "cpu"}
    return load_causal_lm(str(folder), **(settings | options))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    model = random_model(qwen3_config(tie_word_embeddings=request.param, intermediate_size=128))
    return save(model, tmp_path_factory.mktemp("model"))


def test_a_dense_model_equals_what_transformers_loads(folder):
    model = load(folder)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._name_or_path == str(folder)


@pytest.mark.parametrize(
    "options",
    [Nf4Options(), Nf4Options(double_quantization=False), Fp4Options(), Fp8Options(), Int8Options()],
    ids=["nf4", "nf4, single", "fp4", "fp8", "int8"],
)
def test_quantising_while_reading_equals_quantising_afterwards(folder, options):
    streamed = load(folder, weight_format=options)
    afterwards = load(folder)
    quantize_linears(afterwards, options, exclude=[afterwards.get_output_embeddings()])
    assert torch.equal(logits(streamed), logits(afterwards))
    assert load_notes(streamed) == ()
    assert [format_of(layer).name for layer in quantized_layers(streamed)] == [options.name] * 14
    assert type(streamed.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("options", [Nf4Options(), Fp8Options(), Int8Options()], ids=["nf4", "fp8", "int8"])
def test_tied_embeddings_stay_tied(tmp_path, options):
    model = load(save(random_model(qwen3_config()), tmp_path), weight_format=options)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards_are_read(tmp_path):
    source = random_model(qwen3_config())
    save(source, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), logits(source))
    assert torch.isfinite(logits(load(tmp_path, weight_format=Nf4Options()))).all()


def test_a_checkpoint_with_other_names_is_quantised_in_place_and_says_so(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    model = random_model(config)
    save(model.transformer, tmp_path)  # tensors without the prefix "transformer."
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["GPT2LMHeadModel"]}))
    loaded = load(tmp_path, weight_format=Nf4Options())
    assert "loaded whole, then quantised" in load_notes(loaded)[0]
    torch.testing.assert_close(logits(loaded), logits(model))


def test_describe_model_counts_four_bit_weights_as_weights(folder):
    dense, quantized = describe_model(load(folder)), describe_model(load(folder, weight_format=Nf4Options()))
    assert dense["num_parameters"] == quantized["num_parameters"]
    assert dense["total_bytes"] == 4 * dense["num_parameters"]
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    assert quantized["num_bytes"]["nf4"] == pytest.approx(linears * 4.127 / 8, rel=0.01)
    assert quantized["num_trainable"] == 0


@pytest.mark.parametrize("options", [Fp8Options(), Int8Options()], ids=["fp8", "int8"])
def test_describe_model_counts_one_byte_a_weight_and_four_a_row(folder, options):
    dense, quantized = describe_model(load(folder)), describe_model(load(folder, weight_format=options))
    assert dense["num_parameters"] == quantized["num_parameters"]
    weights, rows = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128), 2 * (64 * 3 + 32 * 2 + 128 * 2)
    assert quantized["num_bytes"][options.name] == weights + 4 * rows
    assert quantized["total_bytes"] == dense["total_bytes"] - 4 * weights + weights + 4 * rows


# bitsandbytes' checkpoints
# ----------------------------------------------------------------------------------------------


def quantized_by_bitsandbytes(folder: Path, target: Path, dtype: torch.dtype = torch.float32) -> Path:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map="cpu")
    return save(model, target)


def test_a_model_in_eight_bits_is_read_from_bfloat16_too(folder):
    model = load(folder, dtype=torch.bfloat16, weight_format=Fp8Options(skip_modules=("down_proj",)))
    layers = quantized_layers(model)
    assert len(layers) == 12
    assert {(layer.weight.dtype, layer.scale.dtype) for layer in layers} == {(torch.float8_e4m3fn, torch.float32)}
    assert model.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_biases_are_read_beside_quantised_weights(tmp_path):
    source = random_model(qwen3_config(attention_bias=True))
    source.model.layers[1].self_attn.q_proj.bias.data.uniform_(-1, 1)
    for options in (Nf4Options(), Fp8Options(), Int8Options()):
        layer = load(save(source, tmp_path), weight_format=options).model.layers[1].self_attn.q_proj
        assert torch.equal(layer.bias, source.model.layers[1].self_attn.q_proj.bias)
        assert not layer.bias.requires_grad


@pytest.fixture(scope="module")
def pair(folder, tmp_path_factory):
    """The same model saved in 4 bits by bitsandbytes and by us."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, the oracle of this format, is not installed")
    theirs = quantized_by_bitsandbytes(folder, tmp_path_factory.mktemp("theirs"))
    ours = save_quantized(load(folder, weight_format=Nf4Options()), tmp_path_factory.mktemp("ours"))
    return theirs, ours


def test_a_saved_four_bit_model_is_the_file_that_bitsandbytes_writes(pair):
    theirs, ours = pair
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


def test_a_checkpoint_of_bitsandbytes_is_read_without_it(pair, folder):
    theirs, _ = pair
    loaded = load(theirs)
    assert torch.equal(logits(loaded), logits(load(folder, weight_format=Nf4Options())))
    assert "stays in it" in load_notes(loaded)[-1]


def load_with_bitsandbytes(folder):
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise its evaluation forward repacks the weight in place, and gradients vanish.
            module.support_avx512bf16_for_cpu = False
    return model


def test_eight_bits_asked_of_a_four_bit_checkpoint_have_no_effect_and_it_says_so(pair):
    _, ours = pair
    loaded = load(ours, weight_format=Int8Options())
    assert {format_of(layer).name for layer in quantized_layers(loaded)} == {"nf4"}
    assert load_notes(loaded) == (
        "the checkpoint is stored in nf4 and stays in it; int8 was asked for and has no effect",
    )


def test_what_a_four_bit_checkpoint_left_dense_stays_dense(folder, tmp_path):
    options = Nf4Options(skip_modules=("lm_head", "layers.0.mlp.up_proj"))
    loaded = load(save_quantized(load(folder, weight_format=options), tmp_path), weight_format=Nf4Options())
    layer = loaded.model.layers[0].mlp
    assert (type(layer.up_proj), type(layer.gate_proj)) == (torch.nn.Linear, Nf4Linear)


def test_transformers_with_bitsandbytes_loads_what_we_write(pair):
    theirs, ours = pair
    expected, found = load_with_bitsandbytes(theirs), load_with_bitsandbytes(ours)
    assert torch.equal(logits(found), logits(expected))
    # bitsandbytes multiplies in its own order; the weights are the same bits.
    torch.testing.assert_close(logits(load(ours)), logits(found), rtol=1e-4, atol=1e-4)


def test_saving_a_dense_model_in_four_bits_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match="has no quantised layers"):
        save_quantized(load(folder), tmp_path)


# Memory
# ----------------------------------------------------------------------------------------------------------------

_MEASURE = """
import sys, threading, psutil, torch
from affina.models.load import load_causal_lm, describe_model
from affina.models.weights import Fp8Options, Int8Options, Nf4Options
options = {"nf4": Nf4Options, "fp8": Fp8Options, "int8": Int8Options}[sys.argv[3]]()
process, peak, done = psutil.Process(), [0], threading.Event()
load_causal_lm(sys.argv[2], dtype=torch.bfloat16, device="cpu", weight_format=options)  # imports, tables
before = process.memory_info().rss
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], process.memory_info().rss)
thread = threading.Thread(target=watch); thread.start()
model = load_causal_lm(sys.argv[1], dtype=torch.bfloat16, device="cpu", weight_format=options)
done.set(); thread.join()
print(peak[0] - before, describe_model(model)["total_bytes"])
"""


def write_large_model(config, folder):
    """A checkpoint of the right names and shapes whose tensors are parts of one random one: quick to write."""
    folder.mkdir()
    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["Qwen3ForCausalLM"]}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    source = torch.randn(3072 * 1024).bfloat16() * 0.02
    planned = [
        PlannedTensor(
            name,
            torch.bfloat16,
            tuple(tensor.shape),
            lambda shape=tensor.shape: source[: shape.numel()].view(shape),
        )
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    ]
    write_sharded(folder, planned, max_shard_bytes=10**12)
    return folder


@pytest.mark.parametrize("name", ["nf4", "fp8"])
def test_peak_memory_while_loading_stays_near_the_finished_size(tmp_path, name):
    config = qwen3_config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=16, head_dim=64,
        num_key_value_heads=8, vocab_size=512,
    )  # fmt: skip
    large = write_large_model(config, tmp_path / "large")
    small = save(random_model(qwen3_config()), tmp_path / "small")
    dense_bytes = (large / "model.safetensors").stat().st_size
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(large), str(small), name]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    peak, final = map(int, output.split())
    assert dense_bytes > 150e6
    # Beyond the finished model: one tensor of 6 MB with its float32 blocks, and the allocator's slack.
    assert peak < final + 40e6, (
        f"peak {peak / 1e6:.0f} MB for a model of {final / 1e6:.0f} MB ({dense_bytes / 1e6:.0f})"
    )


# Errors
# ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A small valid model that a test may damage."""
    return save(random_model(qwen3_config()), tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder, **options) -> ModelError:
    with pytest.raises(ModelError) as caught:
        load(folder, **options)
    return caught.value


BOTH = pytest.mark.parametrize("weight_format", [None, Nf4Options(), Int8Options()], ids=["dense", "nf4", "int8"])


def test_a_missing_directory_is_refused():
    error = refusal("./no/such/folder")
    assert error.code == "model-not-found"
    assert "affina/nano ships with affina" in error.fix


def test_a_hub_id_without_network_is_refused():
    error = refusal("someone/some-model-that-is-not-cached")
    assert error.code == "model-unreachable"
    assert "affina/nano needs no network" in error.fix


@pytest.mark.parametrize(
    ("refused", "code", "what", "fix"),
    [
        (GatedRepoError, "model-gated", "owner/model asks you to accept its licence first", "hf auth login"),
        (RevisionNotFoundError, "model-not-found", 'owner/model has no revision "v9"', "check model.revision"),
        (RepositoryNotFoundError, "model-not-found", "no such model on the hub", "check model.path"),
        (HfHubHTTPError, "model-unreachable", "the hub cannot be reached", "give a local directory"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(monkeypatch, refused, code, what, fix):
    def refuse(*_, **__):
        raise refused("no", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    error = refusal("owner/model", revision="v9")
    assert error.code == code
    assert what in error.what
    assert fix in error.fix


def test_a_file_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    assert "is a file" in refusal(tmp_path / "model.gguf").what


def test_a_folder_without_config_is_refused(tmp_path):
    assert "has no config.json" in refusal(tmp_path).what


def test_an_adapter_given_as_model_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    error = refusal(tmp_path)
    assert error.why == "it is an adapter, not a model"
    assert "base" in error.fix


def test_a_broken_config_is_refused(copy):
    (copy / "config.json").write_text('{"model_type": ')
    error = refusal(copy)
    assert error.code == "config-damaged"
    assert str(error.where).endswith("config.json")


def test_an_unknown_model_type_is_refused(copy):
    edit_config(copy, model_type="qwen99")
    error = refusal(copy)
    assert error.code == "model-type-unknown"
    assert '"qwen99" is unknown to transformers' in error.what


def test_a_model_that_is_not_causal_is_refused(copy):
    edit_config(copy, model_type="t5")
    assert "not a causal language model" in refusal(copy).what


def test_foreign_code_is_not_run(copy):
    edit_config(copy, model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling_mystery.Mystery"})
    error = refusal(copy)
    assert error.code == "model-needs-code"
    assert "trust_remote_code: true" in error.fix


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    error = refusal(copy)
    assert error.code == "checkpoint-unsafe"
    assert "pickles" in error.why
    assert "safetensors version" in error.fix


def test_missing_weights_are_refused(copy):
    (copy / "model.safetensors").unlink()
    assert refusal(copy).code == "checkpoint-missing"


def test_a_missing_shard_is_named(tmp_path):
    save(random_model(qwen3_config()), tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    error = refusal(tmp_path)
    assert error.code == "checkpoint-incomplete"
    assert shard.name in error.what


@BOTH
@pytest.mark.parametrize("kept", [0, 5, 200, 20_000])
def test_a_file_that_was_cut_short_is_refused(copy, kept, weight_format):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(copy, weight_format=weight_format)
    assert error.code == "checkpoint-damaged"
    assert error.fix == "download it again"


@BOTH
def test_a_type_that_is_not_read_is_named(copy, weight_format):
    path = copy / "model.safetensors"
    # The header may grow over its padding only; both names have as many letters.
    content = path.read_bytes()
    assert b'"dtype":"F32"' in content
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"C64"', 1))
    error = refusal(copy, weight_format=weight_format)
    assert error.code == "checkpoint-unreadable"
    assert "has the type C64, which affina does not read" in error.what
    assert "bfloat16, float16 or float32" in error.fix
    assert str(error.where) == str(path)


@BOTH
def test_weights_of_another_shape_are_refused(copy, weight_format):
    edit_config(copy, intermediate_size=80)
    error = refusal(copy, weight_format=weight_format)
    assert error.code == "checkpoint-mismatch"
    assert "do not fit together" in error.what


@BOTH
def test_missing_tensors_are_refused_rather_than_random(copy, weight_format):
    edit_config(copy, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    error = refusal(copy, weight_format=weight_format)
    assert error.code == "checkpoint-mismatch"
    assert "layers.2" in error.what
    assert "random numbers" in error.why


@pytest.mark.parametrize(
    ("stored", "described"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "bitsandbytes"),
    ],
)
@pytest.mark.parametrize("weight_format", [None, Fp8Options(), Int8Options()], ids=["as it is", "fp8", "int8"])
def test_a_checkpoint_that_others_quantised_is_refused(copy, stored, described, weight_format):
    edit_config(copy, quantization_config=stored)
    error = refusal(copy, weight_format=weight_format)
    assert error.code == "quantization-unsupported"
    assert f"is stored quantised ({described})" in error.what


@pytest.mark.parametrize("options", [Nf4Options(), Fp8Options(), Int8Options()], ids=["nf4", "fp8", "int8"])
def test_weights_that_are_not_finite_are_named(tmp_path, options):
    model = random_model(qwen3_config())
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    error = refusal(save(model, tmp_path), weight_format=options)
    assert error.code == "weights-not-finite"
    assert "model.layers.1.mlp.up_proj.weight" in error.what
