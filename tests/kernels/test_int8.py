"""int8 rows: scales, rounding, and the error that the model of the rounding predicts."""

from __future__ import annotations

import math

import pytest
import torch

from affina.kernels.int8 import SMALLEST_MAXIMUM, dequantize_rows, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_row_of_whole_numbers_up_to_127_survives():
    row = torch.tensor([[127.0, -126.0, 1.0, 0.0, -1.0, 64.0]])
    codes, scale = quantize_rows(row)
    assert codes.dtype == torch.int8
    assert scale.tolist() == [1.0]
    assert torch.equal(dequantize_rows(codes, scale), row)


def test_halves_are_rounded_to_even():
    codes, _ = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]))
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_the_largest_magnitude_of_a_row_is_127_with_its_sign():
    codes, scale = quantize_rows(torch.tensor([[0.25, -2.0, 1.0], [3.0, 0.0, -1.0]]))
    assert codes.tolist() == [[16, -127, 64], [127, 0, -42]]
    assert torch.equal(scale, torch.tensor([2.0, 3.0]) / torch.tensor([127.0, 127.0]))


def test_a_row_of_zeros_has_scale_one():
    codes, scale = quantize_rows(torch.zeros(3, 8))
    assert scale.tolist() == [1.0] * 3
    assert not codes.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_off_by_at_most_half_a_step(dtype):
    x = normal(33, 257, dtype)
    codes, scale = quantize_rows(x)
    error = (dequantize_rows(codes, scale) - x.float()).abs()
    # Three float32 operations of numbers up to 127 steps lie between: 127 · 3 · 2^-24 of a step.
    assert bool((error <= scale.unsqueeze(1) * (0.5 + 127 * 3 * 2**-24)).all())
    assert bool((codes.abs().amax(dim=1) == 127).all())


def test_the_error_is_that_of_uniform_rounding():
    x = normal(256, 2560)
    codes, scale = quantize_rows(x)
    error = (dequantize_rows(codes, scale) - x).double()
    expected = x.abs().amax(dim=1).double() / 127 / math.sqrt(12)
    found = error.square().mean(dim=1).sqrt()
    # A row's RMS of 2,560 uniform errors scatters by 0.89 / sqrt(2560) = 1.8%; four of these.
    assert float((found / expected - 1).abs().max()) < 0.08
    assert float((found / expected).mean()) == pytest.approx(1.0, abs=0.005)
    assert float(error.square().mean().sqrt()) == pytest.approx(0.0084, abs=0.0002)


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_rows_neither_overflow_nor_vanish(size):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * size
    codes, scale = quantize_rows(x)
    assert bool(scale.isfinite().all())
    # Rows below 127 · 2^-126 have fewer steps: 2^-126 each.
    torch.testing.assert_close(dequantize_rows(codes, scale), x, rtol=0, atol=max(size, SMALLEST_MAXIMUM) / 254 * 1.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_show_in_the_scale(bad):
    x = normal(3, 16)
    x[1, 5] = bad
    _, scale = quantize_rows(x)
    assert scale.isfinite().tolist() == [True, False, True]


def test_memory_of_the_caller_is_used():
    x = normal(4, 40)
    room, scales = torch.zeros(4, 64, dtype=torch.int8), torch.zeros(4)
    codes, scale = quantize_rows(x, out=room[:, 16:56], scale_out=scales)
    expected, expected_scale = quantize_rows(x)
    assert codes.data_ptr() == room[:, 16:56].data_ptr()
    assert scale is scales
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)
    assert not room[:, :16].any()


def test_strided_rows_equal_contiguous_ones():
    x = normal(5, 60)[:, 7:50]
    for found, expected in zip(quantize_rows(x), quantize_rows(x.contiguous()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (3, 0)])
def test_few_numbers_are_fine(shape):
    codes, scale = quantize_rows(normal(*shape))
    assert (codes.shape, scale.shape) == (shape, shape[:1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dequantised_weight_is_rounded_once(dtype):
    codes, scale = quantize_rows(normal(9, 48))
    exact = codes.double() * scale.double().unsqueeze(1)
    found = dequantize_rows(codes, scale, dtype)
    assert found.dtype == dtype
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]
    # Double rounding, to float32 and then to 16 bits, adds 2^-24 at most; float16's subnormals are 2^-25 apart at half.
    assert bool(((found.double() - exact).abs() <= exact.abs() * (unit * 2 + 2.0**-24) + 2.0**-25).all())
