"""The Triton kernel of the loss against the definition in float64; run by test_linear_cross_entropy_triton.py.

On a machine with a GPU `pytest tests/kernels/triton_linear_cross_entropy.py` runs the compiled kernel.
"""

from __future__ import annotations

import pytest
import torch

from affina.kernels.dispatch import use_triton
from affina.kernels.linear_cross_entropy import (
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_and_gradient,
    token_losses,
)
from affina.kernels.triton import linear_cross_entropy as kernel
from tests.kernels import exact_casts
from tests.kernels.device import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""What one rounding to the type changes, relative to the number."""

if DEVICE.type == "cpu":
    exact_casts.install()


def logits_of(rows, vocabulary, dtype=torch.float32, seed=0, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator) * size).to(DEVICE, dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator).to(DEVICE)
    return logits, targets


def definition(logits, targets, bias=None, softcap=None, scale=1.0):
    """Losses and their gradient by the raw logits, in float64."""
    raw = logits.double().requires_grad_()
    z = raw if bias is None else raw + bias.double()
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    losses = torch.nn.functional.cross_entropy(z, targets, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), raw)
    return losses.detach(), gradient


def run(logits, targets, error_dtype=torch.float32, **options):
    losses = torch.full((logits.shape[0],), 9.0, device=DEVICE)
    error = torch.full_like(logits, 9.0, dtype=error_dtype)
    cross_entropy_rows(logits.clone(), targets, losses=losses, error=error, **options)
    return losses, error


def check(logits, targets, error_dtype=torch.float32, **options):
    losses, error = run(logits, targets, error_dtype, **options)
    names = {"logit_scale": "scale"}
    expected, gradient = definition(logits, targets, **{names.get(k, k): v for k, v in options.items()})
    # float32 rounds logits of size 10 to 1e-6, and the exponential multiplies that by itself.
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-5)
    scale = abs(options.get("logit_scale", 1.0))
    torch.testing.assert_close(error.double(), gradient, rtol=2 * UNIT[error_dtype] + 2e-5, atol=scale * 3e-7)


def test_the_kernel_is_what_runs():
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("error_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_logits_and_error_gives_the_definition(dtype, error_dtype):
    check(*logits_of(5, 211, dtype), error_dtype)


SIZES = [(1, 1), (1, 2), (3, 127), (2, 128), (2, 129), (3, 8191), (2, 8193), (2, 20011)]


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
def test_vocabularies_of_any_size_give_the_definition(rows, vocabulary):
    check(*logits_of(rows, vocabulary))


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_bias_scale_and_cap_enter_value_and_gradient(softcap, scale, has_bias):
    logits, targets = logits_of(4, 300)
    bias = torch.linspace(-2, 2, 300, device=DEVICE) if has_bias else None
    check(logits, targets, softcap=softcap, logit_scale=scale, bias=bias)


def test_a_bias_of_sixteen_bits_is_widened():
    logits, targets = logits_of(4, 300)
    check(logits, targets, bias=torch.linspace(-2, 2, 300, device=DEVICE).bfloat16())


def test_ignored_rows_have_no_loss_and_no_error():
    logits, targets = logits_of(6, 9000)
    targets[::2] = -100
    losses, error = run(logits, targets)
    assert torch.equal(losses[::2], torch.zeros(3, device=DEVICE))
    assert torch.equal(error[::2], torch.zeros(3, 9000, device=DEVICE))
    check(logits, targets)


def test_rows_may_be_apart():
    room, targets = logits_of(5, 400)
    losses = torch.empty(5, device=DEVICE)
    error = torch.full((5, 500), 7.0, device=DEVICE, dtype=torch.bfloat16)
    cross_entropy_rows(room[:, 50:350], targets % 300, losses=losses, error=error[:, 100:400])
    expected, gradient = definition(room[:, 50:350], targets % 300)
    torch.testing.assert_close(losses.double(), expected, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(error[:, 100:400].double(), gradient, rtol=2**-7, atol=3e-7)
    assert bool((error[:, :100] == 7).all())
    assert bool((error[:, 400:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_may_replace_the_logits(dtype):
    logits, targets = logits_of(4, 9001, dtype)
    losses, error = run(logits, targets, dtype)
    replaced, again = logits.clone(), torch.empty(4, device=DEVICE)
    cross_entropy_rows(replaced, targets, losses=again, error=replaced)
    assert torch.equal(losses, again)
    assert torch.equal(error, replaced)


def test_logits_of_a_thousand_do_not_overflow():
    logits, targets = logits_of(4, 700, size=1000.0)
    losses, error = run(logits, targets)
    expected, gradient = definition(logits, targets)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(error.double(), gradient, rtol=1e-3, atol=1e-6)


def test_logits_of_minus_infinity_have_no_probability():
    logits, targets = logits_of(3, 9000)
    logits[:, :8500] = float("-inf")
    check(logits, targets % 500 + 8500)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
def test_a_logit_that_is_not_a_number_makes_the_loss_none():
    logits, targets = logits_of(3, 500)
    logits[1, 400] = float("nan")
    losses, _ = run(logits, targets)
    assert losses.isnan().tolist() == [False, True, False]


def test_a_target_outside_the_vocabulary_gives_no_number():
    logits, targets = logits_of(3, 500)
    targets[0], targets[2] = 500, -1
    losses, _ = run(logits, targets)
    assert losses.isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient_of_hidden_equal_the_definition(dtype):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(13, 24, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(301, 24, generator=generator) * 0.3).to(DEVICE, dtype)
    targets = torch.randint(0, 301, (13,), generator=generator).to(DEVICE)
    targets[5] = -100
    loss, gradient = linear_cross_entropy_and_gradient(hidden, weight, targets, softcap=20.0, chunk_rows=5)
    exact = hidden.double().requires_grad_()
    z = 20.0 * torch.tanh(exact @ weight.double().t() / 20.0)
    expected = torch.nn.functional.cross_entropy(z, targets, ignore_index=-100, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    # On a CPU 16-bit products are rounded to 16 bits; a gradient adds 301 products of rounded errors.
    assert abs(loss.item() / expected.item() - 1) < 2 * UNIT[dtype] + 1e-6
    assert (gradient.double() - expected_gradient).norm() < (4 * UNIT[dtype] + 1e-5) * expected_gradient.norm()
    assert torch.equal(gradient[5], torch.zeros_like(gradient[5]))

    differentiable = hidden.clone().requires_grad_()
    kept = targets != -100
    same = linear_cross_entropy(differentiable[kept], weight, targets[kept], softcap=20.0, chunk_rows=5)
    torch.testing.assert_close(same.detach(), loss, rtol=1e-6, atol=1e-5)
    losses = token_losses(hidden, weight, targets, softcap=20.0, chunk_rows=7)
    assert losses[5] == 0
    torch.testing.assert_close(losses.sum(), loss, rtol=1e-6, atol=1e-5)


def test_two_runs_give_the_same_bits():
    logits, targets = logits_of(8, 9000)
    first, second = run(logits, targets), run(logits, targets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows_are_no_work():
    logits, targets = logits_of(0, 50)
    cross_entropy_rows(logits, targets, losses=torch.empty(0, device=DEVICE), error=torch.empty_like(logits))
    kernel.cross_entropy_rows(
        logits, targets, losses=torch.empty(0, device=DEVICE), error=None, bias=None, softcap=None, logit_scale=1.0
    )
