"""The library of large products is chosen while a row is computed, and no longer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from affina.models.fast import blas
from affina.models.fast.blas import LARGE_ROW, products_of


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for torch's setting, which takes cuBLASLt only where there is CUDA; the last entry is in force."""
    chosen: list[Any] = [torch._C._BlasBackend.Cublas]

    def preferred(name: Any = None) -> Any:
        if name is not None:
            if name == "cublaslt":
                warnings.warn("torch.backends.cuda.preferred_blas_library is an experimental feature.", stacklevel=2)
            chosen.append(name)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return chosen


def test_long_rows_on_hopper_ask_cublaslt_and_leave_the_setting_as_it_was(library: list[Any]) -> None:
    with products_of(LARGE_ROW, torch.device("cuda")):
        assert library[-1] == "cublaslt"
    assert library[-1] == torch._C._BlasBackend.Cublas


def test_an_error_leaves_the_setting_as_it_was(library: list[Any]) -> None:
    with pytest.raises(ZeroDivisionError), products_of(LARGE_ROW, torch.device("cuda")):
        raise ZeroDivisionError
    assert library[-1] == torch._C._BlasBackend.Cublas


@pytest.mark.parametrize(
    ("num_tokens", "device", "capability"),
    [(LARGE_ROW - 1, "cuda", (9, 0)), (LARGE_ROW, "cpu", (9, 0)), (LARGE_ROW, "cuda", (8, 9))],
)
def test_elsewhere_the_setting_is_not_touched(
    num_tokens: int, device: str, capability: tuple[int, int], library: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with products_of(num_tokens, torch.device(device)):
        pass
    assert len(library) == 1
    assert not blas._prefers_lt(num_tokens, torch.device(device))
