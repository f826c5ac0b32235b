"""Conversations as text segments, exactly as chat_template.jinja renders them, with the trained part marked.

Jinja renders about 5,000 conversations a second; pre-training needs millions. A test compares the two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

EMPTY_THINKING = "<think>\n\n</think>\n\n"
TOOL_INTRODUCTION = "# Tools\n\nYou may call these functions:\n<tools>"
TOOL_INSTRUCTION = (
    "\n</tools>\n\nA call is one JSON object:\n<tool_call>\n"
    '{"name": <name>, "arguments": <object>}\n</tool_call><|im_end|>\n'
)


@dataclass(frozen=True, slots=True)
class Example:
    """One generated conversation: messages as a chat template takes them, and the tools on offer."""

    skill: str
    language: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of rendered text; `trained` when the loss covers it."""

    text: str
    trained: bool


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _reply(message: dict[str, Any]) -> str:
    """What the assistant writes in one turn, without the end-of-turn token."""
    text = ""
    if reasoning := message.get("reasoning_content"):
        text = f"<think>\n{reasoning}\n</think>\n\n"
    content = message["content"]
    text += content
    for index, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        text += "\n" if content or index else ""
        arguments = _json(function["arguments"])
        text += f'<tool_call>\n{{"name": {_json(function["name"])}, "arguments": {arguments}}}\n</tool_call>'
    return text


def render(example: Example, *, empty_thinking: bool = False) -> list[Segment]:
    """The conversation as alternating segments: given text, then a reply with its <|im_end|>, and so on.

    empty_thinking: replies without reasoning follow an untrained empty think block, which is the prompt that
    `enable_thinking=False` builds
    """
    segments: list[Segment] = []
    given = ""
    messages = example.messages
    start = 0
    if example.tools:
        given = "<|im_start|>system\n"
        if messages[0]["role"] == "system":
            given += messages[0]["content"] + "\n\n"
            start = 1
        given += TOOL_INTRODUCTION + "".join("\n" + _json(tool) for tool in example.tools) + TOOL_INSTRUCTION
    for index in range(start, len(messages)):
        message = messages[index]
        if message["role"] == "assistant":
            given += "<|im_start|>assistant\n"
            if empty_thinking and not message.get("reasoning_content"):
                given += EMPTY_THINKING
            segments += [Segment(given, False), Segment(_reply(message) + "<|im_end|>", True)]
            given = "\n"
        elif message["role"] == "tool":
            if messages[index - 1]["role"] != "tool":
                given += "<|im_start|>user"
            given += f"\n<tool_response>\n{message['content']}\n</tool_response>"
            if index + 1 == len(messages) or messages[index + 1]["role"] != "tool":
                given += "<|im_end|>\n"
        else:
            given += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return segments if given == "\n" else [*segments, Segment(given, False)]
