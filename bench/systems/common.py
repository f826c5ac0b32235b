"""Architectures, documents and the stopwatch that all systems share."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from records import versions

QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}
QWEN3_8B = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12_288, "tie_word_embeddings": False}
QWEN3_TINY = {
    **QWEN3_4B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": QWEN3_4B,
    "qwen3-8b": QWEN3_8B,
    "llama-3.1-8b": LLAMA_8B,
    "tiny": QWEN3_TINY,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 1e-4
WARM_UP_STEPS = 3
TIMED_STEPS = 8
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Seconds of this process since it was started, less those of making or reading weights."""

    def __init__(self) -> None:
        self._started = psutil.Process().create_time()
        self._paused = 0.0

    @property
    def seconds(self) -> float:
        return time.time() - self._started - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        started = time.time()
        yield
        synchronize()
        self._paused += time.time() - started


def config_of(spec: dict[str, Any]) -> Any:
    """The transformers config of a case."""
    from transformers import LlamaConfig, Qwen3Config

    name = spec.get("model", "qwen3-4b")
    config: Any = (LlamaConfig if name.startswith("llama") else Qwen3Config)(**SHAPES[name])
    if "layers" in spec:
        config.num_hidden_layers = spec["layers"]
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: spec["layers"]]
    return config


def dtype_of(spec: dict[str, Any]) -> torch.dtype:
    dtype = getattr(torch, spec.get("dtype", "bfloat16"))
    assert isinstance(dtype, torch.dtype)
    return dtype


def random_model(spec: dict[str, Any]) -> Any:
    """The architecture with random weights, on the GPU."""
    return new_model(config_of(spec), dtype_of(spec))


def new_model(config: Any, dtype: torch.dtype) -> Any:
    """A model of that config with random weights of that type, on the GPU; the rotation's angles stay float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with DEVICE:
            return AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)


def num_token_ids(spec: dict[str, Any]) -> int:
    """Ids below which random tokens are drawn, the same for all systems."""
    return min(128_000, int(SHAPES[spec.get("model", "qwen3-4b")]["vocab_size"]))


def document_lengths(generator: np.random.Generator, count: int, *, longest: int = 2048) -> list[int]:
    """Log-normal, median 300, σ 0.75, 16 to `longest` tokens."""
    return [int(n) for n in np.clip(np.exp(generator.normal(np.log(300), 0.75, count)), 16, longest)]


def packed_rows(capacity: int, num_rows: int) -> list[list[int]]:
    """Lengths of the documents of each row: first fit, longest first, from a pool of that size."""
    generator = np.random.default_rng(0)
    pool = document_lengths(generator, max(64, num_rows * capacity // 250), longest=min(2048, capacity))
    rows: list[list[int]] = []
    for length in sorted(pool, reverse=True):
        for row in rows:
            if sum(row) + length <= capacity:
                row.append(length)
                break
        else:
            rows.append([length])
    full = [row for row in rows if sum(row) > 0.97 * capacity] or rows
    generator.shuffle(full)
    return full[:num_rows]


def cap_memory(setting: dict[str, Any]) -> None:
    """From now on an allocation beyond `cap_gib` fails, as on a card of that size.

    Called when the weights are there: here they are made at once, whereas a checkpoint is read layer by layer.
    """
    if "cap_gib" not in setting or DEVICE.type != "cuda":
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, setting["cap_gib"] * 2**30 / total))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"


def peak_gib() -> dict[str, float]:
    """Of the allocator since `reset_peak`, and what the whole process holds on the card, CUDA's own share included."""
    if DEVICE.type != "cuda":
        return {"peak_gib": 0.0, "reserved_gib": 0.0, "device_gib": 0.0}
    free, total = torch.cuda.mem_get_info()
    found = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), total - free)
    return {
        name: round(n / 2**30, 3) for name, n in zip(("peak_gib", "reserved_gib", "device_gib"), found, strict=True)
    }


def reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def time_steps(
    step: Callable[[int], tuple[int, float]], *, steps: int = TIMED_STEPS, clock: Clock | None = None
) -> dict[str, Any]:
    """Median time of a step, tokens per second and peak memory. `step(i)` returns (tokens, loss).

    clock: of the process, to say when its first step was done
    """
    # The peak counts from before the first step: what a captured graph holds is allocated there, once.
    reset_peak()
    begun = time.perf_counter()
    first_step_seconds = None
    for index in range(WARM_UP_STEPS):
        step(index)
        synchronize()
        if clock is not None and first_step_seconds is None:
            first_step_seconds = round(clock.seconds, 1)
    warm_up = time.perf_counter() - begun
    seconds, tokens, loss = [], [], 0.0
    for index in range(steps):
        synchronize()
        started = time.perf_counter()
        num_tokens, loss = step(WARM_UP_STEPS + index)
        synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(num_tokens)
    per_second = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    return {
        "tokens_per_second": round(per_second, 1),
        "milliseconds": round(statistics.median(seconds) * 1e3, 2),
        **peak_gib(),
        "loss": round(loss, 4),
        "first_step_seconds": first_step_seconds,
        "warm_up_seconds": round(warm_up, 1),
        "steps": steps,
        "device": device_name(),
        "versions": versions(),
    }


def main(measure: Callable[[dict[str, Any], dict[str, Any], Path, Clock], dict[str, Any]]) -> None:
    """Read the request, measure, write the result."""
    clock = Clock()
    request = json.loads(sys.argv[1])
    result = measure(request["spec"], request["setting"], Path(request["folder"]), clock)
    Path(sys.argv[2]).write_text(json.dumps(result))
