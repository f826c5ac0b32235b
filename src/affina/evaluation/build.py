"""Joins a run, its data and its model to an evaluation or a chat. Here the config stops."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from affina.config.schema import EvaluationConfig, RunConfig
from affina.data.collate import collate
from affina.data.run_data import RunData
from affina.data.samples import Sample, SampleStore
from affina.data.templates import ChatTemplate
from affina.data.tokenizer import LoadedTokenizer
from affina.evaluation.chat import ChatSession, Decode
from affina.evaluation.compare import CompareSettings, Contestant, EvaluationResult, compare
from affina.evaluation.files import save_result
from affina.evaluation.perplexity import Progress, RecordScore, no_progress
from affina.evaluation.tasks.exact_match import Generation, ReplyTask, SkippedConversation, build_tasks
from affina.models.adapters import adapter_disabled
from affina.models.build import LoadedModel
from affina.models.forward import evaluation_mode, supervised_token_losses
from affina.models.generate import generate, stream
from affina.models.structure import base_model_of, text_config
from affina.runs.directory import RunDirectory

MAX_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Tokens scored in one forward pass. A CPU gains nothing beyond its caches, a GPU needs the work to be busy."""


def evaluate_run(
    run: RunDirectory,
    config: RunConfig,
    data: RunData,
    tokenizer: LoadedTokenizer,
    loaded: LoadedModel,
    *,
    progress: Progress = no_progress,
    notes: Sequence[str] = (),
) -> EvaluationResult:
    """Base against adapter on the run's validation records; writes evaluation/ and returns the result with its paths.

    notes: sentences that the result carries besides its own

    Raises EvaluationError `evaluation-no-records` for a run without validation data, `evaluation-not-finite`.
    """
    started = time.monotonic()
    settings = config.evaluation
    samples, groups = choose_samples(data, settings)
    tasks, skipped = choose_tasks(data, settings, context_tokens=context_tokens(loaded.model))
    result = compare(
        contestant(loaded, tokenizer, settings, use_adapter=False),
        contestant(loaded, tokenizer, settings, use_adapter=True),
        samples,
        tasks,
        sample_groups=groups,
        settings=compare_settings(settings, loaded.device),
        notes=[*notes, *_notes(data, samples, skipped)],
        progress=progress,
    )
    return save_result(run, replace(result, seconds=round(time.monotonic() - started, 1)))


def compare_settings(settings: EvaluationConfig, device: torch.device) -> CompareSettings:
    """The section `evaluation` as plain values."""
    return CompareSettings(
        confidence=settings.confidence,
        num_resamples=settings.bootstrap_resamples,
        seed=settings.seed,
        num_samples=settings.num_samples,
        batch_size=settings.batch_size,
        max_tokens_at_once=MAX_TOKENS_AT_ONCE.get(device.type, MAX_TOKENS_AT_ONCE["cpu"]),
    )


def choose_samples(data: RunData, settings: EvaluationConfig) -> tuple[list[Sample], list[str | None]]:
    """At most `max_records` validation samples, drawn with the evaluation's seed, and the group of each.

    A group is what the record says (document, customer), else the record itself: with one sample per reply, the
    samples of one conversation are not independent.
    """
    store = data.validation
    indices = _draw(len(store), settings.max_records, settings.seed)
    group_of = {conversation.origin: conversation.group for conversation in data.validation_conversations}
    origins = [store.origin(index) for index in indices]
    samples = [preferred_reply(sample) for sample in store.take(indices)]
    groups = [group_of.get(origin) or origin or None for origin in origins]
    kept = [index for index, sample in enumerate(samples) if sample is not None]
    return [sample for sample in samples if sample is not None], [groups[index] for index in kept]


def preferred_reply(sample: Sample) -> Sample | None:
    """What of a sample a good model finds likely: all of it, the chosen text of a pair, a wanted reply; else None."""
    return None if sample.desirable is False else sample.split()[0]


def choose_tasks(
    data: RunData, settings: EvaluationConfig, *, context_tokens: int | None
) -> tuple[list[ReplyTask], list[SkippedConversation]]:
    """At most `max_generations` replies to generate, from validation conversations drawn with the evaluation's seed."""
    if settings.max_generations == 0:
        return [], []
    store = data.validation_conversations
    order = _draw(len(store), len(store), settings.seed, is_sorted=False)
    room = None if context_tokens is None else max(context_tokens - settings.max_new_tokens, context_tokens // 2)
    return build_tasks(
        # A reply that is labelled unwanted is nothing to compare with.
        (record for record in store.select(order) if record.desirable is not False),
        lambda messages, tools: data.template.prompt_ids(messages, tools, enable_thinking=data.enable_thinking),
        match=settings.match,
        max_tasks=settings.max_generations,
        max_prompt_tokens=room,
    )


def contestant(
    loaded: LoadedModel, tokenizer: LoadedTokenizer, settings: EvaluationConfig, *, use_adapter: bool
) -> Contestant:
    """The loaded model with its adapter, or with the adapter switched off: the base."""
    model = loaded.model
    context = context_tokens(model)
    decode = decoder(tokenizer)

    def score(samples: Sequence[Sample], /) -> list[RecordScore]:
        with _as_wanted(model, use_adapter), evaluation_mode(model):
            return score_samples(model, samples, pad_token_id=tokenizer.pad_id, device=loaded.device)

    def reply(prompts: Sequence[Sequence[int]], /) -> list[Generation]:
        with _as_wanted(model, use_adapter):
            replies = generate(
                model,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                stop_ids=tokenizer.end_of_turn_ids,
                batch_size=len(prompts),
            )
        return [
            Generation(decode(ids), len(ids), len(ids) < _room(settings.max_new_tokens, context, len(prompt)))
            for ids, prompt in zip(replies, prompts, strict=True)
        ]

    return Contestant(score, reply)


def score_samples(
    model: nn.Module, samples: Sequence[Sample], *, pad_token_id: int, device: torch.device
) -> list[RecordScore]:
    """The scores of samples that share one packed row, each seeing only itself. Sums are taken in float64."""
    batch = collate(samples, num_tokens=None, pad_token_id=pad_token_id).to(device)
    losses = supervised_token_losses(model, batch).double().cpu().numpy()
    ends = np.cumsum([len(sample) for sample in samples])
    return [
        RecordScore(float(losses[end - len(sample) : end].sum()), sample.num_supervised)
        for sample, end in zip(samples, ends.tolist(), strict=True)
    ]


def open_chat_session(
    config: RunConfig,
    tokenizer: LoadedTokenizer,
    template: ChatTemplate,
    loaded: LoadedModel,
    *,
    enable_thinking: bool | None = None,
    run: str = "",
) -> ChatSession:
    """A conversation with the loaded model.

    enable_thinking: how the trained prompts were laid out, from the adapter's template contract; without it a model
                     that was trained on plain replies is asked to think first, which it has not learnt
    run:             the run's name, for the greeting
    """
    model = loaded.model

    def tokens(
        prompt_ids: Sequence[int], /, *, use_adapter: bool, max_new_tokens: int, temperature: float
    ) -> Iterator[int]:
        generated = stream(
            model,
            prompt_ids,
            max_new_tokens=max_new_tokens,
            stop_ids=tokenizer.end_of_turn_ids,
            temperature=temperature,
            seed=config.evaluation.seed,
        )
        while True:
            # The adapter is off only while a token is made: between two tokens anything may use the model.
            with _as_wanted(model, use_adapter):
                token = next(generated, None)
            if token is None:
                return
            yield token

    return ChatSession(
        tokens,
        template,
        decoder(tokenizer),
        context_tokens=context_tokens(model),
        enable_thinking=enable_thinking,
        run=run,
        model=config.model.path,
    )


def decoder(tokenizer: LoadedTokenizer) -> Decode:
    """From ids to text without control tokens; think and tool-call tags stay, they belong to the reply."""

    def decode(ids: Sequence[int]) -> str:
        # Cleaning up spaces would change text that has them on purpose ("a ." in code) and break streaming.
        text: str = tokenizer.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    return decode


def context_tokens(model: nn.Module) -> int | None:
    """The longest input the model's config allows, in tokens; None where it does not say."""
    length = getattr(text_config(base_model_of(model)), "max_position_embeddings", None)
    return int(length) if length else None


def _as_wanted(model: nn.Module, use_adapter: bool) -> AbstractContextManager[None]:
    return nullcontext() if use_adapter else adapter_disabled(model)


def _room(max_new_tokens: int, context: int | None, prompt_tokens: int) -> int:
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt_tokens)


def draw_samples(store: SampleStore, count: int, seed: int) -> list[Sample]:
    """At most `count` samples, drawn with `seed`, in their order."""
    return store.take(_draw(len(store), count, seed))


def _draw(num_all: int, num_wanted: int, seed: int, *, is_sorted: bool = True) -> list[int]:
    """Indices of a seeded sample: files are often sorted by topic or length, and their beginning is not typical."""
    chosen = np.random.default_rng(seed).permutation(num_all)[:num_wanted]
    return [int(index) for index in (np.sort(chosen) if is_sorted else chosen)]


def _notes(data: RunData, samples: Sequence[Sample], skipped: Sequence[SkippedConversation]) -> list[str]:
    notes = []
    if len(samples) < len(data.validation):
        notes.append(
            f"{len(samples):,} of {len(data.validation):,} validation samples were drawn (evaluation.max_records)"
        )
    # Prompt lengths differ from record to record; the kind of reason is what counts.
    for reason, number in Counter(entry.reason.split(" has ")[0] for entry in skipped).most_common(3):
        example = next(entry for entry in skipped if entry.reason.startswith(reason))
        notes.append(
            f"no reply was generated for {number:,} validation records: {example.reason}"
            + (f" ({example.origin}, for instance)" if example.origin else "")
        )
    return notes
