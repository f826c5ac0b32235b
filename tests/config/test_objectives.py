"""Objectives in the config: their defaults with sources, what does not go together, what has no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from affina.config import ResolvedConfig, load_config, load_mapping
from affina.config.objectives import OBJECTIVES, SFT_LEARNING_RATE, names_with
from affina.config.schema import TrainingConfig
from affina.errors import AffinaErrors

RECIPE = Path(__file__).parents[2] / "recipes" / "dpo.yaml"


def training(objective: str, **settings: Any) -> dict[str, Any]:
    return {"training": {"objective": objective, **settings}}


def test_every_objective_of_the_schema_is_described() -> None:
    assert set(OBJECTIVES) == set(TrainingConfig.model_fields["objective"].annotation.__args__)  # type: ignore[union-attr]
    assert names_with("pairs") == "dpo, orpo, simpo or reward"
    assert names_with("labels") == "kto"


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto", "simpo"])
def test_beta_and_learning_rate_are_derived_with_their_source(objective: str) -> None:
    resolved = load_mapping(training(objective))
    facts = OBJECTIVES[objective]
    values = (resolved.config.training.preference.beta, resolved.config.training.learning_rate)
    paths = ("training.preference.beta", "training.learning_rate")
    for path, value, default in zip(paths, values, (facts.beta, facts.learning_rate), strict=True):
        assert default is not None
        assert value == default.value
        assert resolved.origins[path].kind == "derived"
        assert str(resolved.origins[path].reason).endswith(default.source)


def reason_of_rate(resolved: ResolvedConfig) -> str:
    return str(resolved.origins["training.learning_rate"].reason)


def test_the_rate_of_a_method_and_an_objective_has_both_reasons_and_the_presets_own_rate() -> None:
    both = {**training("dpo"), "adapter": "full", "quantization": "none"}
    resolved = load_mapping(both)
    assert resolved.config.training.learning_rate == pytest.approx(0.1 * 5e-6)
    assert reason_of_rate(resolved).startswith("full: 0.1 times LoRA's; ")
    assert "; dpo: 5e-06 with LoRA; the alignment handbook's QLoRA recipe" in reason_of_rate(resolved)
    assert "preset" not in reason_of_rate(resolved)

    preset = load_mapping({}, preset="production").config.training.learning_rate
    resolved = load_mapping(both, preset="production")
    # three digits are kept
    assert resolved.config.training.learning_rate == pytest.approx(preset * 0.1 * 5e-6 / SFT_LEARNING_RATE, rel=5e-3)
    assert "0.1 times" in reason_of_rate(resolved)
    assert "dpo: 5e-06 with LoRA" in reason_of_rate(resolved)
    assert reason_of_rate(resolved).endswith(f"in proportion to the preset's {preset:g} for sft with LoRA")

    alone = load_mapping({"adapter": "full", "quantization": "none"})
    assert alone.config.training.learning_rate == pytest.approx(0.1 * SFT_LEARNING_RATE)
    assert "dpo" not in reason_of_rate(alone)


@pytest.mark.parametrize("preset", ["laptop", "starter"])
def test_no_derived_rate_is_above_the_largest_in_use(preset: str) -> None:
    # Prompt tuning's, arXiv 2104.08691. The laptop preset's rate is the largest of all presets.
    for method in ("ia3", "vera", "prompt"):
        assert load_mapping({"adapter": method}, preset=preset).config.training.learning_rate < 0.3


def test_what_the_user_writes_wins() -> None:
    resolved = load_mapping(training("dpo", learning_rate=3e-5, preference={"beta": 0.3}))
    assert (resolved.config.training.learning_rate, resolved.config.training.preference.beta) == (3e-5, 0.3)


def test_a_presets_learning_rate_is_for_sft_and_is_kept_in_proportion() -> None:
    preset = load_mapping({}, preset="production").config.training.learning_rate
    resolved = load_mapping(training("dpo"), preset="production")
    assert resolved.config.training.learning_rate == pytest.approx(preset * 5e-6 / SFT_LEARNING_RATE, rel=1e-2)
    assert "in proportion to the preset's" in str(resolved.origins["training.learning_rate"].reason)
    assert load_mapping(training("sft"), preset="production").config.training.learning_rate == preset


def test_supervised_training_is_what_a_config_without_objective_is() -> None:
    resolved = load_mapping({})
    assert resolved.config.training.objective == "sft"
    assert resolved.config.training.learning_rate == SFT_LEARNING_RATE
    assert resolved.config.training.preference.beta is None


def test_long_texts_are_split_and_reward_models_are_not_compared_by_replies() -> None:
    assert load_mapping(training("cpt")).config.data.truncation == "split"
    assert load_mapping(training("cpt")).config.evaluation.max_generations == 0
    reward = load_mapping(training("reward"))
    assert not reward.config.evaluation.enabled
    assert "validation accuracy" in str(reward.origins["evaluation.enabled"].reason)


def test_nested_settings_are_read_written_and_overridden(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("training:\n  objective: dpo\n  preference:\n    loss: ipo\n")
    resolved = load_config(file, ["training.preference.beta=0.5"])
    assert (resolved.config.training.preference.loss, resolved.config.training.preference.beta) == ("ipo", 0.5)
    again = tmp_path / "again.yaml"
    again.write_text(resolved.to_yaml())
    assert load_config(again).config == resolved.config


TAUGHT = {"distillation": {"teacher": "owner/teacher"}}


@pytest.mark.parametrize(
    ("mapping", "code", "fix", "remedied"),
    [
        (
            training("dpo") | {"data": {"truncation": "split"}},
            "truncation-changes-preference", "truncation: drop", training("dpo") | {"data": {"truncation": "drop"}},
        ),
        (
            training("distill") | {"data": {"truncation": "truncate"}},
            "truncation-changes-preference", "drop",
            training("distill", **TAUGHT) | {"data": {"truncation": "truncate"}},
        ),
        (
            training("reward") | {"evaluation": {"enabled": True}},
            "evaluation-of-reward", "metrics.jsonl", training("reward"),
        ),
        (
            training("distill", distillation={"on_policy": 0.5}),
            "on-policy-without-teacher", "training.distillation.teacher",
            training("distill", distillation={"on_policy": 0.5, "teacher": "owner/teacher"}),
        ),
        (
            training("distill", distillation={"divergence": 1.0}),
            "divergence-needs-teacher", "training.distillation.teacher", training("distill"),
        ),
        (
            training("distill", distillation={"temperature": 2.0}),
            "divergence-needs-teacher", "remove both",
            training("distill", distillation={"temperature": 2.0, "teacher": "owner/teacher"}),
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_and_its_remedy_is_not(
    mapping: dict[str, Any], code: str, fix: str, remedied: dict[str, Any]
) -> None:
    with pytest.raises(AffinaErrors) as caught:
        load_mapping(mapping)
    (error,) = caught.value.errors
    assert error.code == code
    assert fix in str(error.fix)
    load_mapping(remedied)


@pytest.mark.parametrize(
    ("mapping", "path"),
    [
        (training("sft", preference={"beta": 0.2}), "training.preference.beta"),
        (training("orpo", preference={"loss": "ipo"}), "training.preference.loss"),
        (training("dpo", preference={"margin": 2}), "training.preference.margin"),
        (training("dpo", preference={"desirable_weight": 2}), "training.preference.desirable_weight"),
        (training("dpo", preference={"loss": "ipo", "label_smoothing": 0.1}), "training.preference.label_smoothing"),
        (training("kto", distillation={"temperature": 2}), "training.distillation.temperature"),
        (
            training("distill", distillation={"teacher": "owner/t", "max_new_tokens": 64}),
            "training.distillation.max_new_tokens",
        ),
        (training("dpo") | {"data": {"mask": "last"}}, "data.mask"),
    ],
)
def test_a_constant_that_the_objective_does_not_use_is_said(mapping: dict[str, Any], path: str) -> None:
    notes = {note.path: note.what for note in load_mapping(mapping).warnings}
    assert notes[path] == f"{path} has no effect"


def test_used_constants_are_not_reported() -> None:
    for mapping in (
        training("dpo", preference={"beta": 0.2, "loss": "ipo"}),
        training("simpo", preference={"beta": 2.5, "margin": 1.5, "label_smoothing": 0.1}),
        training("kto", preference={"desirable_weight": 1.3}),
        training("distill", distillation={"teacher": "owner/t", "on_policy": 0.5, "max_new_tokens": 64}),
    ):
        assert not [note for note in load_mapping(mapping).warnings if note.path.startswith("training.")]


def test_a_learning_rate_of_another_objective_is_said() -> None:
    mapping = training("dpo", learning_rate=2e-4) | {"model": "owner/model", "data": "owner/data"}
    (note,) = [note for note in load_mapping(mapping).warnings if note.path == "training.learning_rate"]
    assert "is high" in note.what
    assert "for dpo about 5e-06 is usual" in note.why
    low = training("sft", learning_rate=5e-6) | {"model": "owner/model", "data": "owner/data"}
    assert any("is low" in note.what for note in load_mapping(low).warnings)


@pytest.mark.parametrize(
    ("objective", "method", "rate", "what", "why"),
    [
        ("cpt", "lora", 1e-2, "0.01 is high", "LoRA on models of billions of parameters is best between"),
        ("distill", "lora", 5e-6, "5e-06 is low", "a rate for training all weights"),
        ("sft", "full", 1e-3, "0.001 is high", "wants 1e-4 to 5e-4, full 0.1 times that"),
        ("sft", "full", 1e-6, "1e-06 is low", "wants 1e-4 to 5e-4, full 0.1 times that"),
        ("dpo", "full", 2e-5, "2e-05 is high", "for dpo with full about 5e-07 is usual"),
        ("cpt", "lora", 2e-4, None, None),
        ("sft", "full", 1e-5, None, None),
    ],
)
def test_a_rate_is_compared_with_what_is_usual_for_objective_and_method(
    objective: str, method: str, rate: float, what: str | None, why: str | None
) -> None:
    mapping = training(objective, learning_rate=rate, **(TAUGHT if objective == "distill" else {})) | {
        "model": "owner/model", "data": "owner/data", "adapter": method, "quantization": "none",
    }  # fmt: skip
    notes = [note for note in load_mapping(mapping).warnings if note.path == "training.learning_rate"]
    if what is None:
        assert notes == []
        return
    assert notes[0].what == f"training.learning_rate {what}"
    assert str(why) in notes[0].why


def test_what_cannot_be_cut_says_why() -> None:
    reasons = {"dpo": "what was judged is the whole reply", "distill": "log-probabilities for every token"}
    for objective, reason in reasons.items():
        with pytest.raises(AffinaErrors) as caught:
            load_mapping(training(objective) | {"data": {"truncation": "truncate"}})
        assert reason in str(caught.value.errors[0].why)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"training": {"rl": "dpo"}}, "training.objective"),
        ({"training": {"dpo_beta": 0.1}}, "training.preference.beta"),
    ],
)
def test_names_of_other_tools_lead_to_ours(written: dict[str, Any], meant: str) -> None:
    with pytest.raises(AffinaErrors, match="unknown-key") as caught:
        load_mapping(written)
    assert meant in str(caught.value.errors[0].fix)


def test_the_recipe_is_a_valid_config_whose_data_is_still_to_be_named(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").touch()
    copy = tmp_path / "dpo.yaml"
    copy.write_text(RECIPE.read_text(encoding="utf-8"))
    resolved = load_config(copy)
    assert resolved.config.training.objective == "dpo"
    assert resolved.warnings == ()
