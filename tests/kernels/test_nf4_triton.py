"""NF4's Triton kernel, through the interpreter."""

from __future__ import annotations

from tests.kernels.interpreter import run_in_interpreter


def test_the_triton_kernel_of_nf4_equals_the_reference_bit_for_bit():
    run_in_interpreter("triton_nf4.py")
