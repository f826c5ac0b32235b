from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from affina.data.messages import Conversation, Message, ToolCall
from affina.errors import EvaluationError
from affina.evaluation.tasks.exact_match import (
    Generation,
    ReplyTask,
    accuracy,
    build_tasks,
    judge,
    prompt_text,
    reference_text,
    run_tasks,
)
from tests.evaluation.fakes import FakeGenerate, FakeTemplate


def conversation(*turns: tuple[str, str], origin: str = "a.jsonl:1", **changes: Any) -> Conversation:
    return Conversation(tuple(Message(role, text) for role, text in turns), origin=origin, **changes)  # type: ignore[arg-type]


def build(*conversations: Conversation, **options: Any) -> tuple[list[ReplyTask], list[str]]:
    template = FakeTemplate()
    tasks, skipped = build_tasks(conversations, template.prompt_ids, **{"max_tasks": 10, **options})
    return tasks, [entry.reason for entry in skipped]


def test_the_last_trained_reply_is_asked_for_from_the_prompt_before_it() -> None:
    (task,), _ = build(
        conversation(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
    )
    assert "".join(map(chr, task.prompt_ids)) == "user:a;assistant:b;user:c;"
    assert task.reference == "d"
    assert task.origin == "a.jsonl:1"


def test_a_reply_taken_out_of_the_loss_is_not_asked_for() -> None:
    messages = (
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d", train=False),
    )
    (task,), _ = build(Conversation(messages))
    assert task.reference == "b"
    assert task.prompt == "a"


def test_group_and_matcher_travel_with_the_task() -> None:
    (task,), _ = build(conversation(("user", "a"), ("assistant", '{"x": 1}'), group="doc-7"))
    assert (task.group, task.matcher) == ("doc-7", "json")


def test_conversations_that_cannot_be_a_task_are_named_with_the_reason() -> None:
    tasks, reasons = build(
        Conversation(text="plain text"),
        conversation(("assistant", "hello")),
        conversation(("system", "be kind"), ("assistant", "hello")),
        conversation(("user", "a"), ("assistant", "<think>only thoughts</think>")),
        conversation(("user", "long" * 50), ("assistant", "b")),
        conversation(("user", "a"), ("assistant", "b")),
        max_prompt_tokens=100,
    )
    assert len(tasks) == 1
    assert reasons == [
        "it has no trained reply",
        "nothing is asked before its last trained reply",
        "nothing is asked before its last trained reply",
        "its last trained reply is empty",
        "its prompt has 206 tokens, more than the 100 that fit",
    ]


def test_the_limit_counts_tasks_and_not_conversations() -> None:
    good = conversation(("user", "a"), ("assistant", "b"))
    tasks, reasons = build(Conversation(text="x"), good, good, good, max_tasks=2)
    assert len(tasks) == 2
    assert len(reasons) == 1


def test_tools_reach_the_template() -> None:
    seen: list[Any] = []

    def prompt_ids(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> list[int]:
        seen.append(tools)
        return [1]

    build_tasks([conversation(("user", "a"), ("assistant", "b"), tools=({"name": "t"},))], prompt_ids, max_tasks=1)
    assert seen == [({"name": "t"},)]


def test_a_reply_of_tool_calls_is_referred_to_as_the_model_writes_it() -> None:
    message = Message("assistant", "I look.", tool_calls=(ToolCall("weather", {"città": "Roma"}),))
    assert reference_text(message) == (
        'I look.\n<tool_call>\n{"name": "weather", "arguments": {"città": "Roma"}}\n</tool_call>'
    )
    (task,), _ = build(Conversation((Message("user", "a"), message)))
    assert task.matcher == "tool_calls"


def test_a_single_question_is_shown_bare_and_a_dialogue_with_its_roles() -> None:
    assert prompt_text([Message("user", "Hi")]) == "Hi"
    assert prompt_text([Message("system", "Be kind"), Message("user", "Hi")]) == "system: Be kind\n\nuser: Hi"


def test_thinking_is_not_part_of_the_answer_on_either_side() -> None:
    (task,), _ = build(conversation(("user", "a"), ("assistant", "<think>2+2</think>\n\n4")))
    outcome = judge(task, Generation("<think>\nlet me see\n</think>\n4.", 9, is_complete=True))
    assert outcome.is_right
    assert outcome.answer == "4."


def test_a_reply_cut_off_while_thinking_is_wrong_and_empty() -> None:
    (task,), _ = build(conversation(("user", "a"), ("assistant", "4")))
    outcome = judge(task, Generation("<think>\n4 4 4", 5, is_complete=False))
    assert not outcome.is_right
    assert outcome.answer == ""
    assert not outcome.is_complete


def test_outcomes_keep_the_order_of_tasks_though_batches_go_by_length() -> None:
    tasks = [ReplyTask((1,) * length, "p", str(length), "exact") for length in (3, 9, 1, 7, 5)]
    generate = FakeGenerate({task.prompt_ids: task.reference for task in tasks})
    progress: list[tuple[str, int, int]] = []
    outcomes = run_tasks(tasks, generate, batch_size=2, progress=lambda *state: progress.append(state))
    assert [outcome.answer for outcome in outcomes] == ["3", "9", "1", "7", "5"]
    assert generate.batches == [[9, 7], [5, 3], [1]]
    assert [done for _, done, _ in progress] == [2, 4, 5]


def test_accuracy_is_the_share_of_right_replies() -> None:
    tasks = [ReplyTask((index,), "p", "yes", "normalized") for index in range(4)]
    outcomes = run_tasks(tasks, FakeGenerate({(0,): "Yes.", (1,): "no", (2,): "YES", (3,): ""}))
    assert accuracy(outcomes) == 0.5


def test_accuracy_of_nothing_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(EvaluationError) as caught:
        accuracy([])
    assert caught.value.render() == (
        "error[evaluation-no-replies]: no validation record has a reply that can be compared\n"
        "  fix: add conversations with trained replies to data.validation, or set evaluation.max_generations: 0"
    )
