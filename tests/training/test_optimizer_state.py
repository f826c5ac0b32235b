"""The optimiser's state is stored per matrix, whichever engine trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from affina.models.engines import trainable_parameters
from affina.models.fast import attach_fast_engine, detach_fast_engine, flat_adapter_of
from affina.training.objectives.sft import sft_objective
from affina.training.optimizer_state import OptimizerState
from tests.models.fast.families import adapted_model
from tests.models.tiny import batch_of, qwen3_config


def optimizer_of(model: PeftModel) -> tuple[torch.optim.Optimizer, OptimizerState]:
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-3, fused=True)
    order = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return optimizer, OptimizerState(optimizer, flat_adapter_of(model), order)


def steps(model: PeftModel, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        loss, count = sft_objective(model, batch_of([12, 5, 30], seed=seed))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize(("first", "second"), [("fast", "reference"), ("reference", "fast"), ("fast", "fast")])
def test_a_run_continues_on_the_other_engine(first: str, second: str) -> None:
    whole, cut = adapted_model(qwen3_config()), adapted_model(qwen3_config())
    optimizer, _ = optimizer_of(whole)
    steps(whole, optimizer, range(6))

    if first == "fast":
        attach_fast_engine(cut, row_tokens=64)
    optimizer, state = optimizer_of(cut)
    steps(cut, optimizer, range(3))
    saved = state.to_dict()
    detach_fast_engine(cut)
    if second == "fast":
        attach_fast_engine(cut, row_tokens=64)
    optimizer, state = optimizer_of(cut)
    state.load(saved)
    steps(cut, optimizer, range(3, 6))
    detach_fast_engine(cut)
    for (_, expected), found in zip(whole.named_parameters(), cut.parameters(), strict=True):
        # Adam divides gradients by their own size, so float32 noise of tiny ones shows: 1e-3 of a step of lr 1e-3.
        torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


def test_both_engines_write_the_same_form() -> None:
    forms = []
    for engine in ("reference", "fast"):
        model = adapted_model(qwen3_config())
        if engine == "fast":
            attach_fast_engine(model, row_tokens=64)
        optimizer, state = optimizer_of(model)
        steps(model, optimizer, range(1))
        saved = state.to_dict()
        forms.append({number: {k: v.shape for k, v in entry.items()} for number, entry in saved["state"].items()})
        assert saved["param_groups"][0]["params"] == list(range(len(forms[-1])))
    assert forms[0] == forms[1]


def test_a_state_of_another_adapter_is_refused() -> None:
    model, other = adapted_model(qwen3_config()), adapted_model(qwen3_config(), rank=2)
    optimizer, state = optimizer_of(other)
    steps(other, optimizer, range(1))
    attach_fast_engine(model, row_tokens=64)
    _, fast_state = optimizer_of(model)
    with pytest.raises(ValueError, match=r"a matrix of \(2, 64\) saved, one of \(4, 64\) trained"):
        fast_state.load(state.to_dict())
