"""The Triton kernels of attention against the definition; run by test_attention.py under the interpreter.

On a machine with a GPU `pytest tests/kernels/triton_attention.py` runs the compiled kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from affina.kernels import attention as dispatch
from affina.kernels.attention import Segments, attention, attention_backward, why_not
from affina.kernels.dispatch import use_triton
from affina.kernels.triton import attention as kernel
from affina.kernels.triton.attention import Tile, Tiles
from tests.kernels import exact_casts, loop_bounds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.3
# Weights of pairs that are hidden, or behind a document's end, may overflow before they are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
# The smallest tiles that the matrix unit takes, so that short documents have several.
BY_POINTERS = Tiles(Tile(32, 16, 4, 2, False), Tile(32, 16, 4, 2, False), Tile(32, 16, 4, 2, False))
BY_DESCRIPTORS = Tiles(Tile(32, 16, 4, 2, True), Tile(32, 16, 4, 2, True), Tile(32, 16, 4, 2, True))


def let_bfloat16_multiply():
    """Products of bfloat16 become those of the numbers; Triton 3.6's interpreter multiplies the integers that hold them."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = interpreter._convert_float(operand.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest
    )


if DEVICE.type == "cpu":
    exact_casts.install()
    loop_bounds.install()
    let_bfloat16_multiply()

@pytest.fixture(autouse=True, params=[BY_POINTERS, BY_DESCRIPTORS], ids=["pointers", "descriptors"])
def small_tiles(request, monkeypatch):
    monkeypatch.setattr(kernel, "tiles_for", lambda q: request.param)


def segments_of(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    return Segments.from_cu_seqlens(bounds, max_seqlen=max(lengths), lengths=tuple(lengths))


def inputs_of(tokens, heads=4, groups=2, width=16, dtype=torch.bfloat16, seed=0):
    """q, k, a strided view v (as the projection of q, k and v in one product leaves it) and ∂loss/∂output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    packed = normal(tokens, (heads + 2 * groups) * width)
    v = packed[:, -groups * width :].unflatten(1, (groups, width))
    return normal(tokens, heads, width), normal(tokens, groups, width), v, normal(tokens, heads, width)


def definition(q, k, v, lengths, window):
    """[T, H, K] output and [T, H] log-sum-exp, score by score, differentiable, in the type of the inputs."""
    repeats = q.shape[1] // k.shape[1]
    outputs, logs = [], []
    for queries, keys, values in zip(*(tensor.split(list(lengths)) for tensor in (q, k, v)), strict=True):
        scores = SCALE * torch.einsum("thk,uhk->htu", queries, keys.repeat_interleave(repeats, 1))
        position = torch.arange(len(queries))
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < (window or 10**9))
        scores = scores.masked_fill(~visible.to(scores.device), float("-inf"))
        outputs.append(torch.einsum("htu,uhk->thk", scores.softmax(-1), values.repeat_interleave(repeats, 1)))
        logs.append(scores.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(logs)


def expected_of(q, k, v, grad_output, lengths, window):
    """Output, log-sum-exp and the three gradients of the definition, by autograd in float64."""
    lengths = [length for length in lengths if length]
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    output, lse = definition(*leaves, lengths, window)
    return output.detach(), lse.detach(), torch.autograd.grad(output, leaves, grad_output.double())


def both_passes(q, k, v, grad_output, segments, window=None):
    result = attention(q, k, v, segments, scale=SCALE, window=window, backend="triton")
    return result, attention_backward(grad_output, q, k, v, result, segments, scale=SCALE, window=window)


def assert_close(found, expected, dtype):
    # Weights, ∂S and the output are rounded to the type, and the rounded output is in D; errors relative to the
    # largest entry. float32: sums of at most 100 terms.
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def assert_is_definition(lengths, *, window=None, **options):
    inputs = inputs_of(sum(lengths), **options)
    result, gradients = both_passes(*inputs, segments_of(lengths), window)
    output, lse, expected = expected_of(*inputs, lengths, window)
    dtype = inputs[0].dtype
    assert_close(result.output, output, dtype)
    assert result.lse.dtype == torch.float32
    # Exact products of 16-bit numbers, summed in float32: of size 10, a few roundings.
    torch.testing.assert_close(result.lse.double(), lse, rtol=0, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.is_contiguous()
        assert_close(found, wanted, dtype)


def test_the_kernels_are_what_runs():
    q, _, v, _ = inputs_of(8)
    assert use_triton(q)
    assert why_not("triton", q, v, segments_of([8])) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "lengths", [[1], [37], [1, 1, 1], [0, 3, 0, 0, 50, 17, 1, 16, 0]], ids=["token", "one", "tokens", "several, empty"]
)
def test_output_and_gradients_are_those_of_the_definition(lengths, dtype):
    assert_is_definition(lengths, dtype=dtype)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (3, 1), (6, 1), (12, 2)])
def test_heads_share_keys_in_any_ratio(heads, groups):
    assert_is_definition([20, 35], heads=heads, groups=groups)


@pytest.mark.parametrize("window", [1, 5, 16, 33])
def test_a_window_hides_what_lies_before_it(window):
    assert_is_definition([50, 3, 20], window=window)


@pytest.mark.parametrize("width", [8, 24, 64, 80])
def test_a_head_dim_that_is_no_power_of_two_is_padded(width):
    assert_is_definition([5, 30], width=width, heads=2, groups=1)
