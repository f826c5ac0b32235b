"""Records of preferences in the formats that people have: pairs, ranked replies, labels.

A pair becomes one conversation whose `messages` are the prompt and the chosen reply, with the rejected ones beside it
in `rejected`. The prompt is a column of its own, or what both conversations begin with. Replies inside the prompt are
context. A ranked list gives the best reply against each that is worse. A tree (OpenAssistant) gives that for every
question in it. A label (KTO) says of the last reply whether it is wanted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from affina.config.objectives import Records
from affina.data.formats import ROLE_NAMES, Converter, DetectedFormat, is_turns, to_conversation, untrained
from affina.data.messages import Conversation, Message
from affina.data.preference_formats import TEACHER, TEACHER_SHAPE, read_label
from affina.data.records import RawRecord, shorten
from affina.errors import DataError

_REPLY_TEXTS: Final = ("text", "response", "content", "completion", "answer", "reply", "value")
_TEACHER_KEYS: Final = ("token_ids", "log_probabilities")
_DIALOGUE: Final = re.compile(r"\n\n(Human|Assistant):")


def to_conversations(
    record: RawRecord, detected: DetectedFormat, *, wanted: Records = "replies", source: int = 0
) -> list[Conversation]:
    """What a record holds for an objective that wants such records; [] where it prefers nothing to anything.

    raises: DataError at the record's location
    """
    if wanted not in ("pairs", "labels"):
        conversation = to_conversation(record, detected, source=source)
        return [_with_teacher(conversation, record) if wanted == "taught" else conversation]
    convert = _PreferenceConverter(Converter(record, detected.columns))
    found = {
        "preference": convert.pair,
        "ranking": convert.ranking,
        "tree": convert.tree,
        "labelled": convert.labelled,
    }[detected.format]()
    if wanted == "labels" and detected.format != "labelled":
        found = [single for pair in found for single in _unpaired(pair)]
    group = convert.base.group()
    return [replace(entry, group=group, origin=str(record.location), source=source) for entry in found]


def _with_teacher(conversation: Conversation, record: RawRecord) -> Conversation:
    teacher = record.value.get(TEACHER)
    ids, values = (teacher.get(key) if isinstance(teacher, Mapping) else None for key in _TEACHER_KEYS)
    is_right = (
        isinstance(ids, list)
        and isinstance(values, list)
        and len(ids) == len(values) > 0
        and all(isinstance(row, list) and len(row) == len(ids[0]) > 0 for row in (*ids, *values))
        and all(isinstance(i, int) and i >= 0 for row in ids for i in row)
        and all(isinstance(v, int | float) and v <= 1e-4 for row in values for v in row)
    )
    if not is_right:
        raise DataError(
            "bad-teacher",
            f'"{TEACHER}" is {shorten(teacher, limit=60)}',
            why="for each trained token it has the same number of token ids and of natural log-probabilities (≤ 0)",
            fix=f"write {TEACHER_SHAPE}",
            where=record.location,
        )
    return replace(conversation, metadata={**conversation.metadata, TEACHER: {"token_ids": ids, "values": values}})


def _unpaired(pair: Conversation) -> Iterator[Conversation]:
    yield replace(pair, rejected=(), desirable=True)
    for turns in pair.rejected:
        yield replace(pair, messages=turns, rejected=(), desirable=False)


@dataclass(frozen=True, slots=True)
class _PreferenceConverter:
    base: Converter

    def pair(self) -> list[Conversation]:
        base, columns = self.base, self.base.columns
        base.refuse_media()
        texts = [
            self.candidate(field, path) for field, path in (("chosen", columns.chosen), ("rejected", columns.rejected))
        ]
        if columns.prompt is not None and not any(text[0].role in ("system", "user") for text in texts if text):
            prompt, tools = base.prompt()
        else:
            prompt, tools = (), ()
        return [self.preference(prompt, texts, tools)]

    def candidate(self, field: str, path: str | None) -> tuple[Message, ...]:
        value = self.base.required(field, path)
        if isinstance(value, str) and not is_turns(value) and _DIALOGUE.match(f"\n\n{value.lstrip()}"):
            return self.dialogue(value)
        return self.base.reply(field, path)

    def dialogue(self, text: str) -> tuple[Message, ...]:
        """Turns written as one text: Human: …, Assistant: …, with empty lines between (Anthropic HH)."""
        pieces = _DIALOGUE.split(f"\n\n{text.lstrip()}")[1:]
        turns = zip(pieces[::2], (piece.strip() for piece in pieces[1::2]), strict=True)
        return tuple(Message("user", said) if who == "Human" else self.base.assistant(said) for who, said in turns)

    def preference(
        self, prompt: tuple[Message, ...], texts: Sequence[tuple[Message, ...]], tools: tuple[dict[str, Any], ...]
    ) -> Conversation:
        """One conversation of the best text and all others, each behind the prompt that they share."""
        base = self.base
        whole = [base.with_system((*prompt, *text)) for text in texts]
        if not any(message.role == "user" for message in whole[0]):
            raise base.error(
                "missing-prompt",
                "the record has two replies and no prompt that they answer",
                "name its column: columns: {prompt: …}",
            )
        best, *others = whole
        length = 0
        for turns in others:
            if _bare(turns) == _bare(best):
                raise base.error(
                    "pair-without-difference",
                    "the chosen and the rejected conversation are the same",
                    "remove the record: there is nothing to prefer",
                )
        shortest = min(len(turns) for turns in whole)
        while length < shortest and all(
            _bare(turns[length : length + 1]) == _bare(best[length : length + 1]) for turns in others
        ):
            length += 1
        if length == shortest or any(turns[length].role != "assistant" for turns in whole):
            raise base.error(
                "pair-prompts-differ",
                f"the chosen and the rejected conversation part at message {length + 1}, which is not a reply in both",
                "give both the same prompt; only replies may differ",
                "a preference compares two replies to one prompt",
            )
        shared = untrained(best[:length])
        best, *others = [shared + turns[length:] for turns in whole]
        return Conversation(messages=best, rejected=tuple(others), tools=base.tools() or tools)

    def ranking(self) -> list[Conversation]:
        base, columns = self.base, self.base.columns
        base.refuse_media()
        items = base.required("replies", columns.replies)
        if isinstance(items, str):
            items = base.decode("replies", items)
        if not isinstance(items, list) or len(items) < 2:
            raise base.error(
                "bad-ranking",
                f'"{columns.replies}" holds {shorten(items, limit=40)}',
                "write a list of two or more replies to the prompt",
            )
        prompt, tools = base.prompt()
        places = self.places(items)
        best = min(range(len(items)), key=lambda index: places[index])
        worse = [index for index in range(len(items)) if places[index] > places[best]]
        if not worse:
            return []
        return [self.preference(prompt, [self.item(items[index]) for index in (best, *worse)], tools)]

    def item(self, value: Any) -> tuple[Message, ...]:
        if isinstance(value, Mapping) and not is_turns(value):
            text = next((value[key] for key in _REPLY_TEXTS if isinstance(value.get(key), str)), None)
            if text is None:
                raise self.base.error(
                    "bad-ranking", f"a reply of the ranking has no text: {shorten(dict(value))}", 'write {"text": "…"}'
                )
            value = text
        if is_turns(value):
            return self.base.guess_messages("replies", value)[0]
        if not isinstance(value, str):
            raise self.base.error("bad-ranking", f"a reply of the ranking is {shorten(value)}", "write it as a string")
        return (self.base.assistant(value),)

    def places(self, items: Sequence[Any]) -> list[float]:
        """A number for each reply; the smaller, the better."""
        columns = self.base.columns
        name, sign = (columns.ranks, 1.0) if columns.ranks else (columns.scores, -1.0)
        assert name is not None, "detection names ranks or scores"
        values = self.base.value(name)
        if isinstance(values, str):
            values = self.base.decode("ranks", values)
        if values is None:
            values = [item.get(name) if isinstance(item, Mapping) else None for item in items]
        if (
            not isinstance(values, list)
            or len(values) != len(items)
            or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        ):
            raise self.base.error(
                "bad-ranking",
                f'"{name}" holds {shorten(values, limit=40)} for {len(items)} replies',
                "write one number for each reply, in their order",
            )
        return [sign * value for value in values]

    def tree(self) -> list[Conversation]:
        columns = self.base.columns
        root = self.base.required("prompt", columns.prompt) if columns.prompt else self.base.record.value
        return list(self.questions(root, ()))

    def questions(self, node: Mapping[str, Any], before: tuple[Message, ...]) -> Iterator[Conversation]:
        """The preference at this question, and those at the questions below it."""
        role = ROLE_NAMES.get(str(node.get("role", "user")).lower())
        text = node.get("text")
        if role is None or not isinstance(text, str):
            raise self.base.error(
                "bad-tree",
                f"a message of the tree has the role {shorten(node.get('role'))} and the text {shorten(text)}",
                'write {"role": "prompter" or "assistant", "text": "…", "replies": […]}',
            )
        path = (*before, self.base.assistant(text, train=False) if role == "assistant" else Message(role, text))
        children = [child for child in node.get("replies") or () if isinstance(child, Mapping)]
        ranked = [child for child in children if isinstance(child.get("rank"), int | float) and role == "user"]
        ranked.sort(key=lambda child: child["rank"])
        worse = [child for child in ranked if child["rank"] > ranked[0]["rank"]]
        if worse:
            replies = [(self.base.assistant(str(child.get("text", ""))),) for child in (ranked[0], *worse)]
            yield self.preference(path, replies, ())
        for child in children:
            yield from self.questions(child, path)

    def labelled(self) -> list[Conversation]:
        base, columns = self.base, self.base.columns
        value = base.required("label", columns.label)
        label = read_label(value)
        if label is None:
            raise base.error(
                "bad-label",
                f'"{columns.label}" is {shorten(value)}',
                "write true for a wanted reply and false for an unwanted one",
            )
        conversation = base.pair() if columns.completion else base.turns()
        messages = conversation.messages
        last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=0)
        # Earlier replies are context: the label is about the last one.
        messages = untrained(messages[:last]) + messages[last:]
        return [replace(conversation, messages=messages, desirable=label)]


def _bare(messages: Sequence[Message]) -> list[str]:
    """The turns without what does not reach the model."""
    return [json.dumps(message.to_template(), sort_keys=True, ensure_ascii=False) for message in messages]
