"""One byte and a row's scale: what a number becomes."""

from __future__ import annotations

import pytest
import torch

from affina.kernels import fp8, int8
from affina.kernels.row_scaled import expand_rows
from tests.kernels.interpreter import run_in_interpreter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [int8, fp8], ids=["int8", "fp8"])
def test_an_expanded_number_is_the_float32_product_rounded_once(module, dtype):
    x = torch.randn(17, 67, generator=torch.Generator().manual_seed(0))
    codes, scale = module.quantize_rows(x)
    found = expand_rows(codes, scale, torch.empty(x.shape, dtype=dtype))
    assert torch.equal(found, module.dequantize_rows(codes, scale, dtype))


def test_the_triton_kernel_of_row_scaled_bytes_equals_the_reference_bit_for_bit():
    run_in_interpreter("triton_row_scaled.py")
