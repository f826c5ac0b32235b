"""Which device and which arithmetic, and the sentence that says so."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
import torch

from affina.errors import ModelError
from affina.kernels import fp8

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; auto: CUDA, else MPS, else CPU.

    Raises ModelError[device-unavailable] when the machine does not have the one that was asked for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built_without = torch.version.cuda is None and torch.version.hip is None
        raise ModelError(
            "device-unavailable",
            "training.device is cuda, but torch sees no CUDA device",
            why="this torch was built without CUDA" if built_without else "no card, no driver, or it is hidden",
            fix="install a CUDA build of torch, check nvidia-smi, or use training.device: auto",
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ModelError(
            "device-unavailable",
            "training.device is mps, but this machine has no Metal device",
            fix="use training.device: auto",
        )
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def describe_device(device: torch.device) -> str:
    """`NVIDIA H100 (79.1 GiB)` or `CPU (2 threads)`: what training says first. A cap of the process is said too."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cap = process_cap_bytes(device)
        share = f", {cap / 2**30:.1f} of them for this process" if cap is not None else ""
        return f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB{share})"
    if device.type == "mps":
        return "Apple GPU (Metal)"
    return f"CPU ({torch.get_num_threads()} threads)"


def choose_precision(precision: str, device: torch.device) -> tuple[torch.dtype, str | None]:
    """(type of the arithmetic, a note for the user when it is not what was asked).

    auto: bfloat16 where the device computes it well, float16 on older CUDA cards, float32 on CPU and on Metal.
    bf16 on a card without it becomes fp16, with a note. Raises ModelError[precision-unsupported] for fp16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            return (torch.bfloat16 if has_fast_bfloat16(device) else torch.float16), None
        return torch.float32, None
    dtype = _DTYPES[precision]
    if dtype == torch.float16 and device.type == "cpu":
        raise ModelError(
            "precision-unsupported",
            "training.precision is fp16 on a CPU",
            why="CPUs have no fast float16 and its small range needs loss scaling for nothing",
            fix="use training.precision: auto, which is fp32 on a CPU, or bf16",
        )
    if dtype == torch.bfloat16 and device.type == "cuda" and not has_fast_bfloat16(device):
        name = torch.cuda.get_device_properties(device).name
        return torch.float16, f"{name} has no bfloat16: training in fp16 with loss scaling instead"
    if dtype == torch.bfloat16 and device.type == "mps" and not _mps_has_bfloat16():
        return torch.float16, "this macOS has no bfloat16 on Metal: training in fp16 with loss scaling instead"
    if dtype == torch.bfloat16 and device.type == "cpu" and not has_fast_bfloat16(device):
        return dtype, "this CPU emulates bfloat16: fp32 is faster here"
    return dtype, None


def check_fp8(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is worth knowing about weights in e4m3 on the device; None where its matrix units take them.

    Raises ModelError[fp8-unsupported] where the device has no 8-bit floats at all.
    """
    if fp8.has_matrix_units(device):
        return None
    try:
        torch.zeros(1, dtype=fp8.E4M3, device=device).to(dtype)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            "fp8-unsupported",
            f"the base is to be kept in fp8, and {describe_device(device)} has no 8-bit floating point",
            why=str(error).splitlines()[0],
            fix="write `quantization: int8`: one byte per weight too, and a third of the error",
        ) from error
    kind = describe_device(device).split(" (")[0]
    needed = " (CUDA cards since 8.9: Ada, Hopper)" if device.type == "cuda" else ""
    return (
        f"fp8: this {kind} does not multiply 8-bit floats{needed}; weights take a byte each and are expanded for every "
        "product: memory is saved, time is not, and int8 is more exact in the same space"
    )


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: CUDA since Ampere, CPUs with AVX512-BF16, AMX or
    SVE-BF16."""
    if device.type == "cuda":
        if torch.version.hip is not None:
            return True
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & _cpu_flags())
    return device.type == "mps" and _mps_has_bfloat16()


@lru_cache(maxsize=1)
def _cpu_flags() -> frozenset[str]:
    """Instruction sets by the kernel's names; empty where there is no /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _mps_has_bfloat16() -> bool:
    return torch.backends.mps.is_macos_or_newer(14, 0)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device by name, capability (CUDA) and bytes; None where the device has no memory of its own to count.

    free_bytes: that tensors of this process can still take
    is_capped:  these are fewer than the card has free, because the process's allocator has a limit of its own
    """

    name: str
    capability: tuple[int, int] | None
    total_bytes: int | None
    free_bytes: int | None
    is_capped: bool = False


def device_memory(name: str = "auto") -> DeviceMemory:
    """What is free on the device called `name`, this process's context being there already."""
    device = choose_device(name)
    if device.type != "cuda" or torch.version.hip is not None:
        return DeviceMemory(device.type, None, None, None)
    properties = torch.cuda.get_device_properties(device)
    capability = torch.cuda.get_device_capability(device)
    free, total = free_bytes(device), torch.cuda.mem_get_info(device)[1]
    return DeviceMemory(properties.name, capability, total, free, is_capped=free < _free_on_card(device))


@dataclass(frozen=True, slots=True)
class MemoryStats:
    """Bytes. CUDA: allocated by tensors on the card. CPU and MPS: resident memory of the process and of the machine."""

    used_bytes: int
    peak_bytes: int
    total_bytes: int


def memory_stats(device: torch.device) -> MemoryStats:
    """Memory in use now, its peak so far (see `reset_peak_memory`) and what the device has."""
    if device.type == "cuda":
        return MemoryStats(
            torch.cuda.memory_allocated(device),
            torch.cuda.max_memory_allocated(device),
            torch.cuda.get_device_properties(device).total_memory,
        )
    resident = psutil.Process().memory_info().rss
    return MemoryStats(resident, max(resident, _peak_resident_bytes()), psutil.virtual_memory().total)


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors of this process can still take: of the card, or of the machine's memory.

    On a card the smaller of what is free there, the allocator's own unused blocks included, and what the process's cap
    leaves. Everything that plans for, admits to or fills a device asks here, so that all act on one number.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, cap = _free_on_card(device), process_cap_bytes(device)
    return free if cap is None else max(0, min(free, cap - torch.cuda.memory_allocated(device)))


def process_cap_bytes(device: torch.device) -> int | None:
    """The most that this process's allocator may reserve on a card, the CUDA context not counted; None: no limit.

    Set by `torch.cuda.set_per_process_memory_fraction`, or by PYTORCH_CUDA_ALLOC_CONF where torch reads it from there.
    The allocator compares the cap with what it has reserved, and returns unused blocks before it gives up: tensors may
    take cap − allocated. A torch that cannot say what was set counts as without limit.
    """
    fraction_of = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    if device.type != "cuda" or fraction_of is None:
        return None
    fraction = float(fraction_of(device))
    return int(fraction * torch.cuda.get_device_properties(device).total_memory) if fraction < 1 else None


def let_segments_grow(device: torch.device) -> None:
    """Ask PyTorch's allocator for segments that grow, before the model is loaded: for the whole process.

    With fixed ones, of a device that is nearly full a tenth and more lies in gaps: plans count on the whole of it. A
    user's own PYTORCH_CUDA_ALLOC_CONF stands, and platforms without such segments (all but Linux) keep the fixed ones.
    """
    if device.type != "cuda" or torch.version.hip is not None or sys.platform != "linux":
        return
    if any(os.environ.get(name) for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")):
        return
    # torch 2.9 gave the call its new name, and warns of the older one.
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None) or torch.cuda.memory._set_allocator_settings
    change("expandable_segments:True")


def _free_on_card(device: torch.device) -> int:
    """Free bytes of a card, and those that this process's allocator holds without using them."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(unused)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new peak on a CUDA device; the operating system's peak of a process cannot be reset everywhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_resident_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
