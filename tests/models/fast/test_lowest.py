"""The least memory: layers in parts, the adapter in host memory, embedding and head in int8; the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from affina.catalog.save_policy import Keep, SavePolicy
from affina.models.adapters import save_adapter
from affina.models.adapters.restore import restore_adapter_weights
from affina.models.engines import set_engine, trainable_parameters
from affina.models.families import DecoderSpec
from affina.models.fast import detach_fast_engine, fast_engine_of, flat_adapter_of, memory
from affina.models.fast.build import build_decoder
from affina.models.fast.engine import FastEngine
from affina.models.fast.fp8 import Fp8Stack
from affina.models.fast.support import decoder_of
from affina.models.fast.weights import ExpandedStack, Workspace
from affina.models.forward import supervised_loss, supervised_token_losses
from affina.models.weights import Fp8Linear, Fp8Options, Int8Linear, Int8Options, quantize_vocabulary
from affina.training.loop import apply_gradients
from affina.training.optim import OptimizerOptions, build_optimizer
from affina.training.optimizer_state import OptimizerState
from tests.models.fast.families import (
    FAMILIES,
    WEIGHTS,
    adapted_model,
    attach,
    loss_and_gradients,
    worst_difference,
)
from tests.models.tiny import batch_of, qwen3_config

LENGTHS = [5, 1, 17, 40, 9, 2, 23]

# float32 rounds at 2^-24 = 6e-8; a gradient is a sum of some thousand products, added in another order.
FLOAT32 = 1e-5


def lowest_model(config: Any, **options: Any) -> Any:
    """A model with an adapter, embedding and head in int8."""
    model = adapted_model(config, **options)
    quantize_vocabulary(model.get_base_model())
    return model


def attach_lowest(model: Any, *, on_host: bool = True) -> FastEngine:
    """The fast engine as on a card with `engine.memory: lowest`."""
    spec = decoder_of(model)
    assert isinstance(spec, DecoderSpec), spec
    decoder = build_decoder(model, spec, is_lean=True, adapter_on_host=on_host)
    engine = FastEngine(model, decoder, SavePolicy.uniform(spec.num_layers, Keep.PARTS))
    set_engine(model, engine)
    return engine


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of some tens of tokens are computed in several parts."""
    monkeypatch.setattr("affina.catalog.lowest_memory._SMALLEST_PART", 16)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_every_gradient_equal_the_references(family: str, weights: str) -> None:
    model = lowest_model(FAMILIES[family](), weights=weights)
    batch = batch_of(LENGTHS)
    expected_loss, expected = loss_and_gradients(model, batch)
    attach_lowest(model)
    loss, found = loss_and_gradients(model, batch)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    difference, name = worst_difference(expected, found)
    assert difference < FLOAT32, name


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("long_documents_on_host", [True, False])
def test_every_choice_of_where_things_are_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, long_documents_on_host: bool
) -> None:
    model = lowest_model(qwen3_config(num_hidden_layers=3), targets=["q_proj", "layers.1.mlp.down_proj"])
    batch = batch_of(LENGTHS)
    attach(model, Keep.ALL)
    expected_loss, expected = loss_and_gradients(model, batch)
    detach_fast_engine(model)
    monkeypatch.setattr(memory, "LONG_DOCUMENT", 10 if long_documents_on_host else 2048)
    for on_host in (True, False):
        engine = attach_lowest(model, on_host=on_host)
        assert engine.decoder.adapter.is_on_host == on_host
        loss, found = loss_and_gradients(model, batch)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
        assert worst_difference(expected, found)[0] < FLOAT32
        detach_fast_engine(model)


@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name.lower())
def test_an_int8_vocabulary_trains_at_every_level(keep: Keep) -> None:
    model = lowest_model(qwen3_config(num_hidden_layers=3))
    expected_loss, expected = loss_and_gradients(model, batch_of(LENGTHS))
    attach(model, keep)
    loss, found = loss_and_gradients(model, batch_of(LENGTHS))
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    assert worst_difference(expected, found)[0] < FLOAT32


def test_evaluation_gives_the_same_loss_whichever_way_it_is_computed() -> None:
    model = lowest_model(qwen3_config())
    batch = batch_of(LENGTHS)
    with torch.no_grad():
        expected, _ = supervised_loss(model, batch)
        attach_lowest(model)
        found, _ = supervised_loss(model, batch)
        by_token = supervised_token_losses(model, batch)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    assert float(by_token.sum()) == pytest.approx(float(expected), rel=1e-6)


def steps(model: Any, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        for micro_batch in range(2):
            loss, count = supervised_loss(model, batch_of([9, 20], seed=10 * number + micro_batch))
            (loss / count).backward()
        apply_gradients(optimizer, trainable_parameters(model), 1e-2, max_norm=1.0, loss_scale=1.0)
        optimizer.zero_grad(set_to_none=True)


def prepared(**options: Any) -> tuple[Any, torch.optim.Optimizer, OptimizerState]:
    model = lowest_model(qwen3_config(), **options)
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attach_lowest(model)
    optimizer = build_optimizer(trainable_parameters(model), OptimizerOptions("adamw"))
    return model, optimizer, OptimizerState(optimizer, flat_adapter_of(model), matrices)


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".lora_" in name}


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    model, optimizer, _ = prepared()
    steps(model, optimizer, range(4))
    expected = adapter_of(model)
    stopped, optimizer, state = prepared()
    steps(stopped, optimizer, range(2))
    save_adapter(stopped, tmp_path, contract={})
    saved = state.to_dict()
    resumed, optimizer, state = prepared()
    restore_adapter_weights(resumed, tmp_path)
    state.load(saved)
    steps(resumed, optimizer, range(2, 4))
    for name, value in adapter_of(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_what_was_trained_stays_in_the_model_when_the_engine_is_taken_off() -> None:
    model, optimizer, _ = prepared()
    steps(model, optimizer, range(1))
    before = adapter_of(model)
    detach_fast_engine(model)
    assert fast_engine_of(model) is None
    assert adapter_of(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in adapter_of(model).items())
    loss, _ = supervised_loss(model, batch_of([5, 9]))
    assert torch.isfinite(loss)


def test_the_workspace_of_split_stacks_is_the_largest_layer_and_their_products_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    layers = [Int8Options().quantize_linear(torch.nn.Linear(24, rows, bias=False)) for rows in (40, 16, 8)]
    assert all(isinstance(layer, Int8Linear) for layer in layers)
    workspaces = [Workspace(torch.device("cpu"), torch.float32) for _ in range(2)]
    whole = ExpandedStack(layers, 4, workspaces[0])
    split = ExpandedStack(layers, 4, workspaces[1], splits=True)
    assert [workspace.num_bytes for workspace in workspaces] == [68 * 24 * 4, 40 * 24 * 4]
    x, grad, a = torch.randn(7, 24), torch.randn(7, 68), torch.randn(4, 24)
    torch.testing.assert_close(split.forward(x), whole.forward(x))
    for columns in (slice(None), slice(3, 11)):
        expected = whole.input_gradient(grad, a, columns=columns)
        torch.testing.assert_close(split.input_gradient(grad, a, columns=columns), expected)
        of_outputs = grad[:, :64]
        expected = whole.input_gradient(of_outputs, None, columns=columns)
        torch.testing.assert_close(split.input_gradient(of_outputs, None, columns=columns), expected)


def test_eight_bit_stacks_give_some_columns_of_the_gradient_as_of_the_whole() -> None:
    torch.manual_seed(0)
    layer = Fp8Options().quantize_linear(torch.nn.Linear(64, 32, bias=False))
    assert isinstance(layer, Fp8Linear)
    stack = Fp8Stack([layer])
    grad, u, a = torch.randn(5, 32), torch.randn(5, 4), torch.randn(4, 64)
    columns = slice(16, 48)
    whole = stack.input_gradient(grad, None)[:, columns]
    torch.testing.assert_close(stack.input_gradient(grad, None, columns=columns), whole)
    # Columns of A have other scales than A has.
    both = stack.input_gradient(grad, a, u)[:, columns]
    error = stack.input_gradient(grad, a, u, columns=columns) - both
    assert float(error.norm() / both.norm()) < 0.05
