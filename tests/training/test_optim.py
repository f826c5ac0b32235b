"""Optimisers by name: the right one, with the right mathematics, and a clear word when it cannot be had."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import nn

from affina.errors import TrainingError
from affina.training.optim import OptimizerOptions, build_optimizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def step(kind: str, gradient: torch.Tensor, weights: torch.Tensor, *, num_steps: int = 1) -> torch.Tensor:
    parameter = nn.Parameter(weights.clone())
    optimizer = build_optimizer([parameter], OptimizerOptions(kind=kind, weight_decay=0.1))  # type: ignore[arg-type]
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(num_steps):
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_the_first_adamw_step_is_the_formula() -> None:
    weights, gradient = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -4.0])
    # bias correction makes the first step lr · sign(g), after decay by lr · 0.1
    expected = weights * (1 - 0.01 * 0.1) - 0.01 * torch.sign(gradient)
    torch.testing.assert_close(step("adamw", gradient, weights), expected, rtol=1e-6, atol=1e-6)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:.*[Pp]aged.*")
def test_8_bit_adamw_follows_adamw(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    # bitsandbytes quantises states of at least 4,096 elements
    weights = torch.randn(64, 128, generator=generator)
    gradient = torch.randn(64, 128, generator=generator)
    exact = step("adamw", gradient, weights, num_steps=5)
    close = step(kind, gradient, weights, num_steps=5)
    moved = (exact - weights).norm()
    # dynamic 8-bit states carry about 1% relative error (arXiv 2110.02861); the update is their quotient
    assert float((close - exact).norm() / moved) < 0.05


def test_adafactor_moves_against_the_gradient_by_at_most_the_rate() -> None:
    weights = torch.zeros(8, 8)
    gradient = torch.ones(8, 8)
    moved = step("adafactor", gradient, weights)
    assert bool((moved < 0).all())
    assert float(moved.abs().max()) <= 0.01 * math.sqrt(2)


def test_8_bit_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TrainingError) as caught:
        build_optimizer([nn.Parameter(torch.zeros(1))], OptimizerOptions(kind="adamw_8bit"))
    assert caught.value.code == "optimizer-unavailable"
    assert caught.value.what == 'training.optimizer "adamw_8bit" needs bitsandbytes, which is not installed'
    assert 'pip install "affina[gpu]"' in str(caught.value.fix)
