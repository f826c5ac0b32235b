"""What layers keep in host memory comes back as it was; attention that is kept there is not computed twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from affina.catalog.save_policy import Keep, SavePolicy
from affina.models.fast import fast_engine_of, layer, memory
from affina.models.fast.memory import attention_on_host
from affina.models.forward import supervised_loss
from tests.models.fast.families import adapted_model, attach, loss_and_gradients
from tests.models.tiny import batch_of, qwen3_config

LENGTHS = [9, 1, 20, 2]
MIXED = (Keep.OFFLOADED, Keep.INPUT, Keep.ALL)


def model_with(policy: tuple[Keep, ...]) -> Any:
    model = adapted_model(qwen3_config(num_hidden_layers=3))
    attach(model, Keep.ALL)
    engine = fast_engine_of(model)
    assert engine is not None
    engine.set_policy(SavePolicy(policy))
    return model


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    right = layer.attention

    def counted(q: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(q.shape[0])
        return right(q, *arguments, **options)

    monkeypatch.setattr(layer, "attention", counted)
    return calls


def test_attention_of_long_documents_waits_on_the_host_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, attention_calls: list[int]
) -> None:
    loss, gradients = loss_and_gradients(model_with((Keep.ALL,) * 3), batch_of(LENGTHS))
    model = model_with(MIXED)
    attention_calls.clear()
    loss_and_gradients(model, batch_of(LENGTHS))
    assert len(attention_calls) == 3 + 2  # short documents: computed again where it is not kept
    monkeypatch.setattr(memory, "LONG_DOCUMENT", 20)
    attention_calls.clear()
    again_loss, again = loss_and_gradients(model, batch_of(LENGTHS))
    assert len(attention_calls) == 3
    assert torch.equal(loss, again_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name


def test_short_rows_after_long_ones_take_nothing_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = loss_and_gradients(model_with((Keep.ALL,) * 3), batch_of([5, 7]))
    monkeypatch.setattr(memory, "LONG_DOCUMENT", 20)
    model = model_with(MIXED)
    with torch.enable_grad():
        supervised_loss(model, batch_of(LENGTHS))  # as when memory runs out: no backward pass follows
    _, found = loss_and_gradients(model, batch_of([5, 7]))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_two_forward_passes_before_a_backward_pass_are_an_error() -> None:
    model = model_with(MIXED)
    first, _ = supervised_loss(model, batch_of(LENGTHS))
    supervised_loss(model, batch_of(LENGTHS))
    with pytest.raises(RuntimeError, match="another forward pass ran before the backward pass"):
        first.backward()


def test_as_many_layers_wait_on_the_host_as_its_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fast_engine_of(model_with(MIXED))
    assert engine is not None
    spec = engine.decoder.spec

    def layers(policy: tuple[Keep, ...], *, longest: int = memory.LONG_DOCUMENT, device: str = "cuda") -> int:
        return attention_on_host(
            spec,
            SavePolicy(policy),
            num_tokens=1 << 20,
            longest=longest,
            itemsize=2,
            device=torch.device(device),
        )

    assert layers(MIXED) == 2
    assert layers((Keep.INPUT,) * 3) == 3
    assert layers((Keep.INPUT,) * 3, device="cpu") == 0
    assert layers(MIXED, longest=memory.LONG_DOCUMENT - 1) == 0
    of_one_output = (1 << 20) * (spec.query_size * 2 + spec.num_heads * 4)
    of_one_input = (1 << 20) * spec.hidden_size * 2
    total = (of_one_input + 1.5 * of_one_output) / memory._HOST_SHARE
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"total": total})())
    assert layers(MIXED) == 1
