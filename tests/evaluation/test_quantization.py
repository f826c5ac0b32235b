"""Errors of layers and divergence of predictions are what their formulas say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from affina.data.samples import Sample
from affina.errors import EvaluationError
from affina.evaluation import quantization as measuring
from affina.evaluation.quantization import LayerError, QuantizationErrors, decibels, divergence, layer_errors
from affina.models.load import load_causal_lm
from affina.models.weights import Int8Options, Nf4Options, quantize_linears
from tests.models.tiny import VOCABULARY, qwen3_config, random_model, save


def sample(length, *, seed=0, supervised=None):
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, length).astype(np.int32)
    labels = ids.copy()
    labels[0] = -100
    if supervised is not None:
        labels[1 : length - supervised] = -100
    ids.flags.writeable = False  # as stores hand them out
    return Sample(ids, labels)


def quantized_model(options=None, seed=0):
    model = random_model(qwen3_config(), seed=seed)
    quantize_linears(model, options or Nf4Options(), exclude=[model.get_output_embeddings()])
    return model


def test_the_error_of_a_layer_is_that_of_its_weights():
    dense, quantized = random_model(qwen3_config()), quantized_model()
    errors, unread = layer_errors(quantized, lambda name: dense.get_submodule(name).weight)
    assert unread == []
    assert len(errors) == 14
    for error in errors:
        weight = dense.get_submodule(error.name).weight.double()
        kept = quantized.get_submodule(error.name).dequantize(torch.float32).double()
        rmse = float((kept - weight).square().mean().sqrt())
        relative = rmse / float(weight.square().mean().sqrt())
        assert error.rmse == pytest.approx(rmse, rel=1e-6)  # the weights' difference is taken in float32
        assert error.relative_error == pytest.approx(relative, rel=1e-6)
        assert error.snr_db == pytest.approx(-20 * math.log10(relative), abs=1e-4)
        assert error.shape == tuple(weight.shape)
        assert 4.1 < error.bits_per_weight < 4.3


def test_layers_whose_weight_cannot_be_read_are_named_not_guessed():
    quantized = quantized_model()
    errors, unread = layer_errors(quantized, lambda name: torch.zeros(2, 2) if "q_proj" in name else None)
    assert errors == []
    assert len(unread) == 14


def layer(name, rmse, relative):
    return LayerError(name, (2, 8), 4.0, rmse, relative, decibels(relative))


def test_the_whole_error_is_that_of_all_weights_and_the_worst_layers_come_first():
    # Layer a: weights of RMS 1, error 0.1; layer b: RMS 4, error 0.8. Together √((0.01 + 0.64) / (1 + 16)).
    report = QuantizationErrors("nf4", (layer("a", 0.1, 0.1), layer("b", 0.8, 0.2)), None)
    assert report.relative_error == pytest.approx(math.sqrt(0.65 / 17))
    assert report.snr_db == pytest.approx(-10 * math.log10(0.65 / 17))
    assert [one.name for one in report.worst(1)] == ["b"]
    assert json.loads(json.dumps(report.to_dict()))["worst_layers"] == ["b", "a"]


def test_a_weight_without_error_has_infinite_signal_to_noise():
    assert decibels(0.0) == math.inf
    report = QuantizationErrors("int8", (layer("a", 0.0, 0.0),), None)
    assert report.relative_error == 0.0
    assert report.to_dict()["snr_db"] is report.to_dict()["layers"][0]["snr_db"] is None


def test_divergence_is_the_mean_kl_of_the_supervised_tokens():
    dense, quantized = random_model(qwen3_config()), quantized_model()
    samples = [sample(length, seed=length, supervised=length // 2) for length in (12, 30, 140, 21, 9, 17)]
    found = divergence(dense, quantized, samples, text="a text")
    total, count, same, nll = 0.0, 0, 0, 0.0
    for one in samples:
        ids = torch.from_numpy(one.input_ids.astype(np.int64)).unsqueeze(0)
        p = dense(input_ids=ids).logits[0].double().log_softmax(-1)
        q = quantized(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in np.flatnonzero(one.labels != -100):
            a, b = p[position - 1], q[position - 1]
            total += float((a.exp() * (a - b)).sum())
            nll -= float(a[one.labels[position]])
            same += int(a.argmax() == b.argmax())
            count += 1
    assert (found.num_tokens, found.num_records) == (count, 6)
    assert found.kl.value == pytest.approx(total / count, rel=1e-9)
    assert found.top_agreement == same / count
    assert found.perplexity_unquantized == pytest.approx(math.exp(nll / count), rel=1e-9)
    assert 0 < found.kl.interval.low < found.kl.value < found.kl.interval.high


def test_a_model_does_not_diverge_from_itself():
    model = random_model(qwen3_config())
    found = divergence(model, model, [sample(20, seed=i) for i in range(6)], text="x")
    assert (found.kl.value, found.top_agreement) == (0.0, 1.0)
    assert found.perplexity_unquantized == found.perplexity_quantized


def test_more_bits_diverge_less():
    dense = random_model(qwen3_config())
    samples = [sample(40, seed=i) for i in range(6)]
    values = [
        divergence(dense, quantized_model(options), samples, text="x").kl.value
        for options in (Nf4Options(), Int8Options())
    ]
    assert values[0] > 10 * values[1] > 0


def test_text_without_supervised_tokens_is_refused():
    model = random_model(qwen3_config())
    with pytest.raises(EvaluationError, match=r"evaluation-no-tokens\]: notes.txt has no supervised token"):
        divergence(model, model, [sample(10, supervised=0)], text="notes.txt")


def test_a_model_with_nan_is_told():
    model, broken = random_model(qwen3_config()), random_model(qwen3_config())
    nn.init.constant_(broken.model.norm.weight, float("nan"))
    with pytest.raises(EvaluationError, match="evaluation-not-finite") as caught:
        divergence(model, broken, [sample(10)], text="notes.txt")
    assert "record 1 of notes.txt" in caught.value.what


# The whole report
# -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(random_model(qwen3_config()), tmp_path_factory.mktemp("dense"))


def load(folder):
    return load_causal_lm(str(folder), dtype=torch.float32, device="cpu", weight_format=Nf4Options())


def test_the_report_reads_dense_weights_from_the_checkpoint(folder):
    told = []
    report = measuring.measure_quantization(
        load(folder), folder, [sample(20, seed=i) for i in range(5)], text="t",
        progress=lambda *stage: told.append(stage),
    )  # fmt: skip
    assert (report.format, len(report.layers), report.notes) == ("nf4", 14, ())
    assert report.divergence is not None
    assert told[-1] == ("divergence", 5, 5)
    assert json.loads(json.dumps(report.to_dict()))["divergence"]["kl"]["level"] == 0.95


def test_without_text_only_weights_are_measured(folder):
    report = measuring.measure_quantization(load(folder), folder, notes=["no text"])
    assert report.divergence is None
    assert report.notes == ("no text",)


def test_the_divergence_is_computed_in_float32_whatever_the_model_is_stored_in(tmp_path, monkeypatch):
    folder = save(random_model(qwen3_config(), dtype=torch.bfloat16), tmp_path)
    samples = [sample(20, seed=i) for i in range(5)]

    def report_of(**options):
        quantized = load_causal_lm(str(folder), device="cpu", weight_format=Int8Options(), **options)
        return measuring.measure_quantization(quantized, folder, samples, text="t")

    stored, wide = report_of(dtype=torch.bfloat16), report_of(dtype=torch.float32)
    assert stored.notes == ()
    assert stored.divergence.kl.value == pytest.approx(wide.divergence.kl.value, rel=1e-6)
    # 85,000 parameters: 170 kB in bfloat16, 680 kB for both models in float32
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 400_000)
    narrow = report_of(dtype=torch.bfloat16)
    assert "computed in bfloat16, for want of memory for float32" in narrow.notes[0]
    assert narrow.divergence.kl.value > stored.divergence.kl.value  # rounding is part of it


def test_a_dense_model_that_does_not_fit_is_not_loaded_and_it_says_so(folder, monkeypatch):
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 1000)
    report = measuring.measure_quantization(load(folder), folder, [sample(20)], text="t")
    assert report.divergence is None
    assert len(report.layers) == 14
    assert "the divergence was not measured: the unquantised model needs" in report.notes[0]
    assert "1000 bytes are free" in report.notes[0]
