"""The Triton kernels of attention against the definition; run by test_attention.py under the interpreter.

On a machine with a GPU `pytest tests/kernels/triton_attention.py` runs the compiled kernels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl

from affina.kernels.attention import Segments, attention, attention_backward, why_not
from affina.kernels.dispatch import use_triton
from affina.kernels.triton import attention as kernel
from affina.kernels.triton.attention import Tile, Tiles
from tests.kernels import exact_casts, loop_bounds
from tests.kernels.device import DEVICE

SCALE = 0.3
# Weights of pairs that are hidden, or behind a document's end, may overflow before they are dropped.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
# The smallest tiles that the matrix unit takes, so that short documents have several.
BY_POINTERS = Tiles(Tile(32, 16, 4, 2, False), Tile(32, 16, 4, 2, False), Tile(32, 16, 4, 2, False))
BY_DESCRIPTORS = Tiles(Tile(32, 16, 4, 2, True), Tile(32, 16, 4, 2, True), Tile(32, 16, 4, 2, True))


def let_bfloat16_multiply():
    """Makes Triton 3.6's interpreter multiply bfloat16 numbers, not the integers that hold them."""
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


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [([1], torch.bfloat16), ([1, 1, 1], torch.float16), ([0, 3, 0, 0, 50, 17, 1, 16, 0], torch.bfloat16)],
    ids=["token", "tokens", "several, empty"],
)
def test_output_and_gradients_are_those_of_the_definition(lengths, dtype):
    assert_is_definition(lengths, dtype=dtype)


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 1), (3, 1), (6, 1)])
def test_heads_share_keys_in_any_ratio(heads, groups):
    assert_is_definition([20, 18], heads=heads, groups=groups, dtype=torch.float16)


@pytest.mark.parametrize("window", [1, 5, 20])
def test_a_window_hides_what_lies_before_it(window):
    assert_is_definition([38, 3], window=window)


@pytest.mark.parametrize("width", [8, 80])
def test_a_head_dim_that_is_no_power_of_two_is_padded(width):
    assert_is_definition([5, 20], width=width, heads=2, groups=1)


def test_large_scores_stay_finite():
    q, k, v, grad_output = inputs_of(40)
    for window in (None, 8):
        result, gradients = both_passes(q * 30, k * 30, v, grad_output, segments_of([30, 10]), window)
        assert all(torch.isfinite(tensor).all() for tensor in (result.output, result.lse, *gradients))


def test_nothing_depends_on_neighbours_or_on_memory_that_was_never_written(monkeypatch):
    lengths = [5, 40, 6]
    q, k, v, grad_output = inputs_of(sum(lengths))
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths))
    others = [tensor.clone() for tensor in (q, k, v, grad_output)]
    for tensor in others:
        tensor[:5] *= -3
        tensor[45:] += 7
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype=None, **options: (
        empty(*shape, dtype=dtype, **options).fill_(float("nan") if dtype.is_floating_point else 0)
    ))  # fmt: skip
    again, same_gradients = both_passes(*others, segments_of(lengths))
    for found, wanted in zip(
        (again.output, again.lse, *same_gradients), (result.output, result.lse, *gradients), strict=True
    ):
        assert torch.equal(found[5:45], wanted[5:45])
        assert torch.isfinite(found).all()


def test_the_log_sum_exp_is_that_of_the_reference():
    lengths = [5, 40, 6]
    q, k, v, grad_output = inputs_of(sum(lengths), dtype=torch.float16)
    result, _ = both_passes(q, k, v, grad_output, segments_of(lengths))
    wide = attention(q.float(), k.float(), v.float(), segments_of(lengths), scale=SCALE, backend="reference")
    assert result.lse.shape == wide.lse.shape
    torch.testing.assert_close(result.lse, wide.lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("lengths", [[1], [0, 33, 0, 16, 100, 1, 0, 17, 0], [1] * 150], ids=["1", "9", "150"])
def test_the_work_list_holds_each_block_once_with_the_longest_first(lengths, block):
    segments = segments_of(lengths)
    work = segments.work_list(sum(lengths), block).tolist()
    count = sum(-(-length // block) for length in lengths)
    starts = segments.cu_seqlens.tolist()
    expected = sorted(
        ((-rank, document) for document, length in enumerate(lengths) for rank in range(-(-length // block)))
    )
    assert len(work) == sum(lengths) // block + min(len(lengths), sum(lengths)) >= count
    assert work[:count] == [[starts[document], lengths[document], -rank, document] for rank, document in expected]
    assert all(length == 0 for _, length, _, _ in work[count:])


def test_a_work_list_is_made_once_until_the_bounds_are_written_to():
    segments = segments_of([20, 12])
    work = segments.work_list(32, 16)
    assert segments.work_list(32, 16) is work
    assert segments.work_list(32, 32) is not work
    segments.cu_seqlens.copy_(torch.tensor([0, 12, 32]))
    assert segments.work_list(32, 16)[0].tolist() == [12, 20, 1, 1]


def test_large_tiles_take_short_rows():
    """The tiles that cards use; a row is shorter than any of them."""
    tiles = kernel._HOPPER[128]
    lengths = [9, 1, 20]
    q, k, v, grad_output = inputs_of(30, width=128)
    segments = segments_of(lengths)
    output, lse = kernel.forward(
        q, k, v, segments.work_list(30, tiles.forward.tokens(2)), scale=SCALE, window=None, tile=tiles.forward
    )
    expected, expected_lse, _ = expected_of(q, k, v, grad_output, lengths, None)
    assert_close(output, expected, torch.bfloat16)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-5)
