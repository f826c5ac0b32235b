"""AdaLoRA in runs of any length, whichever steps are skipped: down to its budget, and loads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from affina.models.engines import trainable_parameters
from affina.models.forward import supervised_loss
from affina.training.adalora import adalora_of
from tests.models.tiny import batch_of
from tests.training.method_cases import MethodRun, attach, hidden_of, make_base, reload, small_options

BUDGET = small_options("adalora")["rank"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def mean_rank(model: nn.Module) -> float:
    ranks = [int((p != 0).sum()) for name, p in model.named_parameters() if ".lora_E." in name]
    return sum(ranks) / len(ranks)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_a_run_of_any_length_comes_down_to_its_budget_and_loads_again(
    base: Path, tmp_path: Path, num_steps: int
) -> None:
    run = MethodRun(attach(base, "adalora", "dense"), tmp_path, num_steps=num_steps)
    run.train(until=num_steps)
    assert mean_rank(run.model) == BUDGET
    # Saved without the ranks that are masked: the same terms in other sums, some 2^-24 of numbers of the order of one.
    torch.testing.assert_close(hidden_of(reload(base, tmp_path, "dense")), hidden_of(run.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "skipped",
    [{0, 1, 2, 3, 4, 5, 6}, {7}, {6, 7, 8}, {0, 1, 2, 3, 4, 5, 6, 7, 8}],
    ids=["all before the last masking", "the last masking", "around the last masking", "all but one"],
)
def test_whichever_steps_are_skipped_the_budget_is_reached_and_kept(base: Path, skipped: set[int]) -> None:
    model = attach(base, "adalora", "dense")
    step = adalora_of(model, num_steps=10)
    assert step is not None
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=1e-2)
    for number in range(10):
        loss, _ = supervised_loss(model, batch_of([11, 6], seed=number))
        loss.backward()
        if number not in skipped:
            optimizer.step()
            step.after_update(number)
        optimizer.zero_grad(set_to_none=True)
        if number >= 7 and number not in skipped:
            assert mean_rank(model) == BUDGET


def test_with_no_rank_to_take_away_every_rank_stays(base: Path, tmp_path: Path) -> None:
    run = MethodRun(attach(base, "adalora", "dense", initial_rank=BUDGET), tmp_path)
    run.train(until=3)
    assert mean_rank(run.model) == BUDGET
    torch.testing.assert_close(hidden_of(reload(base, tmp_path, "dense")), hidden_of(run.model), rtol=0, atol=1e-5)
