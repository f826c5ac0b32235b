"""How a run gets its engine, and what it says about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from affina.catalog.save_policy import Keep
from affina.config.load import load_mapping
from affina.errors import ModelError
from affina.models.adapters import adapter_disabled
from affina.models.build import load_for_training
from affina.models.fast import fast_engine_of
from affina.models.forward import probe_batch, supervised_loss
from affina.models.weights import Int8Embedding, quantized_layers
from tests.models.fast.families import adapted_model, attach
from tests.models.tiny import batch_of, qwen3_config


def loaded(**changes: Any) -> Any:
    return load_for_training(load_mapping(changes, preset="laptop").config)


def test_auto_takes_the_fast_engine_and_says_what_layers_keep() -> None:
    model = loaded()
    assert fast_engine_of(model.model) is not None
    assert [note for note in model.notes if note.startswith("engine: fast; layers keep ")]


def test_auto_takes_the_reference_with_the_reason_where_the_decoder_cannot() -> None:
    model = loaded(adapter={"dropout": 0.1})
    assert fast_engine_of(model.model) is None
    (note,) = [note for note in model.notes if note.startswith("engine:")]
    assert note == "engine: reference, because layers.0.self_attn.q_proj has adapter dropout"


def test_fast_is_an_error_where_the_decoder_cannot() -> None:
    with pytest.raises(ModelError) as caught:
        loaded(adapter={"dropout": 0.1}, engine="fast")
    text = str(caught.value)
    assert text.startswith(
        "error[engine-unsupported]: engine.path is fast, and the fused decoder does not run this model"
    )
    assert "layers.0.self_attn.q_proj has adapter dropout" in text
    assert "write `engine: auto`" in text


def test_reference_is_the_reference() -> None:
    model = loaded(engine="reference")
    assert fast_engine_of(model.model) is None
    assert not [note for note in model.notes if note.startswith("engine:")]


@pytest.mark.parametrize(("choice", "keep"), [(True, Keep.INPUT), (False, Keep.ALL)])
def test_gradient_checkpointing_is_a_choice_of_what_layers_keep(choice: bool, keep: Keep) -> None:
    engine = fast_engine_of(loaded(training={"gradient_checkpointing": choice}).model)
    assert engine is not None
    assert set(engine.policy.layers) == {keep}


def test_memory_that_the_user_grants_limits_what_layers_keep() -> None:
    engine = fast_engine_of(loaded(training={"gradient_checkpointing": "auto"}, engine={"memory": 0.001}).model)
    assert engine is not None
    assert set(engine.policy.layers) == {Keep.INPUT}


@pytest.mark.parametrize("engine", ["auto", "reference"])
def test_the_lowest_memory_keeps_embedding_and_head_in_8_bits_on_either_engine(engine: str) -> None:
    model = loaded(engine={"path": engine, "memory": "lowest"})
    base = model.model.get_base_model()
    assert type(base.get_input_embeddings()) is Int8Embedding
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert not any(layer.keeps_dense_weight for layer in quantized_layers(base))
    fast = fast_engine_of(model.model)
    if engine == "reference":
        assert fast is None
        assert [note for note in model.notes if note.startswith("activations are recomputed")]
    else:
        # The preset keeps all activations; a CPU has no other memory to which they could go.
        assert fast is not None
        assert set(fast.policy.layers) == {Keep.INPUT}
    loss, _ = supervised_loss(model.model, probe_batch(model.model))
    assert torch.isfinite(loss)


def test_optimisers_that_look_at_matrices_get_matrices() -> None:
    engine = fast_engine_of(loaded(training={"optimizer": "adafactor"}).model)
    assert engine is not None
    assert {parameter.dim() for parameter in engine.parameters} == {2}


def test_with_the_adapter_switched_off_the_reference_answers() -> None:
    model = adapted_model(qwen3_config())
    batch = batch_of([12, 5])
    with torch.no_grad():
        with adapter_disabled(model):
            expected, _ = supervised_loss(model, batch)
        attach(model)
        with adapter_disabled(model):
            found, _ = supervised_loss(model, batch)
        tuned, _ = supervised_loss(model, batch)
    assert torch.equal(found, expected)
    assert not torch.equal(tuned, expected)
