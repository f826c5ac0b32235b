"""The Triton kernels of AdamW against the reference; run by test_adamw.py under the interpreter.

On a machine with a GPU `pytest tests/kernels/triton_adamw.py` runs the compiled kernels.
"""

from __future__ import annotations

import math

import pytest
import torch

from affina.kernels import adamw
from affina.kernels.dispatch import use_triton
from affina.kernels.triton import adamw as kernel
from tests.kernels import exact_casts
from tests.kernels.device import DEVICE

if DEVICE.type == "cpu":
    exact_casts.install()


def buffers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first_two = [torch.randn(count, generator=generator) for _ in range(2)]
    return [t.to(DEVICE) for t in (*first_two, torch.zeros(count), torch.zeros(count))]


def reference_step(tensors, step, factor, **options):
    adamw._adamw_step(*tensors, adamw.Coefficients(step=step, **options), factor)


def test_the_kernel_is_what_runs():
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("count", [1, 1023, 1024, 3001])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_equal_the_reference(count, weight_decay):
    ours, theirs = buffers(count), buffers(count)
    options = {"learning_rate": 3e-3, "betas": (0.9, 0.95), "epsilon": 1e-6, "weight_decay": weight_decay}
    for step in range(1, 6):
        factor = torch.tensor(0.5, device=DEVICE) if step % 2 else 0.5
        adamw.adamw_step(*ours, step=step, gradient_factor=factor, **options)
        reference_step(theirs, step, factor, **options)
    # Each of five steps rounds a dozen float32 operations of an update of 3e-3; parameters are of size 1.
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-7)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("factor", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_device", [False, True], ids=["float", "tensor"])
def test_a_factor_of_zero_or_no_number_leaves_everything_untouched(factor, on_device):
    tensors = buffers(65)
    before = [tensor.clone() for tensor in tensors]
    tensors[1][3] = math.nan
    adamw.adamw_step(
        *tensors, step=1, learning_rate=0.1, weight_decay=0.5,
        gradient_factor=torch.tensor(factor, device=DEVICE) if on_device else factor,
    )  # fmt: skip
    for index in (0, 2, 3):
        assert torch.equal(tensors[index], before[index])


def test_parameters_without_a_gradient_only_decay():
    tensors = buffers(300)
    tensors[1].zero_()
    before = tensors[0].clone()
    adamw.adamw_step(*tensors, step=1, learning_rate=0.1, weight_decay=0.5)
    torch.testing.assert_close(tensors[0], before * 0.95, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1, 4095, 4097, 20_001])
def test_the_norm_is_the_euclidean_one(count):
    gradients = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(DEVICE)
    norm = adamw.gradient_norm(gradients)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(gradients.double().norm().item(), rel=1e-6)
    assert torch.equal(norm, adamw.gradient_norm(gradients))


def test_a_norm_of_several_rounds_misses_no_block(monkeypatch):
    monkeypatch.setattr(kernel, "NORM_BLOCK", 64)
    monkeypatch.setattr(kernel, "MAX_PARTS", 5)
    gradients = torch.randn(64 * 13 + 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert adamw.gradient_norm(gradients).item() == pytest.approx(gradients.double().norm().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("norm", [0.0, 0.5, 3.0, 1e19, math.nan, math.inf])
@pytest.mark.parametrize("max_norm", [1.0, math.inf])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_the_clip_factor_equals_the_reference(norm, max_norm, loss_scale):
    found = adamw.clip_factor(torch.tensor(norm, device=DEVICE), max_norm, loss_scale)
    expected = adamw._clip_factor(torch.tensor(norm, device=DEVICE), max_norm, loss_scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert math.isfinite(found.item())
