"""The device and the arithmetic are chosen by themselves, and wishes that cannot be met are answered."""

from __future__ import annotations

import pytest
import torch

from affina.errors import ModelError
from affina.kernels import fp8
from affina.models import device as device_module
from affina.models.device import (
    check_fp8,
    choose_device,
    choose_precision,
    describe_device,
    has_fast_bfloat16,
    memory_stats,
)

CPU = torch.device("cpu")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@needs_no_cuda
def test_cuda_without_a_card_is_refused():
    with pytest.raises(ModelError) as caught:
        choose_device("cuda")
    assert caught.value.code == "device-unavailable"
    assert "training.device: auto" in caught.value.fix


@needs_no_cuda
def test_auto_always_finds_a_device():
    assert choose_device("auto").type in ("cpu", "mps")


def test_a_cpu_computes_in_float32_unless_asked():
    assert choose_precision("auto", CPU) == (torch.float32, None)
    assert choose_precision("fp32", CPU) == (torch.float32, None)


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(ModelError, match="precision-unsupported") as caught:
        choose_precision("fp16", CPU)
    assert "or bf16" in caught.value.fix


@pytest.mark.parametrize(
    ("is_fast", "note"), [(True, None), (False, "this CPU emulates bfloat16: fp32 is faster here")]
)
def test_bfloat16_on_a_cpu_says_when_it_is_slow(monkeypatch, is_fast, note):
    monkeypatch.setattr(device_module, "has_fast_bfloat16", lambda device: is_fast)
    assert choose_precision("bf16", CPU) == (torch.bfloat16, note)


@pytest.mark.parametrize(
    ("capability", "wish", "expected"),
    [
        ((7, 5), "auto", torch.float16),
        ((7, 5), "bf16", torch.float16),
        ((8, 0), "auto", torch.bfloat16),
        ((9, 0), "fp16", torch.float16),
    ],
)
def test_cards_before_ampere_train_in_float16_and_say_so(monkeypatch, capability, wish, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    properties = type("Properties", (), {"name": "Tesla T4"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    dtype, note = choose_precision(wish, torch.device("cuda", 0))
    assert dtype == expected
    if (capability, wish) == ((7, 5), "bf16"):
        assert note == "Tesla T4 has no bfloat16: training in fp16 with loss scaling instead"
    else:
        assert note is None


@pytest.mark.parametrize(("flags", "is_fast"), [({"avx2"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True)])
def test_bfloat16_is_fast_where_the_instruction_set_has_it(monkeypatch, flags, is_fast):
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: frozenset(flags))
    assert has_fast_bfloat16(CPU) is is_fast


def test_memory_of_the_process_is_reported():
    stats = memory_stats(CPU)
    assert 0 < stats.used_bytes <= stats.peak_bytes < stats.total_bytes
    assert describe_device(CPU).startswith("CPU (")


# 8-bit floats
# ----------------------------------------------------------------------------------------------------------------


def test_fp8_on_a_cpu_works_by_expanding_and_says_so():
    note = check_fp8(CPU, torch.float32)
    assert note.startswith("fp8: this CPU does not multiply 8-bit floats; weights take a byte each and are expanded")
    assert "memory is saved, time is not, and int8 is more exact" in note


@pytest.mark.parametrize(
    ("capability", "multiplies"), [((7, 5), False), ((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)]
)
def test_cards_before_8_9_expand_and_never_compile_a_kernel_for_it(monkeypatch, capability, multiplies):
    # Triton has no conversion to e4m3 before 8.9: its compiler would stop the run with an error of its own.
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    card = torch.device("cuda")
    assert fp8.has_matrix_units(card) == multiplies
    assert fp8.can_convert_in_kernels(card) == multiplies
    monkeypatch.setattr(device_module, "describe_device", lambda device: "Tesla T4 (14.6 GiB)")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(1))  # there is no card here
    note = check_fp8(card, torch.float16)
    if multiplies:
        assert note is None
    else:
        assert "this Tesla T4 does not multiply 8-bit floats (CUDA cards since 8.9: Ada, Hopper)" in note


def test_a_device_without_8_bit_floats_is_refused_with_what_works(monkeypatch):
    def refuse(*arguments, **options):
        raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend")

    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(ModelError) as caught:
        check_fp8(torch.device("mps"), torch.float32)
    assert caught.value.code == "fp8-unsupported"
    assert "Apple GPU (Metal) has no 8-bit floating point" in caught.value.what
    assert "quantization: int8" in caught.value.fix
