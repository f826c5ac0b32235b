"""Checkpoints: exact, sealed, and never the cause of a lost run."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from affina.errors import RunError
from affina.runs import checkpoints
from affina.training import checkpoint as module
from affina.training.callbacks import Observers
from affina.training.checkpoint import CheckpointWriter, restore_optimizer, restore_state
from affina.training.optimizer_state import OptimizerState
from affina.training.state import TrainState
from tests.training.test_loop import Recorder


def make_writer(folder: Path, recorder: Recorder, *, keep_last: int = 2) -> CheckpointWriter:
    parameter = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(4)
    optimizer.step()
    return CheckpointWriter(
        folder,
        write_adapter=lambda path: (path / "adapter.bin").write_bytes(parameter.detach().numpy().tobytes()),
        optimizer_state=OptimizerState(optimizer, None, [parameter]),
        observers=Observers([recorder]),
        keep_last=keep_last,
        keep_best=True,
    )


def test_state_and_optimizer_come_back_exactly(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, Recorder())
    state = TrainState(step=7, num_tokens=900, seconds=1.25, best_validation_loss=0.5, best_step=5, loss_scale=512.0)
    writer(state)
    found = checkpoints.latest_checkpoint(tmp_path)
    assert found.step == 7
    assert restore_state(found.path) == state
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(4))])
    restore_optimizer(OptimizerState(fresh, None, []), found.path)
    saved = writer._optimizer_state.to_dict()["state"][0]
    restored = fresh.state_dict()["state"][0]
    assert all(torch.equal(saved[key], restored[key]) for key in saved)


def test_an_optimizer_of_another_run_is_refused(tmp_path: Path) -> None:
    make_writer(tmp_path, Recorder())(TrainState(step=1))
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))])
    with pytest.raises(RunError, match=r"resume-optimizer-changed.*does not fit this run"):
        restore_optimizer(OptimizerState(other, None, []), tmp_path / "step-00000001")


def test_the_best_checkpoint_outlives_the_newest(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, Recorder(), keep_last=1)
    for step in (1, 2, 3):
        writer(TrainState(step=step, best_step=1, best_validation_loss=0.1))
    assert [entry.step for entry in checkpoints.list_checkpoints(tmp_path)] == [1, 3]


@pytest.mark.parametrize("failing", ["file", "safetensors", "torch"])
def test_a_disk_that_fills_up_loses_nothing_that_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    recorder = Recorder()
    writer = make_writer(tmp_path, recorder)
    writer(TrainState(step=1))

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_space_in_safetensors(*arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_space_in_torch(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        if failing == "file":
            patch.setattr(writer, "_write_adapter", no_space)
        elif failing == "safetensors":
            patch.setattr(writer, "_write_adapter", no_space_in_safetensors)
        else:
            patch.setattr(module.torch, "save", no_space_in_torch)
        writer(TrainState(step=2))
        assert recorder.events[-1][0] == "checkpoint-failed"
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        with pytest.raises(RunError) as caught:
            writer.require_last_written()
        assert "error[disk-full]" in str(caught.value)
        assert "step 1 is saved" in str(caught.value)
    writer(TrainState(step=3))
    writer.require_last_written()
    assert checkpoints.latest_checkpoint(tmp_path).step == 3


def test_a_disk_that_was_full_from_the_first_checkpoint_on_is_told_with_the_way_to_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = make_writer(tmp_path / "checkpoints", Recorder())

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "_write_adapter", no_space)
    writer(TrainState(step=2))
    with pytest.raises(RunError, match="disk-full") as caught:
        writer.require_last_written()
    assert caught.value.fix == f"free some space; `--resume {tmp_path}` then starts from the beginning"


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000009-77").mkdir()
    make_writer(tmp_path, Recorder())
    assert list(tmp_path.iterdir()) == []
