"""The run directory: the only place where processes meet.

    runs/support-20261124/
      run.json        manifest: status, versions, device, command, fingerprints, results
      config.yaml     the resolved config, complete
      origins.json    where each value of the config came from
      metrics.jsonl   one line per logged step and per validation
      events.jsonl    what happened: checkpoints, skipped steps, notes, resumes
      data/           report.json, splits.json
      checkpoints/    step-00000100/ … (see checkpoints.py)
      adapter/        the result, in PEFT's own format
      evaluation/     result.json, samples.jsonl, report.html

Training writes; the command line, evaluation and later the studio read. A crashed run stays readable.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from affina.errors import RunError
from affina.runs import atomic
from affina.runs.checkpoints import list_checkpoints
from affina.runs.jsonlines import JsonLinesFile, read_json_lines
from affina.runs.units import format_bytes

Status = Literal["running", "finished", "failed", "interrupted", "damaged"]
"""damaged: run.json cannot be read; every other is what training left in it."""

MANIFEST_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run, and the reading and writing of its manifest."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def manifest_file(self) -> Path:
        return self.path / MANIFEST_FILE

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def origins_file(self) -> Path:
        return self.path / "origins.json"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as it was last written."""
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            if not isinstance(manifest, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            raise RunError(
                "run-unreadable",
                f"{self.manifest_file} cannot be read: {error}",
                fix="restore it, or name another run (`affina runs` lists them)",
            ) from error
        return manifest

    def update_manifest(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merge `changes` into the manifest and write it, all or nothing."""
        manifest = self.read_manifest() if self.manifest_file.exists() else {}
        manifest.update(changes)
        atomic.write_json(self.manifest_file, manifest)
        return manifest

    def status(self) -> Status:
        """The run's state; a run marked running whose process is gone counts as interrupted."""
        try:
            manifest = self.read_manifest()
        except RunError:
            return "damaged"
        status: Status = manifest.get("status", "failed")
        if status == "running" and not _is_process_alive(manifest.get("pid"), manifest.get("process_started")):
            return "interrupted"
        return status

    def metrics(self) -> Iterator[dict[str, Any]]:
        return read_json_lines(self.metrics_file)

    def events(self) -> Iterator[dict[str, Any]]:
        return read_json_lines(self.events_file)

    def log_event(self, kind: str, message: str, **facts: Any) -> None:
        """Append one event: a stable kind, a sentence for people, and facts for programs."""
        JsonLinesFile(self.events_file).append({"time": now(), "kind": kind, "message": message, **facts})


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def process_identity() -> dict[str, Any]:
    """What tells this process from another that later gets the same number."""
    return {"pid": os.getpid(), "process_started": psutil.Process().create_time()}


def _is_process_alive(pid: Any, started: Any) -> bool:
    if not isinstance(pid, int):
        return False
    try:
        return started is None or abs(psutil.Process(pid).create_time() - float(started)) < 2.0
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def default_name(stem: str) -> str:
    """`support-20261124-101502`: the config file's name and the local time."""
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def create_run(root: Path, name: str) -> RunDirectory:
    """A new, empty run directory.

    A run that failed or was stopped before its first step holds nothing but its error: its directory is used again, so
    that a corrected mistake does not cost the name.

    Raises RunError `run-exists` when the directory already holds something, `run-not-writable` when it cannot be
    made or written.
    """
    path = root / name
    run = RunDirectory(path)
    if run.manifest_file.is_file():
        if not ended_before_first_step(run):
            raise RunError(
                "run-exists",
                f"{path} already holds a run",
                why="affina never writes over a result",
                fix=f"{_way_on(run)}, or choose another output.name",
            )
        _clear_ended(run)
    if path.exists() and not (path.is_dir() and _is_hollow(run)):
        raise RunError(
            "run-exists",
            f"{path} already holds files that are not a run of affina's",
            why="affina never writes over a result",
            fix="choose another output.name or output.directory",
        )
    try:
        for folder in (path, path / "checkpoints", path / "data"):
            folder.mkdir(parents=True, exist_ok=True)
        probe = path / f"{atomic.TEMPORARY_PREFIX}probe"
        probe.write_bytes(b"affina")
        probe.unlink()
    except OSError as error:
        raise RunError(
            "run-not-writable",
            f"cannot write into {path}: {error.strerror or error}",
            fix="set output.directory to a folder that you may write to",
        ) from error
    return run


def starts_from_beginning(run: RunDirectory) -> bool:
    """Whether resuming the run means its step 0: there is neither a checkpoint nor a result."""
    return not list_checkpoints(run.checkpoints) and not run.adapter.exists()


def _way_on(run: RunDirectory) -> str:
    if run.status() != "running" and starts_from_beginning(run):
        return f"it has no checkpoint yet: `affina train --resume {run.path}` starts it from the beginning"
    return f"continue it with `affina train --resume {run.path}`"


def ended_before_first_step(run: RunDirectory) -> bool:
    """Whether the run has neither a logged step nor a checkpoint, an adapter or any file that is not affina's."""
    if run.status() not in ("failed", "interrupted"):
        return False
    own = {run.manifest_file, run.config_file, run.origins_file, run.events_file, run.data, run.checkpoints}
    return all(entry in own or _is_leftover(entry) for entry in run.path.iterdir()) and not any(
        run.checkpoints.glob("*")
    )


def _is_hollow(run: RunDirectory) -> bool:
    """Whether the folder holds nothing, or only what a process leaves that is killed while it makes a run."""
    return all(
        _is_leftover(entry) or (entry in (run.data, run.checkpoints) and entry.is_dir() and not any(entry.iterdir()))
        for entry in run.path.iterdir()
    )


def _is_leftover(entry: Path) -> bool:
    return entry.name.startswith(atomic.TEMPORARY_PREFIX)


def _clear_ended(run: RunDirectory) -> None:
    # The manifest goes last: until then a killed process leaves what is still known to be a failed run.
    atomic.remove_leftovers(run.path)
    shutil.rmtree(run.data, ignore_errors=True)
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    for file in (run.config_file, run.origins_file, run.events_file, run.manifest_file):
        with contextlib.suppress(OSError):  # create_run says what cannot be written
            file.unlink(missing_ok=True)


def open_run(path: Path) -> RunDirectory:
    """An existing run directory. Raises RunError `run-missing` with near names when there is none."""
    run = RunDirectory(path)
    if not run.manifest_file.is_file():
        siblings = [entry.name for entry in list_runs(path.parent)] if path.parent.is_dir() else []
        raise RunError(
            "run-missing",
            f"{path} is not a run directory",
            why=f"it has no {MANIFEST_FILE}",
            fix=f"runs in {path.parent}: {', '.join(siblings[-5:])}" if siblings else "`affina runs` lists the runs",
        )
    return run


def list_runs(root: Path) -> list[RunDirectory]:
    """The runs in a folder, oldest first; those whose manifest is damaged before all others."""
    if not root.is_dir():
        return []
    runs = [RunDirectory(entry) for entry in root.iterdir() if (entry / MANIFEST_FILE).is_file()]
    return sorted(runs, key=lambda run: (_created(run), run.name))


def _created(run: RunDirectory) -> str:
    try:
        return str(run.read_manifest().get("created", ""))
    except RunError:
        return ""


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Raise RunError `disk-full` when fewer than `num_bytes` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise RunError(
            "disk-full",
            f"{folder} has {format_bytes(free)} free; this run's checkpoints need {format_bytes(num_bytes)}",
            why="training would stop at a checkpoint",
            fix="free some space, point output.directory to another disk, or lower training.keep_last",
        )
