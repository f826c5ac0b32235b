"""Architectures, documents and the stopwatch that all systems share."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP_STEPS = 3
TIMED_STEPS = 8


def config_of(spec: dict[str, Any]) -> Any:
    """The transformers config of a case."""
    from transformers import LlamaConfig, Qwen3Config

    name = spec.get("model", "qwen3-4b")
    if name == "llama-3.1-8b":
        config: Any = LlamaConfig(**LLAMA_8B)
    else:
        config = Qwen3Config(**(QWEN3_8B if name == "qwen3-8b" else QWEN3_4B))
    if "layers" in spec:
        config.num_hidden_layers = spec["layers"]
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: spec["layers"]]
    return config


def random_model(spec: dict[str, Any]) -> Any:
    """The architecture with random weights, on the GPU."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec.get("dtype", "bfloat16")))
    try:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config_of(spec))
    finally:
        torch.set_default_dtype(default)


def document_lengths(generator: np.random.Generator, count: int) -> list[int]:
    """Log-normal, median 300, σ 0.75, 16 to 2,048 tokens."""
    return [int(n) for n in np.clip(np.exp(generator.normal(np.log(300), 0.75, count)), 16, 2048)]


def packed_rows(capacity: int, num_rows: int) -> list[list[int]]:
    """Lengths of the documents of each row: first fit, longest first, from a pool of that size."""
    generator = np.random.default_rng(0)
    pool = document_lengths(generator, max(64, num_rows * capacity // 250))
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


def time_steps(step: Callable[[int], tuple[int, float]], *, steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Median time of a step, tokens per second and peak memory. `step(i)` returns (tokens, loss)."""
    # The peak counts from before the first step: what a captured graph holds is allocated there, once.
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for index in range(WARM_UP_STEPS):
        step(index)
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - begun
    seconds, tokens, loss = [], [], 0.0
    for index in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        num_tokens, loss = step(WARM_UP_STEPS + index)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        tokens.append(num_tokens)
    per_second = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
    return {
        "tokens_per_second": round(per_second, 1),
        "milliseconds": round(statistics.median(seconds) * 1e3, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "loss": round(loss, 4),
        "warm_up_seconds": round(warm_up, 1),
        "steps": steps,
        "device": torch.cuda.get_device_name(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that matter here."""
    found = {"torch": torch.__version__}
    for name in ("transformers", "peft", "triton", "bitsandbytes", "liger-kernel", "unsloth", "affina"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(measure: Callable[[dict[str, Any], dict[str, Any], Path], dict[str, Any]]) -> None:
    """Read the request, measure, write the result."""
    request = json.loads(sys.argv[1])
    result = measure(request["spec"], request["setting"], Path(request["folder"]))
    Path(sys.argv[2]).write_text(json.dumps(result))
