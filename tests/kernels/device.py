"""Where the tests of kernels put their tensors.

The reference runs on the CPU, and so do Triton's kernels in its interpreter. On a machine with a GPU the same tests run
the compiled kernels, file by file (pytest does not collect `triton_*.py` by itself):

    AFFINA_TEST_DEVICE=cuda pytest tests/kernels/triton_*.py
"""

from __future__ import annotations

import os

import torch

DEVICE = torch.device(os.environ.get("AFFINA_TEST_DEVICE", "cpu"))
IS_COMPILED = DEVICE.type == "cuda"
