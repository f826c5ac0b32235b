"""Direct launches: what Triton would compile differently is never taken for the same; arguments arrive unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from affina.kernels.triton import four_bit, launch, rms_norm

MEMORY = torch.zeros(64, dtype=torch.float32)
TENSORS = [
    MEMORY,
    MEMORY[1:],
    MEMORY[4:],
    MEMORY.to(torch.bfloat16),
    MEMORY.to(torch.bfloat16)[4:],
    MEMORY.to(torch.bfloat16)[8:],
    MEMORY.to(torch.uint8)[1:],
    nn.Parameter(MEMORY[2:]),
]
EDGES = [-(1 << 31) - 1, -(1 << 31), (1 << 31) - 1, 1 << 31, (1 << 32) + 16, (1 << 63) - 1, 1 << 63, (1 << 64) - 16]
ARGUMENTS = st.one_of(
    st.sampled_from(TENSORS),
    st.sampled_from([*EDGES, 0, 1, 2, 15, 16, -1, -16, 2048]),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False),
)


def specialised(argument: object) -> object:
    """As Triton's launcher does it for CUDA."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import native_specialize_impl

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return native_specialize_impl(backend, argument, False, True, True)


@settings(max_examples=400, deadline=None)
@given(first=ARGUMENTS, second=ARGUMENTS)
def test_arguments_of_one_kind_are_specialised_alike_by_triton(first: Any, second: Any) -> None:
    if launch._kind((first,)) == launch._kind((second,)):
        assert specialised(first) == specialised(second)


@pytest.mark.parametrize("second", TENSORS + EDGES + [0, 1, 2, 16, 17])
@pytest.mark.parametrize("first", TENSORS + EDGES + [0, 1, 2, 16, 17])
def test_no_two_arguments_that_are_specialised_otherwise_are_of_one_kind(first: Any, second: Any) -> None:
    if specialised(first) != specialised(second):
        assert launch._kind((first,)) != launch._kind((second,))


@pytest.mark.parametrize(
    "argument", [True, None, "text", torch.empty(2, device="meta").as_subclass(type("T", (Tensor,), {}))]
)
def test_arguments_that_are_not_known_are_of_no_kind(argument: object) -> None:
    assert launch._kind((MEMORY, argument)) is None


# Launches, on a kernel that only takes notes


class Notes:
    """A compiled kernel and the ordinary way to it; `ordinary` and `direct` hold grids, arguments and constants."""

    arg_names = ("x", "count", "WIDTH", "ROWS")

    def __init__(self) -> None:
        self.ordinary: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []
        self.returns_compiled = True

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: object, **constants: object) -> Any:
            self.ordinary.append((grid, arguments, constants))
            return SimpleCompiled(self.direct) if self.returns_compiled else None

        return run


class SimpleCompiled:
    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self._launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self._launches.append((grid, arguments))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Kernels are `Notes`, and device `device.index` is current."""
    current = SimpleNamespace(index=0)
    monkeypatch.setattr(launch, "JITFunction", Notes)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_FOLLOWS_RULES", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.index)
    return current


@pytest.mark.usefixtures("device")
def test_the_second_launch_of_a_kind_is_direct_and_passes_constants_in_the_kernels_order() -> None:
    kernel = Notes()
    for count in (5, 7):
        launch.launch(kernel, (count, 3), MEMORY, count, ROWS=2, WIDTH=64, num_warps=4)
    assert [grid for grid, _, _ in kernel.ordinary] == [(5, 3)]
    ((grid, arguments),) = kernel.direct
    assert grid == (7, 3, 1)
    assert arguments[0] is MEMORY
    assert arguments[1:] == (7, 64, 2)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    "change",
    [
        {"x": MEMORY[1:]},
        {"x": MEMORY.to(torch.bfloat16)},
        {"count": 1},
        {"count": 16},
        {"count": 1 << 31},
        {"WIDTH": 65},
        {"num_warps": 8},
    ],
    ids=str,
)
def test_another_kind_is_compiled_anew_and_both_are_kept(change: dict[str, Any]) -> None:
    kernel = Notes()

    def run(x: Tensor = MEMORY, count: int = 5, **constants: int) -> None:
        launch.launch(kernel, (1,), x, count, **{"WIDTH": 64, "ROWS": 2, "num_warps": 4, **constants})

    run()
    run(**change)
    assert len(kernel.ordinary) == 2
    run()
    run(**change)
    assert (len(kernel.ordinary), len(kernel.direct)) == (2, 2)


def test_every_device_and_every_kernel_has_its_own(device: SimpleNamespace) -> None:
    kernels = [Notes(), Notes()]
    for _ in range(2):
        for kernel in kernels:
            for device.index in (0, 1):
                launch.launch(kernel, (1,), MEMORY, 5, WIDTH=64, ROWS=2)
    assert [(len(kernel.ordinary), len(kernel.direct)) for kernel in kernels] == [(2, 2), (2, 2)]


@pytest.mark.usefixtures("device")
def test_what_is_not_understood_takes_the_ordinary_way_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, without = Notes(), Notes()
    without.returns_compiled = False
    for _ in range(2):
        launch.launch(kernel, (1,), MEMORY, None, WIDTH=64, ROWS=2)
        launch.launch(without, (1,), MEMORY, 5, WIDTH=64, ROWS=2)
    assert (len(kernel.ordinary), len(without.ordinary)) == (2, 2)
    monkeypatch.setattr(launch, "_FOLLOWS_RULES", False)
    for _ in range(2):
        launch.launch(kernel, (1,), MEMORY, 5, WIDTH=64, ROWS=2)
    assert (len(kernel.ordinary), len(kernel.direct)) == (4, 0)


def test_a_kernel_that_is_not_compiled_takes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})
    kernel = Notes()  # no JITFunction, as kernels of the interpreter are none
    for _ in range(2):
        launch.launch(kernel, (1,), MEMORY, 5, WIDTH=64, ROWS=2)
    assert len(kernel.ordinary) == 2


# Real kernels on a driver without a card


class Driver:
    """What Triton asks of a driver before it launches, of a card that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class CompiledStandIn:
    """Takes the arguments that the C launcher would get, on either way."""

    function = packed_metadata = None

    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self._launches = launches

    def launch_metadata(self, *arguments: object) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        grid, from_kernel = arguments[:3], arguments[9:]
        self._launches.append((grid, *from_kernel))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *arguments: self._launches.append((grid, *arguments))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches the C launcher: grid and arguments, of kernels that Triton thinks it compiles."""
    from collections import defaultdict

    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, ...]] = []

    def compile_nothing(kernel: Any, key: str, *rest: object) -> CompiledStandIn:
        stand_in = CompiledStandIn(found)
        kernel.device_caches[0][0][key] = stand_in
        return stand_in

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_FOLLOWS_RULES", True)
    for kernel in (four_bit._dequantize_kernel, rms_norm._forward_kernel, rms_norm._backward_kernel):
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    return found


def as_numbers(call: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.data_ptr() if isinstance(part, Tensor) else part for part in call)


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_a_direct_launch_passes_what_the_ordinary_one_passed(rows: int, launches: list[tuple[Any, ...]]) -> None:
    x, weight = torch.zeros(rows, 96, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.bfloat16)
    rstd, nested = torch.zeros(rows), torch.zeros(4)
    codes, scales = torch.zeros(rows * 48, dtype=torch.uint8), torch.zeros(rows * 96 // 32, dtype=torch.uint8)
    tables = torch.zeros(256), torch.zeros(16)

    def norm() -> None:
        rms_norm.launch_forward(x, None, weight, 1e-6, sum_out=None, out=x, rstd=rstd)

    def norm_backward() -> None:
        rms_norm.launch_backward(x, x, weight, rstd, grad_residual=None, out=x)

    def expand() -> None:
        four_bit.dequantize_into(codes, scales, nested, nested[0], *tables, x, block_size=32)

    for call in (norm, norm_backward, expand):
        del launches[:]
        call()
        call()
        first, second = map(as_numbers, launches)
        assert first == second
    assert len(launch._compiled) == 3


def test_host_arithmetic_is_tritons() -> None:
    import triton

    for count in [*range(1, 70), 2560, 4096, 151_936]:
        assert launch.power_of_two(count) == triton.next_power_of_2(count)
        assert launch.ceil_div(count, 32) == triton.cdiv(count, 32)


def test_direct_launches_are_for_whoever_asks() -> None:
    asked = os.environ.get("AFFINA_DIRECT_LAUNCH") == "1"
    assert asked == launch.IS_WANTED
    assert not launch._FOLLOWS_RULES or asked
