"""The chunked loss equals cross-entropy on whole logits, in value and in gradient."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.linear_cross_entropy import (
    cross_entropy_rows,
    linear_cross_entropy,
    linear_cross_entropy_and_gradient,
    token_losses,
)


def reference(hidden, weight, targets, bias=None, softcap=None, scale=1.0):
    """The definition in float64."""
    logits = hidden.double() @ weight.double().t()
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def problem(rows, width, vocabulary, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.3).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    return hidden, weight, targets


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 17),
    vocabulary=st.integers(2, 53),
    chunk=st.integers(1, 50),
    ignored=st.integers(0, 5),
    has_bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
)
def test_loss_and_gradient_equal_the_definition(rows, width, vocabulary, chunk, ignored, has_bias, softcap, scale):
    hidden, weight, targets = problem(rows, width, vocabulary)
    targets[: min(ignored, rows)] = -100
    bias = torch.linspace(-1, 1, vocabulary) if has_bias else None
    loss = linear_cross_entropy(
        hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=scale, chunk_rows=chunk
    )
    (gradient,) = torch.autograd.grad(loss * 0.7, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = reference(exact, weight, targets, bias, softcap, scale)
    (expected_gradient,) = torch.autograd.grad(expected * 0.7, exact)
    # float32 rounds each logit to 6e-8 of its size (below 30 here) and adds up to 53 terms per row.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_sixteen_bit_inputs_lose_only_their_own_rounding(dtype, tolerance):
    hidden, weight, targets = problem(37, 33, 211, dtype)
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=10)
    (gradient,) = torch.autograd.grad(loss, hidden)
    exact = hidden.detach().double().requires_grad_()
    expected = reference(exact, weight, targets)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    # A logit is rounded to one part in 2^8 (bfloat16) or 2^11 (float16) on a CPU; a row's loss moves by as much.
    assert abs(loss.item() / expected.item() - 1) < tolerance
    assert (gradient.double() - expected_gradient).norm() / expected_gradient.norm() < 4 * tolerance


def test_chunks_do_not_change_the_result():
    hidden, weight, targets = problem(65, 8, 19)
    losses = [linear_cross_entropy(hidden, weight, targets, chunk_rows=rows).item() for rows in (1, 7, 64, 65, 1000)]
    assert max(losses) - min(losses) < 1e-4  # the order of 65 float32 additions


def test_no_rows_give_zero_and_a_gradient_of_zeros():
    hidden, weight, targets = problem(0, 8, 19)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)


def test_rows_that_are_all_ignored_give_zero_and_a_gradient_of_zeros():
    hidden, weight, targets = problem(5, 8, 19)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros(5, 8))


def test_a_trained_head_gets_its_gradient():
    hidden, weight, targets = problem(9, 8, 19)
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    exact_hidden, exact_weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = torch.autograd.grad(reference(exact_hidden, exact_weight, targets), [exact_hidden, exact_weight])
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_frozen_head_gets_no_gradient_and_no_logits_are_kept():
    hidden, weight, targets = problem(64, 8, 500)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        linear_cross_entropy(hidden, weight, targets, chunk_rows=16)
    assert saved == [64 * 8]  # the gradient of hidden, nothing of size rows × vocabulary


def test_strided_rows_are_accepted():
    hidden, weight, targets = problem(30, 16, 19)
    strided = hidden[::3, ::2]
    loss = linear_cross_entropy(strided, weight[:, ::2], targets[::3], chunk_rows=4)
    copied = linear_cross_entropy(strided.contiguous(), weight[:, ::2].contiguous(), targets[::3], chunk_rows=4)
    torch.testing.assert_close(loss, copied)


def test_token_losses_sum_to_the_loss_and_are_zero_where_ignored():
    hidden, weight, targets = problem(21, 8, 19)
    targets[4] = -100
    losses = token_losses(hidden, weight, targets, chunk_rows=5)
    assert losses.shape == (21,)
    assert losses[4] == 0
    assert not losses.requires_grad
    torch.testing.assert_close(losses.sum(), linear_cross_entropy(hidden, weight, targets).detach())


def test_a_gradient_scaled_beyond_float16_arrives_scaled():
    hidden, weight, targets = problem(6, 8, 19, torch.float16)
    loss = linear_cross_entropy(hidden, weight, targets)
    (plain,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    # 2^17 is infinite in float16; the product with 2^-10 is not.
    (scaled,) = torch.autograd.grad(loss * 2.0**-10 * 2.0**17 * 2.0**-7, hidden)
    torch.testing.assert_close(scaled, plain)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_and_gradient_without_autograd_equal_those_with_it(chunk):
    hidden, weight, targets = problem(11, 8, 19)
    targets[3] = targets[10] = -100
    bias = torch.linspace(-1, 1, 19)
    options = {"bias": bias, "softcap": 5.0, "logit_scale": 0.5}
    expected = linear_cross_entropy(hidden, weight, targets, **options)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    loss, gradient = linear_cross_entropy_and_gradient(hidden.detach(), weight, targets, chunk_rows=chunk, **options)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, expected_gradient)
    assert torch.equal(gradient[[3, 10]], torch.zeros(2, 8))
    assert not loss.requires_grad


def test_the_gradient_is_written_where_the_caller_wants_it_even_over_hidden():
    hidden, weight, targets = problem(11, 8, 19, torch.bfloat16)
    hidden = hidden.detach()
    _, expected = linear_cross_entropy_and_gradient(hidden, weight, targets, chunk_rows=4)
    memory = torch.empty(11, 12, dtype=torch.bfloat16)
    _, strided = linear_cross_entropy_and_gradient(hidden, weight, targets, chunk_rows=4, gradient_out=memory[:, 2:10])
    _, replaced = linear_cross_entropy_and_gradient(hidden, weight, targets, chunk_rows=4, gradient_out=hidden)
    assert strided.data_ptr() == memory[:, 2:10].data_ptr()
    assert replaced is hidden
    assert torch.equal(strided, expected)
    assert torch.equal(replaced, expected)


@pytest.mark.parametrize("error_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_logits_give_their_losses_and_errors(dtype, error_dtype):
    generator = torch.Generator().manual_seed(0)
    memory = (torch.randn(6, 60, generator=generator) * 3).to(dtype)
    targets = torch.randint(0, 50, (6,), generator=generator)
    targets[2] = -100
    exact = memory[:, 5:55].double().requires_grad_()
    capped = 10.0 * torch.tanh(exact * 0.5 / 10.0)
    expected = torch.nn.functional.cross_entropy(capped, targets, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    losses, error = torch.empty(6), torch.empty(6, 60, dtype=error_dtype)[:, :50]
    cross_entropy_rows(memory.clone()[:, 5:55], targets, losses=losses, error=error, softcap=10.0, logit_scale=0.5)
    # float32 arithmetic on logits below 10; the error is rounded once more to its own type.
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=2e-6, atol=5e-6)
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[error_dtype]
    torch.testing.assert_close(error.double(), gradient, rtol=rounding + 1e-5, atol=3e-7)
    assert torch.equal(error[2], torch.zeros(50, dtype=error_dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_may_replace_the_logits(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(4, 30, generator=generator).to(dtype), torch.tensor([3, 0, -100, 29])
    losses, error, again = torch.empty(4), torch.empty(4, 30, dtype=dtype), torch.empty(4)
    cross_entropy_rows(logits.clone(), targets, losses=losses, error=error)
    cross_entropy_rows(logits, targets, losses=again, error=logits)
    assert torch.equal(losses, again)
    assert torch.equal(logits, error)


def test_the_modules_import_where_triton_is_not_installed():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from affina.kernels import adamw, four_bit, fp8\nfrom affina.kernels.code_tables import NF4\n"
        "from affina.kernels.linear_cross_entropy import token_losses\n"
        "fp8.quantize_rows(torch.ones(2, 4)); adamw.gradient_norm(torch.ones(3))\n"
        "four_bit.quantize(torch.ones(2, 64), NF4).dequantize()\n"
        "print(token_losses(torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2, dtype=torch.int64)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
