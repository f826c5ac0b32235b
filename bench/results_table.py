"""The tables of RESULTS.md, and of a guide that shows some of them, from the raw files in results/.

    python bench/results_table.py [--write] [--results bench/results] [--page bench/RESULTS.md]

A table stands between `<!-- table: NAME -->` and `<!-- end: NAME -->`; what is around it is written by hand. Without
`--write` the pages are compared with what the raw files give, and the status is 1 when one
differs. A test does the same.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import methods_report  # noqa: E402
import plan_report  # noqa: E402
import records  # noqa: E402
from tables import markdown  # noqa: E402

PAGES = (HERE / "RESULTS.md", HERE.parent / "docs" / "guides" / "choosing-a-method.md")
Record = dict[str, Any]
_MARKED = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end: \2 -->)", re.DOTALL)

TARGETS: dict[tuple[str, str], int] = {
    ("bf16-lora-8x2048", "default"): 31_000,
    ("bf16-lora-8x2048", "memory_gib 11.2"): 21_000,
    ("nf4-qlora-8x2048", "default"): 30_000,
    ("nf4-qlora-8x2048", "memory_gib 6.2"): 21_000,
    ("bf16-lora-1x2048", "default"): 29_000,
    ("nf4-qlora-1x2048", "default"): 26_000,
    ("nf4-qlora-1x32768", "memory_gib 9.4"): 10_500,
    ("bf16-packed-16384", "default"): 31_000,
    ("bf16-packed-2048", "default"): 27_000,
    ("fp8-lora-8x2048", "default"): 42_000,
}
"""Tokens per second that affina wants to reach, by case and setting."""
FLOORS: dict[str, dict[str, float]] = {
    "bf16-lora-8x2048": {"base products": 350, "attention": 84, "head product": 40},
}
"""Milliseconds that the card's own ceilings leave, by case and part."""


# Pieces
# --------------------------------------------------------------------------------------------------------------


def missing(command: str) -> str:
    return f"Not measured yet: `{command}`.\n"


def provenance(found: Sequence[Record]) -> str:
    """Where figures come from: devices, versions and days of the records that say so."""
    devices = sorted({record["device"] for record in found if "device" in record})
    days = sorted({record["date"] for record in found if "date" in record})
    packages = []
    for name in records.PACKAGES:
        seen = sorted({record["versions"][name] for record in found if name in record.get("versions", {})})
        packages += [f"{name} {' and '.join(seen)}"] if seen else []
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "no date"
    return "; ".join(part for part in (", ".join(devices), ", ".join(packages), span) if part) + ".\n"


def thousands(value: float) -> str:
    return f"{value:,.0f}"


def short_error(text: str) -> str:
    """Its last line, fit for a cell."""
    last = text.strip().splitlines()[-1] if text.strip() else "no reason"
    return last.replace("|", "/")[:90]


def setting_of(record: Record) -> str:
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in sorted(record["setting"].items())) or "default"


def yes(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "**no**"


# Tables
# --------------------------------------------------------------------------------------------------------------


def train_step(results: Path) -> str:
    file = records.read(results / "train_step.json")
    if file is None:
        return missing("python bench/train_step.py")
    rows = []
    for record in file["records"]:
        setting = setting_of(record)
        target = TARGETS.get((record["case"], setting)) if record["system"] == "affina" else None
        names = [record["case"], record["system"], setting]
        if "error" in record:
            rows.append(
                [
                    *names,
                    f"failed: {short_error(record['error'])}",
                    "",
                    "",
                    "",
                    "",
                    thousands(target or 0) if target else "",
                ]
            )
            continue
        first = record.get("first_step_seconds")
        rows.append(
            [
                *names,
                thousands(record["tokens_per_second"]),
                f"{record['peak_gib']:.2f}",
                f"{record['milliseconds']:.1f}",
                "" if first is None else f"{first:.1f}",
                record.get("note", "").partition(";")[0].removesuffix(" for the backward pass"),
                thousands(target) if target else "",
            ]
        )
    head = ["case", "system", "setting", "tokens/s", "peak GiB", "ms", "first step, s", "layers keep", "target"]
    return markdown(head, rows) + "\n" + provenance(file["records"])


def ratios(results: Path) -> str:
    """affina beside the fastest peer, and beside the leanest, of the same call."""
    file = records.read(results / "train_step.json") or {"records": []}
    measured = [record for record in file["records"] if "error" not in record and "call" in record]
    rows = []
    for case, call in dict.fromkeys((record["case"], record["call"]) for record in measured):
        same = [record for record in measured if (record["case"], record["call"]) == (case, call)]
        ours = [record for record in same if record["system"] == "affina"]
        peers = [record for record in same if record["system"] != "affina"]
        for record in ours if peers else []:
            fastest = max(peers, key=lambda peer: peer["tokens_per_second"])
            leanest = min(peers, key=lambda peer: peer["peak_gib"])
            rows.append(
                [
                    case,
                    setting_of(record),
                    f"{record['tokens_per_second'] / fastest['tokens_per_second']:.2f}× {described(fastest)}",
                    f"{record['peak_gib'] / leanest['peak_gib']:.2f}× {described(leanest)}",
                ]
            )
    if not rows:
        return "No call measured affina and a peer on the same case yet.\n"
    return markdown(
        ["case", "affina's setting", "tokens/s against the fastest peer", "memory against the leanest"], rows
    )


def described(record: Record) -> str:
    figures = f"{thousands(record['tokens_per_second'])}, {record['peak_gib']:.2f} GiB"
    return f"{record['system']} ({setting_of(record)}: {figures})"


def step_profile(results: Path) -> str:
    file = records.read(results / "step_profile.json")
    if file is None:
        return missing("python bench/step_profile.py")
    parts, floors = file["milliseconds_by_part"], FLOORS.get(file["case"], {})
    busy = sum(parts.values())
    if busy > 1.02 * file["milliseconds_eager"]:
        return f"The raw file attributes {busy:.0f} ms of kernels to a step of {file['milliseconds_eager']:.0f} ms.\n"
    rows = [
        [title, f"{value:.1f}", f"{value / busy:.1%}", f"{floors[title]:.0f}" if title in floors else ""]
        for title, value in sorted(parts.items(), key=lambda item: -item[1])
    ]
    rows.append(["all kernels", f"{busy:.1f}", "100%", f"{sum(floors.values()):.0f}" if floors else ""])
    idle = file["milliseconds_graphed"] - busy
    rows.append(["idle (of the step as trained)", f"{max(idle, 0):.1f}", "", ""])
    head = [f"part of {file['case']}", "ms", "share", "floor, ms"]
    return markdown(head, rows) + "\n" + provenance([file])


def parity(results: Path) -> str:
    """Worst layout of each family and format: reference → fast, each against the reference in float32."""
    file = records.read(results / "parity.json")
    if file is None:
        return missing("python bench/parity.py")
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in file["records"]:
        groups.setdefault((record["family"], record["format"]), []).append(record)
    rows = []
    for (family, weights), found in groups.items():
        cells = []
        for dtype in ("bfloat16", "float16"):
            some = [record for record in found if record["dtype"] == dtype]
            reference, fast = (
                max((record[f"gradient_error_{engine}"] for record in some), default=0.0)
                for engine in ("reference", "fast")
            )
            cells.append(f"{reference:.1e} → {fast:.1e}" if some else "")
        exact = [record["gradient_error_fast"] for record in found if record["dtype"] == "float32"]
        cells.append(f"{max(exact):.1e}" if exact else "")
        repeated = sum(record["is_repeatable"] for record in found)
        rows.append([family, weights, *cells, f"{repeated} of {len(found)}"])
    head = ["family", "weights", "bf16: reference → fast", "fp16: reference → fast", "float32: fast against reference"]
    where = {"device": file["device"], "date": file["date"], "versions": {"torch": file["torch"]}}
    return markdown([*head, "same bits twice"], rows) + "\n" + provenance([where])


def loss_curves(results: Path) -> str:
    file = records.read(results / "loss_curves.json")
    if file is None:
        return missing("python bench/loss_curves.py --data FOLDER")
    rows = []
    for name, verdict in file["verdicts"].items():
        test = verdict.get("test", {})
        if "mean" not in test:
            seeds = verdict.get("num_seeds", test.get("num_pairs", 0))
            rows.append([name, str(seeds), f"{verdict['loss']:.4f}", "", "", "", "", ""])
            continue
        low, high = test["interval_90"]
        rows.append(
            [
                name,
                str(test["num_pairs"]),
                f"{verdict['loss']:.4f}",
                f"{test['mean']:+.5f}",
                f"{low:+.5f} … {high:+.5f}",
                f"±{test['margin']:.5f}",
                yes(test["is_equivalent"]),
                f"{verdict['share_of_steps_within_spread']:.0%}",
            ]
        )
    head = [
        "variant",
        "seeds",
        "loss, last steps",
        "difference",
        "90% interval",
        "margin",
        "equivalent",
        "steps within spread",
    ]
    shape = file.get("model", {})
    model = f"Qwen3 of {shape.get('num_hidden_layers')} layers of width {shape.get('hidden_size')}: {file.get('base')}"
    return (
        markdown(head, rows)
        + "\n![loss curves](results/loss_curves.svg)\n\n"
        + f"{model}; {file.get('adapter')}; learning rate {file.get('learning_rate')}. "
        + provenance([file])
    )


def long_context(results: Path) -> str:
    file = records.read(results / "long_context.json")
    if file is None:
        return missing("python bench/long_context.py")
    rows = []
    for record in file["records"]:
        unsloth = record.get("unsloth_tokens")
        beside = thousands(unsloth) if unsloth else ""
        if "tokens" not in record:
            rows.append(
                [
                    record["shape"],
                    record["mode"],
                    f"{record['cap_gib']}",
                    f"failed: {short_error(record['error'])}",
                    *[""] * 5,
                    beside,
                ]
            )
            continue
        whole = record["measured_layers"] == record["num_layers"]
        rows.append(
            [
                record["shape"],
                record["mode"],
                f"{record['cap_gib']}",
                f"{'≥ ' if record.get('bounded_by') == 'time' else ''}{thousands(record['tokens'])}",
                f"{record['peak_gib']:.2f}",
                f"{record['reserved_gib']:.2f}",
                f"{record['seconds']:.1f}",
                "whole model" if whole else f"{record['measured_layers']} of {record['num_layers']} layers",
                f"{record['host_gib']:.0f}",
                beside,
            ]
        )
    head = [
        "shape",
        "mode",
        "cap, GiB",
        "tokens",
        "peak GiB",
        "reserved GiB",
        "step, s",
        "measured on",
        "host GiB",
        "Unsloth, Llama-3.1-8B",
    ]
    return markdown(head, rows) + "\n" + provenance([file])


def capped_memory(results: Path) -> str:
    """What became of each cap; of a refusal, the run with the settings that it proposed."""
    file = records.read(results / "capped_memory.json")
    if file is None:
        return missing("python bench/capped_memory.py")
    rows = []
    for record in file["records"]:
        first = record.get("first") or {}
        shown = record.get("fix") or first
        verdict = record["verdict"] if record["verdict"] in _EXPECTED else f"**{record['verdict']}**"
        name = "16 bits" if record["format"] == "none" else record["format"]
        proposed = ", ".join(f"`{setting}`" for setting in first.get("proposed") or ())
        if not shown.get("plan"):
            proposed = proposed or short_error((first.get("error") or {}).get("what") or record.get("error") or "")
        rows.append([name, f"{record['cap_gib']:g}", verdict, proposed, *_planned_and_measured(shown)])
    head = ["base", "cap, GiB", "auto", "proposed, and measured", *_MEASURED]
    text = markdown(head, rows)
    if (t4 := file.get("t4")) and "plan" in t4 and t4.get("run"):
        plan, run = t4["plan"], t4["run"]
        changes = f" with {', '.join(plan['changes'])}" if plan["changes"] else ""
        fits = f"fits{changes}" if plan["fits"] or plan["changes"] else "does not fit"
        row = [
            fits,
            f"{plan['allocated_gib']:.2f}",
            run["outcome"],
            f"{t4['cap_gib']:.2f}",
            *_planned_and_measured(run),
        ]
        head = ["`affina plan --gpu t4`", "its allocated GiB", "the run", "cap, GiB", *_MEASURED]
        text += "\nWhat a T4 owner gets:\n\n" + markdown(head, [row])
    return text + "\n" + provenance([file])


_EXPECTED = ("trains", "refuses correctly")
_MEASURED = (
    "engine",
    "planned, allocated GiB",
    "allocated GiB",
    "planned, reserved GiB",
    "reserved GiB",
    "tokens/s",
    "repeated leaner",
    "layers keep",
)


def _planned_and_measured(run: Record) -> list[str]:
    plan = run.get("plan")
    if not plan:
        return [""] * len(_MEASURED)
    figures = (plan["allocated_gib"], run.get("allocated_gib"), plan["reserved_gib"], run.get("reserved_gib"))
    cells = ["" if value is None else f"{value:.2f}" for value in figures]
    speed = thousands(run["tokens_per_second"]) if "tokens_per_second" in run else run["outcome"]
    return [plan["engine"], *cells, speed, str(run["retries"]), plan["keeps"]]


def leak(results: Path) -> str:
    file = records.read(results / "leak.json")
    if file is None:
        return missing("python bench/leak.py")
    rows = []
    for phase in file["phases"]:
        if "error" in phase:
            rows.append([phase["phase"], f"failed: {short_error(phase['error'])}", *[""] * 6])
            continue
        rows.append(
            [
                phase["phase"],
                thousands(phase["num_steps"]),
                thousands(phase.get("allocated_bytes_growth", 0)),
                thousands(phase.get("reserved_bytes_growth", 0)),
                f"{round(phase.get('resident_bytes_per_step', 0)):,}",
                yes(phase["is_leak_free"]),
                yes(phase["is_repeatable"]),
                phase["engine"],
            ]
        )
    head = ["phase", "steps", "tensors, bytes grown", "allocator, bytes grown", "process, bytes per step", "no leak"]
    return markdown([*head, "same bits twice", "engine"], rows) + "\n" + provenance([file])


def sanitizer(results: Path) -> str:
    file = records.read(results / "sanitizer.json")
    if file is None:
        return missing("python bench/sanitize.py")
    plain = file["results"]
    counts = f"{plain['num_right']} of {plain['num_cases']} cases of {len(plain['kernels'])} kernels"
    text = f"{counts} give the reference's results.\n"
    if not file["tools"]:
        return text + f"No tool ran: {file.get('why_no_tools', 'the call ended before')}.\n\n" + provenance([file])
    rows = [
        [
            tool["tool"],
            yes(tool["is_clean"]),
            str(tool.get("num_cases", "")),
            tool.get("why") or "; ".join(tool["summary"][:3]),
        ]
        for tool in file["tools"]
    ]
    return text + "\n" + markdown(["tool", "clean", "cases", "what it said"], rows) + "\n" + provenance([file])


def plan_accuracy(results: Path) -> str:
    file = records.read(results / "plan_accuracy.json")
    if file is None:
        return missing("python bench/plan_accuracy.py")
    found = file["records"]
    where = [{"device": file["device"], "versions": file["versions"], "date": record["date"]} for record in found]
    figure = "\n![planned against measured](results/plan_accuracy.svg)\n\n"
    return plan_report.summary(file) + figure + plan_report.table(found) + "\n" + provenance(where)


def methods(results: Path) -> str:
    """What each variant reached and cost, and the figures."""
    file = records.read(results / "methods.json")
    if file is None or not file["records"]:
        return missing("python bench/methods.py")
    figures = {
        "methods_parameters.svg": "accuracy against trained parameters",
        "methods_skills.svg": "accuracy against the base's skills kept",
    }
    images = [f"![{title}](results/{name})\n" for name, title in figures.items() if (results / name).exists()]
    return "\n".join([methods_report.methods_table(file), *images, provenance(file["environments"])])


def method_claims(results: Path) -> str:
    file = records.read(results / "methods.json")
    if file is None or not file["records"]:
        return missing("python bench/methods.py")
    return methods_report.claims_table(file)


TABLES: dict[str, Callable[[Path], str]] = {
    "train-step": train_step,
    "ratios": ratios,
    "step-profile": step_profile,
    "parity": parity,
    "loss-curves": loss_curves,
    "long-context": long_context,
    "capped-memory": capped_memory,
    "plan-accuracy": plan_accuracy,
    "leak": leak,
    "sanitizer": sanitizer,
    "methods": methods,
    "method-claims": method_claims,
}


def rendered(page: str, results: Path, *, folder: str = "results") -> str:
    """The page with every table made anew. Raises SystemExit for a name that is not in TABLES.

    folder: where the page finds the figures
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; there are {', '.join(TABLES)}")
        content = TABLES[name](results).replace("](results/", f"]({folder}/")
        return f"{match[1]}\n{content}\n{match[4]}"

    return _MARKED.sub(table, page)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    parser.add_argument("--page", type=Path, action="append", help="instead of all pages that have tables")
    arguments = parser.parse_args(argv)
    is_same = True
    for path in arguments.page or PAGES:
        before = path.read_text(encoding="utf-8")
        after = rendered(before, arguments.results, folder=figures_folder(path, arguments.results))
        if arguments.write:
            path.write_text(after, encoding="utf-8")
        elif before != after:
            is_same = False
            old, new = before.splitlines(True), after.splitlines(True)
            print("".join(difflib.unified_diff(old, new, str(path), "the raw files")))
    if not is_same:
        sys.exit(1)


def figures_folder(page: Path, results: Path) -> str:
    """`results` as the page's links say it."""
    return Path(os.path.relpath(results.resolve(), page.resolve().parent)).as_posix()


if __name__ == "__main__":
    main()
