"""What every benchmark writes beside its figures, and how: whole files only, so a call cut short leaves a record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

POLL_SECONDS = 5.0
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "triton", "bitsandbytes", "liger-kernel", "unsloth", "affina")


def versions() -> dict[str, str]:
    """Of the packages that matter here, those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.__version__  # with the CUDA that it was built for
    return found


def environment(device_name: str) -> dict[str, Any]:
    return {"device": device_name, "versions": versions(), "date": today()}


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def now() -> str:
    """To the second: what names a call, so that only figures of one call are compared."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write(path: Path, record: Any) -> None:
    """`record` as JSON under `path`: the whole of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def read(path: Path) -> Any:
    """What `write` wrote, None where nothing is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


class Deadline:
    """`seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self._end - time.monotonic()


_running: set[int] = set()
"""Process groups that `run` has started and not yet seen end."""


def end_children_when_ended() -> None:
    """Whoever ends this process (a time limit around it) ends the groups it runs: one that trains on beside the next
    benchmark spoils its figures."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return

    def end(number: int, _: object) -> None:
        for group in list(_running):
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        os._exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def run(
    command: Sequence[str],
    *,
    timeout: float,
    environment: Mapping[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[int | None, str]:
    """(exit status, what it printed); the status is None when it took longer, and nothing of it runs any more.

    meanwhile: called every few seconds while it runs
    """
    deadline = Deadline(timeout)
    end_children_when_ended()
    with TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process.pid)
        status: int | None = None
        try:
            while status is None and deadline.left > 0:
                try:
                    status = process.wait(timeout=min(POLL_SECONDS, max(deadline.left, 0.0)))
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)  # compilers that it started hold memory of the device too
                process.wait()
            _running.discard(process.pid)
        output.seek(0)
        return status, output.read().decode(errors="replace")
