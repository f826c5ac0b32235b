"""Which implementation of an operation runs: the Triton kernel or the PyTorch reference."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels on `tensor` are Triton's: on CUDA where Triton is installed.

    Tests run the kernels on CPU tensors through Triton's interpreter: with TRITON_INTERPRET=1, which Triton reads
    when it is imported, and AFFINA_TRITON_ON_CPU=1, which is read here.
    """
    if tensor.device.type == "cuda":
        return has_triton()
    return tensor.device.type == "cpu" and _interprets_on_cpu()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=1)
def _interprets_on_cpu() -> bool:
    wanted = os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("AFFINA_TRITON_ON_CPU") == "1"
    return wanted and has_triton()


def is_true(condition: Tensor) -> bool:
    """`bool(condition)` for a question about values whose usual answer is no; a fake tensor has none, so: no.

    A trace on fake tensors (planning/trace.py) then takes the usual way.
    """
    return not isinstance(condition, FakeTensor) and bool(condition)
