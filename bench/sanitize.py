"""compute-sanitizer over every Triton kernel (bench/kernel_cases.py).

    python bench/sanitize.py [--tools memcheck,racecheck,initcheck,synccheck] [--only attention,…] [--seconds 300]
                             [--output bench/results/sanitizer.json] [--tiny]

First the cases run by themselves: that compiles the kernels, and says whether their results are right. Then once under
each tool, every allocation of its own (PYTORCH_NO_CUDA_MEMORY_CACHING), since a read behind a tensor's end is no error
inside a larger block. A tool that takes too long is recorded as that. The record has each tool's own summary lines.

compute-sanitizer is part of the CUDA toolkit; it is looked for on the PATH, under CUDA_HOME, CUDA_PATH and
/usr/local/cuda*, and among the installed packages (`pip install nvidia-cuda-sanitizer-api`). Virtual machines may not
let it at the device: then it says so, and so does the record.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
ERROR_STATUS = 99
_SUMMARY = re.compile(r"=========.*(SUMMARY|hazard|Device not supported|Target application|Unable|Internal)")
_NUM_ERRORS = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
_KEPT_LINES = 60


def find_sanitizer() -> Path | None:
    """The tool's path, None where there is none."""
    if on_path := shutil.which("compute-sanitizer"):
        return Path(on_path)
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [root / folder / "compute-sanitizer" for root in roots for folder in ("bin", "compute-sanitizer")]
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places += sorted(packages.glob("**/compute-sanitizer"))
    return next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def run_cases(output: Path, arguments: argparse.Namespace, *, timeout: float) -> dict[str, Any]:
    """The cases by themselves."""
    status, printed = records.run(command_of(output, arguments), timeout=timeout)
    results = (records.read(output) or {"cases": []})["cases"]
    found: dict[str, Any] = {
        "num_cases": len(results),
        "num_right": sum(result["is_right"] for result in results),
        "wrong": [result for result in results if not result["is_right"]],
        "kernels": sorted({kernel for result in results for kernel in result["kernels"]}),
    }
    if status is None:
        found["error"] = f"not done within {timeout:.0f} s"
    elif not results:
        found["error"] = printed.strip()[-1500:]
    return found


def run_tool(
    sanitizer: Path, tool: str, output: Path, arguments: argparse.Namespace, *, timeout: float
) -> dict[str, Any]:
    """The cases under one tool; `is_clean` is None when the tool did not come to an end."""
    command = [
        str(sanitizer),
        "--tool",
        tool,
        "--print-limit",
        "20",
        "--error-exitcode",
        str(ERROR_STATUS),
        *command_of(output, arguments),
    ]
    started = time.perf_counter()
    status, printed = records.run(command, timeout=timeout, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return {"tool": tool, "seconds": round(time.perf_counter() - started, 1), **read_output(status, printed, output)}


def read_output(status: int | None, printed: str, output: Path) -> dict[str, Any]:
    """What a tool's exit status and output mean."""
    lines = [line for line in printed.splitlines() if line.startswith("=========")]
    summary = [line.removeprefix("=========").strip() for line in lines if _SUMMARY.search(line)]
    counts = [int(first or second) for first, second in _NUM_ERRORS.findall(printed)]
    results = (records.read(output) or {"cases": []})["cases"]
    found: dict[str, Any] = {
        "is_clean": None,
        "num_errors": sum(counts) if counts else None,
        "num_cases": len(results),
        "summary": list(dict.fromkeys(summary))[:20],
    }
    if status is None:
        found["why"] = "it took longer than it was given"
    elif any("not supported" in line for line in lines):
        found["why"] = "it has no access to this device (a virtual machine's limit)"
    elif not counts:
        found["why"] = f"it ended with {status} and without a summary: {printed.strip()[-600:]}"
    else:
        found["is_clean"] = sum(counts) == 0 and status != ERROR_STATUS
        if not found["is_clean"]:
            found["messages"] = lines[:_KEPT_LINES]
    return found


def command_of(output: Path, arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / "kernel_cases.py"), "--output", str(output)]
    command += ["--only", arguments.only] if arguments.only else []
    return command + (["--tiny"] if arguments.tiny else [])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--only", default="", help="groups of bench/kernel_cases.py, by comma")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything; a tool gets what is left")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "sanitizer.json")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes; also without a GPU")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.tools.split(",")) - set(TOOLS):
        raise SystemExit(f"unknown tools: {', '.join(sorted(unknown))}; there are {', '.join(TOOLS)}")
    deadline = records.Deadline(arguments.seconds)
    sanitizer = find_sanitizer()
    record: dict[str, Any] = {
        **records.environment(_device_name()),
        "sanitizer": str(sanitizer) if sanitizer else None,
        "tools": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        record["results"] = run_cases(Path(folder) / "plain.json", arguments, timeout=deadline.left)
        results = record["results"]
        print(f"{results['num_right']} of {results['num_cases']} cases right", results.get("error", ""), flush=True)
        records.write(arguments.output, record)
        if sanitizer is None:
            record["why_no_tools"] = "compute-sanitizer was not found; it is in the CUDA toolkit"
            print(f"no tool ran: {record['why_no_tools']} (or `pip install nvidia-cuda-sanitizer-api`)")
            records.write(arguments.output, record)
            return
        record["version"] = records.run([str(sanitizer), "--version"], timeout=30)[1].strip()[-200:]
        for tool in arguments.tools.split(","):
            if deadline.left < 10:
                record["tools"].append({"tool": tool, "is_clean": None, "why": "no time was left"})
            else:
                output = Path(folder) / f"{tool}.json"
                record["tools"].append(run_tool(sanitizer, tool, output, arguments, timeout=deadline.left))
            found = record["tools"][-1]
            print(f"{tool}: clean {found['is_clean']}; {found.get('why', found.get('summary'))}", flush=True)
            records.write(arguments.output, record)


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
