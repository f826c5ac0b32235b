"""Saving and restoring the training state: adapter, optimiser, counters.

The adapter is PEFT's own files, so a checkpoint is also an adapter that everything else can load. Order and random
numbers are functions of the step (loop.py), so nothing else is needed for a bit-identical continuation.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from affina.errors import RunError
from affina.runs import checkpoints
from affina.runs.atomic import remove_leftovers
from affina.training.callbacks import Observers
from affina.training.optimizer_state import OptimizerState
from affina.training.state import TrainState

OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer_state.json"


class CheckpointWriter:
    """Writes checkpoints of one run, keeps the newest and the best, and survives a full disk.

    write_adapter: writes the adapter's files into the folder it is given
    """

    def __init__(
        self,
        folder: Path,
        *,
        write_adapter: Callable[[Path], object],
        optimizer_state: OptimizerState,
        observers: Observers,
        keep_last: int,
        keep_best: bool,
    ) -> None:
        self._folder = folder
        self._write_adapter = write_adapter
        self._optimizer_state = optimizer_state
        self._observers = observers
        self._keep_last = keep_last
        self._keep_best = keep_best
        self.failure: OSError | None = None
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    def __call__(self, state: TrainState) -> None:
        """Save a checkpoint. When the disk refuses, training goes on, the older ones stay, and `failure` is set."""
        try:
            with checkpoints.new_checkpoint(self._folder, state.step) as temporary:
                with _disk_errors():
                    self._write_adapter(temporary)
                    torch.save(self._optimizer_state.to_dict(), temporary / OPTIMIZER_FILE)
                text = json.dumps(state.to_dict(), indent=2)
                (temporary / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.failure = error
            self._observers.event(
                "checkpoint-failed",
                f"step {state.step}: the checkpoint could not be written ({error.strerror or error}); "
                "the older ones are untouched and training goes on",
                step=state.step,
            )
            return
        self.failure = None
        self._observers.event("checkpoint", f"checkpoint at step {state.step}", step=state.step)
        best = {state.best_step} if self._keep_best and state.best_step is not None else set()
        checkpoints.prune_checkpoints(self._folder, keep_last=self._keep_last, keep_steps=frozenset(best))

    def require_last_written(self) -> None:
        """Raise RunError when the final checkpoint could not be written."""
        if self.failure is None:
            return
        is_full = self.failure.errno in (errno.ENOSPC, errno.EDQUOT)
        existing = checkpoints.list_checkpoints(self._folder)
        raise RunError(
            "disk-full" if is_full else "checkpoint-not-written",
            f"the last checkpoint could not be written into {self._folder}: {self.failure.strerror or self.failure}",
            why="training is done but its result is only in memory, which ends with this process",
            fix=f"free some space and `--resume`: step {existing[-1].step} is saved"
            if existing
            else f"free some space; `--resume {self._folder.parent}` then starts from the beginning",
        ) from self.failure


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn what torch and safetensors raise when a disk refuses to write into the OSError that it is."""
    try:
        yield
    except SafetensorError as error:
        # "I/O error: No space left on device (os error 28)"
        raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
    except RuntimeError as error:
        # torch's zip writer: "[enforce fail at inline_container.cc:…] . unexpected pos …" or "PytorchStreamWriter …"
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"the optimiser state cannot be written: {error}") from error


def restore_optimizer(optimizer_state: OptimizerState, folder: Path) -> None:
    """Load a checkpoint's optimiser state; only tensors and plain values are unpickled."""
    try:
        saved = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        optimizer_state.load(saved)
    except (ValueError, KeyError) as error:
        raise RunError(
            "resume-optimizer-changed",
            f"the optimiser state in {folder} does not fit this run: {error}",
            why="training.optimizer or the adapter's parameters have changed since",
            fix="resume with the run's own config, or start a new run",
        ) from error


def restore_state(folder: Path) -> TrainState:
    """A checkpoint's counters."""
    values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    state = TrainState.from_dict(values)
    state.stop_reason = None
    return state
