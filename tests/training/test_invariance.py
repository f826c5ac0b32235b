"""How a step is cut into rows and micro-batches leaves its gradient as it is: a real model, the real objective."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from affina.data.collate import collate
from affina.data.samples import IGNORED_LABEL, Sample
from affina.models.adapters import attach_adapter
from affina.models.load import load_causal_lm
from affina.models.weights import Fp8Options, Int8Options, Nf4Options
from affina.training.objectives.sft import sft_objective

LENGTHS = (5, 1, 17, 40, 9, 2, 23)


def make_samples() -> list[Sample]:
    """Samples of odd lengths; one of a single token, one without labels, one trained from its second token on."""
    generator = np.random.default_rng(0)
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = generator.integers(10, 8000, length).astype(np.int32)
        labels = np.where(np.arange(length) >= (1 if number == 4 else length // 2), ids, IGNORED_LABEL)
        if number == 5:
            labels = np.full(length, IGNORED_LABEL)
        labels[0] = IGNORED_LABEL
        samples.append(Sample(ids, labels.astype(np.int32)))
    return samples


def gradients(
    model: torch.nn.Module, rows: Sequence[Sequence[Sample]], *, row_tokens: int | None = None
) -> torch.Tensor:
    """The gradient of one optimiser step over micro-batches `rows`, as the loop computes it, flattened."""
    model.zero_grad()
    batches = [collate(row, num_tokens=row_tokens, pad_token_id=0) for row in rows]
    num_supervised = sum(batch.num_supervised for batch in batches)
    for batch in batches:
        loss_sum, _ = sft_objective(model, batch)
        (loss_sum / num_supervised).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.fixture(scope="module", params=["dense", "nf4", "fp8", "int8"])
def model(request: pytest.FixtureRequest, tiny_model_folder: Path) -> torch.nn.Module:
    formats = {"dense": None, "nf4": Nf4Options(), "fp8": Fp8Options(), "int8": Int8Options()}
    base = load_causal_lm(
        str(tiny_model_folder), dtype=torch.float32, device=torch.device("cpu"), weight_format=formats[request.param]
    )
    adapted = attach_adapter(base, rank=4, alpha=8)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the gradient of A
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param([[0, 1, 2, 3, 4, 5, 6]], id="one packed row"),
        pytest.param([[6, 3, 0, 5], [2, 1, 4]], id="two rows in another order"),
        pytest.param([[0], [2], [3, 5], [4, 1], [6]], id="five micro-batches"),
    ],
)
@pytest.mark.parametrize("row_tokens", [None, 256])
def test_packing_accumulation_and_padding_leave_the_gradient(
    model: torch.nn.Module, cut: list[list[int]], row_tokens: int | None
) -> None:
    samples = make_samples()
    apart = gradients(model, [[sample] for sample in samples])
    together = gradients(model, [[samples[index] for index in row] for row in cut], row_tokens=row_tokens)
    assert float(apart.norm()) > 0
    # float32 rounding (2^-24 = 6e-8 per operation) in sums of another order
    assert float((together - apart).norm() / apart.norm()) < 1e-6


def test_recomputing_activations_leaves_the_gradient(tiny_model_folder: Path) -> None:
    from affina.models.compat import enable_recomputation

    found = []
    for recompute in (False, True):
        base = load_causal_lm(str(tiny_model_folder), dtype=torch.float32, device=torch.device("cpu"))
        adapted = attach_adapter(base, rank=4, alpha=8, dropout=0.2)
        if recompute:
            enable_recomputation(base)
        adapted.train()
        torch.manual_seed(7)
        found.append(gradients(adapted, [make_samples()]))
    assert torch.equal(*found), "the same operations run twice, dropout included"
