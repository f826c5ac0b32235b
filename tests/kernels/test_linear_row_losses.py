"""Losses of each row's logits, in chunks: equal to whole logits, with the gradients of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from affina.kernels.linear_cross_entropy import linear_token_losses, token_losses
from affina.kernels.linear_row_losses import linear_row_losses
from tests.kernels.expandable import Rows


def operands(num_rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(37, 8, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(37, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, bias, torch.randint(0, 37, (num_rows,), generator=generator)


def entropy(logits: Tensor, part: slice) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("num_rows", [0, 1, 16, 33])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_row_losses_and_gradients_equal_those_of_whole_logits(num_rows: int, softcap: float | None) -> None:
    hidden, weight, bias, _ = operands(num_rows, torch.float32)
    upstream = torch.linspace(-2, 3, num_rows)
    found = linear_row_losses(hidden, weight, entropy, bias=bias, softcap=softcap, logit_scale=0.5, chunk_rows=7)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)

    logits = 0.5 * (hidden @ weight.t() + bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = entropy(logits, slice(None))
    (plain,) = torch.autograd.grad((expected * upstream).sum(), hidden)
    # float32: 2^-24 per operation over sums of 37 terms
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5)


def test_each_chunk_is_told_which_rows_it_is() -> None:
    hidden, weight, _, _ = operands(10, torch.float32)
    seen = []

    def note(logits: Tensor, part: slice) -> Tensor:
        seen.append((part.start, part.stop, len(logits)))
        return logits.sum(-1)

    linear_row_losses(hidden, weight, note, chunk_rows=4)
    assert seen == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, _, _ = operands(5, torch.float32)
    with torch.no_grad():
        found = linear_row_losses(hidden, weight, entropy)
    assert not found.requires_grad


@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_losses_have_the_gradient_of_the_plain_cross_entropy(
    num_rows: int, softcap: float | None, dtype: torch.dtype
) -> None:
    hidden, weight, bias, targets = operands(num_rows, dtype)
    upstream = torch.linspace(-2, 3, num_rows)
    found = linear_token_losses(hidden, weight, targets, bias=bias, softcap=softcap, logit_scale=0.5, chunk_rows=7)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)

    exact = hidden.detach().double().requires_grad_()
    logits = 0.5 * (exact @ weight.double().t() + bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (plain,) = torch.autograd.grad((expected * upstream.double()).sum(), exact)
    # 2^-24 and 2^-8 per product, over sums of 37 terms
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient.double(), plain, rtol=tolerance, atol=3 * tolerance)


def test_a_trained_head_gets_its_gradient_from_token_losses() -> None:
    hidden, weight, _, targets = operands(9, torch.float32)
    weight.requires_grad_()
    losses = linear_token_losses(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(losses.sum(), weight)
    assert float(gradient.norm()) > 0
    torch.testing.assert_close(losses.detach(), token_losses(hidden.detach(), weight.detach(), targets))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_trained_head_gets_its_gradient_from_row_losses(softcap: float | None) -> None:
    hidden, weight, bias, _ = operands(9, torch.float32)
    trained = (hidden, weight.requires_grad_(), bias.requires_grad_())
    losses = linear_row_losses(hidden, weight, entropy, bias=bias, softcap=softcap, logit_scale=0.5, chunk_rows=4)
    gradients = torch.autograd.grad((losses * torch.linspace(-2, 3, 9)).sum(), trained)

    exact = [tensor.detach().double().requires_grad_() for tensor in trained]
    logits = 0.5 * (exact[0] @ exact[1].t() + exact[2])
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.autograd.grad((entropy(logits, slice(None)) * torch.linspace(-2, 3, 9)).sum(), exact)
    for found, wanted in zip(gradients, expected, strict=True):
        # float32: 2^-24 per operation over sums of 37 terms
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        frozen = linear_row_losses(hidden, weight, entropy, bias=bias, softcap=softcap, logit_scale=0.5, chunk_rows=4)
    assert not frozen.requires_grad
    torch.testing.assert_close(frozen, losses.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_backward_pass_rounds_once_and_keeps_nothing_but_the_gradient(dtype: torch.dtype) -> None:
    hidden, weight, _, targets = operands(9, dtype)
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        losses = linear_token_losses(hidden, weight, targets)
    assert saved == [hidden.shape]
    (plain,) = torch.autograd.grad(losses.sum(), hidden, retain_graph=True)
    factors = torch.linspace(-2, 3, 9)
    (scaled,) = torch.autograd.grad((losses * factors).sum(), hidden)
    assert torch.equal(scaled, (plain.float() * factors.unsqueeze(1)).to(dtype))


@pytest.mark.parametrize("kind", ["rows", "tokens"])
def test_a_head_that_is_expanded_tile_by_tile_gives_the_same_losses_and_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 8, generator=generator)
    targets = torch.randint(0, 300, (9,), generator=generator)
    results = []
    for head in (weight, Rows(weight)):
        hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if kind == "rows":
            losses = linear_row_losses(hidden, head, entropy, softcap=5.0, chunk_rows=4)
        else:
            losses = linear_token_losses(hidden, head, targets, softcap=5.0, chunk_rows=4)
        (gradient,) = torch.autograd.grad((losses * torch.linspace(-1, 1, 9)).sum(), hidden)
        results.append((losses.detach(), gradient))
    assert results[0][0].shape == results[1][0].shape == (9,)
    # float32 sums over 300 entries in another order
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
