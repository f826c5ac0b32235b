"""Intervals and warm-up that the user left open."""

from __future__ import annotations

from affina.config.schema import TrainingConfig
from affina.runs.checkpoints import checkpoint_bytes
from affina.training.build import build_schedule, build_settings


def test_a_run_is_validated_and_saved_about_ten_times() -> None:
    settings = build_settings(TrainingConfig(), num_steps=200, tokens_per_step=1000.0, validation_tokens=7000)
    assert (settings.evaluate_every_steps, settings.save_every_steps) == (20, 20)


def test_a_large_validation_set_is_measured_less_often_but_checkpoints_keep_coming() -> None:
    settings = build_settings(TrainingConfig(), num_steps=100, tokens_per_step=8000.0, validation_tokens=150_000)
    # 150,000 / 3 tokens' worth of work every n steps of 8,000: 15% at n = 42
    assert (settings.evaluate_every_steps, settings.save_every_steps) == (42, 10)


def test_what_the_user_says_holds() -> None:
    config = TrainingConfig(evaluate_every_steps=3, save_every_steps=7)
    settings = build_settings(config, num_steps=100, tokens_per_step=1.0, validation_tokens=10**9)
    assert (settings.evaluate_every_steps, settings.save_every_steps) == (3, 7)


def test_without_a_validation_set_nothing_depends_on_one() -> None:
    config = TrainingConfig(early_stopping_patience=2, keep_best=True)
    settings = build_settings(config, num_steps=5, tokens_per_step=100.0, validation_tokens=0)
    assert settings.evaluate_every_steps is None
    assert settings.early_stopping_patience is None
    assert not settings.save_best
    assert settings.save_every_steps == 1


def test_warm_up_is_three_percent_and_never_longer_than_the_run() -> None:
    assert build_schedule(TrainingConfig(), num_steps=1000).warmup_steps == 30
    assert build_schedule(TrainingConfig(), num_steps=5).warmup_steps == 1
    assert build_schedule(TrainingConfig(warmup_steps=50), num_steps=20).warmup_steps == 20


def test_disk_space_counts_checkpoints_the_best_and_the_result() -> None:
    # fp32 adapter and two moments, three kept and two in the making, plus the result
    assert checkpoint_bytes(1_000_000, keep_last=3) == (12_000_000 + (1 << 20)) * 5 + 4_000_000
