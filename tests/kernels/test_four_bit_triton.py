"""The Triton kernel of 4-bit weights, through the interpreter."""

from __future__ import annotations

from tests.kernels.interpreter import run_in_interpreter


def test_the_triton_kernel_of_four_bits_equals_the_reference_bit_for_bit():
    run_in_interpreter("triton_four_bit.py")
