"""A card whose attention is wrong is noticed before anything is trained on it."""

from __future__ import annotations

import pytest
import torch

from affina.kernels.attention import AttentionResult
from affina.models.families import DecoderSpec, Unsupported, read_decoder
from affina.models.fast import attach_fast_engine, fast_engine_of, probe
from affina.models.fast.probe import attention_difference
from tests.models.fast.families import FAMILIES, adapted_model


def spec_of(family: str) -> DecoderSpec:
    spec = read_decoder(FAMILIES[family]())
    assert isinstance(spec, DecoderSpec)
    return spec


@pytest.mark.parametrize("family", FAMILIES)
def test_right_attention_differs_by_rounding(family: str) -> None:
    assert attention_difference(spec_of(family), torch.float32, torch.device("cpu")) < 1e-5
    assert attention_difference(spec_of(family), torch.bfloat16, torch.device("cpu")) < probe.ATTENTION_LIMIT / 3


def test_attention_that_is_wrong_behind_the_first_tile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = probe.attention

    def wrong(*arguments: object, backend: str, **options: object) -> AttentionResult:
        result = right(*arguments, backend=backend, **options)  # type: ignore[arg-type]
        if backend != "reference":
            result.output[200:] *= 1.2
        return result

    monkeypatch.setattr(probe, "attention", wrong)
    model = adapted_model(FAMILIES["qwen3, tied"]())
    found = attach_fast_engine(model, row_tokens=64)
    assert isinstance(found, Unsupported)
    assert found.reason.startswith("its attention differs by 1")
    assert found.reason.endswith("% from the definition on this card")
    assert fast_engine_of(model) is None
