"""`quantize` writes what is in memory, all or nothing, and refuses what it cannot do before it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config

from affina.errors import ExportError, ModelError
from affina.export import output as output_module
from affina.export import quantize as quantize_module
from affina.export.quantize import REPORT_FILE, quantize
from affina.models.load import load_causal_lm
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, quantized_layers
from tests.models.tiny import qwen3_config, random_model, save


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save(random_model(qwen3_config(), dtype=torch.bfloat16), tmp_path_factory.mktemp("base"))
    (folder / "LICENSE").write_text("yours")
    return folder


def refusal(base, output, options=None, **settings):
    with pytest.raises(ExportError) as caught:
        quantize(str(base), output, options or Nf4Options(), **settings)
    return caught.value


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "options",
    [Nf4Options(), Nf4Options(scale_search=True), Fp4Options(double_quantization=False), Int8Options(), Fp8Options()],
    ids=["nf4", "nf4-search", "fp4-single", "int8", "fp8"],
)
def test_what_is_written_loads_as_the_model_that_was_in_memory(base, tmp_path, options):
    report = quantize(str(base), tmp_path / "q", options)
    assert (report.format, report.num_layers, report.dense_layers) == (options.name, 14, ("lm_head",))
    assert report.logits_difference == 0.0  # one device, one order of sums
    assert report.dtype == "bfloat16"
    written = load_causal_lm(str(tmp_path / "q"), dtype=torch.bfloat16, device="cpu")
    direct = load_causal_lm(str(base), dtype=torch.bfloat16, device="cpu", weight_format=options)
    for ours, theirs in zip(quantized_layers(written), quantized_layers(direct), strict=True):
        assert torch.equal(ours.dequantize(torch.float32), theirs.dequantize(torch.float32))
    size = (tmp_path / "q" / "model.safetensors").stat().st_size
    assert report.num_bytes == size
    bits = sum(layer.quantized.num_bytes for layer in quantized_layers(written)) * 8
    assert report.bits_per_weight == bits / sum(x.out_features * x.in_features for x in quantized_layers(written))


def test_companions_and_provenance_come_along(base, tmp_path):
    quantize(str(base), tmp_path / "q", Int8Options(skip_modules=("lm_head", "up_proj")))
    assert {"LICENSE", "affina.json", "config.json", "generation_config.json", "model.safetensors"} <= set(
        files_in(tmp_path / "q")
    )
    said = json.loads((tmp_path / "q" / "affina.json").read_text())
    assert said["quantization"] == {"format": "int8", "skip_modules": ["lm_head", "up_proj"]}
    assert said["base"]["path"] == str(base)


def test_a_model_that_is_mostly_embedding_says_that_it_shrinks_little(tmp_path):
    folder = save(random_model(qwen3_config(vocab_size=4096)), tmp_path / "base")
    (note,) = quantize(str(folder), tmp_path / "q", Nf4Options()).notes
    # Two layers of 64 · (64 + 32 + 32 + 64 + 3 · 96) weights beside an embedding of 4,096 · 64.
    assert note.startswith("19% of the parameters are in linear layers that were quantised")
    assert note.endswith("stay in float32, so the model shrinks little")


def test_shards_are_written_and_read(base, tmp_path):
    report = quantize(str(base), tmp_path / "q", Nf4Options(), max_shard_bytes=20_000)
    assert len(report.files) > 1
    assert report.logits_difference == 0.0


def test_the_report_is_measured_when_the_model_is_complete(base, tmp_path):
    def measure(model, folder):
        assert (tmp_path / "q" / "config.json").is_file()
        assert folder == base
        return {"layers": len(quantized_layers(model))}

    report = quantize(str(base), tmp_path / "q", Nf4Options(), measure=measure)
    assert report.errors == {"layers": 14}
    assert json.loads((tmp_path / "q" / REPORT_FILE).read_text()) == {"layers": 14}
    assert json.loads(json.dumps(report.to_dict()))["output"] == str(tmp_path / "q")


def test_an_error_while_measuring_keeps_the_model(base, tmp_path):
    def measure(model, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(str(base), tmp_path / "q", Nf4Options(), measure=measure)
    assert quantized_layers(load_causal_lm(str(tmp_path / "q"), dtype=torch.bfloat16, device="cpu"))


# Refused before anything is written
# --------------------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_refused(base, tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "mine").write_text("x")
    error = refusal(base, tmp_path / "q")
    assert (error.code, error.why) == ("output-exists", "a quantised model never overwrites another one")
    assert files_in(tmp_path / "q") == ["mine"]


def test_a_quantised_model_is_refused(base, tmp_path):
    quantize(str(base), tmp_path / "q", Nf4Options())
    error = refusal(tmp_path / "q", tmp_path / "again", Int8Options())
    assert error.code == "already-quantized"
    assert "stored quantised already (bitsandbytes nf4)" in error.what
    assert "second error" in error.why
    assert "original model" in error.fix
    assert not (tmp_path / "again").exists()


def test_a_model_without_linears_is_refused(tmp_path):
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=1, n_head=2)
    folder = save(random_model(config), tmp_path / "gpt2")
    error = refusal(folder, tmp_path / "q")
    assert error.code == "nothing-to-quantize"
    assert "no linear layer that can be kept in nf4" in error.what
    assert "GPT-2's transposed layers" in error.why
    assert files_in(tmp_path) == ["gpt2"]


def test_skipping_every_layer_is_refused(base, tmp_path):
    error = refusal(base, tmp_path / "q", Nf4Options(skip_modules=("layers",)))
    assert error.code == "nothing-to-quantize"


def test_a_disk_that_is_too_small_is_found_first(base, tmp_path, monkeypatch):
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    error = refusal(base, tmp_path / "q")
    assert error.code == "disk-full"
    assert "the quantised model needs" in error.what
    assert files_in(tmp_path) == []


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(ModelError) as caught:
        quantize("./nothing/here", tmp_path / "q", Nf4Options())
    assert caught.value.code == "model-not-found"


# All or nothing
# ----------------------------------------------------------------------------------------------------------------


def test_a_file_that_differs_from_memory_is_not_kept(base, tmp_path, monkeypatch):
    original = quantize_module.save_quantized

    def write_wrongly(model, folder, **options):
        layer = quantized_layers(model)[3]
        layer.weight.data[0] ^= 1
        result = original(model, folder, **options)
        layer.weight.data[0] ^= 1
        return result

    monkeypatch.setattr(quantize_module, "save_quantized", write_wrongly)
    error = refusal(base, tmp_path / "q")
    assert error.code == "quantize-unverified"
    assert "self_attn.o_proj.weight differs" in error.what
    assert "nothing was kept" in error.why
    assert files_in(tmp_path) == []


def test_logits_that_differ_are_found(base, tmp_path, monkeypatch):
    original, calls = quantize_module.logits_of, []

    def drift(model, prompts):
        calls.append(model)
        return original(model, prompts) + (len(calls) > 1)

    monkeypatch.setattr(quantize_module, "logits_of", drift)
    error = refusal(base, tmp_path / "q")
    assert error.code == "quantize-unverified"
    assert "its logits differ by" in error.what
    assert files_in(tmp_path) == []


def test_an_interrupted_write_leaves_nothing(base, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_module, "copy_companions", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(str(base), tmp_path / "q", Nf4Options())
    assert files_in(tmp_path) == []


def test_weights_that_are_not_finite_are_named_and_nothing_is_written(tmp_path):
    model = random_model(qwen3_config())
    model.model.layers[0].mlp.gate_proj.weight.data[1, 1] = float("inf")
    with pytest.raises(ModelError, match=r"weights-not-finite\]: model\.layers\.0\.mlp\.gate_proj\.weight"):
        quantize(str(save(model, tmp_path / "base")), tmp_path / "q", Nf4Options())
    assert files_in(tmp_path) == ["base"]


_PEAK = """
import sys, threading, psutil
from affina.export.quantize import quantize
from affina.models.weights import Nf4Options

process, peak, done = psutil.Process(), [0], threading.Event()
quantize("affina/nano", sys.argv[2] + "-warm", Nf4Options())
before = process.memory_info().rss
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], process.memory_info().rss)
thread = threading.Thread(target=watch); thread.start()
quantize(sys.argv[1], sys.argv[2], Nf4Options())
done.set(); thread.join()
print(peak[0] - before)
"""


def test_the_dense_model_is_never_in_memory(tmp_path):
    # 100 MiB of dense linears in float32; codes and scales, in memory and loaded again, are 2 x 13 MiB.
    config = qwen3_config(hidden_size=512, intermediate_size=4096, num_hidden_layers=4, vocab_size=64)
    folder = save(random_model(config), tmp_path / "base")
    assert (folder / "model.safetensors").stat().st_size > 95 * 2**20
    ended = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), str(tmp_path / "q")], capture_output=True, text=True, check=True
    )
    # On top: the largest tensor, 8 MiB, what quantising it takes, and one dense weight of a forward pass.
    assert 13 * 2**20 < int(ended.stdout) < 75 * 2**20
