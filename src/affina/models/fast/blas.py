"""Which of NVIDIA's libraries multiplies the large matrices of a row.

torch asks cuBLAS unless told otherwise, and deterministic runs grant that a workspace of 4 MiB. cuBLASLt has one of its
own. Measured on an H200 (bf16, all products of Qwen3-4B's 36 layers, forward and input gradient): 16,384 tokens 349 ms
by cuBLAS and 337 by cuBLASLt, 2,048 tokens 42.5 and 44.7. So it is asked for long rows only, and only while a row is
computed: the setting is the process's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGE_ROW = 8192
"""Tokens from which cuBLASLt is asked."""
_HOPPER = 9


@contextmanager
def products_of(num_tokens: int, device: torch.device) -> Iterator[None]:
    """Products inside go to the library that is faster for rows of so many tokens."""
    if not _prefers_lt(num_tokens, device):
        yield
        return
    before = torch.backends.cuda.preferred_blas_library()
    if before != torch._C._BlasBackend.Cublaslt:
        _quietly_prefer_lt()
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def _prefers_lt(num_tokens: int, device: torch.device) -> bool:
    is_cuda = device.type == "cuda" and torch.version.hip is None
    return is_cuda and num_tokens >= LARGE_ROW and torch.cuda.get_device_capability(device)[0] == _HOPPER


class _PreferLt(torch.autograd.Function):
    """Sets the preference where torch hands its warnings to Python, which it does inside a function of autograd."""

    @staticmethod
    def forward(ctx: Any, nothing: Tensor) -> Tensor:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        return nothing


def _quietly_prefer_lt() -> None:
    """torch says once, on stderr, that the choice is experimental: nothing that a user could do about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*preferred_blas_library is an experimental feature.*")
        _PreferLt.apply(torch.empty(0))  # type: ignore[no-untyped-call]
