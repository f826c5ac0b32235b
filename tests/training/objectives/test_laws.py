"""Laws of every objective on a real model: how a step is cut changes nothing; log-probabilities are the model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from affina.data.collate import Batch, collate
from affina.data.samples import Sample
from affina.errors import ModelError
from affina.models.adapters import attach_adapter
from affina.models.forward import document_log_probabilities
from affina.models.load import load_causal_lm
from affina.models.reward_head import SCORE_NAME, add_reward_head, document_scores
from affina.models.weights import Nf4Options
from affina.training.objectives import MetricSums, Objective
from affina.training.objectives.distill import DistillObjective, OnPolicy, own_replies
from affina.training.objectives.documents import question_and_reply
from affina.training.objectives.kto import KtoObjective, estimate_reference_point, mismatched_rows
from affina.training.objectives.preference import PairObjective
from affina.training.objectives.reward import RewardObjective
from affina.training.objectives.scores import ReferenceScores, pair_scores, reference_log_probabilities
from affina.training.objectives.sft import TokenObjective, sft_objective
from tests.training.objectives.samples import make_labelled, make_pairs, make_taught


def load_base(folder: Path, weight_format: str = "dense", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    options = Nf4Options() if weight_format == "nf4" else None
    return load_causal_lm(str(folder), dtype=dtype, device=torch.device("cpu"), weight_format=options)


def load(folder: Path, weight_format: str = "dense", *, is_moved: bool = True) -> PeftModel:
    base = load_base(folder, weight_format)
    add_reward_head(base, seed=1)
    adapted = attach_adapter(base, rank=4, alpha=8, trained_modules=(SCORE_NAME,))
    if is_moved:
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:  # zero at the start, where policy and reference are one
                    parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@pytest.fixture(scope="module", params=["dense", "nf4"])
def model(request: pytest.FixtureRequest, tiny_model_folder: Path) -> PeftModel:
    return load(tiny_model_folder, request.param)


@pytest.fixture(scope="module")
def teacher(tiny_model_folder: Path) -> torch.nn.Module:
    base = load_causal_lm(str(tiny_model_folder), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        base.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    return base


def batches_of(cut: Sequence[Sequence[Sample]], row_tokens: int | None = None) -> list[Batch]:
    return [collate(row, num_tokens=row_tokens, pad_token_id=0) for row in cut]


def step_of(
    model: torch.nn.Module, objective: Objective, batches: Sequence[Batch]
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of one optimiser step, as the loop computes them."""
    model.zero_grad()
    metrics, total = MetricSums(), 0.0
    prepared = objective.prepare(model, batches, step=0)
    for batch in prepared.batches:
        found = prepared.loss(model, batch)
        (found.loss / prepared.count).backward()
        total += float(found.loss.detach()) / prepared.count
        metrics.add(found.metrics)
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return total, torch.cat(gradients), metrics.means()


OBJECTIVES: dict[str, tuple[Callable[[torch.nn.Module], Objective], Callable[[], list[Sample]]]] = {
    "sft": (lambda teacher: TokenObjective(sft_objective), make_labelled),
    "dpo": (lambda teacher: PairObjective("dpo", beta=0.1, label_smoothing=0.1), make_pairs),
    "ipo": (lambda teacher: PairObjective("ipo", beta=0.1), make_pairs),
    "orpo": (lambda teacher: PairObjective("orpo", beta=0.1), make_pairs),
    "simpo": (lambda teacher: PairObjective("simpo", beta=2.0, margin=1.0), make_pairs),
    "kto": (lambda teacher: KtoObjective(beta=0.1, undesirable_weight=1.5), make_labelled),
    "reward": (lambda teacher: RewardObjective(), make_pairs),
    "distill": (lambda teacher: DistillObjective(teacher, divergence=0.3, temperature=2.0), make_labelled),
    "distill from files": (lambda teacher: DistillObjective(), make_taught),
}


@pytest.fixture(scope="module")
def fully_trained(tiny_model_folder: Path) -> PreTrainedModel:
    """Every weight trains, the head too, and the embedding that it shares."""
    model = attach_adapter(load_base(tiny_model_folder), method="full")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "reward"])
def test_a_step_that_trains_every_weight_may_be_cut_as_well(
    name: str, fully_trained: PreTrainedModel, teacher: torch.nn.Module
) -> None:
    objective, samples = OBJECTIVES[name][0](teacher), OBJECTIVES[name][1]()
    loss, gradient, metrics = step_of(fully_trained, objective, batches_of([[sample] for sample in samples]))
    assert fully_trained.lm_head.weight.grad is not None
    assert float(fully_trained.lm_head.weight.grad.norm()) > 0
    other_loss, other_gradient, other_metrics = step_of(fully_trained, objective, batches_of([samples]))
    # as below
    assert other_loss == pytest.approx(loss, rel=2e-6)
    assert float((other_gradient - gradient).norm() / gradient.norm()) < 5e-6
    assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_a_step_is_cut_into_rows_and_micro_batches_changes_nothing(
    name: str, model: PeftModel, teacher: torch.nn.Module
) -> None:
    objective, make_samples = OBJECTIVES[name][0](teacher), OBJECTIVES[name][1]
    samples = make_samples()
    loss, gradient, metrics = step_of(model, objective, batches_of([[sample] for sample in samples]))
    assert float(gradient.norm()) > 0
    for cut, row_tokens in (([[0, 1, 2, 3, 4]], None), ([[0, 1], [2, 3, 4]], 256)):
        together = batches_of([[samples[index] for index in row] for row in cut], row_tokens)
        other_loss, other_gradient, other_metrics = step_of(model, objective, together)
        # float32 rounding (2^-24 = 6e-8 per operation) in sums of another order, of log-probabilities of some hundreds
        assert other_loss == pytest.approx(loss, rel=2e-6)
        assert float((other_gradient - gradient).norm() / gradient.norm()) < 5e-6
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


@torch.no_grad()
def test_documents_in_rows_of_their_own_have_the_log_probabilities_of_packed_ones(model: PeftModel) -> None:
    batch = collate(make_pairs(), num_tokens=256, pad_token_id=0)
    packed, rows = (document_log_probabilities(model, batch, layout=layout) for layout in ("packed", "rows"))
    # float32, other attention kernels
    torch.testing.assert_close(packed, rows, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_the_log_probability_of_a_document_is_that_of_the_models_own_logits(model: PeftModel) -> None:
    pairs = make_pairs()
    found = document_log_probabilities(model, collate(pairs, num_tokens=256, pad_token_id=0))
    expected = []
    for pair in pairs:
        for document in pair.split():
            ids = torch.from_numpy(document.input_ids).long().unsqueeze(0)
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            trained = torch.from_numpy(document.labels[1:]) != -100
            picked = logits.log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)
            expected.append(picked[trained].sum())
    assert float(found[-1]) == 0.0, "padding is a document without a reply"
    # logits of float32 layers, here against float64 from the logits on
    torch.testing.assert_close(found[:-1].double(), torch.stack(expected), rtol=1e-5, atol=1e-4)


def test_the_gradient_of_dpo_is_autograds_of_the_plain_definition(model: PeftModel) -> None:
    """Whole logits in float64 from transformers' forward, the loss as the paper writes it."""
    pairs = make_pairs()
    objective = PairObjective("dpo", beta=0.1)
    loss, gradient, _ = step_of(model, objective, batches_of([pairs]))
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        ratios = []
        for document in pair.split():
            ids = torch.from_numpy(document.input_ids).long().unsqueeze(0)
            trained = torch.from_numpy(document.labels[1:]) != -100

            def log_probability(ids: Tensor = ids, trained: Tensor = trained) -> Tensor:
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
                return logits.log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)[trained].sum()

            with torch.no_grad(), model.disable_adapter():
                reference = log_probability()
            ratios.append(log_probability() - reference)
        total = total - torch.nn.functional.logsigmoid(0.1 * (ratios[0] - ratios[1])) / len(pairs)
    total.backward()
    plain = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    # float32 forward and backward passes with other kernels
    assert float((gradient - plain).norm() / plain.norm()) < 1e-4


@pytest.mark.parametrize(
    ("method", "weight_format", "dtype"),
    [
        ("lora", "dense", torch.float32),
        ("lora", "dense", torch.bfloat16),
        ("lora", "nf4", torch.float32),
        ("lora", "nf4", torch.bfloat16),
        ("full", "dense", torch.float32),
        ("full", "dense", torch.bfloat16),
        ("freeze", "dense", torch.bfloat16),
        ("layernorm", "dense", torch.float32),
        ("layernorm", "dense", torch.bfloat16),
        ("layernorm", "nf4", torch.bfloat16),
    ],
    ids=str,
)
def test_dpo_starts_at_log_2_with_no_margin(
    method: str, weight_format: str, dtype: torch.dtype, tiny_model_folder: Path
) -> None:
    base = load_base(tiny_model_folder, weight_format, dtype)
    fresh = attach_adapter(base, method=method, options={"num_layers": 1} if method == "freeze" else None)
    fresh.train()
    for kind in ("dpo", "ipo"):
        loss, gradient, metrics = step_of(fresh, PairObjective(kind, beta=0.1), batches_of([make_pairs()]))
        # The policy's losses are autograd's where the head is trained, the reference's the kernel's: sums of some
        # hundreds in float32 (2^-24 · 200 = 1e-5), times β = 0.1. Everything else is the same operations.
        rounding = 1e-6 if method == "full" else 0
        # 25 is the square of the target, 1 / (2 β) = 5: its slope is 10, and 1 / β more than a reward's.
        expected = math.log(2) if kind == "dpo" else 25.0
        assert loss == pytest.approx(expected, abs=1e-6 if kind == "dpo" else 1e-6 + 100 * rounding)
        for name in ("reward_margin", "reward_chosen", "reward_rejected"):
            assert metrics[name] == pytest.approx(0, abs=rounding)
        assert float(gradient.norm()) > 0


def test_the_metrics_of_pairs_are_means_over_pairs_and_over_tokens(model: PeftModel) -> None:
    pairs = make_pairs()
    batch = collate(pairs, num_tokens=None, pad_token_id=0)
    _, _, metrics = step_of(model, PairObjective("orpo", beta=0.5), [batch])
    with torch.no_grad():
        scores = pair_scores(model, batch)
    chosen = (scores.chosen / scores.num_chosen).mean()
    assert metrics["reward_chosen"] == pytest.approx(0.5 * float(chosen), rel=1e-5)
    assert metrics["reward_margin"] == pytest.approx(metrics["reward_chosen"] - metrics["reward_rejected"], abs=1e-4)
    num_tokens = sum(pair.split()[0].num_supervised for pair in pairs)
    assert metrics["chosen_nll"] == pytest.approx(-float(scores.chosen.sum()) / num_tokens, rel=1e-5)


@torch.no_grad()
def test_the_reference_is_the_base_whatever_the_adapter_has_learnt(model: PeftModel, tiny_model_folder: Path) -> None:
    batch = collate(make_pairs(), num_tokens=None, pad_token_id=0)
    fresh = load(tiny_model_folder, "nf4" if "Nf4" in str(model) else "dense", is_moved=False)
    before = model.training
    found = reference_log_probabilities(model, batch)
    assert model.training is before
    torch.testing.assert_close(found, document_log_probabilities(fresh, batch).detach(), rtol=1e-6, atol=1e-5)
    assert not torch.allclose(found, document_log_probabilities(model, batch), atol=1e-2)


def test_the_reference_of_a_row_is_computed_once(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from affina.training.objectives import scores

    rows = []

    def counted(model: torch.nn.Module, batch: Batch) -> Tensor:
        rows.append(batch)
        return reference_log_probabilities(model, batch)

    monkeypatch.setattr(scores, "reference_log_probabilities", counted)
    objective = PairObjective("dpo", beta=0.1)
    pairs = make_pairs()
    first = step_of(model, objective, batches_of([pairs[:2], pairs[2:]]))
    again = step_of(model, objective, batches_of([pairs[2:], pairs[:2]]))
    assert len(rows) == 2
    # the two rows in another order: float32 addition of two gradients
    assert again[0] == pytest.approx(first[0], rel=1e-6)
    step_of(model, objective, batches_of([pairs[:3]]))
    assert len(rows) == 3, "the same pairs in another row are another row"
    unlabelled = [
        Sample(p.input_ids, np.where(p.labels == p.labels.max(), -100, p.labels), p.documents) for p in pairs[:3]
    ]
    step_of(model, objective, batches_of([unlabelled]))
    assert len(rows) == 4, "other tokens are compared"


def test_only_the_first_rows_are_remembered(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceScores, "MAX_ROWS", 2)
    scores = ReferenceScores()
    batches = batches_of([[pair] for pair in make_pairs()])
    for _ in range(2):
        for batch in batches:
            assert torch.equal(scores(model, batch), reference_log_probabilities(model, batch))
    assert len(scores._known) == 2


# KTO's reference point


def test_every_question_of_a_step_goes_with_the_next_reply() -> None:
    samples = make_labelled()
    batches = batches_of([samples[:2], samples[2:]])
    taken = [pair for batch in batches for pair in question_and_reply(batch)]
    mixed = [sample for row in mismatched_rows(batches) for sample in row]
    for number, sample in enumerate(mixed):
        question, reply = taken[number][0], taken[(number + 1) % len(taken)][1]
        assert np.array_equal(sample.input_ids, np.concatenate([question, reply.token_ids]))
    assert sum(map(len, mixed)) == sum(map(len, samples)), "each token of the step is used once"


def test_the_reference_point_scores_the_tokens_that_the_rewards_score() -> None:
    # After the first reply a question and a second reply, and what templates write after a turn.
    generator = np.random.default_rng(0)
    two_turns = generator.integers(10, 8000, 20).astype(np.int32)
    is_trained = np.isin(np.arange(20), [*range(4, 8), *range(14, 19)])
    samples = [*make_labelled(), Sample(two_turns, np.where(is_trained, two_turns, -100), desirable=True)]
    batches = batches_of([samples[:2], samples[2:]])
    mixed = [sample for row in mismatched_rows(batches) for sample in row]
    for sample, own in zip(mixed, samples[1:] + samples[:1], strict=True):
        assert sample.num_supervised == own.num_supervised
        assert np.array_equal(sample.labels[sample.labels != -100], own.labels[own.labels != -100])
    assert mixed[-2].num_supervised == 9


def test_a_step_of_one_reply_has_the_reference_point_zero(model: PeftModel) -> None:
    assert float(estimate_reference_point(model, batches_of([make_labelled()[:1]]))) == 0.0


@torch.no_grad()
def test_the_reference_point_is_never_negative(model: PeftModel) -> None:
    for seed in range(3):
        assert float(estimate_reference_point(model, batches_of([make_labelled(seed)]))) >= 0.0


# Reward


@torch.no_grad()
def test_a_score_is_read_at_the_last_token(model: PeftModel) -> None:
    pairs = make_pairs()
    found = document_scores(model, collate(pairs, num_tokens=256, pad_token_id=0))
    head = model.get_base_model().score
    for index, document in enumerate(document for pair in pairs for document in pair.split()):
        ids = torch.from_numpy(document.input_ids).long().unsqueeze(0)
        hidden = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[-1][0, -1]
        assert float(found[index]) == pytest.approx(float(head(hidden)), rel=1e-4, abs=1e-5)


def test_a_model_whose_body_cannot_be_told_gets_no_head(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    base = load_causal_lm(str(tiny_model_folder), dtype=torch.float32, device=torch.device("cpu"))
    monkeypatch.setattr("affina.models.reward_head.body_of", lambda model: None)
    with pytest.raises(ModelError, match="reward-head-unsupported") as caught:
        add_reward_head(base, seed=0)
    assert "training.objective: dpo" in str(caught.value.fix)


# Distillation


def test_a_student_that_is_its_teacher_has_no_loss(tiny_model_folder: Path) -> None:
    fresh = load(tiny_model_folder, is_moved=False)
    for divergence in (0.0, 0.5, 1.0):
        objective = DistillObjective(fresh.get_base_model(), divergence=divergence)
        assert step_of(fresh, objective, batches_of([make_labelled()]))[0] == pytest.approx(0.0, abs=1e-6)


def test_own_replies_follow_from_seed_and_step(model: PeftModel) -> None:
    batches = batches_of([make_labelled()])
    settings = OnPolicy(share=1.0, max_new_tokens=6, stop_ids=(2,), seed=3)
    first, again, other = (own_replies(model, batches, settings, step=step)[0] for step in (4, 4, 5))
    assert torch.equal(first.input_ids, again.input_ids)
    assert not torch.equal(first.input_ids, other.input_ids)
    for (question, reply), (given, _) in zip(question_and_reply(first), question_and_reply(batches[0]), strict=True):
        assert np.array_equal(question, given)
        assert 1 <= len(reply.token_ids) <= 6
        assert len(reply.token_ids) == 6 or reply.token_ids[-1] == 2, "a reply that ended by itself is closed"
        assert np.array_equal(reply.labels, reply.token_ids), "all of it is trained"


def test_the_share_of_own_replies_is_that_of_the_steps() -> None:
    settings = OnPolicy(share=0.3, max_new_tokens=1, stop_ids=(2,), seed=0)
    due = [settings.is_due(step) for step in range(2000)]
    # three standard deviations of 2,000 draws: 3 · sqrt(0.3 · 0.7 / 2000) = 0.031
    assert abs(sum(due) / 2000 - 0.3) < 0.031
    assert due == [settings.is_due(step) for step in range(2000)]


def test_validation_never_writes_replies(model: PeftModel, teacher: torch.nn.Module) -> None:
    objective = DistillObjective(teacher, on_policy=OnPolicy(share=1.0, max_new_tokens=4, stop_ids=(2,), seed=0))
    batches = batches_of([make_labelled()])
    assert objective.prepare(model, batches, step=None).batches is batches
    assert objective.prepare(model, batches, step=0).batches is not batches
