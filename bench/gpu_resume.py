"""Resume = uninterrupted on a GPU: the built-in model and data, every bit of adapter and losses, both engines.

    python bench/gpu_resume.py [--output bench/results/gpu_resume.json]

Forty steps in bfloat16 with deterministic kernels; a second run of the same, whose last twenty steps are then trained
again from its checkpoint at step 20. The adapter of the fast engine's NF4 run is merged, which verifies its logits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import affina

CASES = (("fast", "nf4", 0.0), ("fast", "none", 0.0), ("fast", "fp8", 0.0), ("reference", "nf4", 0.05))


def losses_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "grad_norm" in line]


def check(engine: str, quantization: str, dropout: float, root: Path) -> dict[str, Any]:
    """Whether a resumed run equals an uninterrupted one."""

    def train(name: str) -> Any:
        settings = {
            "training.device": "cuda",
            "training.precision": "bf16",
            "training.max_steps": 40,
            "training.save_every_steps": 20,
            "training.keep_last": 3,
            "evaluation.enabled": "false",
            "engine.path": engine,
            "adapter.dropout": dropout,
            "quantization.format": quantization,
            "output.directory": root,
            "output.name": f"{name}-{engine}-{quantization}",
        }
        return affina.train(preset="laptop", overrides=[f"{key}={value}" for key, value in settings.items()])

    started = time.perf_counter()
    whole, part = train("whole"), train("part")
    shutil.rmtree(part.run / "adapter")
    affina.train(resume=part.run / "checkpoints" / "step-00000020")
    first, second = (load_file(result.run / "adapter/adapter_model.safetensors") for result in (whole, part))
    events = [json.loads(line) for line in (whole.run / "events.jsonl").read_text().splitlines()]
    record: dict[str, Any] = {
        "engine": engine,
        "quantization": quantization,
        "dropout": dropout,
        "is_adapter_identical": all(torch.equal(first[name], second[name]) for name in first),
        "are_losses_identical": losses_of(whole.run) == losses_of(part.run),
        "final_loss": losses_of(whole.run)[-1],
        "tokens_per_second": whole.tokens_per_second,
        "notes": [event.get("message", "") for event in events if event.get("kind") == "note"],
    }
    if (engine, quantization) == ("fast", "nf4"):
        merged = affina.merge(whole.run, root / "merged").to_dict()
        record["merge"] = {key: value for key, value in merged.items() if key not in ("output", "adapter")}
    record["seconds"] = time.perf_counter() - started
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_resume.json")
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        for engine, quantization, dropout in CASES:
            try:
                records.append(check(engine, quantization, dropout, Path(folder)))
            except affina.AffinaError as error:
                case = {"engine": engine, "quantization": quantization, "dropout": dropout}
                records.append({**case, "error": str(error)})
            print(json.dumps(records[-1], default=str)[:900], flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            header = {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            }
            arguments.output.write_text(json.dumps({**header, "records": records}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
