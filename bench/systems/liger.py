"""transformers + PEFT with Liger's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from systems.common import Clock, main


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen3

    (apply_liger_kernel_to_llama if spec.get("model") == "llama-3.1-8b" else apply_liger_kernel_to_qwen3)()
    from systems import transformers

    return transformers.measure(spec, setting, folder, clock)


if __name__ == "__main__":
    main(measure)
