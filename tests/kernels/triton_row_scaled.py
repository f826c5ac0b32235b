"""The Triton kernel of row-scaled bytes against the reference, bit for bit; run by test_row_scaled.py.

On a machine with a GPU `pytest tests/kernels/triton_row_scaled.py` runs the compiled kernel.
"""

from __future__ import annotations

import pytest
import torch

from affina.kernels import fp8, int8
from affina.kernels.dispatch import use_triton
from affina.kernels.row_scaled import expand_rows
from tests.kernels import exact_casts
from tests.kernels.device import DEVICE

if DEVICE.type == "cpu":
    exact_casts.install()


def quantized(module, rows, columns):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return module.quantize_rows(x.to(DEVICE))


def test_the_kernel_is_what_runs():
    assert use_triton(torch.zeros(1, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("module", [int8, fp8], ids=["int8", "fp8"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 127), (5, 300), (2, 5000)])
def test_expanded_rows_are_the_bits_of_the_reference(rows, columns, module, dtype):
    codes, scale = quantized(module, rows, columns)
    found = expand_rows(codes, scale, torch.empty(rows, columns, dtype=dtype, device=DEVICE))
    expected = torch.empty(rows, columns, dtype=dtype).copy_(codes.cpu()).mul_(scale.cpu().unsqueeze(1))
    assert torch.equal(found.cpu(), expected)


def test_rows_that_are_apart_touch_nothing_between_them():
    codes, scale = quantized(int8, 6, 200)
    out = torch.full((6, 260), 7.0, dtype=torch.bfloat16, device=DEVICE)
    expand_rows(codes[:, :130], scale, out[:, :130])
    assert torch.equal(out[:, :130], (codes[:, :130].float() * scale.unsqueeze(1)).bfloat16())
    assert bool((out[:, 130:] == 7).all())
