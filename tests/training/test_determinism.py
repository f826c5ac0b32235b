"""Deterministic kernels are strict where they exist, and the setting is put back."""

from __future__ import annotations

import pytest
import torch

from affina.training.determinism import deterministic_kernels


def state() -> tuple[bool, bool, bool]:
    settings = torch.utils.deterministic
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


def test_kernels_are_strictly_deterministic_inside_and_as_before_outside() -> None:
    before, notes = state(), []
    with deterministic_kernels(True, lambda: None, notes.append):
        assert state() == (True, False, False)
    assert state() == before
    assert notes == []


def test_an_operation_without_a_deterministic_kernel_is_named_and_only_warned_about() -> None:
    before, notes = state(), []

    def probe() -> None:
        raise RuntimeError("histc_cuda does not have a deterministic implementation, but you set …")

    with deterministic_kernels(True, probe, notes.append):
        assert state()[1]
    assert state() == before
    assert "histc_cuda" in notes[0]


def test_other_errors_of_the_probe_are_not_swallowed() -> None:
    before = state()

    def probe() -> None:
        raise RuntimeError("CUDA error")

    with pytest.raises(RuntimeError, match="CUDA error"), deterministic_kernels(True, probe, print):
        pass
    assert state() == before


def test_it_can_be_switched_off() -> None:
    before = state()
    with deterministic_kernels(False, lambda: pytest.fail("no probe is needed"), print):
        assert state() == before
