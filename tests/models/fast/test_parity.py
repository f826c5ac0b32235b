"""The fused decoder gives the reference's loss and every adapter gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.catalog.save_policy import Keep
from affina.models.engines import trainable_parameters
from affina.models.fast import detach_fast_engine
from affina.models.forward import supervised_loss
from tests.models.fast.families import (
    FAMILIES,
    WEIGHTS,
    adapted_model,
    attach,
    both_engines,
    loss_and_gradients,
    worst_difference,
)
from tests.models.tiny import batch_of, qwen3_config

LENGTHS = [5, 1, 17, 40, 9, 2, 23]

# float32 rounds at 2^-24 = 6e-8; a gradient is a sum of some thousand products, added in another order.
FLOAT32 = 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_every_gradient_equal_the_references(family: str, weights: str) -> None:
    model = adapted_model(FAMILIES[family](), weights=weights)
    expected, found = both_engines(model, batch_of(LENGTHS))
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    difference, name = worst_difference(expected[1], found[1])
    assert difference < FLOAT32, name


@pytest.mark.parametrize("keep", list(Keep), ids=lambda keep: keep.name.lower())
def test_what_is_kept_does_not_change_one_bit(keep: Keep) -> None:
    model = adapted_model(qwen3_config(num_hidden_layers=3))
    batch = batch_of(LENGTHS)
    attach(model, Keep.ALL)
    loss, gradients = loss_and_gradients(model, batch)
    detach_fast_engine(model)
    attach(model, keep)
    again_loss, again = loss_and_gradients(model, batch)
    assert torch.equal(loss, again_loss)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, again[name]), name


def test_an_mlp_in_parts_gives_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(qwen3_config(num_hidden_layers=3))
    batch = batch_of(LENGTHS)
    attach(model, Keep.INPUT)
    loss, whole = loss_and_gradients(model, batch)
    monkeypatch.setattr("affina.models.fast.engine.MLP_CHUNK_TOKENS", 16)
    parts_loss, parts = loss_and_gradients(model, batch)
    assert float(parts_loss) == pytest.approx(float(loss), rel=1e-6)
    assert worst_difference(whole, parts)[0] < FLOAT32


@pytest.mark.parametrize(
    "targets",
    [["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"], ["up_proj"], ["layers.1.self_attn.k_proj"]],
    ids=lambda targets: "+".join(targets),
)
def test_any_choice_of_targets(targets: list[str]) -> None:
    model = adapted_model(qwen3_config(num_hidden_layers=3), targets=targets)
    expected, found = both_engines(model, batch_of(LENGTHS))
    assert worst_difference(expected[1], found[1])[0] < FLOAT32


@pytest.mark.parametrize(("method", "rank", "alpha"), [("rslora", 5, 7.0), ("lora", 1, 1.0), ("lora", 31, 16.0)])
def test_rank_stabilised_scale_and_odd_ranks(method: str, rank: int, alpha: float) -> None:
    model = adapted_model(qwen3_config(num_hidden_layers=2), method=method, rank=rank, alpha=alpha)
    expected, found = both_engines(model, batch_of([30, 7]))
    assert worst_difference(expected[1], found[1])[0] < FLOAT32


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 10_000),
)
def test_any_row_of_documents(lengths: list[int], share: float, seed: int) -> None:
    model = adapted_model(qwen3_config(num_hidden_layers=2))
    batch = batch_of(lengths, seed=seed, supervised=share)
    if batch.num_supervised == 0:
        attach(model)
        loss, count = supervised_loss(model, batch)
        assert (float(loss.detach()), count) == (0.0, 0)
        (gradient,) = torch.autograd.grad(loss, trainable_parameters(model))
        assert not gradient.any()
        return
    expected, found = both_engines(model, batch)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-5, abs=1e-6)
    # Documents of one token attend to nothing else: their q and k gradients are pure cancellation, compared as a whole.
    total = torch.cat([g.flatten() for g in expected[1].values()])
    difference = torch.cat([(found[1][name] - g).flatten() for name, g in expected[1].items()])
    assert float(difference.norm() / total.norm()) < FLOAT32


def test_evaluation_gives_the_same_loss_and_keeps_nothing() -> None:
    model = adapted_model(qwen3_config())
    batch = batch_of(LENGTHS)
    attach(model)
    trained, _ = supervised_loss(model, batch)
    with torch.no_grad():
        evaluated, _ = supervised_loss(model, batch)
    assert torch.equal(trained.detach(), evaluated)
    assert not evaluated.requires_grad


def test_accumulated_gradients_are_those_of_the_whole() -> None:
    model = adapted_model(qwen3_config())
    attach(model)
    (flat,) = trainable_parameters(model)
    for lengths in ([12, 5], [9, 1, 20]):
        loss, _ = supervised_loss(model, batch_of(lengths, seed=len(lengths)))
        loss.backward()
    assert flat.grad is not None
    accumulated = flat.grad.clone()
    one, _ = supervised_loss(model, batch_of([12, 5], seed=2))
    other, _ = supervised_loss(model, batch_of([9, 1, 20], seed=3))
    (whole,) = torch.autograd.grad(one + other, [flat])
    assert float((accumulated - whole).norm() / whole.norm()) < 1e-6


def test_a_second_backward_pass_through_the_same_loss_is_an_error() -> None:
    model = adapted_model(qwen3_config())
    attach(model)
    loss, _ = supervised_loss(model, batch_of([5]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="it runs once"):
        loss.backward()


def test_peft_sees_what_the_optimiser_trains_and_keeps_it_after_detaching() -> None:
    model = adapted_model(qwen3_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    attach(model)
    (flat,) = trainable_parameters(model)
    with torch.no_grad():
        flat.mul_(2.0)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, 2 * before[name]), name
    detach_fast_engine(model)
    with torch.no_grad():
        flat.zero_()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, 2 * before[name]), name
