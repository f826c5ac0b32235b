"""The Triton kernels of the norm through Triton's interpreter; `test_rms_norm.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import rms_norm as operation
from affina.kernels.dispatch import use_triton
from affina.kernels.fp8 import QuantizedRows, quantize_rows
from affina.kernels.rms_norm import add_rms_norm, add_rows, rms_norm, rms_norm_backward
from tests.kernels.device import DEVICE
from tests.kernels.test_rms_norm import (
    EPSILON,
    definition,
    definition_backward,
    definition_sum,
    random_rows,
    random_update,
    random_weight,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding to the result's type; the interpreter truncates float32 to bfloat16, which is up to a whole unit, 2^-7.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# One row per program with padding, none, several rows per program, a row of one element, odd numbers of rows.
SHAPES = [(1, 1), (1, 2560), (3, 1000), (1, 4096), (5, 64), (67, 33), (129, 16)]


def assert_close(found, wanted, dtype, *, scale=1.0):
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance * 0.05 * scale)


def test_these_tests_run_the_triton_kernels(monkeypatch):
    assert use_triton(torch.zeros(1, device=DEVICE))

    def fail(*arguments):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(operation, "_forward_reference", fail)
    monkeypatch.setattr(operation, "_backward_reference", fail)
    monkeypatch.setattr(operation, "_add_reference", fail)
    x, weight = random_rows(2, 8), random_weight(8)
    add_rms_norm(x, x, weight, EPSILON)
    add_rms_norm(x, x, weight, EPSILON, lora=random_update(2, 8, 2))
    add_rows(x, x, lora=random_update(2, 8, 2))
    y, rstd = rms_norm(x, weight, EPSILON)
    rms_norm_backward(y, x, weight, rstd)
    with pytest.raises(AssertionError, match="the reference ran"):
        rms_norm(random_rows(1, 20000), random_weight(20000), EPSILON)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_equal_the_definition(shape, dtype):
    x, weight = random_rows(*shape, dtype, slack=5), random_weight(shape[1], dtype)
    grad_output = random_rows(*shape, dtype, seed=1, slack=2)
    residual = random_rows(*shape, dtype, seed=2, slack=1)
    y, rstd = rms_norm(x, weight, EPSILON)
    assert_close(y, definition(x, weight), dtype)
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(dim=1) + EPSILON).rsqrt(), rtol=1e-6, atol=0)
    scale = max(1.0, float(rstd.max()) * float(grad_output.abs().max()) * 20)
    for extra in (None, residual):
        gradient = rms_norm_backward(grad_output, x, weight, rstd, grad_residual=extra)
        assert_close(gradient, definition_backward(grad_output, x, weight, extra), dtype, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sum_and_its_norm_equal_the_definition(shape, dtype):
    x, update = random_rows(*shape, dtype, slack=5), random_rows(*shape, dtype, seed=1, slack=2)
    weight = random_weight(shape[1], dtype)
    s, y, _ = add_rms_norm(x, update, weight, EPSILON)
    assert_close(s, x.double() + update.double(), dtype)
    assert_close(y, definition(s, weight), dtype)


@pytest.mark.parametrize(
    ("shape", "rank", "dtypes"),
    [
        ((1, 1), 1, DTYPES),
        ((37, 300), 16, DTYPES),
        ((17, 128), 8, [torch.bfloat16]),
        ((2, 2560), 16, [torch.bfloat16]),
        ((16, 70), 65, [torch.float16]),
        ((3, 140), 200, [torch.float32, torch.bfloat16]),
        ((33, 20), 0, [torch.float32]),
    ],
)
def test_a_low_rank_update_is_added_before_the_sum_is_rounded_and_normalised(shape, rank, dtypes):
    for dtype in dtypes:
        x, update = random_rows(*shape, dtype, slack=5), random_rows(*shape, dtype, seed=1, slack=2)
        weight, lora = random_weight(shape[1], dtype), random_update(*shape, rank, dtype, slack=3)
        s, y, rstd = add_rms_norm(x, update, weight, EPSILON, lora=lora)
        assert_close(s, definition_sum(x, update, lora), dtype, scale=20 if dtype == torch.float32 else 1)
        assert_close(y, definition(s, weight), dtype)
        exact = (s.double().square().mean(dim=1) + EPSILON).rsqrt()
        torch.testing.assert_close(rstd.double(), exact, rtol=1e-6, atol=0)
        added = add_rows(x, update, lora=lora)
        assert_close(added, definition_sum(x, update, lora), dtype, scale=20 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("sum_over", "out_over"), [(0, None), (1, None), (0, 1), (1, 0), (None, 1)])
def test_an_updated_sum_and_its_norm_written_over_inputs_are_the_same(sum_over, out_over, dtype):
    lora, weight = random_update(37, 300, 5, dtype), random_weight(300)

    def inputs():
        return [random_rows(37, 300, dtype, seed=seed, slack=3) for seed in range(2)]

    s, y, rstd = add_rms_norm(*inputs(), weight, EPSILON, lora=lora)
    tensors = inputs()
    outputs = {"sum_out": sum_over, "out": out_over}
    outputs = {name: None if index is None else tensors[index] for name, index in outputs.items()}
    found = add_rms_norm(*tensors, weight, EPSILON, lora=lora, **outputs)
    assert all(torch.equal(a, b) for a, b in zip(found, (s, y, rstd), strict=True))
    if out_over is None:
        tensors = inputs()
        assert torch.equal(add_rows(*tensors, lora=lora, out=tensors[sum_over]), s)


@pytest.mark.parametrize("shape", [(3, 300), (70, 33)])
def test_results_written_over_inputs_are_the_same(shape):
    weight = random_weight(shape[1])

    def inputs():
        return [random_rows(*shape, seed=seed, slack=3) for seed in range(3)]

    x, update, _ = inputs()
    s, y, rstd = add_rms_norm(x, update, weight, EPSILON)
    found_s, found_y, _ = add_rms_norm(x, update, weight, EPSILON, sum_out=x, out=update)
    assert found_s is x
    assert found_y is update
    assert torch.equal(found_s, s)
    assert torch.equal(found_y, y)
    wanted = None
    for over in (None, 0, 1, 2):
        tensors = inputs()
        gradient = rms_norm_backward(
            tensors[0], s if over != 1 else tensors[1].copy_(s), weight, rstd, grad_residual=tensors[2],
            out=None if over is None else tensors[over],
        )  # fmt: skip
        wanted = gradient.clone() if wanted is None else wanted
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("shape", [(11, 300), (70, 33)])
def test_rows_taken_in_steps_give_the_same_bits(shape, monkeypatch):
    from affina.kernels.triton import rms_norm as kernels

    weight = random_weight(shape[1])

    def results():
        x, update, residual = (random_rows(*shape, seed=seed, slack=3) for seed in range(3))
        s, y, rstd = add_rms_norm(x, update, weight, EPSILON, sum_out=update)
        gradient = rms_norm_backward(y, s, weight, rstd, grad_residual=residual, out=residual)
        return [s, y, rstd, gradient, rms_norm(x, weight, EPSILON, out=x)[0]]

    wanted = results()
    monkeypatch.setattr(kernels, "_MIN_PROGRAMS", 0)
    for kernel in kernels.ROW_TILES:
        monkeypatch.setitem(kernels.ROW_TILES, kernel, kernels.RowTile(elements=24, steps=4, stages=3))
    assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))


def room_for_codes(rows, columns):
    """Memory for codes with a gap between rows, and for scales."""
    return QuantizedRows.empty(rows, columns + 7, DEVICE)


def same_codes(found, wanted):
    return torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8)) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2560), (5, 64), (67, 33)])
def test_codes_beside_the_norm_are_those_of_a_pass_of_its_own(shape, dtype, monkeypatch):
    x, update, weight = random_rows(*shape, dtype), random_rows(*shape, dtype, seed=1), random_weight(shape[1], dtype)
    x[0] = 0.0
    lora = random_update(*shape, 3, dtype)
    runs = [
        lambda codes: rms_norm(x, weight, EPSILON, codes_out=codes)[0],
        lambda codes: add_rms_norm(x, update, weight, EPSILON, codes_out=codes)[1],
        lambda codes: add_rms_norm(x, update, weight, EPSILON, lora=lora, codes_out=codes)[1],
    ]
    for run in runs:
        room = room_for_codes(*shape)
        codes = QuantizedRows(room.codes[:, : shape[1]], room.scale)
        with monkeypatch.context() as only_the_norms_kernel:
            only_the_norms_kernel.setattr(operation, "quantize_rows", None)
            y = run(codes)
        assert torch.equal(y, run(None)), "codes change nothing else"
        assert same_codes(codes, quantize_rows(y))


def test_columns_beside_a_strided_output_stay_untouched():
    x, weight = random_rows(5, 24), random_weight(24)
    wide = torch.zeros(5, 40, device=DEVICE)
    rms_norm(x, weight, EPSILON, out=wide[:, 3:27])
    torch.testing.assert_close(wide[:, 3:27], rms_norm(x, weight, EPSILON)[0])
    assert not wide[:, :3].any()
    assert not wide[:, 27:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_beyond_the_range_of_the_type_do_not_overflow(dtype):
    x, weight = random_rows(3, 64, dtype, factor=1e4), random_weight(64, dtype)
    y, _ = rms_norm(x, weight, EPSILON)
    assert_close(y, definition(x, weight), dtype)


def test_no_rows_launch_nothing():
    x, weight = random_rows(0, 64), random_weight(64)
    y, rstd = rms_norm(x, weight, EPSILON)
    assert y.shape == (0, 64)
    assert rms_norm_backward(y, x, weight, rstd).shape == (0, 64)
    lora = random_update(0, 64, 4)
    assert add_rms_norm(x, x, weight, EPSILON, lora=lora)[0].shape == (0, 64)
    assert add_rows(x, x, lora=lora).shape == (0, 64)


def test_results_are_the_same_bits_twice():
    x, weight = random_rows(9, 700, torch.bfloat16), random_weight(700)
    assert torch.equal(rms_norm(x, weight, EPSILON)[0], rms_norm(x, weight, EPSILON)[0])
