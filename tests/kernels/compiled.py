"""Compiles the launches of Triton kernels for a GPU that need not be there.

A call with tensors on the device "meta" goes through the launcher as it is; in place of the launch, the kernel is
compiled for these arguments: their types, strides and constants, specialised as Triton's launcher specialises them.
What a GPU would refuse when it starts the kernel, such as too much shared memory, can then be read from the result.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
_TYPES |= {torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8"}


def require_compiler() -> None:
    """Skip the test where kernels cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process")


def compile_launches(
    module: ModuleType, names: list[str], call: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, capability: int
) -> list[Any]:
    """The compiled kernels that `call` launches, of those called `names` in `module`."""
    compiled: list[Any] = []
    for name in names:
        monkeypatch.setattr(module, name, _Recorder(getattr(module, name), capability, compiled))
    try:
        call()
    finally:
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name).kernel)
    return compiled


class _Recorder:
    """Stands in for a kernel and compiles where it would launch."""

    def __init__(self, kernel: Any, capability: int, compiled: list[Any]) -> None:
        self.kernel = kernel
        self.capability = capability
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid[0] > 0
        return self._launch

    def _launch(self, *arguments: Any, **keywords: Any) -> None:
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = [parameter.name for parameter in self.kernel.params]
        values = {**dict(zip(names, arguments, strict=False)), **{n: keywords.pop(n) for n in names if n in keywords}}
        assert list(values) == names, "arguments are missing or in another order"
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            specialises = not parameter.do_not_specialize
            if parameter.is_constexpr or (specialises and type(value) is int and value == 1):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            signature[parameter.name] = _type(value)
            is_aligned = (
                value.storage_offset() * value.element_size() % 16 == 0 if _is_tensor(value) else value % 16 == 0
            )
            if specialises and is_aligned and not isinstance(value, float):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        self.compiled.append(compile(source, target=GPUTarget("cuda", self.capability, 32), options=keywords))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _type(value: Any) -> str:
    if _is_tensor(value):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    assert type(value) is int, f"a launch argument is a {type(value)}"
    return "i32" if abs(value) < 2**31 else "i64"
