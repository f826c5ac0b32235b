"""Changes that make a run fit are the smallest, keep what is learned, and each says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from affina.catalog.gpus import gpus
from affina.catalog.model_files import find_config
from affina.catalog.shapes import read_shape
from affina.config import load_mapping
from affina.config.schema import RunConfig
from affina.errors import AffinaError, ConfigError
from affina.planning.coefficients import coefficients_for, learn, local_file, shipped_coefficients
from affina.planning.fit import apply, best_fit, memory_of, smallest_changes, workload_after
from affina.planning.forecast import card_as, cards_of, forecast, with_memory
from affina.planning.plan import plan_card
from affina.planning.workload import estimated_workload, longest_record_bytes, measured_workload
from tests.planning.setups import qwen3_4b


def config(preset: str = "premium", **sections: Any) -> RunConfig:
    return load_mapping({"extends": preset, "data": {"train": "affina/support"}, **sections}).config


def changes_for(which: RunConfig, card: str | float, *, may_quantize: bool = False) -> dict[str, Any]:
    gpu = gpus()[card] if isinstance(card, str) else with_memory(None, card)
    found = smallest_changes(which, qwen3_4b(), gpu, estimated_workload(which), may_quantize=may_quantize)
    for change in found:
        assert change.why
    return {change.path: change.value for change in found}


def test_the_smallest_change_keeps_the_effective_batch() -> None:
    which = config(training={"micro_batch_size": 4, "gradient_accumulation_steps": 2})
    found = changes_for(which, "rtx3060")
    assert found["training.micro_batch_size"] * found["training.gradient_accumulation_steps"] == 8
    assert "quantization.format" not in found
    changed = apply(
        which, smallest_changes(which, qwen3_4b(), gpus()["rtx3060"], estimated_workload(which), may_quantize=False)
    )
    workload = workload_after(changed, which, estimated_workload(which))
    assert memory_of(changed, qwen3_4b(), gpus()["rtx3060"], workload).fits


def test_another_weight_format_is_proposed_only_when_allowed() -> None:
    which = config(training={"micro_batch_size": 1, "gradient_accumulation_steps": 8})
    # 16-bit weights alone take 7.5 GiB.
    assert changes_for(which, 8.0) == {}
    assert changes_for(which, 8.0, may_quantize=True) == {"quantization.format": "nf4"}
    assert set(changes_for(which, 10.0)) == {"training.optimizer", "data.max_length", "adapter.rank"}
    # Where less is enough, leave is not made use of.
    assert changes_for(which, 12.0, may_quantize=True) == {"training.optimizer": "adamw_8bit"}


def test_recomputation_that_was_switched_off_is_the_first_thing_to_change() -> None:
    which = config("production", training={"gradient_checkpointing": False})
    assert changes_for(which, "rtx4090") == {"training.gradient_checkpointing": "auto"}


def test_replies_are_given_up_before_data_where_not_one_of_them_fits() -> None:
    which = config(
        "production",
        data={"train": "affina/support", "max_length": 32_768},
        training={"micro_batch_size": 1, "gradient_accumulation_steps": 1, "optimizer": "adamw_8bit"},
    )
    # Keys and values of one reply of 33,024 tokens take 4.5 GiB beside the weights; training sends its own to the host.
    assert changes_for(which, 8.0) == {"evaluation.max_generations": 0}


def test_on_a_cpu_within_a_limit_one_reply_at_a_time_is_proposed() -> None:
    which = config("laptop", engine={"memory": 0.15}, training={"gradient_checkpointing": "auto"})
    shape = read_shape(find_config("affina/nano")[0])
    changes = smallest_changes(which, shape, None, estimated_workload(which), may_quantize=False)
    assert {change.path: change.value for change in changes} == {"evaluation.batch_size": 1}


def test_the_time_of_a_comparison_is_that_of_the_batch_that_fits() -> None:
    which = config("production")
    small, large = (
        plan_card(which, qwen3_4b(), with_memory(None, gib), estimated_workload(which), (), with_changes=False)
        for gib in (8.0, 48.0)
    )
    assert small.memory.num_replies < large.memory.num_replies == 16
    assert small.generation_seconds is not None
    assert large.generation_seconds is not None
    assert small.generation_seconds > large.generation_seconds


@pytest.mark.parametrize("gib", [6, 12])
def test_the_best_fit_fits_and_says_why_of_every_choice(gib: float) -> None:
    which, card = config("production"), with_memory(None, gib)
    fit = best_fit(which, qwen3_4b(), card, estimated_workload(which), may_quantize=False)
    assert fit is not None
    assert fit.memory.peak_bytes <= gib * 2**30
    changed = apply(which, fit.changes).training
    assert changed.micro_batch_size * changed.gradient_accumulation_steps == 8
    for change in fit.changes:
        assert change.why
        assert f"{change.path}: {change.value}: {change.why}" in fit.reasons
    assert {change.path for change in fit.changes} == (
        {"training.micro_batch_size", "training.gradient_accumulation_steps"} if gib == 12 else set()
    )
    others = [reason for reason in fit.reasons if not any(reason.startswith(f"{c.path}:") for c in fit.changes)]
    stays = [f"layers keep {fit.memory.keeps}: the most", "quantization.format stays nf4: it fits"]
    if gib == 6:
        stays.insert(0, "training.micro_batch_size stays 2: no other cut")
    assert len(others) == len(stays)
    assert all(reason.startswith(start) for reason, start in zip(others, stays, strict=True)), others


def test_what_a_run_does_not_need_changed_stays_as_it_is() -> None:
    which = config(training={"micro_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": False})
    fit = best_fit(which, qwen3_4b(), gpus()["h200"], estimated_workload(which), may_quantize=False)
    assert fit is not None
    assert "training.gradient_checkpointing" not in {change.path for change in fit.changes}
    assert "layers keep everything for the backward pass: nothing is computed again" in " ".join(fit.reasons).replace(
        "; rows are captured as CUDA graphs", ""
    )


def ask(which: RunConfig, **options: Any) -> Any:
    resolved = load_mapping(which)
    defaults: dict[str, Any] = {
        "gpus": (), "prices": None, "fit_gib": None, "may_quantize": False, "workload": None, "trace": False,
    }  # fmt: skip
    return forecast(resolved, **{**defaults, **options})


def test_a_memory_in_which_nothing_runs_names_the_smallest_card() -> None:
    with pytest.raises(ConfigError, match=r"error\[nothing-fits\]: Qwen/Qwen3-4B does not fit into 2 GiB") as error:
        ask(config("production"), fit_gib=2.0)
    assert "the smallest card on which it runs as it is" in str(error.value)


def test_a_memory_in_which_only_another_format_runs_names_it() -> None:
    which = config(adapter={"rank": 16, "alpha": 32})
    with pytest.raises(ConfigError) as error:
        ask(which, fit_gib=7.0)
    assert "quantization.format=nf4" in str(error.value)
    assert "--may-quantize" in str(error.value)


def test_the_plan_of_a_fit_is_that_of_the_changed_settings() -> None:
    found = ask(config(), fit_gib=16.0, gpus=["rtx4090"])
    (card,) = found.plan.cards
    assert card.fits
    assert card.memory.total_bytes == found.fit.memory.total_bytes
    assert found.to_dict()["fit"]["gib"] == 16.0


def test_a_sequence_longer_than_the_context_says_what_is_native_and_what_yarn_gives() -> None:
    which = config("production").model_copy(
        update={"data": config("production").data.model_copy(update={"max_length": 50_000})}
    )
    with pytest.raises(ConfigError, match="longer-than-context") as error:
        ask(which, gpus=["h200"])
    for number in ("40,960", "32,768", "131,072"):
        assert number in str(error.value)


def test_this_card_without_a_driver_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("affina.planning.forecast.this_gpu", lambda: None)
    with pytest.raises(ConfigError, match=r"error\[gpu-not-here\]"):
        cards_of(config(), ["this"])


def test_cards_are_named_by_lists_and_commas_and_each_once() -> None:
    names = [card.name if card is not None else "cpu" for card in cards_of(config(), ["t4,l4", "t4", "cpu"])]
    assert names == ["t4", "l4", "cpu"]
    assert len(cards_of(config(), ["all"])) == len(gpus())


def test_a_card_that_the_catalog_lacks_is_taken_for_its_nearest_relative() -> None:
    card = card_as("NVIDIA GeForce RTX 4080", 16.0, "8.9")
    assert (card.architecture, card.capability) == ("ada", (8, 9))
    assert card.memory_gib < 16
    assert "RTX 4080" in card.title


# What there is to learn


def test_prepared_data_gives_the_very_steps_of_the_batch_plan() -> None:
    which = config("production", training={"epochs": 2})
    lengths, supervised = [1000, 500, 4096, 20] * 8, [10] * 32
    found = measured_workload(which, lengths, supervised, num_validation=3)
    assert (found.num_samples, found.num_tokens, found.longest) == (32, 8 * 5616, 4096)
    assert found.num_steps == 2 * (found.steps_per_epoch or 0)
    assert sum(found.row_lengths) <= 8192
    assert found.is_exact


def test_without_packing_the_longest_samples_may_meet() -> None:
    which = config("production", data={"train": "affina/support", "packing": False}, training={"micro_batch_size": 2})
    found = measured_workload(which, [100, 900, 50, 700], [1, 1, 1, 1], num_validation=0)
    assert found.row_lengths == (900, 700)


def test_files_are_measured_by_their_size_and_said_to_be_an_estimate(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text((json.dumps({"prompt": "x" * 380, "completion": "y"}) + "\n") * 1000)
    which = load_mapping({"extends": "production", "data": {"train": str(file), "validation_fraction": 0.0}}).config
    found = estimated_workload(which)
    assert not found.is_exact
    assert found.num_samples == 1000
    assert found.num_tokens == pytest.approx(file.stat().st_size / 4, rel=0.01)


RECORDS = [{"prompt": f"{index:04} " + "x" * 380, "completion": "y"} for index in range(1000)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        json.dumps({"data": RECORDS}),
        "\n".join(json.dumps(record) for record in RECORDS),
    ],
    ids=["array", "indented", "inside an object", "lines"],
)
def test_a_json_file_has_as_many_records_as_it_holds_however_it_is_laid_out(tmp_path: Path, text: str) -> None:
    import affina

    file = tmp_path / "data.json"
    file.write_text(text)
    which = load_mapping({"extends": "production", "data": {"train": str(file), "validation_fraction": 0.0}}).config
    found = estimated_workload(which)
    assert found.num_samples == 1000
    assert found.num_tokens == pytest.approx(sum(len(json.dumps(record)) for record in RECORDS) / 4, rel=0.01)
    assert longest_record_bytes(which) == len(json.dumps(RECORDS[0]))
    written = affina.recommend(model="affina/nano", data=str(file), gpu="t4", output=tmp_path / "run.yaml")
    values = {choice.path: choice.value for choice in written.choices}
    assert (values["data.max_length"], values["data.packing"]) == (512, True)  # a record has about 105 tokens


def test_more_records_than_are_measured_are_estimated_from_the_size(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(RECORDS * 3, indent=1))
    which = load_mapping({"data": {"train": str(tmp_path), "validation_fraction": 0.0}}).config
    # Brackets and commas between the records count as records' bytes, 1% here.
    assert estimated_workload(which).num_samples == pytest.approx(6000, rel=0.02)
    many = tmp_path / "many"
    many.mkdir()
    for index in range(25):
        (many / f"{index:02}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:10]))
    which = load_mapping({"data": {"train": str(many), "validation_fraction": 0.0}}).config
    assert estimated_workload(which).num_samples == 250


@pytest.mark.parametrize("content", ["[1, 2", "version https://git-lfs.github.com/spec/v1", "text"])
def test_a_json_file_that_is_none_leaves_the_size_unknown(tmp_path: Path, content: str) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    which = load_mapping({"data": str(file)}).config
    assert estimated_workload(which).num_samples is None
    assert longest_record_bytes(which) is None


@pytest.mark.parametrize(
    ("num_samples", "accumulation", "epochs", "steps_per_epoch", "num_steps"),
    [(8, 2, 1, 4, 4), (9, 2, 1, 5, 5), (6, 2, 1, 3, 3), (10, 4, 3, 3, 9), (8, 2, 1.1, 4, 5), (8, 2, 0.1, 4, 1)],
)
def test_steps_are_rounded_up_as_training_rounds_them(
    tmp_path: Path, num_samples: int, accumulation: int, epochs: float, steps_per_epoch: int, num_steps: int
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n' * num_samples)
    which = load_mapping(
        {
            "data": {"train": str(file), "validation_fraction": 0.0, "packing": False, "max_length": 64},
            "training": {"micro_batch_size": 1, "gradient_accumulation_steps": accumulation, "epochs": epochs},
        }
    ).config
    found = estimated_workload(which)
    exact = measured_workload(which, [8] * num_samples, [4] * num_samples, num_validation=0)
    assert (found.steps_per_epoch, found.num_steps) == (steps_per_epoch, num_steps)
    assert (exact.steps_per_epoch, exact.num_steps) == (steps_per_epoch, num_steps)


def test_data_that_is_not_here_leaves_tokens_unknown_but_max_steps_counts() -> None:
    which = load_mapping({"extends": "production", "data": {"train": "org/set"}, "training": {"max_steps": 50}}).config
    found = estimated_workload(which)
    assert (found.num_tokens, found.num_samples, found.num_steps) == (None, None, 50)


# What a machine learns


def test_a_finished_run_corrects_the_time_of_its_card_and_never_lowers_memory(own_cache: Path) -> None:
    options = {"predicted_bytes": 1000, "predicted_seconds": 1.0}
    learn("h100", "fast", "none", measured_seconds=1.5, measured_bytes=900, **options)  # type: ignore[arg-type]
    assert coefficients_for("h100", "fast", "none").time_factor == pytest.approx(1.5)
    assert coefficients_for("h100", "fast", "none").memory_factor == 1.0
    learn("h100", "fast", "none", measured_seconds=1.1, measured_bytes=1040, **options)  # type: ignore[arg-type]
    learned = coefficients_for("h100", "fast", "none")
    assert (learned.time_factor, learned.memory_factor) == (pytest.approx(1.3), pytest.approx(1.04))
    assert coefficients_for("h100", "fast", "nf4") == shipped_coefficients()
    assert own_cache in local_file().parents


def test_a_busy_machine_or_a_damaged_file_teaches_nothing(own_cache: Path) -> None:
    learn("t4", "fast", "none", predicted_seconds=1, measured_seconds=500, predicted_bytes=10, measured_bytes=None)
    assert coefficients_for("t4", "fast", "none") == shipped_coefficients()
    local_file().write_text("{ damaged")
    assert coefficients_for("t4", "fast", "none") == shipped_coefficients()


# Recommendations


def test_a_recommended_config_is_complete_fits_and_loads_again(tmp_path: Path) -> None:
    import affina

    output = tmp_path / "run.yaml"
    found = affina.recommend(model="Qwen/Qwen3-4B", data="affina/support", gpu="t4", output=output)
    values = {choice.path: choice.value for choice in found.choices}
    assert all(choice.why for choice in found.choices)
    assert values["training.precision"] == "fp16"
    assert found.plan.cards[0].fits
    settings = affina.check(output).config
    assert settings.training.learning_rate == values["training.learning_rate"]
    assert "# derived: T4 has no bfloat16" in output.read_text()
    with pytest.raises(ConfigError, match=r"error\[config-exists\]"):
        affina.recommend(model="Qwen/Qwen3-4B", data="affina/support", gpu="t4", output=output)


@pytest.mark.parametrize(
    ("num_layers", "format", "why"),
    [
        (36, "none", "16-bit weights fit on GeForce RTX 3060 12 GB"),
        (72, "nf4", "16-bit weights do not fit on GeForce RTX 3060 12 GB; 4.127 bits a weight do"),
    ],
)
def test_weights_are_quantised_on_a_card_that_does_not_hold_them_otherwise(
    tmp_path: Path, num_layers: int, format: str, why: str
) -> None:
    import affina

    raw = {**find_config("Qwen/Qwen3-4B")[0], "num_hidden_layers": num_layers}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = affina.recommend(model=str(tmp_path), data="affina/support", gpu="rtx3060", output=tmp_path / "a.yaml")
    chosen = next(choice for choice in found.choices if choice.path == "quantization.format")
    assert (chosen.value, chosen.why) == (format, why)
    assert found.plan.cards[0].fits


def test_a_recommendation_is_for_a_card(tmp_path: Path) -> None:
    import affina

    with pytest.raises(AffinaError, match=r"error\[recommend-without-card\]"):
        affina.recommend(model="affina/nano", data="affina/support", gpu="cpu", output=tmp_path / "a.yaml")
