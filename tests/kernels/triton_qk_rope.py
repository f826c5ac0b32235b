"""The Triton kernels of norm and rotation through Triton's interpreter; `test_qk_rope.py` runs this file."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import qk_rope as operation
from affina.kernels.dispatch import use_triton
from affina.kernels.qk_rope import qk_rope, qk_rope_backward
from tests.kernels.device import DEVICE
from tests.kernels.test_qk_rope import assert_backward, assert_forward, random_gradients, random_problem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding to the result's type; the interpreter truncates float32 to bfloat16, which is up to a whole unit, 2^-7.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def test_these_tests_run_the_triton_kernels(monkeypatch):
    assert use_triton(torch.zeros(1, device=DEVICE))

    def fail(*arguments):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(operation, "_forward_reference", fail)
    monkeypatch.setattr(operation, "_backward_reference", fail)
    problem = random_problem(2, 2, 1, 8)
    qk_rope(**problem)
    qk_rope_backward(*random_gradients(problem, torch.float32), **problem)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "norms", "dtypes"),
    [
        (1, 1, 1, 2, "qk", DTYPES),
        (66, 5, 2, 16, "qk", DTYPES),
        (33, 2, 1, 64, "", DTYPES),
        (17, 2, 3, 80, "qk", [torch.bfloat16]),
        (5, 1, 5, 96, "k", [torch.float32]),
        (17, 2, 1, 128, "q", [torch.float16]),
        (3, 2, 1, 256, "qk", [torch.float32]),
    ],
)
def test_forward_and_backward_equal_the_definition(tokens, heads, kv_heads, head_dim, norms, dtypes):
    for dtype in dtypes:
        problem = random_problem(tokens, heads, kv_heads, head_dim, dtype, slack=3, norms=norms)
        assert_forward(problem, dtype, TOLERANCE)
        gradients = random_gradients(problem, dtype, head_first=tokens % 2 == 1, slack=1)
        assert_backward(problem, gradients, dtype, TOLERANCE)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "norms", "ranks", "dtypes"),
    [
        (1, 1, 1, 2, "qk", (1, 1, 1), DTYPES),
        (66, 5, 1, 64, "qk", (16, 8, 33), DTYPES),
        (35, 2, 1, 80, "", (4, 0, 16), [torch.bfloat16]),
        (17, 3, 1, 64, "qk", (0, 65, 0), [torch.float16]),
        (17, 3, 1, 64, "qk", (0, 0, 0), [torch.float32]),
        (3, 2, 1, 256, "k", (128, 16, 150), [torch.bfloat16]),
    ],
)
def test_low_rank_updates_are_added_forward_and_backward(tokens, heads, kv_heads, head_dim, norms, ranks, dtypes):
    for dtype in dtypes:
        problem = random_problem(tokens, heads, kv_heads, head_dim, dtype, slack=3, norms=norms, ranks=ranks)
        assert_forward(problem, dtype, TOLERANCE)
        assert_backward(problem, random_gradients(problem, dtype), dtype, TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", ["qk", ""])
@pytest.mark.parametrize("ranks", [None, (4, 3, 2)])
def test_the_gradient_written_over_qkv_is_the_same(dtype, norms, ranks):
    problem = random_problem(70, 5, 1, 16, dtype, slack=2, norms=norms, ranks=ranks)
    gradients = random_gradients(problem, dtype)
    wanted = qk_rope_backward(*gradients, **problem)
    found = qk_rope_backward(*gradients, **problem, out=problem["qkv"])
    assert found is problem["qkv"]
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("tile", "ranks"), [((16, 2, 1, 1), None), ((2048, 3, 8, 3), (4, 3, 20))])
def test_other_tiles_equal_the_definition(tile, ranks, monkeypatch):
    from affina.kernels.triton import qk_rope as kernels

    for key in kernels.TILES:
        monkeypatch.setitem(kernels.TILES, key, kernels.Tile(*tile))
    problem = random_problem(20, 5, 2, 32, ranks=ranks)
    assert_forward(problem, torch.float32, TOLERANCE)
    assert_backward(problem, random_gradients(problem, torch.float32), torch.float32, TOLERANCE)


def test_columns_beside_a_strided_gradient_stay_untouched():
    problem = random_problem(5, 2, 1, 6)
    gradients = random_gradients(problem, torch.float32)
    wide = torch.zeros(5, 30, device=DEVICE)
    qk_rope_backward(*gradients, **problem, out=wide[:, 2:26])
    assert torch.equal(wide[:, 2:26], qk_rope_backward(*gradients, **problem))
    assert not wide[:, :2].any()
    assert not wide[:, 26:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_beyond_the_range_of_the_type_do_not_overflow(dtype):
    problem = random_problem(3, 2, 1, 16, dtype)
    problem["qkv"] *= 1e4
    assert_forward(problem, dtype, TOLERANCE)


def test_no_tokens_launch_nothing():
    problem = random_problem(0, 2, 1, 8, ranks=(2, 2, 2))
    assert [tuple(part.shape) for part in qk_rope(**problem)] == [(0, 2, 8), (0, 1, 8), (0, 1, 8)]
    assert qk_rope_backward(*random_gradients(problem, torch.float32), **problem).shape == (0, 32)


def test_results_are_the_same_bits_twice():
    problem = random_problem(33, 2, 1, 64, torch.bfloat16, ranks=(16, 16, 16))
    for first, second in zip(qk_rope(**problem), qk_rope(**problem), strict=True):
        assert torch.equal(first, second)
