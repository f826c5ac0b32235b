"""Every adapter method on two tasks: what it learns, what it costs, and what the base forgets.

    python bench/methods.py --seconds 3000 [--methods lora,dora] [--seeds 0,1,2] [--model affina/nano] [--device cuda]

For each method and task a small sweep of the learning rate comes first: the method's registered rate and a third and
three times of it, with seed 100, on half of the steps, chosen by validation loss. Then the seeds, at that rate, on all
steps. Tasks: `support`, the quickstart's (replies about affina and requests filed as JSON, 124 held out), and `ledger`,
made here from a fixed seed: a sentence about a payment becomes a line of a ledger under rules that no model knows
beforehand (800 to learn, 120 held out). Forgetting is exact-match accuracy on the model's own skill test (of
affina/nano: 224 items of its pre-training's skills, skills.jsonl), before and after; other models have none.

It has not been run to the end on any machine yet: there is no bench/results/methods.json, and affina claims nothing
about which method learns most. The file gets one record per method, task, model and seed, and the sweep; it is written
after each run, and a later call goes on where it stopped. Accuracies carry Wilson intervals over records (95%);
`bench/methods.py --summary` prints means over seeds with the intervals of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "methods.json"
RATE_FACTORS = (1 / 3, 1.0, 3.0)
SWEEP_SEED = 100
TASKS = ("support", "ledger")
# Two-sided 95% points of Student's t with n − 1 degrees of freedom.
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
Record = dict[str, Any]


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
    records = {record["messages"][0]["content"]: record for record in ledger(7, 3000)}
    chosen = list(records.values())[:920]
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (chosen[:800], chosen[800:]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    return paths


def config_of(task: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = {"max_length": 512}
    if task == "support":
        data |= {"train": "affina/support", "validation": [{"path": "affina/support", "split": "validation"}]}
    else:
        train, validation = write_ledger(folder)
        data |= {"train": str(train), "validation": str(validation)}
    return {
        "extends": "laptop",
        "model": arguments.model,
        "quantization": "none",
        "data": data,
        "training": {"device": arguments.device},
        "evaluation": {"max_new_tokens": 96, "max_generations": arguments.max_generations},
    }


def run(
    method: str, task: str, *, rate: float | None, seed: int, steps: int, evaluate: bool, arguments: argparse.Namespace
) -> Record:
    """One training run, and what was measured of it."""
    import torch

    import affina
    from affina.catalog.methods import METHODS
    from affina.evaluation.stats import wilson_interval

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = config_of(task, arguments, folder)
        config["adapter"] = {"method": method}
        config["training"] |= {"max_steps": steps, "seed": seed, "evaluate_every_steps": max(1, steps // 5)}
        config["training"] |= {"learning_rate": rate} if rate is not None else {}
        config["evaluation"]["enabled"] = evaluate
        config["output"] = {"directory": temporary, "name": "run"}
        if "nf4" in METHODS[method].trains_on and "dense" not in METHODS[method].trains_on:
            config["quantization"] = "nf4"
        used = affina.check(config).config.training.learning_rate
        result = affina.train(config)
        record: Record = {
            "method": method,
            "task": task,
            "model": arguments.model,
            "seed": seed,
            "steps": result.steps,
            "learning_rate": used,
            "quantization": config["quantization"],
            "num_trainable": result.num_trainable,
            "share": result.num_trainable / result.num_parameters,
            "peak_memory_bytes": result.peak_memory_bytes,
            "microseconds_per_token": 1e6 * result.seconds / result.num_tokens,
            "best_validation_loss": result.best_validation_loss,
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "date": datetime.now(UTC).date().isoformat(),
        }
        if evaluate and result.evaluation is not None:
            tuned, count = result.evaluation.to_dict()["tuned"], result.evaluation.to_dict()["num_replies"]
            interval = wilson_interval(tuned["num_right"], count)
            record |= {"num_right": tuned["num_right"], "num_replies": count, "accuracy": tuned["accuracy"]}
            record["accuracy_interval"] = [interval.low, interval.high]
            record["skills"] = skills_kept(result.run, arguments)
        return record


def skills_kept(run_directory: Path, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Exact matches on the base's own skill test, with the adapter off and on; None where there is no such test."""
    from affina import api
    from affina.catalog.model_files import resolve_model_folder
    from affina.data.build import tokenizer_from_config
    from affina.evaluation.build import decoder
    from affina.models.adapters import adapter_disabled
    from affina.models.build import load_for_inference
    from affina.models.generate import generate
    from affina.runs.directory import open_run

    path = resolve_model_folder(arguments.model) / "skills.jsonl"
    if not path.is_file():
        return None
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()][:: arguments.every_skill_item]
    directory = open_run(run_directory)
    config = api._run_config(directory).config
    loaded = load_for_inference(config, directory.adapter)
    tokenizer = tokenizer_from_config(config.model)
    decode = decoder(tokenizer)
    prompts = [
        tokenizer.hf.apply_chat_template(
            item["messages"], tools=item.get("tools"), add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for item in items
    ]

    def num_right() -> int:
        replies = generate(loaded.model, prompts, max_new_tokens=64, stop_ids=tokenizer.end_of_turn_ids, batch_size=32)
        finals = [decode(reply).rsplit("</think>", 1)[-1].strip() for reply in replies]
        return sum(final == item["reply"] for final, item in zip(finals, items, strict=True))

    tuned = num_right()
    with adapter_disabled(loaded.model):
        base = num_right()
    return {"num_items": len(items), "base": base, "tuned": tuned}


class Store:
    """The results file: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, list[Record]] = {"sweep": [], "records": []}
        if path.is_file():
            self.content = json.loads(path.read_text(encoding="utf-8"))

    def find(self, kind: str, **keys: Any) -> Record | None:
        return next((r for r in self.content[kind] if all(r[key] == value for key, value in keys.items())), None)

    def add(self, kind: str, record: Record) -> None:
        self.content[kind].append(record)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def tuned_rate(method: str, task: str, store: Store, arguments: argparse.Namespace, is_over: Any) -> float | None:
    """The best rate of the sweep, None when the time is up before it is known."""
    import affina

    steps = max(2, arguments.steps // 2)
    registered = affina.check({"extends": "laptop", "quantization": "none" if method != "loftq" else "nf4",
                               "adapter": {"method": method}}).config.training.learning_rate  # fmt: skip
    found: list[Record] = []
    for factor in RATE_FACTORS:
        rate = float(f"{min(registered * factor, 0.9):.3g}")
        keys = {"method": method, "task": task, "model": arguments.model, "learning_rate": rate, "steps": steps}
        record = store.find("sweep", **keys)
        if record is None:
            if is_over():
                return None
            record = run(method, task, rate=rate, seed=SWEEP_SEED, steps=steps, evaluate=False, arguments=arguments)
            store.add("sweep", record)
            print(f"{method} {task} rate {rate:g}: validation loss {record['best_validation_loss']:.4f}", flush=True)
        found.append(record)
    best = min(found, key=lambda record: record["best_validation_loss"] or math.inf)
    return float(best["learning_rate"])


def measure(store: Store, arguments: argparse.Namespace) -> None:
    """Seeds in the outer loop, so that a run that is cut short has every method before it has any twice."""
    started = time.monotonic()

    def is_over() -> bool:
        return time.monotonic() - started > arguments.seconds

    for seed in arguments.seeds:
        for task in arguments.tasks:
            for method in arguments.methods:
                keys = {
                    "method": method,
                    "task": task,
                    "model": arguments.model,
                    "seed": seed,
                    "steps": arguments.steps,
                }
                if store.find("records", **keys) is not None:
                    continue
                rate = tuned_rate(method, task, store, arguments, is_over)
                if rate is None or is_over():
                    print("the time is up; call again to go on", flush=True)
                    return
                record = run(
                    method, task, rate=rate, seed=seed, steps=arguments.steps, evaluate=True, arguments=arguments
                )
                store.add("records", record)
                print(f"{method} {task} seed {seed}: {record['accuracy']:.1%}, skills {record['skills']}", flush=True)


def summary(store: Store) -> None:
    """Means over seeds, and half the width of their 95% intervals, as Markdown."""
    print("| method | task | trained | share | accuracy | skills kept | µs a token | peak GiB | rate | seeds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in store.content["records"]:
        groups.setdefault((record["method"], record["task"], record["model"]), []).append(record)
    for (method, task, _), records in groups.items():
        first = records[0]
        kept = [r["skills"]["tuned"] / r["skills"]["base"] for r in records if r["skills"] and r["skills"]["base"]]
        cells = (
            f"`{method}`", task, f"{first['num_trainable']:,}", f"{first['share']:.3%}",
            _mean([r["accuracy"] for r in records]), _mean(kept) if kept else "–",
            f"{statistics.mean(r['microseconds_per_token'] for r in records):.0f}",
            f"{max(r['peak_memory_bytes'] for r in records) / 2**30:.2f}", f"{first['learning_rate']:g}",
            str(len(records)),
        )  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def _mean(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) not in STUDENT_T:
        return f"{mean:.1%}"
    half = STUDENT_T[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1%} ± {half:.1%}"


def main() -> None:
    from affina.catalog.methods import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="affina/nano")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after this long")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--max-generations", type=int, default=124)
    parser.add_argument("--every-skill-item", type=int, default=1, help="2: every second item of the skill test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="print the table of what is there")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        sys.exit(f"no such method: {', '.join(unknown)}")
    store = Store(arguments.results)
    if not arguments.summary:
        measure(store, arguments)
    summary(store)


if __name__ == "__main__":
    main()
