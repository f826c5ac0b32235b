"""Same seed, same bits: torch's deterministic kernels for the length of a run, put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def deterministic_kernels(enabled: bool, probe: Callable[[], None], note: Callable[[str], None]) -> Iterator[None]:
    """Within the block torch takes deterministic kernels, or raises where it has none.

    Only warning about them is not enough: torch then keeps the faster, non-deterministic flash attention. So `probe`, a
    small forward and backward pass of the model, is tried first; when one of its operations has no deterministic kernel
    on this device, the block only warns, and `note` is told which operation it is.

    cuBLAS needs a fixed workspace for this and reads the variable when CUDA starts, so it is set before that.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling every fresh tensor helps to find reads of uninitialised memory; it costs time and changes no result.
    settings.fill_uninitialized_memory = False
    try:
        try:
            probe()
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            torch.use_deterministic_algorithms(True, warn_only=True)
            note(f"not every operation is deterministic on this device: {str(error).splitlines()[0]}")
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned_only)
        torch.backends.cudnn.benchmark = benchmark
        settings.fill_uninitialized_memory = fills
