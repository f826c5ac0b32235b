"""Evaluation joined to real parts: the embedded model and data set, an adapter with an effect, packed scoring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from affina import api
from affina.config.schema import RunConfig
from affina.data.build import prepare_from_config, tokenizer_from_config
from affina.data.prepare import PreparedData
from affina.data.samples import IGNORED_LABEL, Sample
from affina.data.tokenizer import LoadedTokenizer
from affina.evaluation.build import (
    choose_samples,
    choose_tasks,
    compare_settings,
    contestant,
    context_tokens,
    decoder,
    evaluate_run,
    open_chat_session,
    score_samples,
)
from affina.models.build import LoadedModel, load_for_training
from affina.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The preset for laptops with a short evaluation and a cache of its own."""
    return api.check(
        {
            "extends": "laptop",
            "quantization": {"format": "none"},
            "data": {"cache_directory": str(tmp_path_factory.mktemp("cache"))},
            "evaluation": {"max_records": 8, "max_generations": 4, "max_new_tokens": 8, "bootstrap_resamples": 200},
        }
    ).config


@pytest.fixture(scope="module")
def tokenizer(config: RunConfig) -> LoadedTokenizer:
    return tokenizer_from_config(config.model)


@pytest.fixture(scope="module")
def data(config: RunConfig, tokenizer: LoadedTokenizer) -> PreparedData:
    return prepare_from_config(config, tokenizer)


@pytest.fixture(scope="module")
def loaded(config: RunConfig) -> LoadedModel:
    """The embedded model with a random adapter that changes its answers."""
    loaded = load_for_training(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return loaded


def plain_loss(loaded: LoadedModel, sample: Sample) -> float:
    """The sum of cross-entropies by transformers' own forward pass of this one sample."""
    ids = torch.from_numpy(sample.input_ids.astype(np.int64)).unsqueeze(0)
    labels = torch.from_numpy(sample.labels.astype(np.int64)).unsqueeze(0)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits.float()
    return float(
        torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED_LABEL, reduction="sum")
    )


def test_scores_of_packed_records_are_those_of_each_record_alone(
    config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    samples, _ = choose_samples(data, config.evaluation)
    tuned = contestant(loaded, tokenizer, config.evaluation, use_adapter=True)
    loaded.model.eval()
    for score, sample in zip(tuned.score(samples), samples, strict=True):
        # Two float32 paths (packed attention and chunked loss against transformers' own): rounding of sums of logits.
        assert score.nll == pytest.approx(plain_loss(loaded, sample), rel=1e-4)
        assert score.num_tokens == sample.num_supervised


def test_the_base_is_the_model_with_its_adapter_off_and_the_adapter_is_on_again_after(
    config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    samples, _ = choose_samples(data, config.evaluation)
    base = contestant(loaded, tokenizer, config.evaluation, use_adapter=False)
    tuned = contestant(loaded, tokenizer, config.evaluation, use_adapter=True)
    before = tuned.score(samples[:3])
    with loaded.model.disable_adapter():
        expected = [plain_loss(loaded, sample) for sample in samples[:3]]
    assert [score.nll for score in base.score(samples[:3])] == pytest.approx(expected, rel=1e-4)
    assert tuned.score(samples[:3]) == before
    assert abs(before[0].nll - expected[0]) > 0.01


def test_evaluation_leaves_a_model_in_training_as_it_was(
    config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    loaded.model.train()
    trainable = [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad]
    samples, _ = choose_samples(data, config.evaluation)
    for use_adapter in (False, True):
        one = contestant(loaded, tokenizer, config.evaluation, use_adapter=use_adapter)
        one.score(samples[:2])
        assert one.generate is not None
        one.generate([[1, 2, 3]])
    assert loaded.model.training
    assert [name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad] == trainable


def test_a_run_is_evaluated_into_its_directory(
    tmp_path: Path, config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.manifest_file.write_text('{"status": "finished"}')
    phases: list[str] = []
    result = evaluate_run(run, config, data, tokenizer, loaded, progress=lambda phase, done, of: phases.append(phase))
    values = json.loads((run.evaluation / "result.json").read_text())
    assert values == result.to_dict()
    assert values["n"] == 8
    assert values["num_replies"] == 4
    assert values["seconds"] > 0
    assert any("validation samples were drawn" in note for note in result.notes)
    assert len((run.evaluation / "samples.jsonl").read_text().splitlines()) == 4
    assert (run.evaluation / "report.html").is_file()
    assert "base model, perplexity" in phases
    again = evaluate_run(run, config, data, tokenizer, loaded)
    assert (again.base, again.tuned, again.perplexity) == (result.base, result.tuned, result.perplexity)


def test_replies_are_asked_for_as_training_laid_them_out(config: RunConfig, data: PreparedData) -> None:
    tasks, skipped = choose_tasks(data, config.evaluation, context_tokens=None)
    assert len(tasks) == 4
    assert skipped == []
    sample = next(
        data.validation[index]
        for index in range(len(data.validation))
        if data.validation.origin(index) == tasks[0].origin
    )
    prompt = sample.input_ids[: len(tasks[0].prompt_ids)].tolist()
    # The ids before the trained reply are the prompt that generation starts from, and the reply starts right after.
    assert prompt == list(tasks[0].prompt_ids)
    assert (sample.labels[: len(prompt)] == IGNORED_LABEL).all()
    assert sample.labels[len(prompt)] != IGNORED_LABEL


def test_drawn_records_depend_on_the_seed_and_not_on_the_limit(config: RunConfig, data: PreparedData) -> None:
    def origins(max_generations: int, seed: int) -> list[str]:
        settings = config.evaluation.model_copy(update={"max_generations": max_generations, "seed": seed})
        return [task.origin for task in choose_tasks(data, settings, context_tokens=None)[0]]

    assert origins(6, 0) == origins(12, 0)[:6]
    assert origins(6, 0) != origins(6, 1)
    assert origins(0, 0) == []


def test_prompts_that_leave_no_room_for_a_reply_are_left_out(config: RunConfig, data: PreparedData) -> None:
    tasks, skipped = choose_tasks(data, config.evaluation, context_tokens=16)
    assert tasks == []
    assert len(skipped) == len(data.validation_conversations)


def test_the_section_evaluation_becomes_plain_settings(config: RunConfig) -> None:
    settings = compare_settings(config.evaluation, torch.device("cpu"))
    assert (settings.num_resamples, settings.confidence, settings.num_samples) == (200, 0.95, 3)


def test_control_tokens_are_not_part_of_a_decoded_reply_and_tags_of_the_reply_are(tokenizer: LoadedTokenizer) -> None:
    text = "<think>\nhm\n</think>\n\na . b"
    ids: Sequence[int] = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    assert decoder(tokenizer)([*ids, *tokenizer.end_of_turn_ids]) == text


def test_a_chat_streams_both_models_from_the_same_prompt(
    config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    chat = open_chat_session(
        config, tokenizer, data.template, loaded, enable_thinking=data.enable_thinking, run="support"
    )
    chat.max_new_tokens = 8
    tuned = "".join(chat.reply("What is LoRA?"))
    base = "".join(chat.base_reply())
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert tuned != base
    with_adapter_off = contestant(loaded, tokenizer, config.evaluation, use_adapter=False)
    assert with_adapter_off.generate is not None
    ids = data.template.prompt_ids(chat.messages[:1], enable_thinking=data.enable_thinking)
    assert with_adapter_off.generate([ids])[0].text.startswith(base)


def test_the_adapter_is_on_while_nobody_takes_a_token(
    config: RunConfig, tokenizer: LoadedTokenizer, data: PreparedData, loaded: LoadedModel
) -> None:
    chat = open_chat_session(config, tokenizer, data.template, loaded)
    pieces = chat.base_reply("Tell me a story.")
    next(pieces)
    sample = data.validation[0]
    tuned = score_samples(loaded.model.eval(), [sample], pad_token_id=tokenizer.pad_id, device=loaded.device)
    pieces.close()  # type: ignore[attr-defined]
    after = score_samples(loaded.model.eval(), [sample], pad_token_id=tokenizer.pad_id, device=loaded.device)
    assert tuned == after


def test_the_context_is_what_the_model_s_config_says(loaded: LoadedModel) -> None:
    assert context_tokens(loaded.model) == loaded.model.config.max_position_embeddings
