"""A card whose attention is wrong is noticed before anything is trained on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from affina.kernels.attention import AttentionResult
from affina.models.families import DecoderSpec, Unsupported, read_decoder
from affina.models.fast import attach_fast_engine, engine, fast_engine_of, probe
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


def test_attention_that_is_wrong_behind_the_first_tile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = probe.attention

    def wrong(q: Tensor, *arguments: Any, **options: Any) -> AttentionResult:
        result = right(q, *arguments, **options)
        if q.dtype == torch.bfloat16:
            result.output[200:] *= 1.2
        return result

    monkeypatch.setattr(probe, "attention", wrong)
    difference = attention_difference(spec_of("qwen3, tied"), torch.bfloat16, torch.device("cpu"))
    assert difference > 2 * probe.ATTENTION_LIMIT


@pytest.mark.parametrize("difference", [0.23, float("nan")])
def test_a_card_whose_attention_is_wrong_trains_on_the_reference(
    difference: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "attention_difference", lambda *arguments: difference)
    model = adapted_model(FAMILIES["qwen3, tied"]())
    assert attach_fast_engine(model, row_tokens=64) == Unsupported(
        f"its attention differs by {difference:.1%} from the definition on this card"
    )
    assert fast_engine_of(model) is None
