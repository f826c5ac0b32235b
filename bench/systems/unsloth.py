"""Unsloth through its own loader and adapter; a checkpoint with random weights is written once per architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from systems.common import TARGETS, Clock, cap_memory, dtype_of, main, time_steps

os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_DISABLE_AUTO_UPDATES="1")

WRITE = """
import json, sys
from systems.checkpoints import write_checkpoint
write_checkpoint(json.loads(sys.argv[1]), sys.argv[2])
"""


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path, clock: Clock) -> dict[str, Any]:
    checkpoint = folder / f"checkpoint-{spec.get('model', 'qwen3-4b')}"
    if not (checkpoint / "config.json").exists():
        with clock.paused():
            subprocess.run([sys.executable, "-c", WRITE, json.dumps(spec), str(checkpoint)], check=True)
    from unsloth import FastLanguageModel  # before everything it patches

    from systems.peers import batches_of, document_lengths_of, trainer_step

    with clock.paused():
        model, _ = FastLanguageModel.from_pretrained(
            str(checkpoint),
            max_seq_length=spec["length"],
            dtype=dtype_of(spec),
            load_in_4bit=bool(spec.get("nf4")),
            load_in_16bit=not spec.get("nf4"),
            local_files_only=True,
        )
    cap_memory(setting)
    model = FastLanguageModel.get_peft_model(
        model,
        r=spec.get("rank", 16),
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        random_state=42,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if setting.get("checkpointing") else False,
    )
    FastLanguageModel.for_training(model)
    batches = batches_of(spec)
    if spec.get("packed"):
        for batch in batches:
            batch.arguments["packed_seq_lengths"] = document_lengths_of(batch)
    return time_steps(trainer_step(model, batches, spec), clock=clock)


if __name__ == "__main__":
    main(measure)
