"""Norm, rotation and low-rank updates of queries and keys, and their gradient, equal the definition in every type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from tests.kernels.device import DEVICE
from tests.kernels.interpreter import run_in_interpreter

EPSILON = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding to the type: at most 2^-8 of a bfloat16, 2^-11 of a float16; float32: some 40 roundings of 6e-8.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def random_tensor(*shape, dtype=torch.float32, seed=0, slack=0, factor=1.0):
    """Random numbers, part of rows that are `slack` longer; what lies around them in memory is NaN."""
    generator = torch.Generator().manual_seed(seed)
    storage = torch.full((shape[0] + 2, *shape[1:-1], shape[-1] + slack), torch.nan, dtype=dtype, device=DEVICE)
    part = storage[: shape[0], ..., : shape[-1]]
    part.copy_(torch.randn(shape, generator=generator) * factor)
    return part


def random_angles(tokens, head_dim):
    """cos and sin of positions far into a long context."""
    positions = torch.arange(tokens, dtype=torch.float64) * 37 + 5
    frequencies = 10000.0 ** (-torch.arange(head_dim // 2, dtype=torch.float64) / (head_dim // 2))
    angles = positions[:, None] * frequencies
    return angles.cos().float().to(DEVICE), angles.sin().float().to(DEVICE)


def random_problem(tokens, heads, kv_heads, head_dim, dtype=torch.float32, *, slack=0, norms="qk", ranks=None):
    """Arguments of `qk_rope`."""
    cos, sin = random_angles(tokens, head_dim)
    weights = [1 + random_tensor(1, head_dim, dtype=dtype, seed=seed, factor=0.3)[0] for seed in (1, 2)]
    update = None
    if ranks is not None:
        sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        factors = [
            None
            if rank == 0
            else random_tensor(size, rank, dtype=dtype, seed=10 + rank, slack=slack, factor=rank**-0.5)
            for size, rank in zip(sizes, ranks, strict=True)
        ]
        t = random_tensor(tokens, sum(ranks), dtype=dtype, seed=3, slack=slack)
        update = QkvUpdate(t, *factors, scale_q=1.5, scale_k=0.7, scale_v=1.1)
    return {
        "qkv": random_tensor(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype, slack=slack),
        "cos": cos,
        "sin": sin,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "q_weight": weights[0] if "q" in norms else None,
        "k_weight": weights[1] if "k" in norms else None,
        "epsilon": EPSILON,
        "lora": update,
    }


def random_gradients(problem, dtype, *, head_first=False, slack=0):
    """Gradients of q, k and v; with `head_first` in memory as [heads, tokens, K]."""
    tokens, heads, kv_heads = problem["qkv"].shape[0], problem["num_heads"], problem["num_kv_heads"]
    head_dim = problem["cos"].shape[1] * 2
    gradients = []
    for seed, count in ((20, heads), (21, kv_heads), (22, kv_heads)):
        shape = (count, tokens, head_dim) if head_first else (tokens, count, head_dim)
        gradient = random_tensor(*shape, dtype=dtype, seed=seed, slack=slack)
        gradients.append(gradient.transpose(0, 1) if head_first else gradient)
    return gradients


def definition(problem):
    """q, k and v in float64; the gradient is left to autograd."""
    tokens = problem["qkv"].shape[0]
    heads, kv_heads = problem["num_heads"], problem["num_kv_heads"]
    head_dim = problem["cos"].shape[1] * 2
    parts = problem["qkv"].double().split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    update = problem["lora"]
    if update is not None:
        columns = update.t.double().split(update.ranks, dim=1)
        parts = [
            part if b is None else part + scale * column @ b.double().t()
            for part, column, b, scale in zip(parts, columns, update.factors, update.scales, strict=True)
        ]
    q, k, v = (part.reshape(tokens, part.shape[1] // head_dim, head_dim) for part in parts)
    cos = torch.cat([problem["cos"]] * 2, dim=1).double()[:, None]
    sin = torch.cat([problem["sin"]] * 2, dim=1).double()[:, None]
    rotated = []
    for x, weight in ((q, problem["q_weight"]), (k, problem["k_weight"])):
        if weight is not None:
            x = x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + problem["epsilon"]) * weight.double()
        first, second = x.chunk(2, dim=-1)
        rotated.append(x * cos + torch.cat([-second, first], dim=-1) * sin)
    return *rotated, v


def definition_backward(problem, gradients):
    exact = problem["qkv"].double().requires_grad_()
    outputs = definition({**problem, "qkv": exact})
    (gradient,) = torch.autograd.grad(outputs, exact, [gradient.double() for gradient in gradients])
    return gradient


def assert_forward(problem, dtype, tolerance=TOLERANCE):
    found, wanted = qk_rope(**problem), definition(problem)
    assert len(found) == (2 if problem["lora"] is None else 3)
    for tensor, exact in zip(found, wanted, strict=False):
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        # Two products of the rotation may cancel.
        torch.testing.assert_close(tensor.double(), exact, rtol=tolerance[dtype], atol=1e-5)


def assert_backward(problem, gradients, dtype, tolerance=TOLERANCE):
    found, wanted = qk_rope_backward(*gradients, **problem), definition_backward(problem, gradients)
    assert found.dtype == dtype
    # A head of small numbers has a large r, and the terms of the norm's gradient cancel: to their size times 6e-8.
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance[dtype], atol=2e-5 * scale)


problems = {
    "tokens": st.integers(0, 6),
    "heads": st.integers(1, 5),
    "kv_heads": st.integers(1, 3),
    "half": st.integers(1, 20),
    "dtype": st.sampled_from(DTYPES),
    "slack": st.integers(0, 3),
    "norms": st.sampled_from(["qk", "", "q", "k"]),
    "ranks": st.sampled_from([None, (4, 2, 3), (1, 0, 5), (0, 2, 0), (0, 0, 0)]),
}


@settings(max_examples=40, deadline=None)
@given(**problems)
def test_queries_and_keys_equal_the_definition(tokens, heads, kv_heads, half, dtype, slack, norms, ranks):
    assert_forward(
        random_problem(tokens, heads, kv_heads, 2 * half, dtype, slack=slack, norms=norms, ranks=ranks), dtype
    )


@settings(max_examples=40, deadline=None)
@given(**problems, head_first=st.booleans())
def test_the_gradient_equals_autograd_of_the_definition(
    tokens, heads, kv_heads, half, dtype, slack, norms, ranks, head_first
):
    problem = random_problem(tokens, heads, kv_heads, 2 * half, dtype, slack=slack, norms=norms, ranks=ranks)
    assert_backward(problem, random_gradients(problem, dtype, head_first=head_first, slack=slack), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", ["qk", ""])
@pytest.mark.parametrize("ranks", [None, (4, 3, 2)])
def test_the_gradient_may_be_written_over_qkv(dtype, norms, ranks):
    problem = random_problem(1200, 4, 2, 64, dtype, norms=norms, ranks=ranks)  # three chunks of tokens
    gradients = random_gradients(problem, dtype)
    wanted = qk_rope_backward(*gradients, **problem)
    found = qk_rope_backward(*gradients, **problem, out=problem["qkv"])
    assert found is problem["qkv"]
    assert torch.equal(found, wanted)


def test_the_gradient_may_be_columns_of_a_wider_tensor():
    problem = random_problem(5, 2, 1, 6)
    gradients = random_gradients(problem, torch.float32)
    wide = torch.zeros(5, 30)
    qk_rope_backward(*gradients, **problem, out=wide[:, 2:26])
    assert torch.equal(wide[:, 2:26], qk_rope_backward(*gradients, **problem))
    assert not wide[:, :2].any()
    assert not wide[:, 26:].any()


def test_a_quarter_turn_moves_the_first_half_to_the_second():
    qkv = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0]])
    quarter = {"cos": torch.zeros(1, 2), "sin": torch.ones(1, 2)}
    q, k = qk_rope(qkv, **quarter, num_heads=1, num_kv_heads=1, q_weight=None, k_weight=None, epsilon=0.0)
    assert q.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
    assert k.tolist() == [[[-7.0, -8.0, 5.0, 6.0]]]


def test_scores_of_rotated_heads_depend_on_the_distance_only():
    cos, sin = random_angles(9, 8)
    one_head = torch.cat([random_tensor(1, 8), random_tensor(1, 8, seed=1), torch.zeros(1, 8)], dim=1).expand(9, 24)
    q, k = qk_rope(
        one_head.contiguous(), cos, sin, num_heads=1, num_kv_heads=1, q_weight=None, k_weight=None, epsilon=0.0
    )
    scores = q[:, 0] @ k[:, 0].t()
    for distance in (-8, -3, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=2e-5)


def test_qwen3_attention_of_transformers_makes_the_same_queries_and_keys():
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    tokens, heads, kv_heads, head_dim = 7, 4, 2, 16
    config = Qwen3Config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    problem = random_problem(tokens, heads, kv_heads, head_dim)
    norms = []
    for name in ("q_weight", "k_weight"):
        norm = Qwen3RMSNorm(config.head_dim, EPSILON)
        norm.weight.data.copy_(problem[name])
        norms.append(norm)
    parts = problem["qkv"].split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    q, k = (
        norm(part.reshape(1, tokens, -1, head_dim)).transpose(1, 2) for norm, part in zip(norms, parts, strict=False)
    )
    cos, sin = (torch.cat([problem[name]] * 2, dim=1)[None] for name in ("cos", "sin"))
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, cos, sin)
    found_q, found_k = qk_rope(**problem)
    torch.testing.assert_close(found_q, wanted_q[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_k, wanted_k[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_squares_beyond_the_range_of_the_type_do_not_overflow(dtype):
    problem = random_problem(3, 2, 1, 16, dtype)
    problem["qkv"] *= 1e4
    assert_forward(problem, dtype)


def test_float64_is_computed_in_float64():
    problem = random_problem(3, 2, 1, 6, torch.float64, ranks=(2, 1, 3))
    problem["cos"], problem["sin"] = problem["cos"].double(), problem["sin"].double()
    gradients = random_gradients(problem, torch.float64)
    found = qk_rope_backward(*gradients, **problem)
    torch.testing.assert_close(found, definition_backward(problem, gradients), rtol=1e-12, atol=1e-12)


def test_columns_that_are_no_whole_heads_are_a_bug():
    with pytest.raises(AssertionError, match="9 columns for 2 \\+ 2 · 1 heads"):
        qk_rope(
            torch.zeros(1, 9), torch.zeros(1, 1), torch.zeros(1, 1),
            num_heads=2, num_kv_heads=1, q_weight=None, k_weight=None, epsilon=0.0,
        )  # fmt: skip


def test_triton_kernels_equal_the_reference_in_the_interpreter():
    run_in_interpreter("triton_qk_rope.py")
