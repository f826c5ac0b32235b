"""The device and the arithmetic are chosen by themselves, and wishes that cannot be met are answered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from affina.catalog.fused_choice import RESERVE_SHARE
from affina.errors import ModelError
from affina.kernels import fp8
from affina.models import device as device_module
from affina.models.device import (
    DeviceMemory,
    check_fp8,
    choose_device,
    choose_precision,
    describe_device,
    device_memory,
    free_bytes,
    has_fast_bfloat16,
    let_segments_grow,
    memory_stats,
    process_cap_bytes,
)
from affina.models.fast.memory import step_budget_bytes

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


# What is free on a card
# ----------------------------------------------------------------------------------------------------------------

GIB = 2**30
CARD = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GiB with 60 free, of which this process has reserved 5 and uses 3; `card["fraction"]` is its cap."""
    state = {"fraction": 1.0, "free": 60 * GIB, "reserved": 5 * GIB, "allocated": 3 * GIB}
    properties = type("Properties", (), {"name": "NVIDIA H100", "total_memory": 80 * GIB})
    fakes = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device: (state["free"], 80 * GIB),
        "memory_reserved": lambda device: state["reserved"],
        "memory_allocated": lambda device: state["allocated"],
        "get_per_process_memory_fraction": lambda device: state["fraction"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    return state


def test_blocks_that_the_allocator_holds_unused_are_free(card):
    assert free_bytes(CARD) == (60 + 2) * GIB
    assert process_cap_bytes(CARD) is None
    assert describe_device(CARD) == "NVIDIA H100 (80.0 GiB)"


def test_a_capped_process_has_what_its_cap_leaves_and_not_what_the_card_has(card):
    card["fraction"] = 0.2  # 16 GiB
    assert process_cap_bytes(CARD) == 16 * GIB
    assert free_bytes(CARD) == (16 - 3) * GIB
    assert device_memory("cuda") == DeviceMemory("NVIDIA H100", (9, 0), 80 * GIB, 13 * GIB, is_capped=True)
    assert describe_device(CARD) == "NVIDIA H100 (80.0 GiB, 16.0 of them for this process)"


def test_a_card_that_others_have_filled_bounds_a_capped_process_too(card):
    card.update(fraction=0.2, free=4 * GIB)
    assert free_bytes(CARD) == (4 + 2) * GIB
    assert not device_memory("cuda").is_capped


def test_a_cap_below_what_is_allocated_already_leaves_nothing(card):
    card["fraction"] = 1 / 80
    assert free_bytes(CARD) == 0


def test_a_torch_that_does_not_tell_its_cap_is_planned_for_the_card(card, monkeypatch):
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert process_cap_bytes(CARD) is None
    assert free_bytes(CARD) == 62 * GIB


def test_the_fast_engines_step_is_bounded_by_the_cap_the_card_and_the_users_own_limit(card):
    share = 1 - RESERVE_SHARE
    assert step_budget_bytes(CARD, None) == int(62 * GIB * share)
    card["fraction"] = 0.2
    assert step_budget_bytes(CARD, None) == int(13 * GIB * share)
    assert step_budget_bytes(CARD, 10 * GIB) == int(7 * GIB * share)
    assert step_budget_bytes(CARD, 40 * GIB) == int(13 * GIB * share)


def test_no_module_but_one_asks_the_card_what_is_free():
    source = Path(device_module.__file__).parents[1]
    askers = {
        path.relative_to(source).as_posix() for path in source.rglob("*.py") if "mem_get_info" in path.read_text()
    }
    assert askers == {"models/device.py"}


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_segments_grow_unless_the_user_chose_otherwise(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    let_segments_grow(torch.device("cpu"))
    assert asked == []
    let_segments_grow(CARD)
    assert asked == ["expandable_segments:True"]
    monkeypatch.setenv(name, "max_split_size_mb:128")
    let_segments_grow(CARD)
    assert len(asked) == 1


def test_where_segments_cannot_grow_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    monkeypatch.setattr("sys.platform", "win32")
    let_segments_grow(CARD)
    assert asked == []
