"""Launches of Triton kernels whose cost on the host is small: a kernel compiled for such arguments is called directly.

An ordinary launch `kernel[grid](…)` of Triton 3.6 binds every argument to its name, specialises it, and looks the
compiled kernel up under a string of it all: 60 µs on an H200's slow virtual host, thousands of times a step. It also
returns the compiled kernel, which can be launched by itself, `compiled[grid](…)`. So the first launch of a kind is an
ordinary one, and its result serves those that follow: with AFFINA_DIRECT_LAUNCH=1 in the environment.

Of a kind are launches that Triton would compile alike. It looks at

    tensors     their type, and whether they begin at a multiple of 16 bytes
    integers    whether they are 1, or a multiple of 16, and how wide they are
    floats      nothing
    constants   everything, and the launch's options
    the device  that is current

which is what `_kind` writes down. What it does not know (booleans, None, tensor descriptors), kernels of the
interpreter and versions of Triton whose rules nobody has read take the ordinary way, and so does everything on AMD's
cards, where a tensor's size counts too. A test compares `_kind` with Triton's own specialisation.
"""

# mypy: disable-error-code="import-untyped, import-not-found"
from __future__ import annotations

import os
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.runtime.jit import JITFunction

KNOWN_TRITON = ("3.6.",)
"""Versions whose rules of specialisation `_kind` follows."""

IS_WANTED = os.environ.get("AFFINA_DIRECT_LAUNCH") == "1"
"""No card has run such launches yet. Until one has, with equal bits, they are for whoever asks."""
_FOLLOWS_RULES = IS_WANTED and torch.version.hip is None and triton.__version__.startswith(KNOWN_TRITON)
_compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...], Any]] = {}
"""By kernel, device and kind: the compiled kernel; its constants in the order of the kernel's parameters; the kernel,
so that its identity stays its own."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)`: the compile-time constants, and options such as num_warps, by name."""
    kind = _kind(arguments) if _FOLLOWS_RULES and type(kernel) is JITFunction else None
    if kind is None:
        kernel[grid](*arguments, **constants)
        return
    # By identity, since the hash of a kernel is that of its source and costs as much as all the rest.
    key = (id(kernel), torch.cuda.current_device(), *kind, *constants, *constants.values())
    known = _compiled.get(key)
    if known is None:
        compiled = kernel[grid](*arguments, **constants)
        if compiled is not None:
            in_order = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            _compiled[key] = compiled, in_order, kernel
        return
    compiled, in_order, _ = known
    compiled[(*grid, 1, 1)[:3]](*arguments, *in_order)


def _kind(arguments: tuple[object, ...]) -> list[object] | None:
    """All that Triton asks about arguments before it compiles a kernel; None where there is one that is not known."""
    kind: list[object] = []
    for argument in arguments:
        its_type = type(argument)
        if its_type is Tensor or its_type is nn.Parameter:
            kind.append(argument.dtype)  # type: ignore[attr-defined]
            kind.append(argument.data_ptr() & 15 == 0)  # type: ignore[attr-defined]
        elif its_type is int:
            kind.append(_kind_of_integer(argument))  # type: ignore[arg-type]
        elif its_type is float:
            kind.append(float)
        else:
            return None
    return kind


def _kind_of_integer(value: int) -> int:
    """1 for 1, which is compiled in; another number for each type (i32, i64, u64), with and without a factor of 16."""
    if value == 1:
        return 1
    if -(1 << 31) <= value < 1 << 31:
        return 2 if value & 15 else 3
    return (4 if value & 15 else 5) + (2 if value >= 1 << 63 else 0)


def ceil_div(count: int, size: int) -> int:
    """⌈count / size⌉; `triton.cdiv` is for kernels and takes some microseconds outside of them."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()
