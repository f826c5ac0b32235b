"""Embedding and head in int8: what they compute, what they share, and what else still works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig

from affina.errors import ModelError
from affina.kernels import int8
from affina.models.adapters import attach_adapter, base_identity, load_adapter, save_adapter
from affina.models.forward import supervised_loss, supervised_token_losses, verified_head
from affina.models.load import describe_model, load_causal_lm, load_notes
from affina.models.quantized_checkpoint import save_quantized
from affina.models.safetensors_file import checkpoint_tensors
from affina.models.weights import (
    Fp8Options,
    Int8Embedding,
    Int8Head,
    Int8Options,
    Nf4Options,
    quantize_linears,
    quantize_vocabulary,
    row_scaled,
)
from tests.models.fast.allocations import AllocationTracker
from tests.models.tiny import VOCABULARY, batch_of, qwen3_config, random_model, randomize_adapter, save

IDS = torch.arange(20).unsqueeze(0) * 5 % VOCABULARY


def load(folder: Path, **options: Any) -> Any:
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "quantizes_vocabulary": True}
    return load_causal_lm(str(folder), **(settings | options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def rounded_to_int8(model: Any) -> Any:
    """The same dense model with the numbers that int8 would keep, in embedding and head."""
    for module in {id(m.weight): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        module.weight.data = int8.dequantize_rows(*int8.quantize_rows(module.weight.data))
    return model


TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@TIED
@pytest.mark.parametrize("options", [None, Nf4Options(), Int8Options()], ids=["dense", "nf4", "int8"])
def test_quantising_while_reading_equals_rounding_the_dense_weights(tmp_path: Path, tied: bool, options: Any) -> None:
    folder = save(random_model(qwen3_config(tie_word_embeddings=tied)), tmp_path)
    model = load(folder, weight_format=options)
    assert type(model.get_input_embeddings()) is Int8Embedding
    assert type(model.get_output_embeddings()) is Int8Head
    expected = rounded_to_int8(load(folder, weight_format=options, quantizes_vocabulary=False))
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-5)
    afterwards = load(folder, weight_format=options, quantizes_vocabulary=False)
    quantize_vocabulary(afterwards)
    assert torch.equal(logits(model), logits(afterwards))
    assert load_notes(model) == ()


def test_a_tied_model_holds_one_copy_and_stays_tied_when_it_is_cast(tmp_path: Path) -> None:
    model = load(save(random_model(qwen3_config()), tmp_path))
    dense_bytes = describe_model(random_model(qwen3_config()))["total_bytes"]
    saved = VOCABULARY * 64 * 4 - VOCABULARY * (64 + 4)
    assert describe_model(model)["total_bytes"] == dense_bytes - saved
    model.to(torch.bfloat16)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.scale.dtype == embedding.scale.dtype == torch.float32
    assert embedding(IDS).dtype == logits(model).dtype == torch.bfloat16


def test_tied_equals_untied_with_equal_weights() -> None:
    tied = random_model(qwen3_config())
    untied = random_model(qwen3_config(tie_word_embeddings=False))
    untied.load_state_dict(tied.state_dict())
    quantize_vocabulary(tied)
    quantize_vocabulary(untied)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    assert torch.equal(logits(tied), logits(untied))
    found, expected = supervised_loss(tied, batch_of([9, 5]))[0], supervised_loss(untied, batch_of([9, 5]))[0]
    assert torch.equal(found, expected)


def test_a_look_up_expands_the_rows_it_needs_and_no_others() -> None:
    model = random_model(qwen3_config(vocab_size=5000))
    quantize_vocabulary(model)
    embedding = model.get_input_embeddings()
    with AllocationTracker() as tracker:
        rows = embedding(IDS)
    assert torch.equal(rows, embedding.quantized.dequantize()[IDS])
    assert tracker.peak_bytes < 20 * 64 * (4 + 4 + 1) + 1000


def test_the_dense_weight_is_never_whole_where_the_codes_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_scaled, "_CHUNK_ELEMENTS_CPU", 64 * 50)
    weight = torch.randn(5000, 64)
    with AllocationTracker() as tracker:
        row_scaled.quantize_weight(
            weight, int8.quantize_rows, torch.int8, dtype=torch.bfloat16, device=torch.device("cpu")
        )
    # Codes and scales, and for 50 rows at a time their bfloat16, float32 and rounded float32 numbers.
    assert tracker.peak_bytes < 5000 * (64 + 4) + 50 * 64 * (2 + 2 + 4 + 4 + 4) + 5000


def test_the_head_without_a_gradient_never_expands_whole() -> None:
    model = random_model(qwen3_config(vocab_size=200_000, num_hidden_layers=1))
    quantize_vocabulary(model)
    head = model.get_output_embeddings()
    hidden = torch.randn(2, 3, 64)
    expected = nn.functional.linear(hidden, head.dequantize())
    with AllocationTracker() as tracker, torch.no_grad():
        found = head(hidden)
    torch.testing.assert_close(found, expected)
    assert tracker.peak_bytes < 200_000 * 64 * 4 / 2
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(head(hidden).square().sum(), hidden)
    torch.testing.assert_close(gradient, 2 * expected @ head.dequantize())


def test_loss_and_token_losses_are_those_of_the_models_own_logits() -> None:
    model = random_model(qwen3_config())
    quantize_vocabulary(model)
    assert verified_head(model) is not None
    batch = batch_of([20])
    own = nn.functional.cross_entropy(
        model(input_ids=batch.input_ids[None], use_cache=False).logits[0, :-1], batch.labels[1:], reduction="sum"
    )
    assert float(supervised_loss(model, batch)[0]) == pytest.approx(float(own), rel=1e-5)
    assert float(supervised_token_losses(model, batch).sum()) == pytest.approx(float(own), rel=1e-5)


def test_generation_answers_as_the_rounded_dense_model() -> None:
    model, dense = random_model(qwen3_config()), rounded_to_int8(random_model(qwen3_config()))
    quantize_vocabulary(model)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


def test_the_base_is_the_same_base_for_an_adapter(tmp_path: Path) -> None:
    folder = save(random_model(qwen3_config()), tmp_path / "model")
    assert base_identity(load(folder)) == base_identity(load(folder, quantizes_vocabulary=False))
    trained = attach_adapter(load(folder))
    randomize_adapter(trained)
    save_adapter(trained, tmp_path / "adapter", contract={})
    again = load_adapter(load(folder, quantizes_vocabulary=False), tmp_path / "adapter")
    assert sum("lora_B" in name and bool(p.any()) for name, p in again.named_parameters()) == 14


@TIED
@pytest.mark.parametrize("options", [Nf4Options(), Int8Options(), Fp8Options()], ids=["nf4", "int8", "fp8"])
def test_saved_in_few_bits_it_is_a_model_with_a_dense_vocabulary(tmp_path: Path, tied: bool, options: Any) -> None:
    source = save(random_model(qwen3_config(tie_word_embeddings=tied)), tmp_path / "source")
    model = load(source, weight_format=options)
    saved = save_quantized(model, tmp_path / "saved")
    names = {name for name in checkpoint_tensors(saved) if name.startswith(("lm_head", "model.embed_tokens"))}
    assert names == {"model.embed_tokens.weight"} | ({"lm_head.weight"} if not tied else set())
    again = load(saved, quantizes_vocabulary=False)
    assert type(again.get_output_embeddings()) is nn.Linear
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_an_embedding_of_another_kind_stays_as_it_is_and_it_is_said(tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    folder = save(random_model(config), tmp_path)
    model = load(folder)
    assert load_notes(model) == ("the embedding stays in float32: its embedding is a Gemma3TextScaledWordEmbedding",)
    assert torch.equal(logits(model), logits(load(folder, quantizes_vocabulary=False)))


@TIED
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, tied: bool) -> None:
    model = random_model(qwen3_config(tie_word_embeddings=tied))
    weight = model.model.embed_tokens.weight if tied else model.lm_head.weight
    weight.data[3, 4] = float("nan")
    with pytest.raises(ModelError) as caught:
        load(save(model, tmp_path))
    assert caught.value.code == "weights-not-finite"
    assert ("model.embed_tokens.weight" if tied else "lm_head.weight") in caught.value.what


def test_the_model_computes_in_the_type_it_was_loaded_in(tmp_path: Path) -> None:
    model = load(save(random_model(qwen3_config()), tmp_path), weight_format=Fp8Options(), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16  # transformers looks at the first floating parameter; the layers' are 8-bit
    assert model.float().dtype == torch.float32


def test_quantising_layers_leaves_an_int8_vocabulary_alone() -> None:
    model = random_model(qwen3_config())
    quantize_vocabulary(model)
    names = quantize_linears(model, Nf4Options(skip_modules=()))
    assert len(names) == 14
    assert type(model.get_output_embeddings()) is Int8Head
