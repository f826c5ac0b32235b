"""Optimisers by name: the right one, with the right mathematics, and a clear word when it cannot be had."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import nn

from affina.errors import TrainingError
from affina.training.loop import apply_gradients
from affina.training.optim import FlatAdamW, OptimizerOptions, build_optimizer, describe_saving, moment_bytes

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


def flat_and_matrices(num_steps: int, *, max_norm: float = 1.0, loss_scale: float = 1.0) -> tuple[Any, Any]:
    """(parameter, optimiser, norms) after the same steps: flat, and as two matrices with torch's own AdamW."""
    generator = torch.Generator().manual_seed(0)
    start, options = torch.randn(60, generator=generator), OptimizerOptions(kind="adamw", weight_decay=0.1)
    flat = [nn.Parameter(start.clone())]
    matrices = [nn.Parameter(start[:24].view(4, 6).clone()), nn.Parameter(start[24:].view(6, 6).clone())]
    found = []
    optimizers = [build_optimizer(parameters, options) for parameters in (flat, matrices)]
    norms: list[list[float]] = [[], []]
    for number in range(num_steps):
        gradient = torch.randn(60, generator=generator) * loss_scale * (number + 1)
        flat[0].grad = gradient.clone()
        matrices[0].grad, matrices[1].grad = gradient[:24].view(4, 6).clone(), gradient[24:].view(6, 6).clone()
        for parameters, optimizer, of_optimizer in zip((flat, matrices), optimizers, norms, strict=True):
            rate = 0.01 / (number + 1)
            of_optimizer.append(apply_gradients(optimizer, parameters, rate, max_norm=max_norm, loss_scale=loss_scale))
    for parameters, optimizer, of_optimizer in zip((flat, matrices), optimizers, norms, strict=True):
        found.append((torch.cat([p.detach().flatten() for p in parameters]), optimizer, of_optimizer))
    return found[0], found[1]


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e6])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_a_flat_step_is_the_step_of_the_matrices(max_norm: float, loss_scale: float) -> None:
    (flat, optimizer, norms), (expected, _, expected_norms) = flat_and_matrices(
        5, max_norm=max_norm, loss_scale=loss_scale
    )
    assert isinstance(optimizer, FlatAdamW)
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    # The clip factor's 1e-6 beside a norm of about 8, and float32 rounding.
    torch.testing.assert_close(flat, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_flat_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    (parameter, optimizer, _), _ = flat_and_matrices(2)
    before = copy.deepcopy(optimizer.state_dict())
    values = parameter.clone()
    (live,) = optimizer.param_groups[0]["params"]
    live.grad = torch.ones(60)
    live.grad[7] = bad
    assert not math.isfinite(apply_gradients(optimizer, [live], 0.1, max_norm=1.0, loss_scale=1.0))
    assert torch.equal(live, values)
    after = optimizer.state_dict()
    assert float(after["state"][0]["step"]) == float(before["state"][0]["step"]) == 2
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after["state"][0][name], before["state"][0][name])


def test_torchs_adamw_goes_on_where_the_flat_one_stopped() -> None:
    (parameter, optimizer, _), _ = flat_and_matrices(3)
    (live,) = optimizer.param_groups[0]["params"]
    other = nn.Parameter(parameter.clone())
    continued = torch.optim.AdamW([other], lr=0.0)
    continued.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    live.grad = other.grad = torch.linspace(-0.1, 0.1, 60)
    for each, parameters in ((optimizer, [live]), (continued, [other])):
        apply_gradients(each, parameters, 0.02, max_norm=10.0, loss_scale=1.0)
    torch.testing.assert_close(live, other, rtol=1e-6, atol=1e-7)


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


# What 8-bit moments save
# ----------------------------------------------------------------------------------------------------

QWEN3_4B = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]
"""(out, in) of the linear layers q, k, v, o, gate, up, down; 36 layers."""


def lora_sizes(rank: int, shapes: list[tuple[int, int]], num_layers: int = 36) -> list[int]:
    """Elements of A and B of every layer."""
    return [rank * side for rows, columns in shapes for side in (columns, rows)] * num_layers


@pytest.mark.parametrize(
    ("sizes", "num_parameters", "full", "kept"),
    [
        # 8 bytes an element; 2 and 8 / 256 of it, and 2,048 for the two tables. All matrices fill whole blocks.
        (lora_sizes(16, QWEN3_4B), 33_030_144, 264_241_152, 67_094_528),
        (lora_sizes(64, QWEN3_4B), 132_120_576, 1_056_964_608, 268_371_968),
        (lora_sizes(8, [QWEN3_4B[0], QWEN3_4B[2]]), 2_949_120, 23_592_960, 5_992_448),
        # IA3: a vector for each k, v (1,024 elements: 32-bit moments) and down (9,728: 8-bit).
        ([1024, 1024, 9728] * 36, 423_936, 3_391_488, 589_824 + 711_360 + 2_048),
    ],
    ids=["all-linear r16", "all-linear r64", "q, v r8", "ia3"],
)
def test_bytes_of_moments_are_parameters_times_bytes(
    sizes: list[int], num_parameters: int, full: int, kept: int
) -> None:
    assert sum(sizes) == num_parameters
    assert moment_bytes(sizes, "adamw") == full
    assert moment_bytes(sizes, "adamw_8bit") == moment_bytes(sizes, "paged_adamw_8bit") == kept


@needs_bitsandbytes
def test_bytes_of_8_bit_moments_are_those_that_bitsandbytes_keeps() -> None:
    shapes = [(64, 64), (70, 99), (16, 100), (5000,)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = build_optimizer(parameters, OptimizerOptions(kind="adamw_8bit"))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert sum(tensors.values()) == moment_bytes([parameter.numel() for parameter in parameters], "adamw_8bit")


def test_a_small_saving_is_told_with_the_advice_to_stay_exact() -> None:
    said = describe_saving(lora_sizes(16, QWEN3_4B), "paged_adamw_8bit", model_bytes=2_650_000_000)
    assert said == (
        "training.optimizer paged_adamw_8bit keeps 64 MiB of moments where adamw would keep 252 MiB: it saves 188 MiB "
        "beside a model of 2.47 GiB; adamw is exact and as good here"
    )
    large = describe_saving(lora_sizes(64, QWEN3_4B), "adamw_8bit", model_bytes=2_650_000_000)
    assert large is not None
    assert large.endswith("it saves 752 MiB beside a model of 2.47 GiB")
    assert describe_saving([4096], "adamw", model_bytes=1) is None


@needs_bitsandbytes
def test_paged_moments_on_a_cpu_are_8_bit_moments_without_a_warning() -> None:
    import bitsandbytes

    optimizer = build_optimizer([nn.Parameter(torch.zeros(8))], OptimizerOptions(kind="paged_adamw_8bit"))
    assert type(optimizer) is bitsandbytes.optim.AdamW8bit
