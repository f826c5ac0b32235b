"""Finds where each reply stands in a rendered conversation, without knowing the template.

The conversation is rendered twice: once as it is, and once with private-use characters around what the assistant
wrote (reasoning, content, names of called functions). If taking the marks out of the second rendering gives the first
one, character for character, then the marks' positions are the positions of the fields in the first. That is checked
for every conversation, so that no assumption about a template has to hold beyond the record at hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Render = Callable[[list[dict[str, Any]]], str]

# Pairs of private-use characters; the first pair that the conversation does not contain is used.
_MARK_PAIRS = tuple((chr(base), chr(base + 1)) for base in (0xF8D0, 0xF8E2, 0xE4A6, 0xF5D72, 0x10ABC2))


@dataclass(frozen=True, slots=True)
class FieldPositions:
    """Where the marked fields of one message stand in the plain text.

    first, last: positions of the first and the last mark, in characters
    kept:        marks that the template let through, by kind: "r" reasoning, "c" content, "n" names of calls
    placed:      marks that were put in
    """

    first: int
    last: int
    kept: dict[str, int]
    placed: dict[str, int]

    @property
    def has_lost_reasoning(self) -> bool:
        """Whether the template dropped reasoning: a field of its own, or one written into the content."""
        return any(self.kept.get(kind, 0) < self.placed.get(kind, 0) for kind in ("r", "c"))


Located = dict[int, FieldPositions | None]
"""Message index of every assistant message → its positions; None when nothing of the message was rendered."""


def locate_fields(plain: str, messages: Sequence[dict[str, Any]], render: Render) -> Located | None:
    """Where the assistant's messages stand in `plain`, or None where marks cannot follow the template."""
    for marks_names in (True, False):
        located = _locate(plain, messages, render, marks_names=marks_names)
        if located is not None:
            return located
    return None


def _locate(plain: str, messages: Sequence[dict[str, Any]], render: Render, *, marks_names: bool) -> Located | None:
    pair = next((pair for pair in _MARK_PAIRS if pair[0] not in plain and pair[1] not in plain), None)
    if pair is None:
        return None
    marked = [
        _mark_message(message, index, pair, marks_names=marks_names) if message["role"] == "assistant" else message
        for index, message in enumerate(messages)
    ]
    text, marks = _take_out_marks(render(marked), pair)
    if text != plain:
        return None
    placed = {
        index: _count_placed(message, marks_names=marks_names)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    }
    return _positions(marks, placed)


def _positions(marks: list[tuple[int, int, str]], placed: dict[int, dict[str, int]]) -> Located | None:
    by_message: dict[int, list[tuple[int, str]]] = {}
    for position, index, kind in marks:
        by_message.setdefault(index, []).append((position, kind))
    located: Located = {}
    previous_last = 0
    for index in sorted(placed):
        found = by_message.get(index)
        if not found:
            located[index] = None
            continue
        if found[0][0] < previous_last:
            return None
        kept: dict[str, int] = {}
        for _, kind in found:
            kept[kind] = kept.get(kind, 0) + 1
        located[index] = FieldPositions(found[0][0], found[-1][0], kept, placed[index])
        previous_last = found[-1][0]
    return located


def _mark_message(message: dict[str, Any], index: int, pair: tuple[str, str], *, marks_names: bool) -> dict[str, Any]:
    marked = dict(message)
    marked["content"] = _surround(message["content"], index, "c", pair)
    if message.get("reasoning_content"):
        marked["reasoning_content"] = _surround(message["reasoning_content"], index, "r", pair)
    if marks_names and message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": _surround(call["function"]["name"], index, "n", pair)}}
            for call in message["tool_calls"]
        ]
    return marked


def _surround(text: str, index: int, kind: str, pair: tuple[str, str]) -> str:
    """Marks inside the outer white space, because templates strip it; empty text stays empty, because they test it."""
    core = text.strip()
    if not core:
        return text
    start = text.index(core)
    mark = f"{pair[0]}{index}{kind}{pair[1]}"
    return f"{text[:start]}{mark}{core}{mark}{text[start + len(core) :]}"


def _count_placed(message: dict[str, Any], *, marks_names: bool) -> dict[str, int]:
    calls = message.get("tool_calls") or () if marks_names else ()
    return {
        "c": 2 if message["content"].strip() else 0,
        "r": 2 if (message.get("reasoning_content") or "").strip() else 0,
        "n": 2 * sum(1 for call in calls if call["function"]["name"].strip()),
    }


def _take_out_marks(marked: str, pair: tuple[str, str]) -> tuple[str, list[tuple[int, int, str]]]:
    """The text without marks, and (position in that text, message index, kind) of every mark in order."""
    pieces: list[str] = []
    marks: list[tuple[int, int, str]] = []
    position = cursor = 0
    for match in re.finditer(f"{pair[0]}(\\d+)([rcn]){pair[1]}", marked):
        piece = marked[cursor : match.start()]
        pieces.append(piece)
        position += len(piece)
        cursor = match.end()
        marks.append((position, int(match.group(1)), match.group(2)))
    pieces.append(marked[cursor:])
    return "".join(pieces), marks
