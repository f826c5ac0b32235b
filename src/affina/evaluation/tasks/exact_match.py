"""Exact-match accuracy: does the model give the reply that the record holds?

For each validation conversation the last trained reply is taken out, the model generates from the prompt before it,
and the two are compared by one of `matchers`. Thinking blocks are not part of an answer on either side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from affina.data.messages import Conversation, Message
from affina.errors import EvaluationError
from affina.evaluation.matchers import MATCHERS, MatcherName, MatchSetting, choose_matcher, final_answer
from affina.evaluation.perplexity import Progress, no_progress


@dataclass(frozen=True, slots=True)
class ReplyTask:
    """One reply to be given.

    prompt_ids: the token ids that generation starts from, as serving would build them
    prompt:     the same for people: the turns before the reply
    reference:  the reply of the record, without its thinking; tool calls as <tool_call> blocks
    matcher:    how a reply is compared with the reference
    origin:     `file:line` of the record
    group:      records with the same group are not independent
    """

    prompt_ids: tuple[int, ...]
    prompt: str
    reference: str
    matcher: MatcherName
    origin: str = ""
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """One generated reply, before thinking is removed. `is_complete` is False when the token limit ended it."""

    text: str
    num_tokens: int
    is_complete: bool


class Generate(Protocol):
    """Greedy replies to prompts of token ids, in the order given, one batch at a time."""

    def __call__(self, prompts: Sequence[Sequence[int]], /) -> Sequence[Generation]: ...


@dataclass(frozen=True, slots=True)
class ReplyOutcome:
    """What a model answered to one task: the answer without thinking, and whether it is right."""

    answer: str
    is_right: bool
    num_tokens: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class SkippedConversation:
    """A conversation that cannot be a task, and why."""

    origin: str
    reason: str


PromptIds = Callable[[Sequence[Message], Sequence[dict[str, Any]]], Sequence[int]]
"""From messages and tools to the ids that generation starts from (`ChatTemplate.prompt_ids`)."""


def build_tasks(
    conversations: Iterable[Conversation],
    prompt_ids: PromptIds,
    *,
    match: MatchSetting = "auto",
    max_tasks: int,
    max_prompt_tokens: int | None = None,
) -> tuple[list[ReplyTask], list[SkippedConversation]]:
    """At most `max_tasks` tasks, from the first conversations that can be one, and those that could not.

    max_prompt_tokens: longer prompts are left out: the reply would not fit into the model's context
    """
    tasks: list[ReplyTask] = []
    skipped: list[SkippedConversation] = []
    for conversation in conversations:
        if len(tasks) == max_tasks:
            break
        task = _build_task(conversation, prompt_ids, match, max_prompt_tokens)
        if isinstance(task, ReplyTask):
            tasks.append(task)
        else:
            skipped.append(task)
    return tasks, skipped


def run_tasks(
    tasks: Sequence[ReplyTask],
    generate: Generate,
    *,
    batch_size: int = 16,
    phase: str = "replies",
    progress: Progress = no_progress,
) -> list[ReplyOutcome]:
    """The outcome of each task, in order. Prompts of similar length share a batch, so that little is padding."""
    outcomes: list[ReplyOutcome | None] = [None] * len(tasks)
    by_length = sorted(range(len(tasks)), key=lambda index: len(tasks[index].prompt_ids), reverse=True)
    for start in range(0, len(tasks), batch_size):
        batch = by_length[start : start + batch_size]
        generations = generate([tasks[index].prompt_ids for index in batch])
        for index, generation in zip(batch, generations, strict=True):
            outcomes[index] = judge(tasks[index], generation)
        progress(phase, start + len(batch), len(tasks))
    return [outcome for outcome in outcomes if outcome is not None]


def judge(task: ReplyTask, generation: Generation) -> ReplyOutcome:
    """Compare one generated reply with the task's reference."""
    answer = final_answer(generation.text)
    is_right = MATCHERS[task.matcher](answer, task.reference)
    return ReplyOutcome(answer, is_right, generation.num_tokens, generation.is_complete)


def accuracy(outcomes: Sequence[ReplyOutcome]) -> float:
    """Share of right replies. Raises EvaluationError `evaluation-no-replies` for none at all."""
    if not outcomes:
        raise EvaluationError(
            "evaluation-no-replies",
            "no validation record has a reply that can be compared",
            fix="add conversations with trained replies to data.validation, or set evaluation.max_generations: 0",
        )
    return sum(outcome.is_right for outcome in outcomes) / len(outcomes)


def reference_text(message: Message) -> str:
    """The reply as a model would write it, without thinking: its text, then its calls as <tool_call> blocks."""
    calls = [
        "<tool_call>\n"
        + json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        + "\n</tool_call>"
        for call in message.tool_calls
    ]
    return "\n".join(part for part in (final_answer(message.content), *calls) if part)


def prompt_text(messages: Sequence[Message]) -> str:
    """The turns for people: the bare text when there is one user turn, else each turn with its role."""
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return "\n\n".join(f"{message.role}: {reference_text(message)}" for message in messages)


def _build_task(
    conversation: Conversation, prompt_ids: PromptIds, match: MatchSetting, max_prompt_tokens: int | None
) -> ReplyTask | SkippedConversation:
    position = _last_trained_reply(conversation)
    if position is None:
        return SkippedConversation(conversation.origin, "it has no trained reply")
    before = conversation.messages[:position]
    if not any(message.role in ("user", "tool") for message in before):
        return SkippedConversation(conversation.origin, "nothing is asked before its last trained reply")
    reference = reference_text(conversation.messages[position])
    if not reference:
        return SkippedConversation(conversation.origin, "its last trained reply is empty")
    ids = tuple(prompt_ids(before, conversation.tools))
    if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
        return SkippedConversation(
            conversation.origin, f"its prompt has {len(ids)} tokens, more than the {max_prompt_tokens} that fit"
        )
    return ReplyTask(
        prompt_ids=ids,
        prompt=prompt_text(before),
        reference=reference,
        matcher=choose_matcher(match, reference),
        origin=conversation.origin,
        group=conversation.group,
    )


def _last_trained_reply(conversation: Conversation) -> int | None:
    for position in range(len(conversation.messages) - 1, -1, -1):
        message = conversation.messages[position]
        if message.role == "assistant" and message.train:
            return position
    return None
