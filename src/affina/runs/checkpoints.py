"""Which checkpoints a run has, which are whole, and which to delete. Knows files, not tensors.

checkpoints/step-00000100/
  adapter_model.safetensors, adapter_config.json, affina.json   the adapter, loadable by PEFT
  optimizer.pt                                                  optimiser state
  trainer_state.json                                            step, counters, loss scale, best loss
  checksums.json                                                sha256 of all of the above
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from affina.errors import RunError
from affina.runs import atomic
from affina.runs.checksums import find_damage, write_checksums

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    step: int


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in a run's `checkpoints/` folder, by step. Unfinished ones have other names and do not count."""
    if not folder.is_dir():
        return []
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    return sorted((Checkpoint(path, int(match[1])) for path, match in found if match), key=lambda entry: entry.step)


@contextmanager
def new_checkpoint(folder: Path, step: int) -> Iterator[Path]:
    """A temporary folder to fill; sealed with checksums and renamed to `step-…` when the block ends well."""
    with atomic.new_directory(folder / f"step-{step:08d}") as temporary:
        yield temporary
        write_checksums(temporary)


def require_whole(checkpoint: Checkpoint) -> None:
    """Raise RunError `checkpoint-damaged`, naming the newest whole checkpoint, when the checksums do not match."""
    damage = find_damage(checkpoint.path)
    if damage is None:
        return
    older = [
        entry
        for entry in list_checkpoints(checkpoint.path.parent)
        if entry.step < checkpoint.step and find_damage(entry.path) is None
    ]
    raise RunError(
        "checkpoint-damaged",
        f"{checkpoint.path} is damaged: {damage}",
        why="resuming from it would give other weights than the run had",
        fix=f"`--resume {older[-1].path}` continues from step {older[-1].step}, the newest whole checkpoint"
        if older
        else "no whole checkpoint is left; start a new run",
    )


def latest_checkpoint(folder: Path) -> Checkpoint:
    """The newest checkpoint, verified. Raises RunError `checkpoint-missing` or `checkpoint-damaged`."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise RunError(
            "checkpoint-missing",
            f"{folder} holds no checkpoint",
            why="nothing is left to continue from, and the run's adapter is not written over",
            fix="start a new run: another output.name",
        )
    require_whole(checkpoints[-1])
    return checkpoints[-1]


def prune_checkpoints(folder: Path, *, keep_last: int, keep_steps: frozenset[int]) -> list[Checkpoint]:
    """Delete all but the newest `keep_last` checkpoints and those of `keep_steps`; return what was deleted."""
    checkpoints = list_checkpoints(folder)
    kept = {entry.step for entry in checkpoints[-keep_last:]} | keep_steps
    deleted = [entry for entry in checkpoints if entry.step not in kept]
    for entry in deleted:
        # Renamed first: a folder half deleted by a killed process must not look like a checkpoint.
        doomed = folder / f"{atomic.TEMPORARY_PREFIX}deleted-{entry.path.name}"
        entry.path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return deleted


def checkpoint_bytes(num_trainable: int, *, keep_last: int) -> int:
    """Upper estimate of a run's disk space: fp32 adapter and two Adam moments per checkpoint, one in the making.

    The best checkpoint and the result are two more copies.
    """
    per_checkpoint = num_trainable * 4 * 3 + (1 << 20)
    return per_checkpoint * (keep_last + 2) + num_trainable * 4
