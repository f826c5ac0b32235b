"""Kernels fit into the shared memory of GPUs, for every head, rank and type; they are compiled here, not run."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import qk_rope as rope_operation
from affina.kernels import rms_norm as norm_operation
from affina.kernels.fp8 import QuantizedRows, quantize_rows, transpose_codes
from affina.kernels.qk_rope import QkvUpdate, qk_rope, qk_rope_backward
from affina.kernels.rms_norm import RowUpdate, add_rms_norm, add_rows, rms_norm
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


@pytest.mark.parametrize("width", [2560, 16384])
def test_the_norm_with_codes_compiles_and_keeps_its_rows_in_registers(width, monkeypatch):
    from affina.kernels.triton import rms_norm as kernels

    x, weight = empty(20, width, dtype=torch.bfloat16), empty(width, dtype=torch.bfloat16)
    codes = QuantizedRows.empty(20, width, torch.device("meta"))

    def call():
        rms_norm(x, weight, 1e-6, codes_out=codes)
        add_rms_norm(x, x, weight, 1e-6, codes_out=codes)

    found = compile_launches(kernels, ["_forward_kernel"], call, monkeypatch, capability=90)
    assert len(found) == 2
    assert all(".v4.b32" in kernel.asm["ptx"] for kernel in found), "whole 16-byte words are read"
    assert not any(".local" in kernel.asm["ptx"] for kernel in found)
    # Only the sums of warps are exchanged, no row.
    assert max(kernel.metadata.shared for kernel in found) <= 512


@pytest.mark.parametrize(("columns", "rank"), [(2560, 16), (6144, 48), (19456, 32), (40000, 0)])
def test_quantising_rows_compiles_and_reads_whole_words(columns, rank, monkeypatch):
    from affina.kernels import fp8
    from affina.kernels.triton import fp8 as kernels

    monkeypatch.setattr(fp8, "use_triton", lambda _: True)
    x, beside = empty(20, columns, dtype=torch.bfloat16), empty(20, rank, dtype=torch.bfloat16)
    factor = empty(columns + rank, dtype=torch.float32)
    codes = empty(64, columns, dtype=torch.float8_e4m3fn)

    def call():
        quantize_rows(x)
        quantize_rows(x, beside=beside, column_factor=factor[:columns], beside_factor=factor[columns:])
        transpose_codes(codes, below=codes[:rank])

    names = ["_quantize_rows_kernel", "_transpose_kernel"]
    found = compile_launches(kernels, names, call, monkeypatch, capability=90)
    assert len(found) == 3
    assert all(".v4.b32" in kernel.asm["ptx"] for kernel in found)
    assert max(kernel.metadata.shared for kernel in found) <= SHARED_BYTES[90]
