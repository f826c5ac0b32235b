"""The longest micro-batch is tried before the first step, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from affina.models.engines import trainable_parameters
from affina.training.objectives.sft import TokenObjective, sft_objective
from affina.training.optim import OptimizerOptions, build_optimizer
from affina.training.probe import probe_longest
from tests.models.tiny import batch_of
from tests.training.method_cases import attach, make_base


def test_a_probe_learns_nothing_and_is_repeated_where_room_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach(make_base(tmp_path), "lora", "dense")
    parameters = trainable_parameters(model)
    optimizer = build_optimizer(parameters, OptimizerOptions("adamw"))
    before = [parameter.detach().clone() for parameter in parameters]
    random_state = torch.get_rng_state()
    calls: list[str] = []

    def losses(*arguments: object, **options: object) -> object:
        calls.append("pass")
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        torch.rand(1)
        return sft_objective(*arguments, **options)  # type: ignore[arg-type]

    def room() -> bool:
        calls.append("room")
        return True

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    probe_longest(
        model, batch_of([7, 9], seed=1), TokenObjective(losses), optimizer,  # type: ignore[arg-type]
        optimizer_kind="adamw", accumulates=True, make_room=room,
    )  # fmt: skip
    assert calls == ["pass", "room", "pass", "pass"]
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_probe_that_does_not_fit_ends_before_the_first_step(tmp_path: Path) -> None:
    model = attach(make_base(tmp_path), "lora", "dense")
    optimizer = build_optimizer(trainable_parameters(model), OptimizerOptions("adamw"))

    def losses(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        probe_longest(
            model, batch_of([7, 9], seed=1), TokenObjective(losses), optimizer,  # type: ignore[arg-type]
            optimizer_kind="adamw", accumulates=False, make_room=lambda: False,
        )  # fmt: skip
