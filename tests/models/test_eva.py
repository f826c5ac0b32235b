"""EVA's directions are the singular vectors of the inputs that the layers see."""

from __future__ import annotations

import pytest
import torch

from affina.models.adapters import attach_adapter, eva
from affina.models.adapters.eva import Directions, start_from_inputs
from affina.models.forward import Isolation, isolation_of
from tests.models.tiny import batch_of, qwen3_config, random_model


@pytest.mark.parametrize("width", [12, 200])
def test_directions_of_parts_are_the_singular_vectors_of_the_whole(width):
    generator = torch.Generator().manual_seed(0)
    # Four strong directions above noise: what a truncation drops is noise.
    rows = torch.randn(96, 4, generator=generator) @ (torch.randn(4, width, generator=generator) * 3)
    rows = rows + 1e-4 * torch.randn(96, width, generator=generator)
    found = Directions(8)
    for part in rows.split(32):
        found.add(part)
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[:4]
    agreement = (found.unit_rows(4) @ expected.t()).abs()
    torch.testing.assert_close(agreement, torch.eye(4), rtol=0, atol=1e-3)


def test_rows_that_span_too_few_directions_give_none():
    found = Directions(8)
    found.add(torch.ones(5, 16))
    assert found.unit_rows(2) is None
    assert found.unit_rows(1) is not None


@pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "rows"])
def test_a_starts_as_the_main_directions_of_the_layers_input_and_nothing_else_changes(monkeypatch, is_packed):
    if not is_packed:
        monkeypatch.setattr(eva, "isolation_of", lambda model: Isolation("rows", "wished", 0.0))
    model = attach_adapter(random_model(qwen3_config()), method="eva", rank=4)
    isolation_of(model)
    batch = batch_of([30, 18])
    inputs = []
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].reshape(-1, 64)))
    assert start_from_inputs(model, [batch]) == []
    hook.remove()
    rows = inputs[0] if is_packed else torch.cat([inputs[0][:30], inputs[0][30:48]])
    expected = torch.linalg.svd(rows, full_matrices=False).Vh[:4]
    found = layer.lora_A["default"].weight.detach()
    torch.testing.assert_close(found @ found.t(), torch.eye(4), rtol=0, atol=1e-4)
    torch.testing.assert_close((found @ expected.t()).abs(), torch.eye(4), rtol=0, atol=1e-3)
    assert not layer.lora_B["default"].weight.any()


def test_layers_whose_inputs_span_too_few_directions_stay_random_and_are_named():
    model = attach_adapter(random_model(qwen3_config()), method="eva", rank=16)
    before = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach().clone()
    named = start_from_inputs(model, [batch_of([5])])
    assert "model.layers.0.self_attn.q_proj" in named
    assert torch.equal(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight, before)
