"""What `affina train` does with `engine.memory: auto` in a process that may take only a part of its card.

    python bench/capped_memory.py [--caps 4,6,8,12,16,24] [--formats nf4,none] [--steps 6] [--jobs 6]
                                  [--total-gib 80] [--seconds 145] [--output bench/results/capped_memory.json] [--tiny]

Qwen3-4B's architecture with random weights, written once into a temporary folder; chats of log-normal length (median
300 tokens, at most 2,048) from a fixed seed; LoRA r = 16 on the base in NF4 and in 16 bits, micro-batches of 8 packed
rows of 2,048 tokens. Every cap is a process of its own: `torch.cuda.set_per_process_memory_fraction` before anything is
on the card, and then `affina.train` as a user calls it, from preparation and admission over loading, save policy and
steps to validation and checkpoint. Processes run side by side, so tokens/s say that it trains, not how fast.

A refusal is not believed but checked, by two more runs in the same process: one with the settings that the refusal
printed (`fix`; with those of `affina plan --fit` where it printed none), which must train, and one with the refusal
switched off (`forced`), which must run out of memory. The verdict of a cap is `trains`, `refuses correctly`,
`refuses wrongly` or `fails`.

`t4` is what the owner of a T4 gets: the plan of `affina plan --gpu t4`, and a run under the T4's own memory in which
affina is told that it is one and takes what it takes there: float16, the reference engine.

`--tiny`: a toy model on a CPU, where `engine.memory` stands in for the cap and nothing can be forced.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402
from systems.common import DEVICE, cap_memory, device_name, document_lengths, reset_peak  # noqa: E402

from affina.training.callbacks import BaseCallback, RunFacts, StepMetrics  # noqa: E402

GIB = 2**30
CAPS = (4, 6, 8, 12, 16, 24)
FORMATS = ("nf4", "none")
NUM_RECORDS = 400
OVERHEAD_TOKENS = 32
"""Of a record's two turns: role names, markers, line ends."""
START_SECONDS = 40.0
"""A process that is started later than this before the end would only be killed."""
TEXT = (
    "The order was sent on Monday and came back because nobody at this address could be found. Please write when we "
    "should try again or name a shop nearby where it can wait for you until Friday without any further cost."
)
READY = "ready"
_SETTINGS = re.compile(r"write (.+?): then it needs ")


@dataclass(frozen=True)
class Job:
    """One process. is_t4: affina is told that the card is a T4; cap_gib is then what a T4 has for tensors"""

    format: str
    cap_gib: float
    is_t4: bool = False

    @property
    def name(self) -> str:
        return f"{self.format}-{'t4' if self.is_t4 else f'{self.cap_gib:g}'}"


# One process: one cap
# --------------------------------------------------------------------------------------------------------------


class Watch(BaseCallback):
    """The losses, and the most that loading took."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.loading_bytes = 0

    def on_start(self, facts: RunFacts) -> None:
        self.loading_bytes = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)


def run_process(request: dict[str, Any], output: Path) -> None:
    """What a user does under the cap; after a refusal also what it proposes, and what it refuses."""
    import affina
    import affina.models.build
    import affina.training.run  # all that is slow, while the checkpoint is written

    job, config = Job(**request["job"]), request["config"]
    if DEVICE.type == "cuda":
        cap_memory({"cap_gib": job.cap_gib})
    if job.is_t4:
        be_a_t4()
    wait_for(Path(config["model"]) / READY)
    found: dict[str, Any] = {"plan": t4_plan(config)} if job.is_t4 else {}

    def run(kind: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
        as_there = ["training.precision=fp16", "engine.path=reference"] if job.is_t4 else []
        named = {**config, "output": {**config["output"], "name": f"{job.name}-{kind}"}}
        found[kind] = train(named, [*as_there, *overrides])
        records.write(output, found)
        print(f"{job.name}, {kind}: {found[kind]['outcome']}", flush=True)
        return found[kind]

    first = run("first")
    if first["outcome"] == "refused":
        settings = printed_settings(first["error"]["fix"])
        first["fix_from"] = "refusal" if settings else "affina plan --fit"
        first["proposed"] = settings = settings or fitting_settings(config, job.cap_gib)
        if settings:
            run("fix", settings)
        if DEVICE.type == "cuda":
            affina.api._admit = lambda *_: None
            run("forced")  # last, since it should end with the memory full
    records.write(output, {**found, "is_complete": True})


def train(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """One `affina.train`: how it ended, what was planned, what it took."""
    import affina
    from affina.errors import AffinaError

    is_gpu = DEVICE.type == "cuda"
    gc.collect()
    reset_peak()
    watch = Watch()
    record: dict[str, Any] = {"outcome": "trained"}
    if is_gpu:
        record["allocated_before_gib"] = gib(torch.cuda.memory_allocated())  # of an earlier run: none
    started = time.perf_counter()
    try:
        result = affina.train(config, overrides=overrides, callbacks=[watch])
        record["tokens_per_second"] = round(result.tokens_per_second, 1)
    except AffinaError as error:
        refused = error.code == "memory-too-small"
        record |= {"outcome": "refused" if refused else "failed", "error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 - a record is wanted of whatever happens
        what = f"{type(error).__name__}: {error}"[:800]
        record |= {"outcome": "failed", "error": {"code": "unexpected", "what": what, "fix": None}}
    record["seconds"] = round(time.perf_counter() - started, 1)
    record["steps"] = len(watch.losses)
    record["losses_are_finite"] = all(map(math.isfinite, watch.losses)) if watch.losses else None
    if is_gpu:
        record["loading_gib"] = gib(watch.loading_bytes)
        record["allocated_gib"] = gib(torch.cuda.max_memory_allocated())
        record["reserved_gib"] = gib(torch.cuda.max_memory_reserved())
    run = Path(config["output"]["directory"]) / config["output"]["name"]
    record |= {"plan": plan_in(run), "events": events_in(run)}
    record["retries"] = sum(event["kind"] == "out-of-memory-recovered" for event in record["events"])
    return record


def be_a_t4() -> None:
    """Let affina's admission find a T4. Kernels are compiled for the card that is there, so it is the run's settings
    that take float16 and the reference engine, which is what a T4 gets."""
    from affina.catalog.gpus import gpu_named
    from affina.models import device

    card, real = gpu_named("t4"), device.device_memory
    device.device_memory = lambda name="auto": replace(
        real(name), name="Tesla T4", capability=card.capability, total_bytes=card.memory_bytes
    )


def wait_for(file: Path) -> None:
    """Until the checkpoint is whole; the parent process ends this one when it never is."""
    while not file.exists():
        time.sleep(0.2)


def plan_in(run: Path) -> dict[str, Any] | None:
    """The run's own plan; what it takes from the card is its total without the CUDA context."""
    plan = (records.read(run / "run.json") or {}).get("plan")
    if plan is None:
        return None
    context = sum(part["num_bytes"] for part in plan["components"] if part["name"] == "CUDA context")
    return {
        "engine": plan["engine"],
        "keeps": plan["keeps"],
        "allocated_gib": gib(plan["allocated_bytes"]),
        "reserved_gib": gib(plan["total_bytes"] - context),
    }


def events_in(run: Path) -> list[dict[str, str]]:
    """What the run said: notes, recoveries, failures."""
    file = run / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines]
    told = ("note", "out-of-memory-recovered", "callback-failed", "failed")
    return [{"kind": event["kind"], "message": event["message"][:400]} for event in events if event["kind"] in told]


def gib(num_bytes: float) -> float:
    return round(num_bytes / GIB, 3)


# What they share
# --------------------------------------------------------------------------------------------------------------


def write_model(request: dict[str, Any]) -> None:
    """The checkpoint, and the file that says it is whole."""
    from systems.checkpoints import write_checkpoint

    write_checkpoint(request["spec"], request["model"])
    (Path(request["model"]) / READY).touch()


def write_chats(file: Path, *, longest: int) -> None:
    """Requests and replies of random words, a record's length in tokens drawn as `document_lengths` does."""
    generator = np.random.default_rng(0)
    lines = []
    for length in document_lengths(generator, NUM_RECORDS, longest=longest):
        text = " ".join(generator.choice(TEXT.split(), length))[: max(2, length - OVERHEAD_TOKENS)]
        cut = max(1, len(text) // 3)
        turns = (("user", text[:cut].strip() or "the"), ("assistant", text[cut:].strip() or "order"))
        lines.append(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(job: Job, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The run of a job, as its YAML would say."""
    return {
        "model": str(folder / "model"),
        "quantization": job.format,
        "adapter": {"method": "lora", "rank": 16, "alpha": 32},
        "data": {
            "train": str(folder / "chats.jsonl"),
            "max_length": 128 if arguments.tiny else 2048,
            "packing": True,
            "validation_fraction": 0.03,
        },
        "training": {"micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": arguments.steps},
        "evaluation": {"enabled": False},
        "engine": {"memory": job.cap_gib if arguments.tiny else "auto"},
        "output": {"directory": str(folder / "runs")},
    }


# A refusal, checked
# --------------------------------------------------------------------------------------------------------------


def printed_settings(fix: str | None) -> list[str]:
    """The settings that a refusal says to write, as overrides; none where it names a larger card only."""
    found = _SETTINGS.search(fix or "")
    pairs = (part.split(": ", 1) for part in found[1].split(", ")) if found else ()
    return [f"{path}={value}" for path, value in pairs]


def fitting_settings(config: dict[str, Any], cap_gib: float) -> list[str]:
    """What `affina plan --fit --may-quantize` proposes for a card that leaves tensors the cap; none: nothing fits."""
    import affina
    from affina.errors import AffinaError
    from affina.planning.coefficients import shipped_coefficients

    context = shipped_coefficients().context_bytes / GIB
    try:
        forecast = affina.plan(config, fit_gib=cap_gib + context, may_quantize=True)
    except AffinaError:
        return []
    return [f"{change.path}={change.value}" for change in forecast.fit.changes] if forecast.fit else []


def verdict_of(found: dict[str, Any]) -> str:
    """What a cap's runs show together; found: their records by kind."""
    first, fix, forced = (found.get(kind) for kind in ("first", "fix", "forced"))
    if first is None:
        return "not run" if found.get("timed_out") else "fails"
    if first["outcome"] == "trained":
        return "trains" if first["losses_are_finite"] else "fails"
    if first["outcome"] == "failed":
        return "fails"
    if not found.get("is_complete"):
        return "refuses, not checked"
    fix_is_right = has_trained(fix) if first["proposed"] else True
    return "refuses correctly" if fix_is_right and not has_trained(forced) else "refuses wrongly"


def has_trained(record: dict[str, Any] | None) -> bool:
    return record is not None and record["outcome"] == "trained"


# All of them
# --------------------------------------------------------------------------------------------------------------


def run_all(
    jobs: Sequence[Job],
    start: Callable[[Job], dict[str, Any]],
    finished: Callable[[Job, dict[str, Any]], None],
    *,
    num_at_once: int,
    total_gib: float,
) -> None:
    """Every job, side by side as far as their caps together stay below `total_gib`.

    start:    runs a job and returns what it found        finished: is told of it
    """
    waiting, running = list(jobs), dict[Future[dict[str, Any]], Job]()
    records.end_children_when_ended()
    with ThreadPoolExecutor(num_at_once) as pool:
        while waiting or running:
            for job in list(waiting):
                taken = sum(other.cap_gib for other in running.values())
                if not running or (len(running) < num_at_once and taken + job.cap_gib <= total_gib):
                    waiting.remove(job)
                    running[pool.submit(start, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                finished(running.pop(future), future.result())


def in_own_process(job: Job, folder: Path, arguments: argparse.Namespace, deadline: records.Deadline) -> dict[str, Any]:
    """A job's records by kind, whatever becomes of its process."""
    if deadline.left < START_SECONDS:
        return {"timed_out": True, "error": "no time was left to start it"}
    output = folder / f"{job.name}.json"
    request = {"job": asdict(job), "config": config_of(job, folder, arguments)}
    command = [sys.executable, str(HERE / "capped_memory.py"), "--request", json.dumps(request)]
    # What one run learns of this machine must not change the plan of the next.
    environment = {"AFFINA_CACHE": str(folder / "cache" / job.name), "HF_HUB_OFFLINE": "1"}
    status, printed = records.run([*command, "--output", str(output)], timeout=deadline.left, environment=environment)
    found: dict[str, Any] = records.read(output) or {}
    if status is None:
        found["timed_out"] = True
    if not found.get("is_complete"):
        found["error"] = printed.strip()[-800:]
    return found


def t4_plan(config: dict[str, Any]) -> dict[str, Any]:
    """What `affina plan --gpu t4` says of the run."""
    import affina

    card = affina.plan(config, gpus=["t4"]).plan.cards[0]
    return {
        "fits": card.fits,
        "changes": [f"{change.path}={change.value}" for change in card.changes],
        "engine": card.memory.engine,
        "keeps": card.memory.keeps,
        "allocated_gib": gib(card.memory.allocated_bytes),
        "total_gib": gib(card.memory.total_bytes),
    }


def t4_tensor_gib() -> float:
    """What a T4 has for tensors."""
    from affina.catalog.gpus import gpu_named
    from affina.planning.coefficients import shipped_coefficients

    return (gpu_named("t4").memory_bytes - shipped_coefficients().context_bytes) / GIB


def key_of(record: dict[str, Any]) -> tuple[int, float]:
    return FORMATS.index(record["format"]), record["cap_gib"]


def summary(found: Sequence[dict[str, Any]]) -> str:
    lines = []
    for record in sorted(found, key=key_of):
        shown = record.get("fix") or record.get("first") or {}
        plan = shown.get("plan") or {}
        figures = f"planned {plan.get('allocated_gib')}, allocated {shown.get('allocated_gib')} GiB" if plan else ""
        said = (shown.get("error") or {}).get("what", "") or " ".join(record.get("first", {}).get("proposed", []))
        lines.append(f"{record['format']:5} {record['cap_gib']:>5g} GiB  {record['verdict']:18} {figures}  {said[:90]}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caps", default=",".join(map(str, CAPS)), help="GiB, by comma")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(FORMATS)}, by comma")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=6, help="processes side by side")
    parser.add_argument("--total-gib", type=float, default=80.0, help="of all caps side by side")
    parser.add_argument("--seconds", type=float, default=145.0, help="for everything")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "capped_memory.json")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    parser.add_argument("--write-model", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.request:
        run_process(json.loads(arguments.request), arguments.output)
        return
    if arguments.write_model:
        write_model(json.loads(arguments.write_model))
        return
    if DEVICE.type != "cuda" and not arguments.tiny:
        raise SystemExit("there is no GPU; --tiny tries the script on a CPU")
    formats = arguments.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        raise SystemExit(f"unknown formats: {', '.join(sorted(unknown))}; there are {', '.join(FORMATS)}")
    try:
        caps = [float(cap) for cap in arguments.caps.split(",")]
    except ValueError:
        raise SystemExit(f"--caps are numbers by comma, not {arguments.caps!r}") from None
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), arguments, formats, caps)


def measure(folder: Path, arguments: argparse.Namespace, formats: Sequence[str], caps: Sequence[float]) -> None:
    """All caps in all formats and the T4, written to the output after each process."""
    deadline = records.Deadline(arguments.seconds)
    old = records.read(arguments.output) or {}
    write_chats(folder / "chats.jsonl", longest=128 if arguments.tiny else 2048)
    jobs = [Job(format, cap) for format in formats for cap in sorted(caps)]
    if "nf4" in formats and not arguments.tiny:
        jobs.append(Job("nf4", t4_tensor_gib(), is_t4=True))
    kept = [one for one in old.get("records", []) if Job(one["format"], one["cap_gib"]) not in jobs]
    new: list[dict[str, Any]] = []
    t4: dict[str, Any] = {}
    about = {
        **records.environment(device_name()),
        "jobs": arguments.jobs,
        "steps": arguments.steps,
        "model": "tiny" if arguments.tiny else "qwen3-4b",
    }

    def finished(job: Job, found: dict[str, Any]) -> None:
        if job.is_t4:
            t4.update(
                cap_gib=round(job.cap_gib, 2),
                run=found.get("first"),
                **{key: found[key] for key in ("plan", "error") if key in found},
            )
        else:
            new.append({"format": job.format, "cap_gib": job.cap_gib, "verdict": verdict_of(found), **found})
        whole = {**about, "records": sorted([*kept, *new], key=key_of), "t4": t4 or old.get("t4")}
        records.write(arguments.output, whole)
        print(f"{job.name}: {verdict_of(found)}, {deadline.left:.0f} s left", flush=True)

    model = {
        "spec": {
            "model": "tiny" if arguments.tiny else "qwen3-4b",
            "dtype": "float32" if arguments.tiny else "bfloat16",
        },
        "model": str(folder / "model"),
    }
    # Beside the first processes, which import for as long as it is written.
    writing = [sys.executable, str(HERE / "capped_memory.py"), "--write-model", json.dumps(model)]
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(records.run, writing, timeout=deadline.left)
        run_all(
            jobs,
            lambda job: in_own_process(job, folder, arguments, deadline),
            finished,
            num_at_once=arguments.jobs,
            total_gib=arguments.total_gib,
        )
        status, printed = written.result()
    if status != 0:
        raise SystemExit(f"the checkpoint could not be written: {printed.strip()[-800:]}")
    print(summary(new), flush=True)


if __name__ == "__main__":
    main()
