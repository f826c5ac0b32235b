"""Lets kernels loop to bounds that are only known when they run, in Triton's interpreter.

The interpreter of Triton 3.6 keeps a scalar as an array of one element, which NumPy 2.4 no longer converts to the
integer that `range` needs. Delete this when the interpreter converts it by itself.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Replaces the interpreter's conversion in this process."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "converts_scalars", False):
        return

    def patch_and_convert(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    patch_and_convert.converts_scalars = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patch_and_convert
