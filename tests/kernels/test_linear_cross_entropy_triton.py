"""The loss's Triton kernel, through the interpreter."""

from __future__ import annotations

from tests.kernels.interpreter import run_in_interpreter


def test_the_triton_kernel_of_the_loss_equals_the_definition():
    run_in_interpreter("triton_linear_cross_entropy.py")
