"""Same seed, same bits: torch's deterministic kernels for the length of a run, put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Within the block torch takes deterministic kernels where it has them, and warns where it has none.

    cuBLAS needs a fixed workspace for this and reads the variable when CUDA starts, so it is set before that.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Filling every fresh tensor helps to find reads of uninitialised memory; it costs time and changes no result.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
        torch.backends.cudnn.benchmark = benchmark
        settings.fill_uninitialized_memory = fills
