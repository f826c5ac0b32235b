"""Training one step: affina's fast engine and its peers, on one GPU, in one call.

    python bench/train_step.py [--groups targets,peers,more] [--cases bf16-lora-8x2048,nf4-qlora-8x2048:memory_gib=6.2]
                               [--systems affina,transformers,liger,unsloth]
                               [--seconds 500] [--output bench/results/train_step.json] [--list] [--tiny]

Every system trains LoRA on all seven linear layers of the same architecture with random weights (the same bytes and
operations as the released ones), AdamW, random tokens, the loss on every token. Peers run as transformers' Trainer runs
them: autocast, a gradient scaler in float16. Times are medians after warm-up; peak memory is the allocator's. Each
measurement is a process of its own. A measurement that fails is recorded with its reason. `--seconds` ends the list
early, so that a call with a limit still writes what it measured; what was measured before and is not measured now stays
in the file.

Cases: `bf16-lora-8x2048` is 8 full rows of 2,048 tokens; `bf16-packed-16384` packs documents of log-normal lengths
(median 300, σ 0.75, 16 to 2,048 tokens) into rows of 16,384, where tokens/s does not count padding. Unsloth has no
flash-attention wheel on this stack: its packed rows run on SDPA. `lowest` cases are `engine.memory: lowest`.

Settings: `memory_gib` is the budget that affina is told; `cap_gib` makes an allocation beyond it fail, for every
system; `checkpointing` recomputes activations (Unsloth: offloads them). `first_step_seconds` are those from the
process's start to the end of the first optimiser step, imports and compilation included, less the making (Unsloth:
reading) and quantising of weights. On fp8 weights no peer trains LoRA here.

`--tiny` runs every case on a toy shape, on a CPU in float32: that the scripts work, nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "bf16-lora-8x2048": {"rows": 8, "length": 2048},
    "nf4-qlora-8x2048": {"rows": 8, "length": 2048, "nf4": True},
    "fp8-lora-8x2048": {"rows": 8, "length": 2048, "fp8": True},
    "bf16-lora-1x2048": {"rows": 1, "length": 2048},
    "nf4-qlora-1x2048": {"rows": 1, "length": 2048, "nf4": True},
    "nf4-qlora-1x32768": {"rows": 1, "length": 32768, "nf4": True},
    "nf4-lowest-1x2048": {"rows": 1, "length": 2048, "nf4": True, "lowest": True},
    "nf4-lowest-1x32768": {"rows": 1, "length": 32768, "nf4": True, "lowest": True},
    "nf4-lowest-1x2048-qwen3-8b": {"rows": 1, "length": 2048, "nf4": True, "lowest": True, "model": "qwen3-8b"},
    "bf16-packed-16384": {"rows": 1, "length": 16384, "packed": True},
    "bf16-packed-2048": {"rows": 1, "length": 2048, "packed": True},
    "bf16-lora-8x2048-r64": {"rows": 8, "length": 2048, "rank": 64},
    "nf4-qlora-8x2048-r64": {"rows": 8, "length": 2048, "rank": 64, "nf4": True},
    "bf16-lora-16x2048": {"rows": 16, "length": 2048},
    "bf16-lora-32x2048": {"rows": 32, "length": 2048},
    "nf4-qlora-16x2048": {"rows": 16, "length": 2048, "nf4": True},
    "nf4-qlora-32x2048": {"rows": 32, "length": 2048, "nf4": True},
    "bf16-lora-8x2048-llama-3.1-8b": {"rows": 8, "length": 2048, "model": "llama-3.1-8b"},
    "nf4-qlora-4x2048-llama-3.1-8b": {"rows": 4, "length": 2048, "nf4": True, "model": "llama-3.1-8b"},
    "bf16-lora-8x2048-qwen3-8b": {"rows": 8, "length": 2048, "model": "qwen3-8b"},
    "nf4-qlora-4x2048-qwen3-8b": {"rows": 4, "length": 2048, "nf4": True, "model": "qwen3-8b"},
    "fp16-qlora-1x2048": {"rows": 1, "length": 2048, "nf4": True, "dtype": "float16"},
    "fp16-qlora-8x2048": {"rows": 8, "length": 2048, "nf4": True, "dtype": "float16"},
}
GROUPS = ("targets", "peers", "more")


@dataclass(frozen=True)
class Entry:
    """One measurement. group: targets (GOALS' table), peers (the same cases by others), more (all other cases)."""

    group: str
    case: str
    system: str
    setting: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.system, json.dumps(self.setting, sort_keys=True)

    @property
    def name(self) -> str:
        """`case:setting`, as `--cases` takes it."""
        return f"{self.case}:{setting_name(self.setting)}"


def setting_name(setting: dict[str, Any]) -> str:
    """`default`, or `memory_gib=11.2`; several by +."""
    return "+".join(f"{key}={json.dumps(value)}" for key, value in sorted(setting.items())) or "default"


def _peers(
    group: str, case: str, *, unsloth: Sequence[bool] = (True,), others: Sequence[str] = (), **setting: Any
) -> list[Entry]:
    """Unsloth with checkpointing on or off, and the others with it on; all at the same cap."""
    entries = [Entry(group, case, "unsloth", {"checkpointing": on, **setting}) for on in unsloth]
    return entries + [Entry(group, case, system, {"checkpointing": True, **setting}) for system in others]


BOTH = ("liger", "transformers")
PLAN: tuple[Entry, ...] = (
    Entry("targets", "bf16-lora-8x2048", "affina"),
    Entry("targets", "bf16-lora-8x2048", "affina", {"memory_gib": 11.2}),
    Entry("targets", "nf4-qlora-8x2048", "affina"),
    Entry("targets", "nf4-qlora-8x2048", "affina", {"memory_gib": 6.2}),
    Entry("targets", "bf16-lora-1x2048", "affina"),
    Entry("targets", "nf4-qlora-1x2048", "affina"),
    Entry("targets", "fp8-lora-8x2048", "affina"),
    Entry("targets", "bf16-packed-16384", "affina"),
    Entry("targets", "bf16-packed-2048", "affina"),
    Entry("targets", "nf4-lowest-1x2048", "affina"),
    Entry("targets", "nf4-qlora-1x32768", "affina", {"memory_gib": 9.4}),
    Entry("targets", "nf4-qlora-1x32768", "affina", {"memory_gib": 9.4, "deterministic": False}),
    *_peers("peers", "bf16-lora-8x2048", unsloth=(False, True), others=BOTH),
    Entry("peers", "bf16-lora-8x2048", "liger", {"checkpointing": False}),
    *_peers("peers", "nf4-qlora-8x2048", others=BOTH),
    *_peers("peers", "nf4-qlora-1x2048", unsloth=(True, False), others=BOTH),
    *_peers("peers", "bf16-lora-1x2048", unsloth=(False, True), others=BOTH),
    *_peers("peers", "bf16-packed-16384", unsloth=(False, True), others=BOTH),
    *_peers("peers", "bf16-packed-2048", unsloth=(False,), others=BOTH),
    *_peers("peers", "nf4-qlora-1x32768", others=("liger",)),
    Entry("more", "nf4-lowest-1x32768", "affina"),
    Entry("more", "nf4-lowest-1x2048-qwen3-8b", "affina"),
    Entry("more", "bf16-lora-8x2048-r64", "affina"),
    *_peers("more", "bf16-lora-8x2048-r64", unsloth=(False, True), others=BOTH),
    Entry("more", "nf4-qlora-8x2048-r64", "affina"),
    *_peers("more", "nf4-qlora-8x2048-r64"),
    Entry("more", "bf16-lora-16x2048", "affina"),
    *_peers("more", "bf16-lora-16x2048", unsloth=(False, True), others=("liger",)),
    Entry("more", "bf16-lora-32x2048", "affina"),
    *_peers("more", "bf16-lora-32x2048", others=("liger",)),
    Entry("more", "nf4-qlora-16x2048", "affina"),
    *_peers("more", "nf4-qlora-16x2048"),
    Entry("more", "nf4-qlora-32x2048", "affina"),
    *_peers("more", "nf4-qlora-32x2048"),
    Entry("more", "nf4-qlora-4x2048-llama-3.1-8b", "affina"),
    *_peers("more", "nf4-qlora-4x2048-llama-3.1-8b", others=BOTH),
    Entry("more", "nf4-qlora-4x2048-qwen3-8b", "affina"),
    *_peers("more", "nf4-qlora-4x2048-qwen3-8b", others=BOTH),
    Entry("more", "bf16-lora-8x2048-llama-3.1-8b", "affina"),
    *_peers("more", "bf16-lora-8x2048-llama-3.1-8b", unsloth=(False, True)),
    Entry("more", "bf16-lora-8x2048-qwen3-8b", "affina"),
    *_peers("more", "bf16-lora-8x2048-qwen3-8b", unsloth=(False, True)),
    Entry("more", "fp16-qlora-8x2048", "affina", {"cap_gib": 15}),
    Entry("more", "fp16-qlora-1x2048", "affina", {"cap_gib": 15}),
    Entry("more", "fp16-qlora-8x2048", "affina", {"cap_gib": 7.5}),
    Entry("more", "fp16-qlora-1x2048", "affina", {"cap_gib": 7.5}),
    *_peers("more", "fp16-qlora-8x2048", others=BOTH, cap_gib=15),
    *_peers("more", "fp16-qlora-1x2048", others=BOTH, cap_gib=15),
    *_peers("more", "fp16-qlora-8x2048", cap_gib=7.5),
    *_peers("more", "fp16-qlora-1x2048", others=BOTH, cap_gib=7.5),
)


def select(groups: str | None, cases: str | None, systems: str | None) -> list[Entry]:
    """The entries of PLAN that all three lists name; None names all.

    cases: `case` or `case:setting`, by comma. Raises SystemExit for a name that PLAN does not know.
    """
    wanted_groups, wanted_cases, wanted_systems = (
        set(names.split(",")) if names else None for names in (groups, cases, systems)
    )
    known_cases = {entry.case for entry in PLAN} | {entry.name for entry in PLAN}
    for names, known, what in (
        (wanted_groups, set(GROUPS), "group"),
        (wanted_cases, known_cases, "case"),
        (wanted_systems, {entry.system for entry in PLAN}, "system"),
    ):
        if unknown := (names or set()) - known:
            raise SystemExit(f"unknown {what} {', '.join(sorted(unknown))}; --list shows what there is")
    return [
        entry
        for entry in PLAN
        if (wanted_groups is None or entry.group in wanted_groups)
        and (wanted_cases is None or entry.case in wanted_cases or entry.name in wanted_cases)
        and (wanted_systems is None or entry.system in wanted_systems)
    ]


def tiny(spec: dict[str, Any]) -> dict[str, Any]:
    """The case on a toy shape that a CPU trains in a second."""
    return {**spec, "rows": min(spec["rows"], 2), "length": 128, "model": "tiny", "dtype": "float32"}


def measure(entry: Entry, folder: Path, timeout: float, *, is_tiny: bool = False) -> dict[str, Any]:
    """One measurement in its own process."""
    spec = tiny(CASES[entry.case]) if is_tiny else CASES[entry.case]
    request = {"case": entry.case, "spec": spec, "setting": entry.setting, "folder": str(folder)}
    record: dict[str, Any] = {"case": entry.case, "system": entry.system, "setting": entry.setting}
    output = folder / "result.json"
    output.unlink(missing_ok=True)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", f"systems.{entry.system}", json.dumps(request), str(output)]
    started = time.perf_counter()
    status, printed = records.run(command, timeout=timeout, environment=environment)
    if status is None:
        return {**record, "error": f"no result within {timeout:.0f} s", "was_cut_off": True}
    if status != 0 or not output.exists():
        return {**record, "error": printed.strip()[-1500:] or f"ended with {status}"}
    record.update(json.loads(output.read_text()))
    record["wall_seconds"] = round(time.perf_counter() - started, 1)
    return record


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per case, system and setting, in the order of PLAN: the newest.

    A measurement that only ran out of the call's time leaves an older figure standing.
    """
    by_key = {_key(record): record for record in old}
    for record in new:
        if not (record.get("was_cut_off") and _key(record) in by_key):
            by_key[_key(record)] = record
    order = {entry.key: index for index, entry in enumerate(PLAN)}
    return sorted(by_key.values(), key=lambda record: order.get(_key(record), len(order)))


def _key(record: dict[str, Any]) -> tuple[str, str, str]:
    return Entry("", record["case"], record["system"], record["setting"]).key


def table(found: Sequence[dict[str, Any]]) -> str:
    """What GOALS' table shows, one line per measurement."""
    lines = []
    for record in found:
        head = f"{record['case']:32} {record['system']:12} {setting_name(record['setting']):32}"
        if "error" in record:
            lines.append(f"{head} failed: {record['error'].splitlines()[-1][:150]}")
            continue
        lines.append(
            f"{head} {record['tokens_per_second']:>9,.0f} tokens/s {record['peak_gib']:>7.2f} GiB "
            f"{record['milliseconds']:>8.1f} ms  first step {record['first_step_seconds']:>5.1f} s  "
            f"loss {record['loss']:.3f}  {record.get('note', '')}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", help=f"only these of {', '.join(GROUPS)}, by comma")
    parser.add_argument("--cases", help="only these, by comma: `case` or `case:setting`")
    parser.add_argument("--systems", help="only these, by comma")
    parser.add_argument("--seconds", type=float, default=3600.0, help="start no measurement after this long")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "train_step.json")
    parser.add_argument("--list", action="store_true", help="print what would be measured, and stop")
    parser.add_argument("--tiny", action="store_true", help="toy shapes on a CPU, to try the scripts")
    arguments = parser.parse_args(argv)
    deadline = records.Deadline(arguments.seconds)
    plan = select(arguments.groups, arguments.cases, arguments.systems)
    if arguments.list:
        print("\n".join(f"{entry.group:8} {entry.system:12} {entry.name}" for entry in plan))
        return
    found = (records.read(arguments.output) or {"records": []})["records"]
    call = records.now()
    with tempfile.TemporaryDirectory() as folder:
        for entry in plan:
            if deadline.left < 15:
                print("out of time; the rest is not measured")
                break
            record = measure(entry, Path(folder), timeout=deadline.left, is_tiny=arguments.tiny)
            record |= {"date": records.today(), "call": call}
            found = merged(found, [record])
            print(table([record]), flush=True)
            records.write(arguments.output, {"records": found})


if __name__ == "__main__":
    main()
