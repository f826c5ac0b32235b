"""silu(gate) · up and its gradient equal the definition, with and without low-rank updates, in every type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.swiglu import GateUpUpdate, swiglu, swiglu_backward, swiglu_backward_with_ranks
from tests.kernels.compiled import compile_launches, require_compiler
from tests.kernels.device import DEVICE
from tests.kernels.interpreter import run_in_interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the type: at most 2^-8 of a bfloat16, 2^-11 of a float16; float32: some 20 roundings of 6e-8.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def definition(gate_up, update=None):
    """In float64; the gradient is left to autograd."""
    gate, up = gate_up.double().chunk(2, dim=1)
    if update is not None:
        t_gate, t_up = update.t.double().split(update.ranks, dim=1)
        if update.b_gate is not None:
            gate = gate + update.scale_gate * t_gate @ update.b_gate.double().t()
        if update.b_up is not None:
            up = up + update.scale_up * t_up @ update.b_up.double().t()
    return gate / (1 + torch.exp(-gate)) * up


def definition_backward(grad_output, gate_up, update=None):
    exact = gate_up.double().requires_grad_()
    (gradient,) = torch.autograd.grad(definition(exact, update), exact, grad_output.double())
    return gradient


def random_rows(rows, width, dtype=torch.float32, seed=0, *, slack=0, factor=1.0):
    """[rows, width] random numbers; the row stride is width + slack. What lies around them in memory is NaN."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((rows + 2, width + slack), torch.nan, dtype=dtype, device=DEVICE)
    storage[:rows, :width] = (torch.randn(rows, width, generator=generator) * factor).to(DEVICE)
    return storage[:rows, :width]


def random_update(rows, width, ranks, dtype=torch.float32, *, slack=0):
    """An update of about the size of the base; a rank of 0 has no B."""
    t = random_rows(rows, sum(ranks), dtype, seed=5, slack=slack)
    b_gate, b_up = (
        None if rank == 0 else random_rows(width, rank, dtype, seed=6 + i, slack=slack, factor=rank**-0.5)
        for i, rank in enumerate(ranks)
    )
    return GateUpUpdate(t, b_gate, b_up, scale_gate=1.5, scale_up=0.7)


def rank_outputs(width, ranks, dtype=torch.float32, *, value=torch.nan):
    """Where the gradients of factors of ranks (R_g, R_u, R_d) are written; it holds `value` before."""
    gate, up, down = ranks
    return {
        "grad_b_gate": torch.full((width, gate), value, dtype=dtype, device=DEVICE) if gate else None,
        "grad_b_up": torch.full((width, up), value, dtype=dtype, device=DEVICE) if up else None,
        "grad_a_down": torch.full((down, width), value, dtype=dtype, device=DEVICE) if down else None,
    }


def random_u_down(rows, rank, dtype=torch.float32, *, slack=0):
    return random_rows(rows, rank, dtype, seed=9, slack=slack) if rank else None


def rank_products(gradient, activation, update, u_down, product=torch.matmul):
    """The gradients of the factors in float64, from those of gate and up and from the activation."""
    width = gradient.shape[1] // 2
    t_gate, t_up = update.t.double().split(update.ranks, dim=1)
    grad_gate, grad_up = gradient.double().split(width, dim=1)
    pairs = {
        "grad_b_gate": (update.scale_gate * grad_gate.t(), t_gate if update.b_gate is not None else None),
        "grad_b_up": (update.scale_up * grad_up.t(), t_up if update.b_up is not None else None),
        "grad_a_down": (u_down.double().t() if u_down is not None else None, activation.double()),
    }
    return {
        name: None if left is None or right is None else product(left, right) for name, (left, right) in pairs.items()
    }


def assert_rank_gradients(found, gradient, activation, update, u_down, *, rounding, before=0.0):
    """`found` is what the products give, each factor of which is exact to `rounding`."""
    wanted = rank_products(gradient, activation, update, u_down)
    sizes = rank_products(gradient, activation, update, u_down, lambda left, right: left.abs() @ right.abs())
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None
            continue
        excess = (found[name].double() - before - value).abs() - rounding * sizes[name]
        assert float(excess.max()) < 1e-6, name


def assert_close(found, wanted, dtype, tolerance=TOLERANCE):
    """Equal to the rounding of `dtype`; float32's own rounding remains where gate and update cancel."""
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance[dtype], atol=5e-6)


sizes = {
    "rows": st.integers(0, 9),
    "width": st.integers(1, 40),
    "slack": st.integers(0, 3),
    "dtype": st.sampled_from(DTYPES),
    "ranks": st.sampled_from([None, (4, 4), (1, 9), (0, 3), (2, 0), (0, 0)]),
}


@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_the_activation_equals_the_definition(rows, width, slack, dtype, ranks):
    gate_up = random_rows(rows, 2 * width, dtype, slack=slack)
    update = None if ranks is None else random_update(rows, width, ranks, dtype, slack=slack)
    assert_close(swiglu(gate_up, lora=update), definition(gate_up, update), dtype)


@settings(max_examples=40, deadline=None)
@given(**sizes, has_activation=st.booleans())
def test_the_gradient_equals_autograd_of_the_definition(rows, width, slack, dtype, ranks, has_activation):
    gate_up = random_rows(rows, 2 * width, dtype, slack=slack)
    update = None if ranks is None else random_update(rows, width, ranks, dtype, slack=slack)
    grad_output = random_rows(rows, width, dtype, seed=1, slack=slack)
    activation = torch.empty(rows, width, dtype=dtype) if has_activation else None
    gradient = swiglu_backward(grad_output, gate_up, activation_out=activation, lora=update)
    assert_close(gradient, definition_backward(grad_output, gate_up, update), dtype)
    if activation is not None:
        assert torch.equal(activation, swiglu(gate_up, lora=update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [None, (4, 3)])
def test_gradient_and_activation_may_be_written_over_their_inputs(dtype, ranks):
    rows, width = 3600, 150  # three chunks of rows
    gate_up, grad_output = random_rows(rows, 2 * width, dtype), random_rows(rows, width, dtype, seed=1)
    update = None if ranks is None else random_update(rows, width, ranks, dtype)
    wanted_activation = swiglu(gate_up, lora=update)
    wanted = swiglu_backward(grad_output, gate_up, lora=update)
    found = swiglu_backward(grad_output, gate_up, out=gate_up, activation_out=grad_output, lora=update)
    assert found is gate_up
    assert torch.equal(found, wanted)
    assert torch.equal(grad_output, wanted_activation)


@pytest.mark.parametrize("half", [0, 1])
def test_the_activation_may_be_written_over_either_half(half):
    gate_up = random_rows(3600, 300)
    wanted = swiglu(gate_up)
    found = swiglu(gate_up, out=gate_up[:, 150 * half : 150 * (half + 1)])
    assert torch.equal(found, wanted)


def test_outputs_may_be_columns_of_a_wider_tensor():
    gate_up, grad_output = random_rows(5, 16), random_rows(5, 8, seed=1)
    wide = torch.zeros(5, 40)
    swiglu_backward(grad_output, gate_up, out=wide[:, 2:18], activation_out=wide[:, 20:28])
    assert torch.equal(wide[:, 2:18], swiglu_backward(grad_output, gate_up))
    assert torch.equal(wide[:, 20:28], swiglu(gate_up))
    assert not wide[:, :2].any()
    assert not wide[:, 18:20].any()
    assert not wide[:, 28:].any()


def test_numbers_that_can_be_checked_on_paper():
    gate_up = torch.tensor([[0.0, 1.0, 3.0, 2.0]])
    sigmoid = 0.7310585786300049  # 1 / (1 + 1/e)
    torch.testing.assert_close(swiglu(gate_up), torch.tensor([[0.0, 2 * sigmoid]]))
    # Gate: u σ = 3/2 at 0; 2 (σ + σ (1 − σ)) at 1. Up: silu of the gate.
    wanted = torch.tensor([[1.5, 2 * sigmoid * (2 - sigmoid), 0.0, sigmoid]])
    torch.testing.assert_close(swiglu_backward(torch.ones(1, 2), gate_up), wanted)


@pytest.mark.parametrize("size", [80.0, 200.0, 1e4])
def test_large_gates_are_the_identity_or_zero_and_stay_finite(size):
    gate_up = torch.tensor([[size, -size, 2.0, 2.0]])
    activation = swiglu(gate_up)
    gradient = swiglu_backward(torch.ones(1, 2), gate_up)
    torch.testing.assert_close(activation, torch.tensor([[2 * size, 0.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[2.0, 0.0, size, 0.0]]))


def test_float64_is_computed_in_float64():
    gate_up, grad_output = random_rows(4, 14, torch.float64), random_rows(4, 7, torch.float64, seed=1)
    update = random_update(4, 7, (2, 3), torch.float64)
    found = swiglu_backward(grad_output, gate_up, lora=update)
    torch.testing.assert_close(found, definition_backward(grad_output, gate_up, update), rtol=1e-13, atol=1e-14)


def test_an_update_adds_what_separate_operations_add():
    gate_up, update = random_rows(6, 20), random_update(6, 10, (3, 2))
    delta = torch.cat([update.t[:, :3] @ update.b_gate.t() * 1.5, update.t[:, 3:] @ update.b_up.t() * 0.7], dim=1)
    torch.testing.assert_close(swiglu(gate_up, lora=update), swiglu(gate_up + delta), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    **{**sizes, "ranks": st.sampled_from([(4, 4), (1, 9), (0, 3), (2, 0), (0, 0)])},
    rank_down=st.sampled_from([0, 1, 5]),
    accumulates=st.booleans(),
)
def test_gradients_of_the_factors_are_their_products(rows, width, slack, dtype, ranks, rank_down, accumulates):
    gate_up, grad_output = random_rows(rows, 2 * width, dtype, slack=slack), random_rows(rows, width, dtype, seed=1)
    update = random_update(rows, width, ranks, dtype, slack=slack)
    u_down = random_u_down(rows, rank_down, dtype, slack=slack)
    outputs = rank_outputs(width, (*ranks, rank_down), value=0.5 if accumulates else torch.nan)
    wanted, activation = swiglu_backward(grad_output, gate_up, lora=update), swiglu(gate_up, lora=update)
    found = swiglu_backward_with_ranks(
        grad_output.clone(), gate_up, lora=update, u_down=u_down, **outputs, accumulates=accumulates
    )
    assert torch.equal(found, wanted)
    # Sums in float32 of at most 9 products.
    before = 0.5 if accumulates else 0.0
    assert_rank_gradients(outputs, wanted, activation, update, u_down, rounding=12 * 2**-24, before=before)


def test_gradients_of_the_factors_equal_autograd():
    gate_up, grad_output = random_rows(7, 24, torch.float64), random_rows(7, 12, torch.float64, seed=1)
    update, u_down = random_update(7, 12, (3, 2), torch.float64), random_u_down(7, 4, torch.float64)
    for b in (update.b_gate, update.b_up):
        b.requires_grad_()
    activation = definition(gate_up, update)
    activation.backward(grad_output)
    outputs = rank_outputs(12, (3, 2, 4), torch.float64)
    with torch.no_grad():
        swiglu_backward_with_ranks(grad_output.clone(), gate_up, lora=update, u_down=u_down, **outputs)
    torch.testing.assert_close(outputs["grad_b_gate"], update.b_gate.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(outputs["grad_b_up"], update.b_up.grad, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(outputs["grad_a_down"], u_down.t() @ activation.detach(), rtol=1e-12, atol=1e-13)


def test_the_next_projection_alone_may_have_an_adapter():
    gate_up, grad_output, u_down = random_rows(5, 16), random_rows(5, 8, seed=1), random_u_down(5, 3)
    grad_a_down = torch.empty(3, 8)
    wanted = swiglu_backward(grad_output, gate_up)
    found = swiglu_backward_with_ranks(
        grad_output, gate_up, lora=None, u_down=u_down, grad_a_down=grad_a_down, out=gate_up
    )
    assert found is gate_up
    assert torch.equal(found, wanted)
    torch.testing.assert_close(grad_a_down, u_down.t() @ swiglu(random_rows(5, 16)))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("grad_b_gate", r"gradients of B of ranks \(0, 2\) for an update of ranks \(3, 2\)"),
        ("grad_a_down", "u_down and grad_a_down belong together"),
    ],
)
def test_a_factor_without_a_place_for_its_gradient_is_a_bug(missing, message):
    outputs = {**rank_outputs(4, (3, 2, 5)), missing: None}
    with pytest.raises(AssertionError, match=message):
        swiglu_backward_with_ranks(
            torch.zeros(2, 4),
            torch.zeros(2, 8),
            lora=random_update(2, 4, (3, 2)),
            u_down=torch.zeros(2, 5),
            **outputs,
        )


def test_an_update_whose_columns_do_not_match_its_ranks_is_a_bug():
    with pytest.raises(AssertionError, match=r"t has 5 columns for ranks \(3, 0\)"):
        GateUpUpdate(torch.zeros(2, 5), torch.zeros(4, 3), None)


@pytest.mark.parametrize(
    ("capability", "rank", "dtype", "shared_kib"),
    # What a program may take on a T4 and on consumers' cards of later generations; on an H100, three programs' share.
    [(75, 64, torch.float16, 64), (86, 64, torch.bfloat16, 99), (90, 16, torch.bfloat16, 56)],
)
def test_kernels_with_updates_compile_and_fit(capability, rank, dtype, shared_kib, monkeypatch):
    require_compiler()
    from affina.kernels import swiglu as operation
    from affina.kernels.triton import swiglu_low_rank as kernels

    monkeypatch.setattr(operation, "use_triton", lambda _: True)
    monkeypatch.setattr(kernels, "approximates", lambda _: True)

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    update = GateUpUpdate(empty(64, 2 * rank), empty(256, rank), empty(256, rank))
    outputs = {name: empty(*value.shape, dtype=torch.float32) for name, value in rank_outputs(256, (rank,) * 3).items()}

    def call():
        gate_up = empty(64, 512)
        activation = swiglu(gate_up, lora=update)
        swiglu_backward_with_ranks(activation, gate_up, lora=update, u_down=empty(64, rank), **outputs, out=gate_up)

    names = ["_forward_kernel", "_backward_kernel", "_reduce_kernel"]
    found = compile_launches(kernels, names, call, monkeypatch, capability=capability)
    assert len(found) == 3
    assert max(kernel.metadata.shared for kernel in found) <= shared_kib * 1024


def test_triton_kernels_equal_the_reference_in_the_interpreter():
    run_in_interpreter("triton_swiglu.py")
