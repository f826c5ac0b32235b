"""The norm, its sum and its gradient equal the definition, in every type and where outputs lie over inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.fp8 import QuantizedRows, quantize_rows
from affina.kernels.rms_norm import RowUpdate, add_rms_norm, add_rows, rms_norm, rms_norm_backward
from tests.kernels.device import DEVICE
from tests.kernels.interpreter import run_in_interpreter

EPSILON = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the type: at most 2^-8 of a bfloat16, 2^-11 of a float16; float32: some 20 roundings of 6e-8.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def definition(x, weight):
    """The norm in float64."""
    x, weight = x.double(), weight.double()
    return weight * x / torch.sqrt(x.square().mean(dim=1, keepdim=True) + EPSILON)


def definition_backward(grad_output, x, weight, grad_residual=None):
    """The gradient by autograd in float64."""
    exact = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(definition(exact, weight), exact, grad_output.double())
    return gradient if grad_residual is None else gradient + grad_residual.double()


def random_rows(rows, width, dtype=torch.float32, seed=0, *, slack=0, factor=1.0):
    """[rows, width] random numbers; the row stride is width + slack. What lies around them in memory is NaN."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((rows + 2, width + slack), torch.nan, dtype=dtype, device=DEVICE)
    storage[:rows, :width] = (torch.randn(rows, width, generator=generator) * factor).to(DEVICE)
    return storage[:rows, :width]


def random_weight(width, dtype=torch.float32):
    return (1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(99))).to(DEVICE, dtype)


def random_update(rows, width, rank, dtype=torch.float32, *, slack=0):
    """A low-rank update whose entries are of the size of its scale."""
    t = random_rows(rows, rank, dtype, seed=3, slack=slack)
    b = random_rows(width, rank, dtype, seed=4, slack=slack, factor=max(1, rank) ** -0.5)
    return RowUpdate(t, b, 0.7)


def definition_sum(x, update, lora):
    """The sum in float64."""
    return x.double() + update.double() + lora.scale * lora.t.double() @ lora.b.double().t()


def assert_close(found, wanted, dtype, *, scale=1.0):
    """Elements agree to the rounding of `dtype`; small ones to that of numbers of size `scale`."""
    assert found.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 0.05 * scale)


def test_codes_are_those_of_the_normalised_rows():
    x, update, weight = random_rows(5, 48), random_rows(5, 48, seed=1), random_weight(48)
    for is_sum in (False, True):
        codes = QuantizedRows.empty(5, 48, DEVICE)
        if is_sum:
            _, y, _ = add_rms_norm(x, update, weight, EPSILON, lora=random_update(5, 48, 2), codes_out=codes)
        else:
            y, _ = rms_norm(x, weight, EPSILON, codes_out=codes)
        wanted = quantize_rows(y)
        assert torch.equal(codes.codes.float(), wanted.codes.float())
        assert torch.equal(codes.scale, wanted.scale)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 9), width=st.integers(1, 70), slack=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_rows_are_normalised_as_defined(rows, width, slack, dtype):
    x, weight = random_rows(rows, width, dtype, slack=slack), random_weight(width, dtype)
    y, rstd = rms_norm(x, weight, EPSILON)
    assert_close(y, definition(x, weight), dtype)
    assert rstd.dtype == torch.float32
    torch.testing.assert_close(rstd.double(), (x.double().square().mean(dim=1) + EPSILON).rsqrt(), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    slack=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    has_residual=st.booleans(),
)
def test_the_gradient_equals_autograd_of_the_definition(rows, width, slack, dtype, has_residual):
    x, weight = random_rows(rows, width, dtype, slack=slack), random_weight(width, dtype)
    grad_output = random_rows(rows, width, dtype, seed=1, slack=slack)
    residual = random_rows(rows, width, dtype, seed=2) if has_residual else None
    _, rstd = rms_norm(x, weight, EPSILON)
    gradient = rms_norm_backward(grad_output, x, weight, rstd, grad_residual=residual)
    wanted = definition_backward(grad_output, x, weight, residual)
    # The gradient is a difference of numbers of the size of r; rows of one element have r up to 1 / |x| and cancel.
    scale = float(rstd.max()) * float(grad_output.abs().max()) * 20 if rows else 1.0
    assert_close(gradient, wanted, dtype, scale=max(1.0, scale))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_and_the_rounded_sum_is_normalised(dtype):
    x, update, weight = random_rows(7, 40, dtype), random_rows(7, 40, dtype, seed=1), random_weight(40, dtype)
    s, y, rstd = add_rms_norm(x, update, weight, EPSILON)
    assert torch.equal(s, x + update)
    wanted_y, wanted_rstd = rms_norm(s, weight, EPSILON)
    assert torch.equal(y, wanted_y)
    assert torch.equal(rstd, wanted_rstd)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 70),
    rank=st.integers(0, 20),
    slack=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_a_low_rank_update_is_added_before_the_one_rounding(rows, width, rank, slack, dtype):
    x, update = random_rows(rows, width, dtype, slack=slack), random_rows(rows, width, dtype, seed=1)
    weight, lora = random_weight(width, dtype), random_update(rows, width, rank, dtype, slack=slack)
    s, y, rstd = add_rms_norm(x, update, weight, EPSILON, lora=lora)
    # The terms of the sum may cancel: float32 then keeps 6e-8 of their size.
    assert_close(s, definition_sum(x, update, lora), dtype, scale=20 if dtype == torch.float32 else 1)
    assert torch.equal(add_rows(x, update, lora=lora), s)
    wanted_y, wanted_rstd = rms_norm(s, weight, EPSILON)
    assert torch.equal(y, wanted_y)
    assert torch.equal(rstd, wanted_rstd)


def test_an_update_of_rank_1_has_a_result_to_check_on_paper():
    lora = RowUpdate(torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0], [3.0]]), 0.5)
    x, update = torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    assert torch.equal(add_rows(x, update, lora=lora), torch.tensor([[2.0, 1.0, 4.0], [1.5, 2.0, 0.5]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_update_are_added_as_tensors_are(dtype):
    x, update = random_rows(2051, 130, dtype), random_rows(2051, 130, dtype, seed=1)
    assert torch.equal(add_rows(x, update), x + update)
    assert torch.equal(add_rows(x, update, lora=random_update(2051, 130, 0, dtype)), x + update)


@pytest.mark.parametrize("over", ["x", "update"])
def test_the_updated_sum_may_be_written_over_an_input(over):
    tensors = {"x": random_rows(2100, 130), "update": random_rows(2100, 130, seed=1)}
    lora = random_update(2100, 130, 4)
    wanted = add_rows(**tensors, lora=lora)
    found = add_rows(**tensors, lora=lora, out=tensors[over])
    assert found is tensors[over]
    assert torch.equal(found, wanted)


def test_the_gradient_of_the_sum_is_that_of_its_terms():
    x, update = random_rows(3, 8, torch.float64).requires_grad_(), random_rows(3, 8, torch.float64, seed=1)
    lora, grad_output = random_update(3, 8, 2, torch.float64), random_rows(3, 8, torch.float64, seed=5)
    s = definition_sum(x, update, lora)
    (wanted,) = torch.autograd.grad(definition(s, torch.ones(8)), x, grad_output)
    _, _, rstd = add_rms_norm(x.detach(), update, torch.ones(8), EPSILON, lora=lora)
    gradient = rms_norm_backward(grad_output, s.detach(), torch.ones(8), rstd)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("has_update", [False, True])
@pytest.mark.parametrize(("sum_over", "out_over"), [("x", None), ("update", None), ("x", "update"), ("update", "x")])
def test_sum_and_norm_may_be_written_over_their_inputs(sum_over, out_over, has_update):
    tensors = {"x": random_rows(2100, 130), "update": random_rows(2100, 130, seed=1)}
    options = {"weight": random_weight(130), "epsilon": EPSILON}
    options["lora"] = random_update(2100, 130, 4) if has_update else None
    s, y, rstd = add_rms_norm(*(t.clone() for t in tensors.values()), **options)
    found_s, found_y, found_rstd = add_rms_norm(
        **tensors, **options, sum_out=tensors[sum_over], out=tensors.get(out_over)
    )
    assert found_s is tensors[sum_over]
    assert torch.equal(found_s, s)
    assert torch.equal(found_y, y)
    assert torch.equal(found_rstd, rstd)


@pytest.mark.parametrize("over", ["grad_output", "grad_residual", "x"])
def test_the_gradient_may_be_written_over_an_input(over):
    tensors = {name: random_rows(2100, 130, seed=i) for i, name in enumerate(("grad_output", "x", "grad_residual"))}
    weight = random_weight(130)
    _, rstd = rms_norm(tensors["x"], weight, EPSILON)
    wanted = rms_norm_backward(**tensors, weight=weight, rstd=rstd)
    found = rms_norm_backward(**tensors, weight=weight, rstd=rstd, out=tensors[over])
    assert found is tensors[over]
    assert torch.equal(found, wanted)


def test_outputs_may_be_columns_of_a_wider_tensor():
    x, weight = random_rows(5, 24), random_weight(24)
    wide = torch.zeros(5, 40)
    y, rstd = rms_norm(x, weight, EPSILON, out=wide[:, 3:27])
    assert torch.equal(wide[:, 3:27], rms_norm(x, weight, EPSILON)[0])
    assert not wide[:, :3].any()
    assert not wide[:, 27:].any()
    rms_norm_backward(y, x, weight, rstd, out=wide[:, 3:27])
    assert not wide[:, 27:].any()


def test_many_rows_equal_the_definition_across_the_borders_of_chunks():
    x, weight = random_rows(2051, 257), random_weight(257)
    y, rstd = rms_norm(x, weight, EPSILON)
    assert_close(y, definition(x, weight), torch.float32)
    gradient = rms_norm_backward(x.flip(0), x, weight, rstd)
    assert_close(gradient, definition_backward(x.flip(0), x, weight), torch.float32, scale=20)


def test_one_row_of_equal_numbers_has_a_result_to_check_on_paper():
    x = torch.full((1, 4), 3.0)
    y, rstd = rms_norm(x, torch.tensor([1.0, 2.0, -1.0, 0.5]), 0.0)
    torch.testing.assert_close(rstd, torch.tensor([1 / 3]))
    torch.testing.assert_close(y, torch.tensor([[1.0, 2.0, -1.0, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_beyond_the_range_of_the_type_do_not_overflow(dtype):
    x, weight = random_rows(3, 64, dtype, factor=1e4), random_weight(64, dtype)
    y, _ = rms_norm(x, weight, EPSILON)
    assert_close(y, definition(x, weight), dtype)


def test_a_row_of_zeros_gives_zeros():
    x, weight = torch.zeros(2, 8), random_weight(8)
    y, rstd = rms_norm(x, weight, EPSILON)
    assert torch.equal(y, x)
    torch.testing.assert_close(rstd, torch.full((2,), EPSILON**-0.5))
    torch.testing.assert_close(rms_norm_backward(torch.ones(2, 8), x, weight, rstd), rstd[:, None] * weight)


def test_float64_rows_are_computed_in_float64():
    x, weight = random_rows(4, 9, torch.float64), random_weight(9, torch.float64)
    y, rstd = rms_norm(x, weight, EPSILON)
    torch.testing.assert_close(y, definition(x, weight), rtol=1e-14, atol=1e-14)
    gradient = rms_norm_backward(y, x, weight, rstd)
    torch.testing.assert_close(gradient, definition_backward(y, x, weight), rtol=1e-12, atol=1e-13)


def test_transformers_module_differs_by_roundings_only():
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    x, weight = random_rows(6, 64, torch.bfloat16), random_weight(64, torch.bfloat16)
    module = Qwen3RMSNorm(64, EPSILON).bfloat16()
    module.weight.data.copy_(weight)
    y, _ = rms_norm(x, weight, EPSILON)
    # It rounds twice, to 2^-8 each; 2^-8 more for ours.
    torch.testing.assert_close(module(x).float(), y.float(), rtol=3 * 2**-8, atol=1e-6)


def test_triton_kernels_equal_the_reference_in_the_interpreter():
    run_in_interpreter("triton_rms_norm.py")
