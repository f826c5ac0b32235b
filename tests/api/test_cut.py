"""A run that the device does not hold as it was asked for learns the same from smaller pieces, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import affina
from affina.planning.fit import Change
from affina.runs.directory import RunDirectory
from affina.training.objectives.sft import sft_objective
from tests.api.test_train import assert_same_result, make_config

CUT = (Change("training.micro_batch_size", 1, ""), Change("training.gradient_accumulation_steps", 4, ""))
SENTENCE = (
    "a micro-batch of 2 rows does not fit into the device's memory: the rows of a step are 4 × 1 instead of 2 × 2"
)


def test_a_run_whose_micro_batches_were_cut_is_the_run_with_those_settings_and_resumes_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5)
    with monkeypatch.context() as small:
        small.setattr("affina.planning.admission.cut_to_fit", lambda *_: CUT)
        cut = affina.train(config)
    events = [json.loads(line) for line in (cut.run / "events.jsonl").read_text().splitlines()]
    assert [event["message"] for event in events if event["kind"] == "micro-batch-cut"] == [SENTENCE]
    assert "micro_batch_size: 2" in (cut.run / "config.yaml").read_text(), "what the user has written stays"
    asked = make_config(
        tiny_model_folder,
        chats_file,
        tmp_path,
        training__max_steps=5,
        training__micro_batch_size=1,
        training__gradient_accumulation_steps=4,
        output__name="asked",
    )
    assert_same_result(cut.run, affina.train(asked).run)

    # On a device that would hold them all the same, a run that has begun goes on as it began.
    step = cut.run / "checkpoints" / "step-00000003"
    assert affina.train(resume=step).steps == 5
    assert_same_result(cut.run, tmp_path / "runs" / "asked")


def test_a_run_that_starts_again_from_the_beginning_is_judged_again(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=2)
    with monkeypatch.context() as small:
        small.setattr("affina.planning.admission.cut_to_fit", lambda *_: CUT)
        small.setattr("affina.api._train_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            affina.train(config)
    run = RunDirectory(tmp_path / "runs" / "first")
    assert run.read_manifest()["cut"] == {change.path: change.value for change in CUT}
    affina.train(resume=run.path)
    assert run.read_manifest()["cut"] == {}


class ShortOnce:
    """The objective of a device whose memory ends in the third training batch, once."""

    def __init__(self) -> None:
        self.num_batches = 0

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        self.num_batches += torch.is_grad_enabled()
        if self.num_batches == 3:
            self.num_batches += 1
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
        return sft_objective(model, batch)


@pytest.mark.parametrize("checkpointing", ["auto", False], ids=["left to affina", "refused by the user"])
def test_on_the_reference_engine_a_step_that_runs_out_of_memory_is_repeated_with_recomputation(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_folder: Path,
    chats_file: Path,
    tmp_path: Path,
    checkpointing: Any,
) -> None:
    settings: dict[str, Any] = {"training__max_steps": 4, "training__gradient_checkpointing": checkpointing}
    config = make_config(tiny_model_folder, chats_file, tmp_path, **settings)
    with monkeypatch.context() as short:
        short.setattr("affina.training.objectives.build.sft_objective", ShortOnce())
        if checkpointing is False:
            with pytest.raises(affina.AffinaError, match="out-of-memory"):
                affina.train(config)
            return
        result = affina.train(config)
    events = [json.loads(line) for line in (result.run / "events.jsonl").read_text().splitlines()]
    assert [event["message"] for event in events if event["kind"] == "out-of-memory-recovered"] == [
        "step 2 ran out of memory and is repeated with more recomputation: layers keep their inputs"
    ]
    roomy = affina.train(make_config(tiny_model_folder, chats_file, tmp_path, **settings, output__name="roomy"))
    assert_same_result(result.run, roomy.run)
