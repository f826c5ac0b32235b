"""A merged model answers as base and adapter do, or there is no merged model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

from affina.errors import ExportError, ModelError
from affina.export import output as output_module
from affina.export.merge import merge
from affina.export.mergers import LowRankMerger
from affina.models.adapters import attach_adapter, save_adapter
from affina.models.load import load_causal_lm
from affina.models.quantized_checkpoint import save_quantized
from affina.models.safetensors_file import read_header
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options
from tests.models.tiny import VOCABULARY, qwen3_config, random_model, randomize_adapter, save

IDS = torch.arange(20).unsqueeze(0) * 5 % VOCABULARY


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save(random_model(qwen3_config(tie_word_embeddings=request.param)), folder, max_shard_size="80KB")
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def make_adapter(base, folder, *, method="lora", scale=0.05, weight_format=None):
    model = load_causal_lm(str(base), dtype=torch.float32, device="cpu", weight_format=weight_format)
    adapted = attach_adapter(model, method=method, rank=4, alpha=16)
    randomize_adapter(adapted, scale=scale)
    return save_adapter(adapted, folder, contract={"fingerprint": "abc"}), logits(adapted)


def move_adapter(model):
    """Every trained parameter away from where it starts, whatever the method."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 0.03), ("float16", 0.004)])
def test_the_merged_model_has_the_adapters_logits(base, adapter, tmp_path, dtype, tolerance):
    directory, expected = adapter
    report = merge(str(base), directory, tmp_path / "merged", dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # One rounding per weight (2^-24, 2^-9, 2^-11 of it), then two layers of sums.
    assert (logits(model) - expected).square().mean().sqrt() < tolerance * expected.std()
    assert report.merge_error < tolerance < report.adapter_effect
    assert report.num_merged == 14
    assert report.quantized_difference is None
    assert json.loads(json.dumps(report.to_dict()))["dtype"] == dtype


def test_rslora_is_merged_with_its_own_scale(base, tmp_path):
    directory, expected = make_adapter(base, tmp_path / "adapter", method="rslora")
    merge(str(base), directory, tmp_path / "merged", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_the_result_is_complete(base, adapter, tmp_path):
    output = tmp_path / "merged"
    merge(str(base), adapter[0], output)
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert (output / "LICENSE").read_text() == "Apache-2.0"
    assert (output / "chat_template.jinja").is_file()
    assert (output / "generation_config.json").is_file()
    provenance = json.loads((output / "affina.json").read_text())
    assert provenance["contract"] == {"fingerprint": "abc"}
    assert provenance["base"]["path"] == str(base)
    specs = read_header(output / "model.safetensors")
    assert {spec.dtype for spec in specs.values()} == {torch.bfloat16}
    assert load_file(output / "model.safetensors").keys() == specs.keys()


def test_large_results_are_sharded(base, adapter, tmp_path):
    report = merge(str(base), adapter[0], tmp_path / "merged", dtype="float32", max_shard_bytes=100_000)
    assert len(report.files) > 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(model), adapter[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    # Weights are off by 9%, 2.7% and 0.7% of their spread; two layers add up what seven weights each contribute.
    [(Nf4Options(), 0.02, 0.5), (Fp4Options(), 0.02, 0.7), (Fp8Options(), 0.005, 0.15), (Int8Options(), 0.001, 0.05)],
    ids=["nf4", "fp4", "fp8", "int8"],
)
def test_an_adapter_trained_on_a_quantised_base_is_merged_into_the_dense_one(base, tmp_path, options, least, most):
    directory, _ = make_adapter(base, tmp_path / "adapter", weight_format=options)
    report = merge(str(base), directory, tmp_path / "merged", dtype="float32", trained_weight_format=options)
    assert report.merge_error < 1e-5
    assert least < report.quantized_difference < most
    kind = options.name.upper()
    assert f"trained against the {kind} base and is merged into the original one" in report.notes[-1]
    assert report.notes[-1].endswith(f"the {kind} base's own error")
    assert all(spec.dtype == torch.float32 for spec in read_header(tmp_path / "merged/model.safetensors").values())


def test_an_adapter_trained_with_an_int8_vocabulary_is_merged_into_the_original_one(base, adapter, tmp_path):
    report = merge(str(base), adapter[0], tmp_path / "merged", dtype="float32", trained_int8_vocabulary=True)
    assert report.merge_error < 1e-5
    assert 0.001 < report.quantized_difference < 0.05  # 0.7% of the weights' spread, once or twice
    assert "trained against the int8-vocabulary base" in report.notes[-1]


@pytest.mark.parametrize(
    "options", [Nf4Options(), Fp4Options(), Int8Options(), Fp8Options()], ids=["nf4", "fp4", "int8", "fp8"]
)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "boft"])
def test_a_base_that_exists_only_quantised_is_expanded(base, tmp_path, method, options):
    # PEFT's own merge of the others writes to the weight of a layer; that of a quantised one is codes.
    quantized = load_causal_lm(str(base), dtype=torch.float32, device="cpu", weight_format=options)
    save_quantized(quantized, tmp_path / "stored")
    trained = attach_adapter(quantized, method=method)
    move_adapter(trained)
    adapter = save_adapter(trained, tmp_path / "adapter", contract={"fingerprint": "abc"})
    report = merge(str(tmp_path / "stored"), adapter, tmp_path / "merged", dtype="float32")
    assert f"stored in {options.name}" in report.notes[0]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    # One rounding of each weight to float32, then two layers of sums.
    torch.testing.assert_close(logits(merged), logits(trained.eval()), rtol=1e-4, atol=1e-4)
    assert all(spec.dtype == torch.float32 for spec in read_header(tmp_path / "merged/model.safetensors").values())
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert report.merge_error < 1e-5


def test_a_loftq_adapter_is_merged_into_the_codes_of_a_base_that_is_stored_in_nf4(base, tmp_path):
    quantized = load_causal_lm(str(base), dtype=torch.float32, device="cpu", weight_format=Nf4Options())
    save_quantized(quantized, tmp_path / "stored")
    trained = attach_adapter(quantized, method="loftq", rank=4)
    move_adapter(trained)
    adapter = save_adapter(trained, tmp_path / "adapter", contract={"fingerprint": "abc"})
    assert merge(str(tmp_path / "stored"), adapter, tmp_path / "merged", dtype="float32").merge_error < 1e-5


def test_checkpoints_with_other_names_and_transposed_weights_are_merged(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2)
    model = random_model(config)
    for name, part in (("full", model), ("bare", model.transformer)):
        folder = save(part, tmp_path / name)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"architectures": ["GPT2LMHeadModel"]}))
        directory, expected = make_adapter(folder, tmp_path / f"adapter-{name}")
        report = merge(str(folder), directory, tmp_path / f"merged-{name}", dtype="float32")
        assert any("in memory" in note for note in report.notes) == (name == "bare")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{name}", dtype=torch.float32)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


# Failing loudly
# --------------------------------------------------------------------------------------------------------


def assert_nothing_was_left(folder):
    assert not (folder / "merged").exists()
    assert [path.name for path in folder.iterdir() if "merged" in path.name] == []


def refusal(base, adapter, folder, **options):
    with pytest.raises(ExportError) as caught:
        merge(str(base), adapter, folder / "merged", **options)
    return caught.value


def test_an_adapter_without_effect_is_refused(base, tmp_path):
    directory, _ = make_adapter(base, tmp_path / "adapter", scale=0.0)
    error = refusal(base, directory, tmp_path)
    assert error.code == "merge-vanished"
    assert "changes nothing" in error.what
    assert_nothing_was_left(tmp_path)


def test_an_effect_below_rounding_is_refused(base, tmp_path):
    directory, _ = make_adapter(base, tmp_path / "adapter", scale=1e-6)
    error = refusal(base, directory, tmp_path)
    assert error.code == "merge-vanished"
    assert "float32" in error.fix
    assert_nothing_was_left(tmp_path)
    assert merge(str(base), directory, tmp_path / "exact", dtype="float32").merge_error < 1e-5


def test_a_merge_that_forgets_the_adapter_is_found(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LowRankMerger, "merged", lambda self, name, weight: weight.float())
    assert refusal(base, adapter[0], tmp_path).code == "merge-vanished"
    assert_nothing_was_left(tmp_path)


def test_a_merge_with_another_scale_is_found(base, adapter, tmp_path, monkeypatch):
    original = LowRankMerger.merged
    monkeypatch.setattr(
        LowRankMerger,
        "merged",
        lambda self, name, weight: original(self, name, weight) + 0.1 * (original(self, name, weight) - weight),
    )
    assert refusal(base, adapter[0], tmp_path, dtype="float32").code == "merge-unverified"
    assert_nothing_was_left(tmp_path)


def test_an_existing_directory_is_never_overwritten(base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("x")
    error = refusal(base, adapter[0], tmp_path)
    assert error.code == "output-exists"
    assert (tmp_path / "merged" / "precious.txt").read_text() == "x"


def test_an_output_below_a_file_is_refused(base, adapter, tmp_path):
    (tmp_path / "notes").write_text("x")
    error = refusal(base, adapter[0], tmp_path / "notes")
    assert error.code == "output-not-writable"
    assert error.what == f"cannot write into {tmp_path / 'notes'}: it is a file"
    assert "-o" in error.fix


def test_an_output_that_the_system_refuses_is_told_with_its_reason(base, adapter, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output_module.Path, "mkdir", refuse)
    error = refusal(base, adapter[0], tmp_path)
    assert error.code == "output-not-writable"
    assert error.what == f"cannot write into {tmp_path}: permission denied"


def test_an_empty_directory_may_be_filled(base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    merge(str(base), adapter[0], tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_disk_that_is_too_small_is_found_first(base, adapter, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda path: usage)
    error = refusal(base, adapter[0], tmp_path)
    assert error.code == "disk-full"
    assert re.fullmatch(rf"the merged model needs \d+ KiB, {tmp_path} has 1000 bytes free", error.what)
    assert_nothing_was_left(tmp_path)


def test_an_adapter_for_another_base_is_refused(adapter, tmp_path):
    other = save(random_model(qwen3_config(), seed=5), tmp_path / "other")
    with pytest.raises(ModelError, match="adapter-base-mismatch"):
        merge(str(other), adapter[0], tmp_path / "merged")
    assert_nothing_was_left(tmp_path)


def test_an_unknown_type_is_refused(base, adapter, tmp_path):
    assert refusal(base, adapter[0], tmp_path, dtype="int8").code == "dtype-unknown"
