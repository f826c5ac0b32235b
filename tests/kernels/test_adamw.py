"""The flat AdamW step is torch.optim.AdamW's, clipping is clip_grad_norm_'s, and bad steps do not happen."""

from __future__ import annotations

import math

import pytest
import torch

from affina.kernels.adamw import Coefficients, _adamw_step, adamw_step, clip_factor, gradient_norm
from tests.kernels.interpreter import run_in_interpreter


def buffers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) for _ in range(2)] + [torch.zeros(count), torch.zeros(count)]


@pytest.mark.parametrize("fused", [True, False], ids=["as it runs here", "the specification"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_give_the_bits_of_torchs_adamw(weight_decay, fused):
    parameters, _, first, second = buffers(1003)
    expected = torch.nn.Parameter(parameters.clone())
    options = {"betas": (0.9, 0.95), "weight_decay": weight_decay}
    optimizer = torch.optim.AdamW([expected], lr=3e-3, eps=1e-6, fused=fused, foreach=False, **options)
    generator = torch.Generator().manual_seed(7)
    for step in range(1, 11):
        gradient = torch.randn(1003, generator=generator)
        expected.grad = gradient.clone()
        optimizer.step()
        if fused:
            adamw_step(parameters, gradient, first, second, step=step, learning_rate=3e-3, epsilon=1e-6, **options)
        else:
            coefficients = Coefficients(step=step, learning_rate=3e-3, epsilon=1e-6, **options)
            _adamw_step(parameters, gradient, first, second, coefficients, 1.0)
    state = optimizer.state[expected]
    assert torch.equal(parameters, expected.detach())
    assert torch.equal(first, state["exp_avg"])
    assert torch.equal(second, state["exp_avg_sq"])


def test_the_first_step_is_the_learning_rate_in_the_direction_of_the_sign():
    parameters, gradients = torch.zeros(3), torch.tensor([2.0, -0.5, 0.0])
    adamw_step(parameters, gradients, torch.zeros(3), torch.zeros(3), step=1, learning_rate=0.25)
    torch.testing.assert_close(parameters, torch.tensor([-0.25, 0.25, 0.0]), rtol=1e-6, atol=0)


def test_the_gradient_factor_scales_the_gradient_and_leaves_it_alone():
    parameters, gradients, first, second = buffers(50)
    kept = gradients.clone()
    others = [parameters.clone(), gradients * 0.125, first.clone(), second.clone()]
    adamw_step(parameters, gradients, first, second, step=1, learning_rate=0.1, gradient_factor=torch.tensor(0.125))
    adamw_step(*others, step=1, learning_rate=0.1)
    assert torch.equal(gradients, kept)
    assert torch.equal(parameters, others[0])
    assert torch.equal(second, others[3])


@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_device", [False, True], ids=["float", "tensor"])
def test_a_factor_of_zero_or_no_number_leaves_everything_untouched(factor, on_device):
    tensors = buffers(65)
    before = [tensor.clone() for tensor in tensors]
    tensors[1][3] = math.nan
    adamw_step(
        *tensors, step=1, learning_rate=0.1, weight_decay=0.5,
        gradient_factor=torch.tensor(factor) if on_device else factor,
    )  # fmt: skip
    for index in (0, 2, 3):
        assert torch.equal(tensors[index], before[index])


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 100_003])
def test_the_norm_is_the_euclidean_one(count):
    gradients = torch.randn(count, generator=torch.Generator().manual_seed(count))
    # float32: sums of 4,096 squares in lanes, then of 25.
    assert gradient_norm(gradients).item() == pytest.approx(gradients.double().norm().item(), rel=1e-6)


def test_the_norm_does_not_depend_on_the_number_of_threads():
    gradients = torch.randn(300_001, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    norms = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        norms.append(gradient_norm(gradients).item())
    torch.set_num_threads(before)
    assert norms[0] == norms[1]


@pytest.mark.parametrize(("size", "max_norm"), [(10.0, 1.0), (0.01, 1.0), (1.0, math.inf), (0.0, 1.0)])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_factor_times_gradient_is_what_clip_grad_norm_leaves(size, max_norm, loss_scale):
    gradient = torch.randn(200, generator=torch.Generator().manual_seed(0)) * size
    expected = torch.nn.Parameter(torch.zeros(200))
    expected.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([expected], max_norm)
    scaled = gradient * loss_scale
    factor = clip_factor(gradient_norm(scaled), max_norm, loss_scale)
    torch.testing.assert_close(scaled * factor, expected.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_gradients_without_a_finite_norm_stop_the_step(bad):
    parameters, gradients, first, second = buffers(300)
    before = parameters.clone()
    gradients[17] = bad
    factor = clip_factor(gradient_norm(gradients), 1.0)
    adamw_step(parameters, gradients, first, second, step=1, learning_rate=0.1, gradient_factor=factor)
    assert factor.item() == 0.0
    assert torch.equal(parameters, before)


def test_the_triton_kernels_of_adamw_equal_the_reference():
    run_in_interpreter("triton_adamw.py")
