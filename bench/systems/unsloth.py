"""Unsloth through its own loader and adapter; a checkpoint with random weights is written once per architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_DISABLE_AUTO_UPDATES="1")

WRITE = """
import json, sys
from systems.common import random_model
spec, folder = json.loads(sys.argv[1]), sys.argv[2]
random_model(spec).save_pretrained(folder)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>"],
)
fast.chat_template = "{% for m in messages %}<|im_start|>{{m.role}}\\n{{m.content}}<|im_end|>\\n{% endfor %}"
fast.save_pretrained(folder)
"""


def measure(spec: dict[str, Any], setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    import json

    checkpoint = folder / f"checkpoint-{spec.get('model', 'qwen3-4b')}"
    if not (checkpoint / "config.json").exists():
        subprocess.run([sys.executable, "-c", WRITE, json.dumps(spec), str(checkpoint)], check=True)
    import torch
    from unsloth import FastLanguageModel  # before everything it patches

    from systems.common import TARGETS, time_steps

    model, _ = FastLanguageModel.from_pretrained(
        str(checkpoint),
        max_seq_length=spec["length"],
        dtype=torch.bfloat16,
        load_in_4bit=bool(spec.get("nf4")),
        load_in_16bit=not spec.get("nf4"),
        local_files_only=True,
    )
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
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, 128_000, (spec["rows"], spec["length"]), device="cuda")

    def step(index: int) -> tuple[int, float]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ids.numel(), float(loss)

    return time_steps(step)


if __name__ == "__main__":
    from systems.common import main

    main(measure)
