"""The closed form of every method against its real step on a CPU, whose live bytes are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from affina.catalog.fused_choice import StepDemand
from affina.catalog.methods import METHODS
from affina.catalog.reference_memory import reference_step_bytes
from affina.catalog.shapes import ModelShape, read_shape
from affina.planning.setup import Adapter, StepSetup, reference_row
from affina.planning.static_memory import static_bytes
from affina.planning.trace import TraceSettings, build_model, run_step
from tests.planning.setups import setup

SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "tie_word_embeddings": True,
}
LENGTHS = (512, 512)
DENSE = [name for name, method in METHODS.items() if "dense" in method.trains_on]


def shape_of(config: Qwen3Config) -> ModelShape:
    return read_shape({**config.to_dict(), "model_type": config.model_type})


def planned_setup(name: str, precision: str) -> StepSetup:
    settings = METHODS[name].settings()
    others = tuple((key, getattr(settings, key)) for key in METHODS[name].fields if key not in ("rank", "targets"))
    adapter = Adapter(settings.rank, settings.targets, settings.dropout, name, others)
    shape = shape_of(Qwen3Config(**SIZES))
    plan = setup(None, rows=2, length=512, lengths=LENGTHS, shape=shape, precision=precision, adapter=adapter)
    return plan.with_(engine="reference")


def planned_bytes(name: str, precision: str, *, recompute: bool) -> int:
    plan = planned_setup(name, precision)
    demand = StepDemand(8 * plan.num_trainable, accumulates=False, validates=False)
    step = reference_step_bytes(reference_row(plan), demand, recompute=recompute, on_gpu=False)
    # AdaLoRA's importance comes with the loop's method step, which a counted step has not.
    uncounted = 4 * plan.num_frozen if name == "adalora" else 0
    return sum(static_bytes(plan).values()) + step - uncounted


def measured(name: str, dtype: torch.dtype, *, recompute: bool) -> int:
    settings = METHODS[name].settings()
    which = TraceSettings(
        LENGTHS, dtype=dtype, rank=settings.rank, targets=settings.targets, method=name, recompute=recompute
    )
    torch.manual_seed(0)
    return run_step(build_model(Qwen3Config(**SIZES), which), which).peak_bytes


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", DENSE)
def test_every_methods_step_is_planned_as_it_is_counted(name: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    real = measured(name, dtype, recompute=False)
    planned = planned_bytes(name, precision, recompute=False)
    # Never too little beyond buffers and 1% of workspaces; at most a tenth too much, which is the mask of prefixes.
    assert 0.99 * real <= planned <= 1.1 * real


@pytest.mark.parametrize("name", ["full", "dora", "boft", "vera", "prompt", "adalora"])
def test_recomputation_is_followed_and_never_planned_with_too_little(name: str) -> None:
    real = measured(name, torch.bfloat16, recompute=True)
    planned = planned_bytes(name, "bf16", recompute=True)
    assert 0.99 * real <= planned <= 1.3 * real


def test_gradients_of_trained_weights_pile_up_behind_a_short_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIZES, "hidden_size", 512)
    monkeypatch.setitem(SIZES, "intermediate_size", 1536)
    short = planned_setup("full", "fp32").with_(row_tokens=64, lengths=(64,), num_predicted=63)
    demand = StepDemand(8 * short.num_trainable, accumulates=False, validates=False)
    planned = sum(static_bytes(short).values()) + reference_step_bytes(
        reference_row(short), demand, recompute=False, on_gpu=False
    )
    which = TraceSettings((64,), dtype=torch.float32, method="full")
    real = run_step(build_model(Qwen3Config(**SIZES), which), which).peak_bytes
    assert real > 16 * short.num_trainable
    assert 0.99 * real <= planned <= 1.15 * real
