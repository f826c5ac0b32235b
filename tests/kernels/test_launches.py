"""Kernels fit into the shared memory of GPUs, for every head, rank and type; they are compiled here, not run."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import qk_rope as rope_operation
from affina.kernels import rms_norm as norm_operation
from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import RowUpdate, add_rms_norm, add_rows
from tests.kernels.compiled import compile_launches, require_compiler

SHARED_BYTES = {75: 64 * 1024, 90: 96 * 1024}
"""What a program may take, by compute capability: of a T4, and of later generations' smallest, consumers' cards with
99 KiB. An H100 has 227 KiB."""


@pytest.fixture(autouse=True)
def _compiles(monkeypatch):
    require_compiler()
    for operation in (rope_operation, norm_operation):
        monkeypatch.setattr(operation, "use_triton", lambda _: True)


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("head_dim", "rank", "dtype", "capability"),
    [
        (256, 64, torch.float32, 90),  # took 272 KiB forward
        (256, 64, torch.bfloat16, 90),  # took 136 KiB forward
        (128, 200, torch.bfloat16, 90),
        (128, 16, torch.bfloat16, 90),
        (64, 16, torch.float16, 75),
        (80, 0, torch.bfloat16, 90),
    ],
)
def test_the_rotation_fits_whatever_head_and_rank(head_dim, rank, dtype, capability, monkeypatch):
    from affina.kernels.triton import qk_rope as kernels

    tokens, heads, kv_heads = 20, 4, 2
    qkv = empty(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = empty(tokens, head_dim // 2, dtype=torch.float32)
    weight = empty(head_dim, dtype=dtype)
    update = None
    if rank:
        factors = [empty(count * head_dim, rank, dtype=dtype) for count in (heads, kv_heads, kv_heads)]
        update = QkvUpdate(empty(tokens, 3 * rank, dtype=dtype), *factors)
    options = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "q_weight": weight,
        "k_weight": weight,
        "epsilon": 1e-6,
        "lora": update,
    }
    gradients = [empty(tokens, count, head_dim, dtype=dtype) for count in (heads, kv_heads, kv_heads)]

    def call():
        qk_rope(qkv, angles, angles, **options)
        qk_rope_backward(*gradients, qkv, angles, angles, **options, out=qkv)

    found = compile_launches(kernels, ["_forward_kernel", "_backward_kernel"], call, monkeypatch, capability=capability)
    assert len(found) == 2
    assert max(kernel.metadata.shared for kernel in found) <= SHARED_BYTES[capability]


@pytest.mark.parametrize(
    ("width", "rank", "dtype", "capability"),
    [
        (2560, 64, torch.bfloat16, 90),
        (16384, 200, torch.bfloat16, 90),
        (2560, 16, torch.float32, 90),
        (2560, 64, torch.float16, 75),
    ],
)
def test_the_updated_sum_fits_whatever_width_and_rank(width, rank, dtype, capability, monkeypatch):
    from affina.kernels.triton import rms_norm as kernels

    x, update, weight = empty(20, width, dtype=dtype), empty(20, width, dtype=dtype), empty(width, dtype=dtype)
    lora = RowUpdate(empty(20, rank, dtype=dtype), empty(width, rank, dtype=dtype))

    def call():
        add_rms_norm(x, update, weight, 1e-6, lora=lora, sum_out=update)
        add_rows(x, update, lora=lora, out=update)

    found = compile_launches(kernels, ["_forward_kernel", "_add_kernel"], call, monkeypatch, capability=capability)
    assert len(found) == 3
    assert max(kernel.metadata.shared for kernel in found) <= SHARED_BYTES[capability]
