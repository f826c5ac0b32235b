"""Makes Triton's interpreter round as GPUs do.

The interpreter of Triton 3.6 cuts float32 to bfloat16 off instead of rounding it, and loses the carry when it rounds
to 8 bits (1.9999 becomes 1). The processes that `run_in_interpreter` starts may therefore replace its conversion by
PyTorch's, which rounds to nearest even as the compiled kernels do. Delete it when the interpreter rounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_FLOATS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
}


def _convert(values: np.ndarray[Any, Any], source: Any, target: Any, rounding_mode: Any) -> np.ndarray[Any, Any]:
    """The numbers whose bits `values` holds in type `source`, as unsigned integers with their bits in `target`."""
    del rounding_mode
    from_type, to_type = _FLOATS[str(source)], _FLOATS[str(target)]
    numbers = torch.from_numpy(np.frombuffer(values.tobytes(), dtype=np.uint8).copy()).view(from_type)
    bits = numbers.to(to_type).view(torch.uint8).numpy()
    return bits.view(f"uint{8 * to_type.itemsize}").reshape(values.shape)


def install() -> None:
    """Replaces the interpreter's conversion in this process."""
    from triton.runtime import interpreter

    interpreter._convert_float = _convert
