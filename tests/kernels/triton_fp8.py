"""The Triton kernels of e4m3 against the reference, bit for bit; run by test_fp8.py under the interpreter.

On a machine with a GPU `pytest tests/kernels/triton_fp8.py` runs the compiled kernels and the matrix unit.
"""

from __future__ import annotations

import pytest
import torch

from affina.kernels import fp8
from affina.kernels.dispatch import use_triton
from affina.kernels.triton import fp8 as kernel
from tests.kernels import exact_casts
from tests.kernels.device import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if DEVICE.type == "cpu":
    exact_casts.install()


def normal(rows, columns, dtype=torch.float32, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def reference(x, factor=None):
    codes, scale = torch.empty(x.shape, dtype=fp8.E4M3, device=DEVICE), torch.empty(x.shape[0], device=DEVICE)
    fp8._quantize_rows(x, factor, codes, scale)
    return codes, scale


def equal(found, expected):
    return torch.equal(found[0].view(torch.uint8), expected[0].view(torch.uint8)) and torch.equal(found[1], expected[1])


def test_the_kernel_is_what_runs():
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 127), (7, 128), (5, 129), (4, 1000)])
def test_codes_and_scales_are_the_bits_of_the_reference(rows, columns, dtype):
    x = normal(rows, columns, dtype)
    assert equal(fp8.quantize_rows(x), reference(x))


@pytest.mark.parametrize("columns", [256, 300, 700])
def test_rows_longer_than_a_tile_are_read_twice(monkeypatch, columns):
    monkeypatch.setattr(kernel, "MAX_HELD", 128)
    x, factor = normal(5, columns), normal(1, columns, seed=2)[0].abs()
    assert equal(fp8.quantize_rows(x), reference(x))
    assert equal(fp8.quantize_rows(x, column_factor=factor), reference(x, factor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "rank"), [(64, 1), (130, 7), (200, 48)])
def test_rows_beside_others_are_quantised_as_one(columns, rank, dtype):
    x, beside = normal(6, columns + 3, dtype)[:, :columns], normal(6, rank + 2, dtype, seed=1)[:, :rank] * 3
    factor = normal(1, columns + rank, seed=2)[0].abs()
    whole = torch.cat([x, beside], dim=1)
    assert equal(
        fp8.quantize_rows(x, beside=beside, column_factor=factor[:columns], beside_factor=factor[columns:]),
        reference(whole, factor),
    )
    assert equal(fp8.quantize_rows(x, beside=beside), reference(whole))


@pytest.mark.parametrize("columns", [2560, 2561, 640, 384, 3000, 255])
def test_rows_are_held_in_two_pieces(columns):
    """An even and an odd rest, a rest as long as the first piece, and almost so."""
    x, factor = normal(3, columns, torch.bfloat16), normal(1, columns + 5, seed=2)[0].abs()
    beside = normal(3, 5, torch.bfloat16, seed=1) * 3
    assert equal(fp8.quantize_rows(x), reference(x))
    whole = torch.cat([x, beside], dim=1)
    assert equal(
        fp8.quantize_rows(x, beside=beside, column_factor=factor[:columns], beside_factor=factor[columns:]),
        reference(whole, factor),
    )


@pytest.mark.parametrize(
    ("columns", "pieces"),
    [(1, (128, 0)), (300, (256, 128)), (500, (512, 0)), (2560, (2048, 512)), (4096, (4096, 0)), (9728, (8192, 2048)),
     (19456, (16384, 4096)), (32768, (32768, 0)), (32769, (32768, 0)), (100_000, (32768, 0))],
)  # fmt: skip
def test_a_row_is_held_with_few_lanes_to_spare(columns, pieces):
    assert kernel.held_pieces(columns) == pieces
    assert sum(pieces) >= min(columns, 32768)


def test_a_row_of_the_longest_tile_is_right():
    x = normal(2, 32768, torch.bfloat16)
    assert equal(fp8.quantize_rows(x), reference(x))


def test_zeros_tiny_and_huge_rows_equal_the_reference():
    x = normal(8, 200)
    x[0] = 0.0
    sizes = torch.tensor([1.0, 1e-41, 1e-38, 1e-37, 1e-30, 1.0, 1e30, 5e37], device=DEVICE)
    x = x * sizes.unsqueeze(1)
    assert equal(fp8.quantize_rows(x), reference(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_memory_of_the_caller_are_respected(dtype):
    x = normal(6, 300, dtype)[:, 20:220]
    room = torch.zeros(6, 256, device=DEVICE).to(fp8.E4M3)
    scales = torch.zeros(6, device=DEVICE)
    fp8.quantize_rows(x, out=room[:, 32:232], scale_out=scales)
    assert equal((room[:, 32:232].contiguous(), scales), reference(x))
    assert bool((room[:, :32].float() == 0).all())
    assert bool((room[:, 232:].float() == 0).all())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_visible(bad):
    x = normal(3, 130)
    x[1, 129] = bad
    codes, scale = fp8.quantize_rows(x)
    assert fp8.dequantize_rows(codes, scale).isfinite().all(dim=1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(1, 1), (64, 64), (65, 130), (200, 33)], ids=str)
def test_transposing_moves_every_byte(shape):
    codes, _ = reference(normal(*shape))
    found = fp8.transpose_codes(codes)
    assert torch.equal(found.view(torch.uint8), codes.view(torch.uint8).t())
    below, _ = reference(normal(7, shape[1], seed=1))
    stacked = torch.cat([codes.view(torch.uint8), below.view(torch.uint8)])
    assert torch.equal(fp8.transpose_codes(codes, below=below).view(torch.uint8), stacked.t())
    room = torch.zeros(shape[1], shape[0] + 16, device=DEVICE).to(fp8.E4M3)
    fp8.transpose_codes(codes, out=room[:, : shape[0]])
    assert torch.equal(room[:, : shape[0]].view(torch.uint8), codes.view(torch.uint8).t())
    assert bool((room[:, shape[0] :].float() == 0).all())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("fast", [True, False])
def test_products_are_those_of_the_dequantised_factors(out_dtype, rows, fast):
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no e4m3 matrix unit")
    x, w = normal(rows, 144, torch.bfloat16), normal(32, 144, torch.bfloat16, seed=1)
    bias = torch.linspace(-1, 1, 32, device=DEVICE)
    x8, w8 = fp8.quantize_rows(x), fp8.quantize_rows(w)
    found = fp8.fp8_linear(*x8, *w8, out_dtype=out_dtype, bias=bias, use_fast_accum=fast)
    expected = fp8.dequantize_rows(*x8).double() @ fp8.dequantize_rows(*w8).double().t() + bias.double()
    assert found.dtype == out_dtype
    # One rounding to bfloat16; the fast accumulator keeps at least 13 bits of a sum.
    assert (found.double() - expected).norm() < 2**-8 * expected.norm()


def test_the_input_gradient_is_off_by_no_more_than_the_product():
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this card has no e4m3 matrix unit")
    gradient, w = normal(32, 96, torch.bfloat16), normal(96, 64, seed=1)
    w *= torch.linspace(0.01, 1, 96, device=DEVICE).unsqueeze(1)
    found = fp8.fp8_linear_backward(gradient, *fp8.quantize_rows(w), out_dtype=torch.bfloat16)
    expected = gradient.double() @ w.double()
    # 2.6% of each factor's rounding.
    assert (found.double() - expected).norm() < 0.042 * expected.norm()
