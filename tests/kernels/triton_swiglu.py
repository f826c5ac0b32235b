"""The Triton kernels of silu(gate) · up through Triton's interpreter; `test_swiglu.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import swiglu as operation
from affina.kernels.dispatch import use_triton
from affina.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_with_ranks
from affina.kernels.triton import swiglu_low_rank as kernels
from tests.kernels import exact_casts, loop_bounds
from tests.kernels.device import DEVICE, IS_COMPILED
from tests.kernels.test_swiglu import (
    assert_close,
    assert_rank_gradients,
    definition,
    definition_backward,
    random_rows,
    random_u_down,
    random_update,
    rank_outputs,
)

if not IS_COMPILED:
    exact_casts.install()
    loop_bounds.install()

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding to the result's type; float32: some 20 roundings of 6e-8.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# One element, less and more than a tile in either direction.
SHAPES = [(1, 1), (1, 1500), (2, 1024), (20, 65), (70, 20)]


def test_these_tests_run_the_triton_kernels(monkeypatch):
    assert use_triton(torch.zeros(1, device=DEVICE))

    def fail(*arguments):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(operation, "_forward_reference", fail)
    monkeypatch.setattr(operation, "_backward_reference", fail)
    gate_up = random_rows(2, 8)
    swiglu_backward(swiglu(gate_up), gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_and_gradient_equal_the_definition(shape, dtype):
    rows, width = shape
    gate_up, grad_output = random_rows(rows, 2 * width, dtype, slack=5), random_rows(*shape, dtype, seed=1, slack=2)
    assert_close(swiglu(gate_up), definition(gate_up), dtype, TOLERANCE)
    activation = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    gradient = swiglu_backward(grad_output, gate_up, activation_out=activation)
    assert_close(gradient, definition_backward(grad_output, gate_up), dtype, TOLERANCE)
    assert torch.equal(activation, swiglu(gate_up))


@pytest.mark.parametrize(
    ("shape", "ranks", "dtypes"),
    [
        ((1, 1), (1, 1), DTYPES),
        ((70, 65), (16, 16), DTYPES),
        ((65, 30), (8, 33), [torch.bfloat16]),
        ((3, 64), (0, 16), [torch.float16]),
        ((3, 70), (5, 0), [torch.bfloat16]),
        ((4, 70), (0, 0), [torch.float32]),
    ],
)
def test_low_rank_updates_are_added(shape, ranks, dtypes):
    rows, width = shape
    for dtype in dtypes:
        gate_up = random_rows(rows, 2 * width, dtype, slack=5)
        update = random_update(rows, width, ranks, dtype, slack=3)
        assert_close(swiglu(gate_up, lora=update), definition(gate_up, update), dtype, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_updated_activation_may_be_written_over_the_gate(dtype):
    gate_up, update = random_rows(70, 300, dtype, slack=5), random_update(70, 150, (16, 8), dtype)
    wanted = swiglu(gate_up, lora=update)
    assert torch.equal(swiglu(gate_up, out=gate_up[:, :150], lora=update), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_written_over_inputs_are_the_same(dtype):
    gate_up, grad_output = random_rows(70, 300, dtype, slack=5), random_rows(70, 150, dtype, seed=1, slack=1)
    wanted_activation, wanted = swiglu(gate_up), swiglu_backward(grad_output, gate_up)
    over_gate = gate_up.clone()
    assert torch.equal(swiglu(over_gate, out=over_gate[:, :150]), wanted_activation)
    found = swiglu_backward(grad_output, gate_up, out=gate_up, activation_out=grad_output)
    assert found is gate_up
    assert torch.equal(found, wanted)
    assert torch.equal(grad_output, wanted_activation)


def test_columns_beside_strided_outputs_stay_untouched():
    gate_up, grad_output = random_rows(5, 16), random_rows(5, 8, seed=1)
    wide = torch.zeros(5, 40, device=DEVICE)
    swiglu_backward(grad_output, gate_up, out=wide[:, 2:18], activation_out=wide[:, 20:28])
    assert torch.equal(wide[:, 2:18], swiglu_backward(grad_output, gate_up))
    assert torch.equal(wide[:, 20:28], swiglu(gate_up))
    assert not wide[:, :2].any()
    assert not wide[:, 18:20].any()
    assert not wide[:, 28:].any()


@pytest.mark.parametrize("size", [80.0, 200.0, 1e4])
def test_large_gates_are_the_identity_or_zero_and_stay_finite(size):
    gate_up = torch.tensor([[size, -size, 2.0, 2.0]], device=DEVICE)
    torch.testing.assert_close(swiglu(gate_up), torch.tensor([[2 * size, 0.0]], device=DEVICE))
    gradient = swiglu_backward(torch.ones(1, 2, device=DEVICE), gate_up)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 0.0, size, 0.0]], device=DEVICE))


def test_no_rows_launch_nothing():
    assert swiglu(random_rows(0, 8)).shape == (0, 4)
    assert swiglu_backward(random_rows(0, 4), random_rows(0, 8)).shape == (0, 8)


def test_results_are_the_same_bits_twice():
    gate_up, update = random_rows(70, 200), random_update(70, 100, (16, 16))
    assert torch.equal(swiglu(gate_up, lora=update), swiglu(gate_up, lora=update))


def with_ranks(grad_output, gate_up, update, u_down, ranks, **options):
    """(gradient of gate and up, gradients of the factors)"""
    outputs = rank_outputs(grad_output.shape[1], ranks, value=0.5 if options.get("accumulates") else torch.nan)
    gradient = swiglu_backward_with_ranks(grad_output, gate_up, lora=update, u_down=u_down, **outputs, **options)
    return gradient, outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "ranks"),
    [
        ((1, 1), (1, 1, 1)),
        ((150, 100), (16, 8, 5)),  # several tiles in either direction, several chunks of rows
        ((70, 65), (64, 33, 64)),
        ((33, 30), (0, 16, 0)),
        ((40, 64), (3, 0, 17)),
        ((65, 70), (0, 0, 16)),
    ],
)
def test_gradients_of_the_factors_are_their_products(shape, ranks, dtype):
    rows, width = shape
    gate_up, grad_output = random_rows(rows, 2 * width, dtype, slack=5), random_rows(*shape, dtype, seed=1, slack=2)
    update, u_down = (
        random_update(rows, width, ranks[:2], dtype, slack=3),
        random_u_down(rows, ranks[2], dtype, slack=4),
    )
    wanted, activation = swiglu_backward(grad_output, gate_up, lora=update), swiglu(gate_up, lora=update)
    gradient, found = with_ranks(grad_output, gate_up, update, u_down, ranks)
    assert_close(gradient, definition_backward(grad_output, gate_up, update), dtype, TOLERANCE)
    # The products are of the same rounded numbers; the sums are in float32, of at most 150 products.
    assert_close(gradient, wanted.double(), dtype, {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10})
    rounding = 40 * 2**-24
    assert_rank_gradients(found, gradient, activation, update, u_down, rounding=rounding)


def test_gradients_of_the_factors_are_added_to_what_is_there_and_in_place():
    ranks = (16, 8, 5)
    gate_up, grad_output = random_rows(150, 200, torch.bfloat16, slack=8), random_rows(150, 100, torch.bfloat16, seed=1)
    update, u_down = random_update(150, 100, ranks[:2], torch.bfloat16), random_u_down(150, ranks[2], torch.bfloat16)
    wanted, once = with_ranks(grad_output, gate_up, update, u_down, ranks)
    gradient, found = with_ranks(grad_output, gate_up, update, u_down, ranks, accumulates=True, out=gate_up)
    assert gradient is gate_up
    assert torch.equal(gradient, wanted)
    for name, value in once.items():
        torch.testing.assert_close(found[name], value + 0.5, rtol=1e-6, atol=1e-6)


def test_gradients_of_factors_of_no_rows_are_zero():
    _, found = with_ranks(
        random_rows(0, 8), random_rows(0, 16), random_update(0, 8, (2, 3)), random_u_down(0, 4), (2, 3, 4)
    )
    assert not any(value.any() for value in found.values())


def test_ranks_above_64_take_the_reference(monkeypatch):
    monkeypatch.setattr(kernels, "launch_forward", None)
    monkeypatch.setattr(kernels, "launch_backward", None)
    ranks = (65, 65, 80)
    gate_up, grad_output = random_rows(40, 60), random_rows(40, 30, seed=1)
    update, u_down = random_update(40, 30, ranks[:2]), random_u_down(40, ranks[2])
    wanted, activation = swiglu_backward(grad_output, gate_up, lora=update), swiglu(gate_up, lora=update)
    gradient, found = with_ranks(grad_output, gate_up, update, u_down, ranks)
    assert torch.equal(gradient, wanted)
    assert_rank_gradients(found, gradient, activation, update, u_down, rounding=40 * 2**-24)


@pytest.mark.parametrize("num_programs", [1, 4, 528, 10_000])
@pytest.mark.parametrize("blocks", [1, 2, 9, 512, 513])
def test_chunks_hold_all_blocks_of_rows_and_are_few(blocks, num_programs):
    chunk = kernels._blocks_per_chunk(blocks, 152, num_programs)
    num_chunks = -(-blocks // chunk)
    assert 1 <= num_chunks <= 16
    assert num_chunks * chunk >= blocks


def test_many_rows_fill_the_device_in_even_rounds():
    # 152 column blocks, 528 programs at once: 10 chunks of 52 of the 512 row blocks are 2.9 rounds.
    assert kernels._blocks_per_chunk(512, 152, 528) == 52
