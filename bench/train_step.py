"""Training one step: affina's fast engine and its peers, on one GPU, in one call.

    python bench/train_step.py [--cases bf16-lora-8x2048,…] [--systems affina,transformers,liger,unsloth]
                               [--seconds 500] [--output bench/results/train_step.json]

Every system trains LoRA r = 16 on all seven linear layers of the same architecture with random weights (the same bytes
and operations as the released ones), AdamW, random tokens, the loss on every token. Times are medians after warm-up;
peak memory is the allocator's. Each measurement is a process of its own. A measurement that fails is recorded with its
reason. `--seconds` ends the list early, so that a call with a limit still writes what it measured.

Cases: `bf16-lora-8x2048` is 8 full rows of 2,048 tokens; `bf16-packed-16384` packs documents of log-normal lengths
(median 300, σ 0.75, 16 to 2,048 tokens) into rows of 16,384, where tokens/s does not count padding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

CASES: dict[str, dict[str, Any]] = {
    "bf16-lora-8x2048": {"rows": 8, "length": 2048},
    "nf4-qlora-8x2048": {"rows": 8, "length": 2048, "nf4": True},
    "fp8-lora-8x2048": {"rows": 8, "length": 2048, "fp8": True},
    "bf16-lora-1x2048": {"rows": 1, "length": 2048},
    "nf4-qlora-1x2048": {"rows": 1, "length": 2048, "nf4": True},
    "nf4-qlora-1x32768": {"rows": 1, "length": 32768, "nf4": True},
    "bf16-packed-16384": {"rows": 1, "length": 16384, "packed": True},
    "bf16-packed-2048": {"rows": 1, "length": 2048, "packed": True},
    "bf16-lora-8x2048-r64": {"rows": 8, "length": 2048, "rank": 64},
    "bf16-lora-16x2048": {"rows": 16, "length": 2048},
    "bf16-lora-32x2048": {"rows": 32, "length": 2048},
    "nf4-qlora-4x2048-llama-3.1-8b": {"rows": 4, "length": 2048, "nf4": True, "model": "llama-3.1-8b"},
    "nf4-qlora-4x2048-qwen3-8b": {"rows": 4, "length": 2048, "nf4": True, "model": "qwen3-8b"},
    "fp16-qlora-1x2048": {"rows": 1, "length": 2048, "nf4": True, "dtype": "float16"},
}

# What to measure by default: (case, system, settings of the system).
PLAN: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("bf16-lora-8x2048", "affina", {}),
    ("bf16-lora-8x2048", "affina", {"memory_gib": 11.2}),
    ("nf4-qlora-8x2048", "affina", {}),
    ("nf4-qlora-8x2048", "affina", {"memory_gib": 6.2}),
    ("bf16-lora-1x2048", "affina", {}),
    ("nf4-qlora-1x2048", "affina", {}),
    ("fp8-lora-8x2048", "affina", {}),
    ("bf16-packed-16384", "affina", {}),
    ("bf16-packed-2048", "affina", {}),
    ("nf4-qlora-1x32768", "affina", {"memory_gib": 9.4}),
    ("nf4-qlora-1x32768", "affina", {"memory_gib": 9.4, "deterministic": False}),
    ("bf16-lora-8x2048", "unsloth", {"checkpointing": False}),
    ("nf4-qlora-8x2048", "unsloth", {"checkpointing": True}),
    ("bf16-lora-8x2048", "unsloth", {"checkpointing": True}),
    ("bf16-lora-8x2048", "liger", {"checkpointing": True}),
    ("bf16-lora-8x2048", "transformers", {"checkpointing": True}),
    ("nf4-qlora-1x2048", "unsloth", {"checkpointing": True}),
    ("nf4-qlora-1x2048", "transformers", {"checkpointing": True}),
    ("bf16-lora-8x2048-r64", "affina", {}),
    ("bf16-lora-16x2048", "affina", {}),
    ("bf16-lora-32x2048", "affina", {}),
    ("nf4-qlora-4x2048-llama-3.1-8b", "affina", {}),
    ("nf4-qlora-4x2048-qwen3-8b", "affina", {}),
)


def measure(case: str, system: str, setting: dict[str, Any], folder: Path, timeout: float) -> dict[str, Any]:
    """One measurement in its own process."""
    request = {"case": case, "spec": CASES[case], "setting": setting, "folder": str(folder)}
    record: dict[str, Any] = {"case": case, "system": system, "setting": setting}
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"systems.{system}", json.dumps(request), str(output)]
    started = time.perf_counter()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {**record, "error": f"no result within {timeout:.0f} s"}
    if done.returncode != 0 or not output.exists():
        return {**record, "error": (done.stderr or done.stdout).strip()[-1500:]}
    record.update(json.loads(output.read_text()))
    record["wall_seconds"] = round(time.perf_counter() - started, 1)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """What GOALS' table shows, one line per measurement."""
    lines = []
    for record in records:
        setting = ", ".join(f"{key} {value}" for key, value in record["setting"].items()) or "default"
        head = f"{record['case']:32} {record['system']:12} {setting:24}"
        if "error" in record:
            lines.append(f"{head} failed: {record['error'].splitlines()[-1][:150]}")
            continue
        lines.append(
            f"{head} {record['tokens_per_second']:>9,.0f} tokens/s {record['peak_gib']:>7.2f} GiB "
            f"{record['milliseconds']:>8.1f} ms  loss {record['loss']:.3f}  {record.get('note', '')}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="only these, by comma")
    parser.add_argument("--systems", help="only these, by comma")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no measurement after this long")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "train_step.json")
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.seconds
    plan = [
        entry
        for entry in PLAN
        if (not arguments.cases or entry[0] in arguments.cases.split(","))
        and (not arguments.systems or entry[1] in arguments.systems.split(","))
    ]
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for case, system, setting in plan:
            left = deadline - time.perf_counter()
            if left < 15:
                break
            record = measure(case, system, setting, Path(folder), timeout=left)
            record["date"] = datetime.now(UTC).strftime("%Y-%m-%d")
            records.append(record)
            print(table([record]), flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps({"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
