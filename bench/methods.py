"""Every adapter method on two tasks: what it learns, what it costs, and what the base forgets.

    python bench/methods.py --device cuda --jobs 14 --seconds 400 [--model affina/nano,FOLDER] [--variants lora,dora]
                            [--seeds 0,1,2] [--steps 200] [--results bench/results/methods.json]

A variant is a method with its registered settings, or one of four more: `lora-qv` (LoRA on the queries and values
alone), `lora-nf4` (QLoRA), `lora-int8`; `loftq` is on NF4, as it always is. All compute with the reference engine.

For each variant, task and model a sweep of the learning rate comes first: the registered rate and a third and three
times of it, with seed 100, on half of the steps, chosen by validation loss; where the best is at an edge, one and then
another rate beyond it. The registered rate is the preset `laptop`'s times the method's factor, times 256 over the
model's width: the preset's is for affina/nano. Then the seeds, at the best rate, on all steps. Tasks: `support`, the
quickstart's (replies about affina and requests filed as JSON, 124 held out), and `ledger`, made here from a fixed seed:
a sentence about a payment becomes a line of a ledger under rules that no model knows beforehand (800 to learn, 120 held
out). Forgetting is exact-match accuracy on the model's own skill test (skills.jsonl beside the weights; of affina/nano
224 items of its pre-training's skills), divided by the base's, which is measured once per model.

`--jobs`: so many processes share the work, of one thread each: a run on a small model waits for the host, not for the
device. A record's seconds are those of a shared machine and mean nothing. Time per token and peak memory are measured
afterwards, in `--speed-seconds` at the end, by one process alone: 15 steps on `support` for each variant, the median of
the last ten.

The file gets one record per method, task, model and seed, the sweeps, the bases and the errors; it is written after
each result, and a later call goes on where one stopped and tries again what failed. The variants that answer a claim
come first, each with its sweeps and all its seeds. What the figures say: bench/methods_report.py.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402
from method_runs import (  # noqa: E402
    CLAIM_VARIANTS,
    KEYS,
    TASKS,
    VARIANTS,
    Job,
    Record,
    Settings,
    config_of,
    model_name,
    work,
    write_ledger,
)
from workers import Outcome, share_work  # noqa: E402

RESULTS = records.RESULTS / "methods.json"
RATE_FACTORS = (1 / 3, 1.0, 3.0)
MAX_RATES = 5
HIGHEST_RATE = 0.9
NANO_WIDTH = 256
SWEEP_SEED = 100
SPEED_STEPS = 15


# The file, and what is still to do
# --------------------------------------------------------------------------------------------------------------


class Store:
    """The results file: what is there is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kinds = ("environments", *KEYS, "errors")
        self.content: dict[str, list[Record]] = {kind: [] for kind in kinds} | (records.read(path) or {})
        self.found = {kind: {_keys(kind, record): record for record in self.content[kind]} for kind in KEYS}

    def find(self, job: Job) -> Record | None:
        return self.found[job.kind].get(_keys(job.kind, job.keys()))

    def add(self, kind: str, record: Record) -> None:
        """Keeps it; the device, the versions and the day are written once for all records that share them."""
        environment = {key: record.pop(key) for key in ("device", "versions", "date") if key in record}
        if environment not in self.content["environments"]:
            self.content["environments"].append(environment)
        record["environment"] = self.content["environments"].index(environment)
        self.content[kind].append(record)
        if kind in KEYS:
            self.found[kind][_keys(kind, record)] = record
        records.write(self.path, self.content)


def _keys(kind: str, record: Record) -> tuple[Any, ...]:
    return tuple(record[name] for name in KEYS[kind])


def rates_wanted(registered: float, losses: Mapping[float, float]) -> list[float]:
    """The learning rates that a sweep still lacks. losses: of the rates that it has, infinite where a run failed"""
    first = [_rounded(registered * factor) for factor in RATE_FACTORS]
    if missing := [rate for rate in dict.fromkeys(first) if rate not in losses]:
        return missing
    if len(losses) >= MAX_RATES:
        return []
    best, rates = best_rate(losses), sorted(losses)
    if best is None or best == rates[0]:
        return [_rounded(rates[0] / 3)]
    beyond = _rounded(rates[-1] * 3)
    return [beyond] if best == rates[-1] and beyond not in losses else []


def best_rate(losses: Mapping[float, float]) -> float | None:
    """The rate with the lowest loss, None where none has a finite one."""
    rate = min(losses, key=lambda rate: losses[rate], default=None)
    return rate if rate is not None and math.isfinite(losses[rate]) else None


def _rounded(rate: float) -> float:
    return float(f"{min(rate, HIGHEST_RATE):.3g}")


class Plan:
    """Which piece of work comes next, and what became of those that ended."""

    def __init__(self, store: Store, arguments: argparse.Namespace) -> None:
        self.store, self.arguments = store, arguments
        self.failed: set[Job] = set()
        self.seconds: dict[Job, float] = {}
        first = [name for name in arguments.variants if name in CLAIM_VARIANTS]
        others = [name for name in arguments.variants if name not in CLAIM_VARIANTS]
        self.order = [(model, name) for names in (first, others) for model in arguments.models for name in names]
        self.registered = {pair: registered_rate(*pair) for pair in self.order}

    def choose(self, running: Sequence[Job], seconds_left: float) -> Job | None:
        return next((job for job in self.ready(running) if self.expected_seconds(job) < seconds_left), None)

    def ready(self, running: Sequence[Job]) -> Iterator[Job]:
        """What can be begun now, in the order in which it should be."""

        def is_open(job: Job) -> bool:
            return job not in self.failed and job not in running and self.store.find(job) is None

        yield from (job for model in self.arguments.models if is_open(job := Job("base", model)))
        steps = self.arguments.steps
        for model, variant in self.order:
            for task in self.arguments.tasks:
                is_swept = any(_is_sweep(job, model, variant, task) for job in running)
                losses = self.losses(model, variant, task)
                wanted = rates_wanted(self.registered[model, variant], losses)
                sweep = (Job("sweep", model, variant, task, rate, SWEEP_SEED, sweep_steps(steps)) for rate in wanted)
                yield from (job for job in sweep if is_open(job))
                rate = best_rate(losses)
                if wanted or is_swept or rate is None:
                    continue
                runs = (Job("records", model, variant, task, rate, seed, steps) for seed in self.arguments.seeds)
                yield from (job for job in runs if is_open(job))

    def losses(self, model: str, variant: str, task: str) -> dict[float, float]:
        """Validation loss by learning rate, as far as the sweep has come."""
        keys = (model_name(model), variant, task, sweep_steps(self.arguments.steps))
        failed = {job.rate: math.inf for job in self.failed if _is_sweep(job, model, variant, task)}
        found = {
            rate: _finite(record["best_validation_loss"])
            for (*others, rate), record in self.store.found["sweep"].items()
            if tuple(others) == keys
        }
        return failed | found

    def speed(self) -> Iterator[Job]:
        """A measurement of each variant that has been trained, at a rate that it was trained with."""
        rates = {(r["model"], r["variant"]): r["learning_rate"] for r in self.store.content["records"]}
        for model, variant in self.order:
            if (rate := rates.get((model_name(model), variant))) is not None:
                yield Job("speed", model, variant, TASKS[0], rate, 0, SPEED_STEPS)

    def expected_seconds(self, job: Job) -> float:
        """A tenth more than the longest of its variant, else than the median of its kind and model; 0 for the first."""
        alike = [done for done in self.seconds if (done.kind, done.model) == (job.kind, job.model)]
        own = [self.seconds[done] for done in alike if done.variant == job.variant]
        if own:
            return 1.1 * max(own)
        return 1.1 * median(self.seconds[done] for done in alike) if alike else 0.0

    def finish(self, job: Job, outcome: Outcome) -> None:
        self.seconds[job] = outcome.seconds
        if outcome.error is not None:
            self.failed.add(job)
            failure = {**vars(job), **job.keys(), "error": outcome.error, "date": records.today()}
            self.store.add("errors", failure)
            print(f"{job}: {outcome.error.strip().splitlines()[0][:300]}", flush=True)
            return
        self.store.add(job.kind, outcome.value)
        print(f"{job}: {described(outcome.value)} in {outcome.seconds:.1f} s", flush=True)


class SpeedPlan:
    """The same store and clock, another list."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.jobs = plan, list(plan.speed())

    def choose(self, running: Sequence[Job], seconds_left: float) -> Job | None:
        return next((job for job in self.jobs if self.is_open(job, seconds_left)), None)

    def is_open(self, job: Job, seconds_left: float) -> bool:
        is_done = job in self.plan.failed or self.plan.store.find(job) is not None
        return not is_done and self.plan.expected_seconds(job) < seconds_left

    def finish(self, job: Job, outcome: Outcome) -> None:
        self.plan.finish(job, outcome)


def _is_sweep(job: Job, model: str, variant: str, task: str) -> bool:
    return (job.kind, job.model, job.variant, job.task) == ("sweep", model, variant, task)


def described(record: Record) -> str:
    if "microseconds_per_token" in record:
        return f"{record['microseconds_per_token']:.1f} µs a token, {record['peak_memory_bytes'] / 2**30:.3f} GiB"
    known = f"skills {record['num_skills_right']}/{record['num_skills']}" if "num_skills" in record else "no skill test"
    if "tasks" in record:
        accuracies = [f"{name} {figures['accuracy']:.1%}" for name, figures in record["tasks"].items()]
        return ", ".join([*accuracies, known])
    if "accuracy" in record:
        return f"{record['accuracy']:.1%} right, {known}"
    return f"validation loss {_finite(record['best_validation_loss']):.4f}"


def _finite(loss: float | None) -> float:
    return loss if loss is not None and math.isfinite(loss) else math.inf


def sweep_steps(steps: int) -> int:
    return max(2, steps // 2)


def registered_rate(model: str, variant: str) -> float:
    """The preset's rate times the method's factor, for the model's width."""
    import affina
    from affina.catalog.model_files import find_config

    settings = Settings(device="cpu", folder="")
    chosen = affina.check(config_of("affina/nano", "support", VARIANTS[variant], settings)).config
    return chosen.training.learning_rate * NANO_WIDTH / find_config(model)[0]["hidden_size"]


# The whole
# --------------------------------------------------------------------------------------------------------------


def measure(store: Store, arguments: argparse.Namespace) -> None:
    """The shared work, then the measurements of one process alone."""
    deadline = records.Deadline(arguments.seconds)
    shared = records.Deadline(arguments.seconds - arguments.speed_seconds)
    store.content["errors"] = []  # what failed is tried again
    plan = Plan(store, arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder))
        settings = Settings(arguments.device, folder, arguments.max_generations, arguments.every_skill_item)
        do = partial(work, settings=settings)
        share_work(plan, do, num_workers=arguments.jobs, deadline=shared)
        left = sum(1 for _ in plan.ready(()))
        print(f"{left} pieces of work are ready and left; call again to go on" if left else "all done", flush=True)
        share_work(SpeedPlan(plan), do, num_workers=1, deadline=deadline)


def parse(command: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", dest="models", type=_names, default=["affina/nano"], help="names or folders")
    parser.add_argument("--variants", type=_names, default=list(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--tasks", type=_names, default=list(TASKS))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing that would end later")
    parser.add_argument("--speed-seconds", type=float, default=60.0, help="of these, kept for times and memory")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--max-generations", type=int, default=124)
    parser.add_argument("--every-skill-item", type=int, default=1, help="2: every second item of the skill test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true", help="measure nothing; print the tables of what is there")
    arguments = parser.parse_args(command)
    for given, known in ((arguments.variants, VARIANTS), (arguments.tasks, TASKS)):
        if unknown := [name for name in given if name not in known]:
            raise SystemExit(f"no such variant or task: {', '.join(unknown)}; there are {', '.join(known)}")
    return arguments


def _names(text: str) -> list[str]:
    return text.split(",")


def main(command: Sequence[str] | None = None) -> None:
    from methods_report import claims_table, draw, methods_table

    arguments = parse(command)
    store = Store(arguments.results)
    began = time.monotonic()
    if not arguments.summary:
        measure(store, arguments)
        print(f"{time.monotonic() - began:.0f} s", flush=True)
    draw(store.content, arguments.results.parent)
    print(methods_table(store.content), claims_table(store.content), sep="\n")


if __name__ == "__main__":
    main()
