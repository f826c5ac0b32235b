"""The 16-bit decoder with the kernels that a GPU runs, in Triton's interpreter."""

from __future__ import annotations

from tests.kernels.interpreter import run_in_interpreter


def test_the_decoder_with_folded_updates_equals_float32_in_the_interpreter() -> None:
    run_in_interpreter("../models/fast/triton_decoder.py")
