"""Real runs of the presets on Qwen3-4B's shape, on one GPU: that they train, resume, merge, and what they take.

    python bench/qwen3_4b.py --tokenizer FOLDER --data gsm8k.jsonl [--output bench/results/qwen3_4b.json]

Released weights are not needed: the model has Qwen3-4B's exact architecture and random weights, hence the same bytes
and operations, and the real tokenizer and template. The loss starts near ln(151,936) = 11.93 and falls while the
adapter learns the data's token frequencies. `--engine` chooses reference, transformers' own forward, or fast.

For each preset: tokens per second and peak memory of the steps after the first three, and the loss of every step.
Besides: a resumed run against an uninterrupted one (equal bits), and a merge with its logits verified.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

import affina

ARCHITECTURE = {
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40_960,
}
WARM_UP_STEPS = 3


def make_model(folder: Path, tokenizer: Path, *, num_layers: int) -> None:
    """Write random weights of the architecture, and the real tokenizer beside them."""
    torch.manual_seed(0)
    config = Qwen3Config(**{**ARCHITECTURE, "num_hidden_layers": num_layers})
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = Qwen3ForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def run(name: str, preset: str, model: Path, data: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """One run of a preset, and what its steps took."""
    torch.cuda.empty_cache()
    overrides = [
        f"model.path={model}",
        f"data.train=[{{path: {data}}}]",
        "evaluation.enabled=false",
        "data.validation_fraction=0.0",
        f"output.directory={root / 'runs'}",
        f"output.name={name}",
        f"data.cache_directory={root / 'cache'}",
        *(f"{key}={value}" for key, value in changes.items()),
    ]
    started = time.perf_counter()
    result = affina.train(preset=preset, overrides=overrides)
    wall = time.perf_counter() - started
    records = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    print(f"{name}: {json.dumps(steps[-1])}", flush=True)
    gc.collect()
    return {
        "case": name,
        "preset": preset,
        "changes": changes,
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in steps[WARM_UP_STEPS:]),
        "peak_gib": result.peak_memory_bytes / 2**30,
        "losses": [record["loss"] for record in steps],
        "num_trainable": result.num_trainable,
        "steps": result.steps,
        "wall_seconds": wall,
        "run": str(result.run),
    }


def check_resume(model: Path, data: Path, root: Path, *, engine: str) -> dict[str, Any]:
    """Train six steps, train them again from the checkpoint at step three, compare every bit."""
    common = {
        "training.max_steps": 6,
        "training.warmup_steps": 2,
        "training.save_every_steps": 3,
        "data.max_length": 1024,
        "adapter.dropout": 0.05 if engine == "reference" else 0.0,
        "engine.path": engine,
    }
    whole = run(f"whole-{engine}", "production", model, data, root, **common)
    part = run(f"part-{engine}", "production", model, data, root, **common)
    shutil.rmtree(Path(part["run"]) / "adapter")
    affina.train(resume=Path(part["run"]) / "checkpoints" / "step-00000003")
    first, second = (load_file(Path(entry["run"]) / "adapter/adapter_model.safetensors") for entry in (whole, part))
    return {"is_bit_identical": all(torch.equal(first[key], second[key]) for key in first), "num_tensors": len(first)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of Qwen3-4B's tokenizer files")
    parser.add_argument("--data", type=Path, required=True, help="chats, or any file that affina reads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "qwen3_4b.json")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--without-checks", action="store_true", help="only the presets' runs")
    parser.add_argument("--engine", choices=("reference", "fast"), default="fast")
    parser.add_argument("--only-checks", action="store_true", help="keep the runs of an earlier record")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        started = time.perf_counter()
        make_model(root / "model", arguments.tokenizer, num_layers=arguments.layers)
        print(f"random model written in {time.perf_counter() - started:.0f} s", flush=True)
        steps = {"training.max_steps": arguments.steps, "engine.path": arguments.engine}
        record: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": {"torch": torch.__version__, "affina": affina.__version__},
            "num_layers": arguments.layers,
            "runs": [],
        }
        if arguments.only_checks:
            record |= json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        for name, preset in (("starter", "starter"), ("production", "production"), ("premium", "premium")):
            if arguments.only_checks:
                break
            record["runs"].append(run(name, preset, root / "model", arguments.data, root, **steps))
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        if arguments.without_checks:
            return
        record["num_layers_of_checks"] = arguments.layers
        record["resume"] = {
            engine: check_resume(root / "model", arguments.data, root, engine=engine)
            for engine in ("reference", "fast")
        }
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record["resume"]), flush=True)
        started = time.perf_counter()
        record["merge"] = affina.merge(root / "runs" / "whole-fast", root / "merged").to_dict()
        record["merge"]["seconds"] = time.perf_counter() - started
        for entry in record["runs"]:
            entry.pop("run", None)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
