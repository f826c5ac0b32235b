"""A head in few bits, expanded tile by tile, gives the loss and gradient of the plain head."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_and_gradient, token_losses
from affina.kernels.logits import TILE_MULTIPLE, head_product, tile_rows
from affina.kernels.tiled_cross_entropy import tiled_cross_entropy, workspace_bytes
from tests.kernels.expandable import Rows
from tests.kernels.test_linear_cross_entropy import problem, reference
from tests.models.fast.allocations import AllocationTracker


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 17),
    vocabulary=st.integers(2, 3 * TILE_MULTIPLE + 5),
    chunk=st.integers(1, 25),
    ignored=st.integers(0, 5),
    has_bias=st.booleans(),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    scale=st.sampled_from([1.0, 0.125, 3.0]),
)
def test_loss_and_gradient_equal_the_definition(rows, width, vocabulary, chunk, ignored, has_bias, softcap, scale):
    hidden, weight, targets = problem(rows, width, vocabulary)
    targets[: min(ignored, rows)] = -100
    bias = torch.linspace(-1, 1, vocabulary) if has_bias else None
    losses, gradient = torch.empty(rows), torch.empty(rows, width)
    tiled_cross_entropy(
        hidden.detach(),
        Rows(weight),
        targets,
        losses=losses,
        gradient=gradient,
        bias=bias,
        softcap=softcap,
        logit_scale=scale,
        chunk_rows=chunk,
        tile_bytes=1,
    )
    exact = hidden.detach().double().requires_grad_()
    expected = reference(exact, weight, targets, bias, softcap, scale)
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    # float32 rounds each logit to 6e-8 of its size (below 60 here) and adds up to 389 terms per row.
    torch.testing.assert_close(losses.sum().double(), expected.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-4)


def test_every_public_function_takes_such_a_head_and_gives_what_a_dense_one_gives():
    hidden, weight, targets = problem(9, 8, 300)
    rows = Rows(weight)
    expected, expected_gradient = linear_cross_entropy_and_gradient(hidden.detach(), weight, targets)
    found, gradient = linear_cross_entropy_and_gradient(hidden.detach(), rows, targets)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    loss = linear_cross_entropy(hidden, rows, targets)
    (by_autograd,) = torch.autograd.grad(loss * 0.5, hidden)
    torch.testing.assert_close(by_autograd, 0.5 * expected_gradient)
    torch.testing.assert_close(token_losses(hidden, rows, targets), token_losses(hidden, weight, targets))
    torch.testing.assert_close(head_product(hidden, rows, tile_bytes=1), hidden.detach() @ weight.t())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_the_bits_of_the_plain_head_but_for_the_order_of_sums(dtype):
    hidden, weight, targets = problem(37, 33, 300, dtype)
    plain, plain_gradient = linear_cross_entropy_and_gradient(hidden.detach(), weight, targets)
    losses, gradient = torch.empty(37), torch.empty(37, 33, dtype=dtype)
    tiled_cross_entropy(hidden.detach(), Rows(weight), targets, losses=losses, gradient=gradient, tile_bytes=1)
    torch.testing.assert_close(losses.sum(), plain, rtol=1e-5, atol=1e-4)
    # Both round each probability once and the sum once; the plain product of a CPU rounds nothing in between either.
    error = float((gradient.float() - plain_gradient.float()).norm() / plain_gradient.float().norm())
    assert error < 2 * torch.finfo(dtype).eps


def test_the_gradient_may_be_written_over_the_rows():
    hidden, weight, targets = problem(20, 8, 300)
    expected, gradient = torch.empty(20), torch.empty(20, 8)
    tiled_cross_entropy(hidden.detach(), Rows(weight), targets, losses=expected, gradient=gradient, chunk_rows=6)
    place, losses = hidden.detach().clone(), torch.empty(20)
    tiled_cross_entropy(place, Rows(weight), targets, losses=losses, gradient=place, chunk_rows=6)
    assert torch.equal(losses, expected)
    assert torch.equal(place, gradient)


def test_extreme_logits_neither_overflow_nor_vanish():
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.cat([torch.full((200, 1), -3e4), torch.tensor([[3e4]]), torch.full((200, 1), -3e4)])
    losses, gradient = torch.empty(2), torch.empty(2, 1)
    tiled_cross_entropy(
        hidden, Rows(weight), torch.tensor([200, 0]), losses=losses, gradient=gradient, chunk_rows=2, tile_bytes=1
    )
    # float32 numbers around 3e4 are 2^-9 apart.
    assert losses.tolist() == pytest.approx([0.0, torch.tensor(400.0).log().item()], abs=2**-9)
    assert gradient.flatten().tolist() == pytest.approx([0.0, 0.0])


def test_neither_the_head_nor_a_row_of_logits_is_ever_whole():
    vocabulary, width, num_rows = 6000, 64, 700
    hidden, weight, targets = problem(num_rows, width, vocabulary)
    rows, losses, gradient = Rows(weight), torch.empty(num_rows), torch.empty(num_rows, width)
    tile_bytes = 512 * width * 4
    with AllocationTracker() as tracker:
        tiled_cross_entropy(
            hidden.detach(), rows, targets, losses=losses, gradient=gradient, chunk_rows=100, tile_bytes=tile_bytes
        )
    assert rows.largest == 512
    logits = 100 * 512 * 4
    # A tile, its logits, where the targets are, twice the chunk's gradient; a few numbers per row besides.
    assert tracker.peak_bytes < tile_bytes + logits * 5 / 4 + 2 * 100 * width * 4 + 100 * 100
    assert tracker.peak_bytes < vocabulary * width * 4 / 2


def test_the_workspace_of_any_vocabulary_and_any_number_of_rows_is_bounded():
    assert workspace_bytes((151_936, 2560), 2) == workspace_bytes((10_000_000, 2560), 2) < 38 << 20
    assert tile_rows((151_936, 2560), 2) == 3200
    assert tile_rows((100, 2560), 2) == 100
