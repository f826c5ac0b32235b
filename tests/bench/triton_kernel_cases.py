"""The kernel cases through Triton's interpreter; test_sanitize.py runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.kernels import exact_casts, loop_bounds

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import kernel_cases

exact_casts.install()
loop_bounds.install()

CASES = [case for case in kernel_cases.cases(is_tiny=True) if "bfloat16" not in case.name]
"""The interpreter multiplies bfloat16 numbers as integers."""


def test_these_cases_run_the_triton_kernels() -> None:
    assert all(module.use_triton(torch.zeros(1)) for module in kernel_cases._MODULES)
    with kernel_cases.references():
        assert not any(module.use_triton(torch.zeros(1)) for module in kernel_cases._MODULES)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_kernels_equal_their_references(case: kernel_cases.Case) -> None:
    with torch.no_grad():
        found = kernel_cases.check(case)
    assert found["is_right"], found
