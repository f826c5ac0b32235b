"""One run of bench/methods.py: the variants, the tasks, and what is measured of each, in a process of its own."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import records

from affina.catalog.methods import METHODS

SPEED_STEPS_COUNTED = 10
REPLIES_AT_ONCE = 128
SKILL_TOKENS = 96
TASKS = ("support", "ledger")
Record = dict[str, Any]
KEYS = {
    "base": ("model",),
    "sweep": ("model", "variant", "task", "steps", "learning_rate"),
    "records": ("model", "variant", "task", "steps", "seed"),
    "speed": ("model", "variant"),
}
"""What a record is found by: the rate of a seed's run follows from the sweep."""


# What is measured
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A method, how it is set, and on what base."""

    method: str
    adapter: Mapping[str, Any] = field(default_factory=dict)
    quantization: str = "none"


VARIANTS: dict[str, Variant] = {
    "lora": Variant("lora"),
    "full": Variant("full"),
    "lora-qv": Variant("lora", {"targets": ["q_proj", "v_proj"]}),
    "lora-nf4": Variant("lora", quantization="nf4"),
    "ia3": Variant("ia3"),
    "lora-int8": Variant("lora", quantization="int8"),
    **{
        name: Variant(name, quantization="none" if "dense" in METHODS[name].trains_on else "nf4")
        for name in (
            *("rslora", "dora", "loraplus", "pissa", "freeze", "prefix", "prompt", "ptuning", "houlsby", "pfeiffer"),
            *("loha", "lokr", "adalora", "vera", "oft", "boft", "miss", "layernorm", "olora", "eva", "loftq"),
        )
    },
}
"""In the order in which they are measured."""
CLAIM_VARIANTS = ("lora", "full", "lora-qv", "lora-nf4", "ia3", "lora-int8")
"""Those that answer a claim: measured on every model before any other is."""


@dataclass(frozen=True)
class Job:
    """One piece of work. rate, seed, steps: 0 where the kind has none (base) or they are fixed (speed)"""

    kind: Literal["base", "sweep", "records", "speed"]
    model: str
    variant: str = ""
    task: str = ""
    rate: float = 0.0
    seed: int = 0
    steps: int = 0

    def keys(self) -> Record:
        """What its record is found by."""
        values = {**vars(self), "model": model_name(self.model), "learning_rate": self.rate}
        return {name: values[name] for name in KEYS[self.kind]}

    def __str__(self) -> str:
        parts = [self.kind, model_name(self.model), self.variant, self.task]
        parts += [f"rate {self.rate:g}"] if self.kind == "sweep" else []
        parts += [f"seed {self.seed}"] if self.kind == "records" else []
        return " ".join(part for part in parts if part)


def model_name(model: str) -> str:
    """What a model is called in the file: a folder by its last part, wherever it lies."""
    return Path(model).name if Path(model).is_dir() else model


def ledger(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Payments in words, and their lines: NAME|cents with a check digit|month as a letter."""
    rng = random.Random(seed)
    names = ("Anna", "Bruno", "Carla", "Dario", "Elena", "Fabio", "Greta", "Hugo", "Ines", "Jonas")
    things = ("coffee", "a bike", "two chairs", "the rent", "a ticket", "books", "a lamp", "bread")
    months = ("January", "February", "March", "April", "May", "June", "July", "August", "September")
    for _ in range(count):
        name, thing, month = rng.choice(names), rng.choice(things), rng.choice(months)
        amount = rng.randrange(1, 100)
        prompt = f"{name} paid {amount} euros for {thing} in {month}."
        reply = f"{name.upper()}|{amount}00-{(amount // 10 + amount) % 10}|{chr(ord('A') + months.index(month))}"
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]}


def write_ledger(folder: Path) -> tuple[Path, Path]:
    """Training and validation files; no prompt is in both."""
    records_by_prompt = {record["messages"][0]["content"]: record for record in ledger(7, 3000)}
    chosen = list(records_by_prompt.values())[:920]
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (chosen[:800], chosen[800:]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    return paths


@dataclass(frozen=True)
class Settings:
    """What all work has in common. folder: where the ledger lies, for the length of a call"""

    device: str
    folder: str
    max_generations: int = 124
    every_skill_item: int = 1


def config_of(model: str, task: str, variant: Variant, settings: Settings) -> dict[str, Any]:
    data: dict[str, Any] = {"max_length": 512}
    if task == "support":
        data |= {"train": "affina/support", "validation": [{"path": "affina/support", "split": "validation"}]}
    else:
        data |= {name: str(Path(settings.folder) / f"{name}.jsonl") for name in ("train", "validation")}
    return {
        "extends": "laptop",
        "model": model,
        "quantization": variant.quantization,
        "adapter": {"method": variant.method, **variant.adapter},
        "data": data,
        "training": {"device": settings.device},
        # One and the same forward pass for all: the fast engine has three of the methods, and compiles first.
        "engine": {"path": "reference"},
        "evaluation": {"enabled": False, "max_new_tokens": 96, "max_generations": settings.max_generations},
    }


# Measuring, in a process of its own
# --------------------------------------------------------------------------------------------------------------


def work(job: Job, settings: Settings) -> Record:
    """The record of one piece of work."""
    if job.kind == "base":
        return job.keys() | measure_base(job, settings) | environment(settings)
    with tempfile.TemporaryDirectory() as temporary:
        config = config_of(job.model, job.task or TASKS[0], VARIANTS[job.variant], settings)
        config["output"] = {"directory": temporary, "name": "run"}
        # As many epochs as the steps need: the smaller task has fewer in the preset's.
        training = {"epochs": 100, "max_steps": job.steps, "seed": job.seed, "learning_rate": job.rate}
        # A checkpoint at the end is enough: its loss is what counts, and the weights are those of the last step.
        config["training"] |= training | {"evaluate_every_steps": job.steps}
        if job.kind == "speed":
            config["data"] |= {"validation": [], "validation_fraction": 0.0}
        return job.keys() | train_and_measure(job, config, settings) | environment(settings)


def environment(settings: Settings) -> Record:
    import torch

    return records.environment(torch.cuda.get_device_name() if settings.device == "cuda" else "cpu")


def train_and_measure(job: Job, config: dict[str, Any], settings: Settings) -> Record:
    import affina
    from affina.models.build import load_for_inference
    from affina.training.callbacks import BaseCallback, StepMetrics

    seconds_per_token: list[float] = []

    class Clock(BaseCallback):
        def on_step(self, metrics: StepMetrics) -> None:
            seconds_per_token.append(1 / metrics.tokens_per_second)

    resolved = affina.check(config)
    result = affina.train(resolved, callbacks=[Clock()])
    record: Record = {
        "method": VARIANTS[job.variant].method,
        "quantization": config["quantization"],
        "seed": job.seed,
        "num_steps": result.steps,
        "learning_rate": job.rate,
        "num_trainable": result.num_trainable,
        "num_parameters": result.num_parameters,
        "best_validation_loss": result.best_validation_loss,
    }
    if job.kind == "speed":
        record["microseconds_per_token"] = 1e6 * median(seconds_per_token[-SPEED_STEPS_COUNTED:])
        record["peak_memory_bytes"] = result.peak_memory_bytes
    if job.kind == "records":
        assert result.adapter is not None
        loaded = load_for_inference(resolved.config, result.adapter)
        right, count = task_replies(resolved.config, loaded)
        record |= {"num_right": right, "num_replies": count, "accuracy": right / count}
        record |= skills(resolved.config, loaded.model, job.model, settings)
    return record


def measure_base(job: Job, settings: Settings) -> Record:
    """The model as it is, on its own skills and on both tasks."""
    import affina
    from affina.models.adapters import adapter_disabled
    from affina.models.build import load_for_training

    configs = {task: affina.check(config_of(job.model, task, Variant("lora"), settings)).config for task in TASKS}
    loaded = load_for_training(configs[TASKS[0]])
    record: Record = {"tasks": {}}
    with adapter_disabled(loaded.model):
        for task, config in configs.items():
            right, count = task_replies(config, loaded)
            record["tasks"][task] = {"num_right": right, "num_replies": count, "accuracy": right / count}
        return record | skills(configs[TASKS[0]], loaded.model, job.model, settings)


def task_replies(config: Any, loaded: Any) -> tuple[int, int]:
    """(replies that are right, replies) on the validation records."""
    from affina.data.build import tokenizer_from_config
    from affina.data.run_data import open_run_data
    from affina.evaluation.build import choose_tasks, contestant, context_tokens
    from affina.evaluation.tasks.exact_match import run_tasks

    tokenizer = tokenizer_from_config(config.model)
    tasks, _ = choose_tasks(
        open_run_data(config, tokenizer), config.evaluation, context_tokens=context_tokens(loaded.model)
    )
    model = contestant(loaded, tokenizer, config.evaluation, use_adapter=True)
    assert model.generate is not None
    outcomes = run_tasks(tasks, model.generate, batch_size=REPLIES_AT_ONCE)
    return sum(outcome.is_right for outcome in outcomes), len(outcomes)


def skills(config: Any, model: Any, name: str, settings: Settings) -> Record:
    """Exact matches on the base's own skill test; nothing where there is no such test."""
    from affina.catalog.model_files import resolve_model_folder
    from affina.data.build import tokenizer_from_config
    from affina.evaluation.build import decoder
    from affina.models.generate import generate

    path = resolve_model_folder(name) / "skills.jsonl"
    if not path.is_file():
        return {}
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:: settings.every_skill_item]
    tokenizer = tokenizer_from_config(config.model)
    decode = decoder(tokenizer)
    prompts = [
        tokenizer.hf.apply_chat_template(
            item["messages"], tools=item.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for item in items
    ]
    replies = generate(
        model,
        prompts,
        max_new_tokens=SKILL_TOKENS,
        stop_ids=tokenizer.end_of_turn_ids,
        batch_size=REPLIES_AT_ONCE,
    )
    finals = [decode(reply).rsplit("</think>", 1)[-1].strip() for reply in replies]
    right = sum(final == item["reply"] for final, item in zip(finals, items, strict=True))
    return {"num_skills": len(items), "num_skills_right": right}
