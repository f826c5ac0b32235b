"""e4m3 rows: scales, rounding, errors of products, and both ways to the input gradient."""

from __future__ import annotations

import pytest
import torch

from affina.kernels.fp8 import (
    E4M3,
    SMALLEST_MAXIMUM,
    dequantize_rows,
    fp8_linear,
    fp8_linear_backward,
    quantize_rows,
    transpose_codes,
)
from tests.kernels.interpreter import run_in_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def test_a_row_of_representable_numbers_survives():
    # 448 is the largest number of e4m3; with it in the row the scale is 1 and powers of two are exact.
    row = torch.tensor([[448.0, -256.0, 1.0, 0.0, 2.0**-9, -1.75]])
    codes, scale = quantize_rows(row)
    assert codes.dtype == E4M3
    assert scale.tolist() == [1.0]
    assert torch.equal(codes.float(), row)


def test_halves_are_rounded_to_even():
    # Between 16 and 32 e4m3 has steps of 2: 17 lies between 16 (even) and 18, 19 between 18 and 20 (even).
    codes, _ = quantize_rows(torch.tensor([[448.0, 17.0, 19.0, -17.0, -19.0]]))
    assert codes.float().tolist() == [[448.0, 16.0, 20.0, -16.0, -20.0]]


def test_a_row_of_zeros_has_scale_one():
    codes, scale = quantize_rows(torch.zeros(3, 8))
    assert scale.tolist() == [1.0] * 3
    assert torch.equal(codes.float(), torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_off_by_at_most_half_a_step(dtype):
    x = normal(33, 257, dtype)
    codes, scale = quantize_rows(x)
    error = (dequantize_rows(codes, scale) - x.float()).abs()
    # 2^-4 of a number above 2^-6 · scale, 2^-10 · scale below it; one more rounding of float32 for the product.
    bound = torch.maximum(x.float().abs() * 2**-4, scale.unsqueeze(1) * 2**-10) * (1 + 1e-6)
    assert bool((error <= bound).all())
    assert bool((codes.float().abs().amax(dim=1) == 448).all())


@pytest.mark.parametrize("size", [1e-40, 1e-37, 1e-30, 1e30, 3e38])
def test_tiny_and_huge_rows_neither_overflow_nor_vanish(size):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * size
    codes, scale = quantize_rows(x)
    assert bool(scale.isfinite().all())
    # Subnormal float32 numbers have few bits of their own, and rows below 448 · 2^-126 few steps of e4m3.
    torch.testing.assert_close(dequantize_rows(codes, scale), x, rtol=2**-4, atol=SMALLEST_MAXIMUM / 448 * 2**-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_visible(bad):
    x = normal(3, 16)
    x[1, 5] = bad
    codes, scale = quantize_rows(x)
    finite = dequantize_rows(codes, scale).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True]


def test_memory_of_the_caller_is_used():
    x = normal(4, 40)
    room, scales = torch.zeros(4, 64).to(E4M3), torch.zeros(4)
    codes, scale = quantize_rows(x, out=room[:, 16:56], scale_out=scales)
    expected, expected_scale = quantize_rows(x)
    assert codes.data_ptr() == room[:, 16:56].data_ptr()
    assert scale is scales
    assert torch.equal(codes.float(), expected.float())
    assert torch.equal(scale, expected_scale)
    assert torch.equal(room[:, :16].float(), torch.zeros(4, 16))


def test_strided_rows_equal_contiguous_ones():
    x = normal(5, 60)[:, 7:50]
    found, expected = quantize_rows(x), quantize_rows(x.contiguous())
    assert torch.equal(found[0].float(), expected[0].float())
    assert torch.equal(found[1], expected[1])


def test_a_column_factor_enters_before_the_scale():
    x, factor = normal(5, 60), torch.linspace(0.1, 3, 60)
    found, expected = quantize_rows(x, column_factor=factor), quantize_rows(x * factor)
    assert torch.equal(found[0].float(), expected[0].float())
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows_are_fine(rows):
    codes, scale = quantize_rows(normal(rows, 8))
    assert (codes.shape, scale.shape) == ((rows, 8), (rows,))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
def test_the_product_is_that_of_the_dequantised_factors(out_dtype):
    x, w, bias = normal(9, 48), normal(32, 48, seed=1), torch.linspace(-1, 1, 32)
    x8, w8 = quantize_rows(x), quantize_rows(w)
    found = fp8_linear(*x8, *w8, out_dtype=out_dtype, bias=bias)
    expected = dequantize_rows(*x8).double() @ dequantize_rows(*w8).double().t() + bias.double()
    assert found.dtype == out_dtype
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[out_dtype]
    assert relative(found, expected) < rounding


def test_a_product_is_off_by_what_the_error_model_says():
    x, w = normal(64, 1024), normal(64, 1024, seed=1) * 0.02
    found = fp8_linear(*quantize_rows(x), *quantize_rows(w), out_dtype=torch.float32)
    # 2.6% for each factor, independent: 3.7% of the product's size. 4,096 entries: known to 1% of itself.
    assert relative(found, x @ w.t()) == pytest.approx(0.037, abs=0.002)


def test_the_input_gradient_is_off_by_no_more_than_the_product():
    gradient, w = normal(32, 256), normal(256, 128, seed=1) * torch.linspace(0.01, 1, 256).unsqueeze(1)
    found = fp8_linear_backward(gradient, *quantize_rows(w), out_dtype=torch.float32)
    assert relative(found, gradient @ w) < 0.042


def test_the_gradient_is_that_of_the_forward_weight():
    gradient, w = normal(32, 256), quantize_rows(normal(256, 128, seed=1))
    found = fp8_linear_backward(gradient, *w, out_dtype=torch.float32)
    # Only the gradient's own rounding is left: 2.6%.
    assert relative(found, gradient @ dequantize_rows(*w)) == pytest.approx(0.026, abs=0.002)


@pytest.mark.parametrize("rank", [1, 5, 16, 33])
def test_an_adapters_share_is_quantised_like_the_rest(rank):
    gradient, w = normal(32, 256), quantize_rows(normal(256, 128, seed=1))
    u, a = normal(32, rank, seed=2), quantize_rows(normal(rank, 128, seed=3))
    found = fp8_linear_backward(gradient, *w, out_dtype=torch.float32, u=u, a=dequantize_rows(*a))
    stacked = torch.cat([dequantize_rows(*w), dequantize_rows(*a)])
    # Rows of A are representable; only the rounding of [gradient, u] is left: 2.6%.
    assert relative(found, torch.cat([gradient, u], dim=1) @ stacked) == pytest.approx(0.026, abs=0.003)


def test_rows_beside_others_are_quantised_as_one():
    x, beside, factor = normal(5, 60), normal(5, 24, seed=1) * 4, torch.linspace(0.1, 3, 84)
    found = quantize_rows(x, beside=beside, column_factor=factor[:60], beside_factor=factor[60:])
    expected = quantize_rows(torch.cat([x, beside], dim=1), column_factor=factor)
    assert torch.equal(found[0].float(), expected[0].float())
    assert torch.equal(found[1], expected[1])


def test_transposing_codes_moves_every_byte():
    codes, _ = quantize_rows(normal(37, 21))
    assert torch.equal(transpose_codes(codes).float(), codes.float().t())
    below, _ = quantize_rows(normal(5, 21, seed=1))
    assert torch.equal(transpose_codes(codes, below=below).float(), torch.cat([codes.float(), below.float()]).t())


def test_the_triton_kernels_of_fp8_equal_the_reference():
    run_in_interpreter("triton_fp8.py")
