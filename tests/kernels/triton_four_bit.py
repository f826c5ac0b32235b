"""The Triton kernel of 4-bit weights against the reference, bit for bit.

test_four_bit_triton.py runs it under the interpreter.

On a machine with a GPU `pytest tests/kernels/triton_four_bit.py` runs the compiled kernel.
"""

from __future__ import annotations

import pytest
import torch

from affina.kernels import code_tables, double_quantization, four_bit
from affina.kernels.code_tables import FP4, NF4
from affina.kernels.dispatch import use_triton
from affina.kernels.triton import four_bit as kernel
from tests.kernels import exact_casts
from tests.kernels.device import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

if DEVICE.type == "cpu":
    exact_casts.install()


def quantized_weight(shape, *, double=True, dtype=torch.float32, block_size=64, size=0.02, table=NF4):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(hash(shape) % 1000)) * size
    weight = (weight * torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(1)) ** 2).to(DEVICE, dtype)
    return four_bit.quantize(weight, table, double_quantization=double, block_size=block_size)


def expected(quantized, dtype):
    """The reference: PyTorch's operations."""
    return four_bit.dequantize(
        quantized.codes,
        quantized.scales(),
        quantized.table,
        quantized.shape,
        dtype,
        block_size=quantized.block_size,
    )


def test_the_kernel_is_what_runs():
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("shape", [(1, 64), (1, 1), (3, 5), (7, 65), (37, 320), (130, 192)], ids=str)
@pytest.mark.parametrize("table", [NF4, FP4], ids=lambda table: table.name)
def test_the_kernel_gives_the_bits_of_the_reference(shape, table, double, dtype):
    quantized = quantized_weight(shape, double=double, dtype=dtype, table=table)
    found = quantized.dequantize()
    assert found.dtype == dtype
    assert torch.equal(found, expected(quantized, dtype))


@pytest.mark.parametrize("lookup", kernel.LOOKUPS)
def test_every_way_to_look_a_number_up_gives_the_same_bits(lookup):
    quantized = quantized_weight((19, 256))
    out = torch.empty(19, 256, dtype=torch.bfloat16, device=DEVICE)
    kernel.dequantize_into(
        quantized.codes, quantized.absmax, quantized.nested_absmax, quantized.nested_offset,
        double_quantization.dynamic_map(DEVICE), code_tables.numbers_on(NF4, DEVICE), out,
        block_size=64, lookup=lookup, numbers_per_program=2048,
    )  # fmt: skip
    assert torch.equal(out, expected(quantized, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_apart_and_what_lies_between_them_stays(dtype):
    quantized = quantized_weight((11, 192))
    room = torch.full((11, 256), 7.0, dtype=dtype, device=DEVICE)
    returned = four_bit.dequantize_into(quantized, room[:, 64:])
    assert returned.data_ptr() == room[:, 64:].data_ptr()
    assert torch.equal(room[:, 64:], expected(quantized, dtype))
    assert torch.equal(room[:, :64], torch.full_like(room[:, :64], 7.0))


def test_rows_of_odd_width_may_be_apart_too():
    quantized = quantized_weight((5, 33))
    room = torch.full((5, 40), 7.0, device=DEVICE)
    four_bit.dequantize_into(quantized, room[:, :33])
    assert torch.equal(room[:, :33], expected(quantized, torch.float32))
    assert torch.equal(room[:, 33:], torch.full_like(room[:, 33:], 7.0))


@pytest.mark.parametrize("block_size", [32, 128, 4096])
def test_blocks_of_another_size_are_read(block_size):
    quantized = quantized_weight((9, 256), block_size=block_size)
    assert torch.equal(quantized.dequantize(), expected(quantized, torch.float32))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # the interpreter's NumPy
def test_weights_out_of_float16_range_become_infinite_as_in_the_reference():
    quantized = quantized_weight((4, 128), size=1e6)
    found = quantized.dequantize(torch.float16)
    assert bool(found.isinf().any())
    assert torch.equal(found, expected(quantized, torch.float16))


def test_three_dimensional_weights_keep_their_shape():
    flat = quantized_weight((6, 128))
    quantized = four_bit.FourBitTensor(
        NF4, flat.codes, flat.absmax, flat.nested_absmax, flat.nested_offset, (2, 3, 128), torch.float32
    )
    assert torch.equal(quantized.dequantize(), expected(flat, torch.float32).view(2, 3, 128))
