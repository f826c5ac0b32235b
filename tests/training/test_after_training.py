"""What training leaves on the device for the replies that are generated after it."""

from __future__ import annotations

import pytest

from affina.models.engines import engine_of
from affina.models.fast import fast_engine_of
from affina.training.run import leave_for_replies
from tests.models.fast.families import adapted_model, attach, qwen3_config


def test_captured_rows_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted_model(qwen3_config())
    attach(model)
    engine = fast_engine_of(model)
    assert engine is not None
    cleared: list[bool] = []

    class Captured:
        def clear(self) -> None:
            cleared.append(True)

    monkeypatch.setattr(engine, "graphs", Captured())
    leave_for_replies(model)
    assert cleared == [True]
    assert engine_of(model) is engine
    monkeypatch.setattr(engine, "graphs", None)
    leave_for_replies(model)
    assert cleared == [True]


def test_a_model_without_the_fast_engine_is_left_as_it_is() -> None:
    model = adapted_model(qwen3_config())
    leave_for_replies(model)
    assert engine_of(model) is None
