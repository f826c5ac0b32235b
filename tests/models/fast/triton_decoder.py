"""The decoder in 16 bits with low-rank updates folded into the kernels: test_folded.py runs it in the interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from affina.catalog.save_policy import Keep, SavePolicy
from affina.kernels.fp8 import QuantizedRows, quantize_rows
from affina.models.engines import set_engine
from affina.models.families import DecoderSpec, read_decoder
from affina.models.fast.build import build_decoder
from affina.models.fast.engine import FastEngine
from affina.models.fast.fp8 import Fp8Stack
from affina.models.weights import quantize_vocabulary
from tests.kernels import exact_casts, loop_bounds
from tests.models.fast.families import adapted_model, loss_and_gradients
from tests.models.tiny import batch_of, qwen3_config

LENGTHS = [5, 1, 17, 9]
TARGETS: dict[str, object] = {"all": "all-linear", "some": ["k_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module", autouse=True)
def repaired_interpreter() -> None:
    exact_casts.install()
    loop_bounds.install()


def gradients(
    dtype: torch.dtype, targets: object, *, folds: bool, keep: Keep = Keep.ALL, weights: str = "dense"
) -> tuple[float, Tensor]:
    """Loss and all adapter gradients of a model whose dense weights are exact in float16."""
    model = adapted_model(
        qwen3_config(num_hidden_layers=2),
        weights=weights,
        targets=targets,  # type: ignore[arg-type]
        dtype=torch.float16,
    )
    if weights == "int8":
        quantize_vocabulary(model.get_base_model())
    model.get_base_model().to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float16).float()
    spec = read_decoder(model.get_base_model().config)
    assert isinstance(spec, DecoderSpec)
    decoder = build_decoder(model, spec, is_lean=keep == Keep.PARTS, adapter_on_host=keep == Keep.PARTS)
    layers = [dataclasses.replace(layer, folds=folds) for layer in decoder.layers]
    decoder = dataclasses.replace(decoder, layers=layers)
    set_engine(model, FastEngine(model, decoder, SavePolicy.uniform(2, keep)))
    loss, found = loss_and_gradients(model, batch_of(LENGTHS))
    return float(loss), torch.cat([found[name].double().flatten() for name in sorted(found)])


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("keep", [Keep.ALL, Keep.INPUT, Keep.PARTS])
def test_folded_updates_give_the_float32_gradients_within_rounding(
    monkeypatch: pytest.MonkeyPatch, targets: str, keep: Keep
) -> None:
    monkeypatch.setattr("affina.catalog.lowest_memory._SMALLEST_PART", 16)
    loss, exact = gradients(torch.float32, TARGETS[targets], folds=False)
    folded_loss, folded = gradients(torch.float16, TARGETS[targets], folds=True, keep=keep)
    apart_loss, apart = gradients(torch.float16, TARGETS[targets], folds=False, keep=keep)
    assert folded_loss == pytest.approx(loss, rel=1e-3)
    assert apart_loss == pytest.approx(loss, rel=1e-3)
    # float16 rounds at 2^-11 = 5e-4 an operation, some twenty of them one after the other
    folded_error = float((folded - exact).norm() / exact.norm())
    apart_error = float((apart - exact).norm() / exact.norm())
    assert folded_error < 1e-2
    # Folded updates are rounded once less, so they are not worse but for the luck of a few thousand roundings.
    assert folded_error < 1.5 * apart_error


def test_eight_bit_weights_expanded_one_by_one_give_the_float32_gradients_within_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("affina.catalog.lowest_memory._SMALLEST_PART", 16)
    loss, exact = gradients(torch.float32, "all-linear", folds=False, weights="int8")
    lowest_loss, lowest = gradients(torch.float16, "all-linear", folds=True, keep=Keep.PARTS, weights="int8")
    assert lowest_loss == pytest.approx(loss, rel=1e-3)
    # As above; the weights are rounded to float16 too when they are expanded.
    assert float((lowest - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.parametrize("keep", [Keep.ALL, Keep.INPUT, Keep.PARTS])
def test_codes_that_norms_write_are_those_that_products_would_make(monkeypatch: pytest.MonkeyPatch, keep: Keep) -> None:
    monkeypatch.setattr("affina.catalog.lowest_memory._SMALLEST_PART", 16)
    monkeypatch.setattr("affina.models.fast.weights.can_multiply_fp8", lambda _: True)
    widths: list[int] = []

    def recorded(x: Tensor, **options: object) -> QuantizedRows:
        widths.append(x.shape[1])
        return quantize_rows(x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("affina.models.fast.fp8.quantize_rows", recorded)
    loss, found = gradients(torch.float16, "all-linear", folds=True, keep=keep, weights="fp8")
    fused_count = len(widths)
    monkeypatch.setattr(Fp8Stack, "takes_quantized", False)
    apart_loss, apart = gradients(torch.float16, "all-linear", folds=True, keep=keep, weights="fp8")
    # Of four products of a layer those of q, k, v and of gate and up read norms.
    assert len(widths) - fused_count >= 2 * fused_count
    assert loss == apart_loss
    assert torch.equal(found, apart)
    exact_loss, exact = gradients(torch.float32, "all-linear", folds=False, weights="fp8")
    # Each product is off by 2.6% for each factor it rounds, some ten of them one after the other.
    assert loss == pytest.approx(exact_loss, rel=0.05)
    assert float((found - exact).norm() / exact.norm()) < 0.3
