"""The Triton kernels of silu(gate) · up through Triton's interpreter; `test_swiglu.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import swiglu as operation
from affina.kernels.dispatch import use_triton
from affina.kernels.swiglu import swiglu, swiglu_backward
from tests.kernels.test_swiglu import assert_close, definition, definition_backward, random_rows, random_update

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding to the result's type; the interpreter truncates float32 to bfloat16, which is up to a whole unit, 2^-7.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
# One element, less and more than a tile in either direction.
SHAPES = [(1, 1), (1, 1500), (2, 1024), (20, 65), (70, 20)]


def test_these_tests_run_the_triton_kernels(monkeypatch):
    assert use_triton(torch.zeros(1))

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
    activation = torch.empty(rows, width, dtype=dtype)
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
        ((5, 66), (128, 150), [torch.bfloat16]),
        ((66, 40), (64, 65), [torch.float32]),
    ],
)
def test_low_rank_updates_are_added_forward_and_backward(shape, ranks, dtypes):
    rows, width = shape
    for dtype in dtypes:
        gate_up, grad_output = random_rows(rows, 2 * width, dtype, slack=5), random_rows(*shape, dtype, seed=1)
        update = random_update(rows, width, ranks, dtype, slack=3)
        assert_close(swiglu(gate_up, lora=update), definition(gate_up, update), dtype, TOLERANCE)
        activation = torch.empty(rows, width, dtype=dtype)
        gradient = swiglu_backward(grad_output, gate_up, activation_out=activation, lora=update)
        assert_close(gradient, definition_backward(grad_output, gate_up, update), dtype, TOLERANCE)
        assert torch.equal(activation, swiglu(gate_up, lora=update))


@pytest.mark.parametrize("ranks", [None, (16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_written_over_inputs_are_the_same(dtype, ranks):
    gate_up, grad_output = random_rows(70, 300, dtype, slack=5), random_rows(70, 150, dtype, seed=1, slack=1)
    update = None if ranks is None else random_update(70, 150, ranks, dtype)
    wanted_activation = swiglu(gate_up, lora=update)
    wanted = swiglu_backward(grad_output, gate_up, lora=update)
    over_gate = gate_up.clone()
    assert torch.equal(swiglu(over_gate, out=over_gate[:, :150], lora=update), wanted_activation)
    found = swiglu_backward(grad_output, gate_up, out=gate_up, activation_out=grad_output, lora=update)
    assert found is gate_up
    assert torch.equal(found, wanted)
    assert torch.equal(grad_output, wanted_activation)


def test_columns_beside_strided_outputs_stay_untouched():
    gate_up, grad_output = random_rows(5, 16), random_rows(5, 8, seed=1)
    wide = torch.zeros(5, 40)
    swiglu_backward(grad_output, gate_up, out=wide[:, 2:18], activation_out=wide[:, 20:28])
    assert torch.equal(wide[:, 2:18], swiglu_backward(grad_output, gate_up))
    assert torch.equal(wide[:, 20:28], swiglu(gate_up))
    assert not wide[:, :2].any()
    assert not wide[:, 18:20].any()
    assert not wide[:, 28:].any()


@pytest.mark.parametrize("size", [80.0, 200.0, 1e4])
def test_large_gates_are_the_identity_or_zero_and_stay_finite(size):
    gate_up = torch.tensor([[size, -size, 2.0, 2.0]])
    torch.testing.assert_close(swiglu(gate_up), torch.tensor([[2 * size, 0.0]]))
    gradient = swiglu_backward(torch.ones(1, 2), gate_up)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 0.0, size, 0.0]]))


def test_no_rows_launch_nothing():
    assert swiglu(random_rows(0, 8)).shape == (0, 4)
    assert swiglu_backward(random_rows(0, 4), random_rows(0, 8)).shape == (0, 8)


def test_results_are_the_same_bits_twice():
    gate_up, update = random_rows(70, 200), random_update(70, 100, (16, 16))
    assert torch.equal(swiglu(gate_up, lora=update), swiglu(gate_up, lora=update))
