"""The quickstart job: affina against transformers' Trainer + PEFT, same data, same steps, same machine, one run.

    python bench/laptop.py [--repeats 3]

Both sides fine-tune the built-in model on the built-in data with NF4 QLoRA on the CPU, in processes of their own, one
after the other and alternating. Every optimiser step of the Trainer sees the samples of the same step of affina, in
the same micro-batches; the learning rate, the adapter's initial values and the clipping are the same. The Trainer does
what it does by default: it pads a micro-batch to its longest sample and computes the logits of every token. Its 4-bit
layers are bitsandbytes'. tokens/s counts tokens of samples, not padding, over the time of training alone.

Writes bench/results/laptop.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "laptop.json"
OVERRIDES = ("evaluation.enabled=false", "data.validation=[]", "data.validation_fraction=0.0")


def run_affina(directory: Path) -> dict[str, Any]:
    """The job through affina's API."""
    import affina

    result = affina.train(
        preset="laptop", overrides=[*OVERRIDES, f"output.directory={directory}", "output.name=affina"]
    )
    losses = [
        json.loads(line)["loss"]
        for line in (result.run / "metrics.jsonl").read_text().splitlines()
        if "grad_norm" in line
    ]
    return {"seconds": result.seconds, "num_tokens": result.num_tokens, "steps": result.steps, "losses": losses}


def run_trainer(directory: Path) -> dict[str, Any]:
    """The same job through transformers' Trainer and PEFT on bitsandbytes' 4-bit layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    import affina
    from affina.catalog.embedded import embedded_model_path
    from affina.training.build import build_schedule
    from affina.training.run import build_plan

    config = affina.check(preset="laptop", overrides=OVERRIDES).config
    data = affina.prepare(preset="laptop", overrides=OVERRIDES)
    plan = build_plan(config, data.train)
    micro_batches = [row for step in range(plan.num_steps) for row in plan.step(step)]

    class SameRows:
        """The rows of each epoch in affina's order; the Trainer iterates once per epoch."""

        epoch = 0

        def __len__(self) -> int:
            return plan.micro_batches_per_epoch

        def __iter__(self) -> Iterator[list[int]]:
            first = self.epoch * plan.steps_per_epoch
            self.epoch += 1
            for step in range(first, first + plan.steps_per_epoch):
                yield from plan.step(step)

    path = str(embedded_model_path("affina/nano"))
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(config.training.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=config.adapter.rank,
            lora_alpha=int(config.adapter.alpha),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    schedule = build_schedule(config.training, num_steps=plan.num_steps)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.training.learning_rate,
        betas=(config.training.adam_beta1, config.training.adam_beta2),
        eps=config.training.adam_epsilon,
        weight_decay=config.training.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step) / config.training.learning_rate
    )
    pad = data.template.tokenizer.pad_id

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(sample) for sample in samples)
        rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
        for sample in samples:
            fill = width - len(sample)
            rows["input_ids"].append(sample.input_ids.tolist() + [pad] * fill)
            rows["labels"].append(sample.labels.tolist() + [-100] * fill)
            rows["attention_mask"].append([1] * len(sample) + [0] * fill)
        return {name: torch.tensor(values) for name, values in rows.items()}

    class SameBatches(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(data.train, batch_sampler=SameRows(), collate_fn=collate)

    arguments = TrainingArguments(
        output_dir=str(directory / "trainer"),
        num_train_epochs=config.training.epochs,
        gradient_accumulation_steps=len(plan.step(0)),
        max_grad_norm=config.training.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=config.training.seed,
    )
    trainer = SameBatches(model=model, args=arguments, train_dataset=data.train, optimizers=(optimizer, scheduler))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    num_tokens = int(sum(int(data.train.lengths[row].sum()) for row in micro_batches))
    return {"seconds": seconds, "num_tokens": num_tokens, "steps": plan.num_steps, "losses": losses}


SYSTEMS = {"affina": run_affina, "trainer": run_trainer}


def in_own_process(system: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(
            [sys.executable, __file__, "--only", system, "--output", str(output), "--directory", folder],
            check=True,
            env=environment,
            stdout=sys.stderr,
        )
        result: dict[str, Any] = json.loads(output.read_text())
    result["tokens_per_second"] = result["num_tokens"] / result["seconds"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=SYSTEMS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--directory", type=Path)
    arguments = parser.parse_args()
    if arguments.only:
        arguments.output.write_text(json.dumps(SYSTEMS[arguments.only](arguments.directory)))
        return

    measured: dict[str, list[dict[str, Any]]] = {system: [] for system in SYSTEMS}
    for _ in range(arguments.repeats):
        for system, results in measured.items():
            results.append(in_own_process(system))
            print(f"{system}: {results[-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr)
    medians = {
        system: statistics.median(result["tokens_per_second"] for result in results)
        for system, results in measured.items()
    }
    losses = {system: results[0]["losses"] for system, results in measured.items()}
    difference = max(abs(a - b) for a, b in zip(losses["affina"], losses["trainer"], strict=True))
    import peft
    import torch
    import transformers

    record = {
        "ratio_tokens_per_second": medians["affina"] / medians["trainer"],
        "affina": medians["affina"],
        "trainer": medians["trainer"],
        "final_loss": {system: values[-1] for system, values in losses.items()},
        "largest_loss_difference": difference,
        "steps": measured["affina"][0]["steps"],
        "runs": {
            system: [{key: result[key] for key in ("seconds", "num_tokens", "tokens_per_second")} for result in results]
            for system, results in measured.items()
        },
        "losses": losses,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": "python bench/laptop.py --repeats " + str(arguments.repeats),
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(f"affina {medians['affina']:,.0f} tokens/s, Trainer {medians['trainer']:,.0f} tokens/s: ", end="")
    print(
        f"{record['ratio_tokens_per_second']:.2f}x; "
        f"final loss {losses['affina'][-1]:.4f} and {losses['trainer'][-1]:.4f}"
    )


if __name__ == "__main__":
    main()
