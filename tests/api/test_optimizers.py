"""8-bit optimisers: they resume to the same bits, and a run says what they save in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import affina
from affina.runs.checkpoints import list_checkpoints
from affina.runs.directory import RunDirectory
from tests.api.test_train import assert_same_result, make_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes, whose optimisers these are, is not installed",
)


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    kind: str, tiny_model_folder: Path, chats_file: Path, tmp_path: Path
) -> None:
    results = []
    for name in ("whole", "part"):
        config = make_config(tiny_model_folder, chats_file, tmp_path, training__max_steps=5, output__name=name)
        # 64 · 64 elements and more are kept in 8 bits
        config |= {"adapter": {"rank": 64, "alpha": 64}, "training": {**config["training"], "optimizer": kind}}
        results.append(affina.train(config))
    whole, part = results
    (third,) = [saved for saved in list_checkpoints(part.run / "checkpoints") if saved.step == 3]
    affina.train(resume=third.path)
    assert_same_result(part.run, whole.run)
    notes = [event["message"] for event in RunDirectory(whole.run).events() if event["kind"] == "note"]
    (said,) = [note for note in notes if note.startswith(f"training.optimizer {kind} keeps")]
    # 28 matrices of rank 64 on two layers of width 64 and 128; all have 4,096 elements or more.
    assert "it saves" in said
    assert "beside a model of" in said
