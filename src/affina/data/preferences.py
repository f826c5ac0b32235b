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
from typing import Any, Final, Literal

from affina.config.objectives import Records, names_with
from affina.data.formats import (
    CHOSEN_NAMES,
    PROMPT_NAMES,
    REJECTED_NAMES,
    ROLE_NAMES,
    WANTED,
    Columns,
    Converter,
    DetectedFormat,
    Format,
    Probe,
    detect_format,
    first_turn,
    is_turns,
    to_conversation,
    untrained,
    with_unread,
)
from affina.data.messages import Conversation, Message
from affina.data.records import RawRecord, shorten
from affina.errors import DataError, Location

_REPLY_LISTS: Final = ("replies", "responses", "completions", "answers", "candidates", "outputs", "generations")
_RANKS: Final = ("ranks", "rank", "ranking")
_SCORES: Final = ("scores", "score", "ratings", "rating", "rewards", "overall_score")
_LABELS: Final = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "reward")
_REPLIES: Final = ("completion", "response", "output", "answer", "reply", "generation")
_REPLY_TEXTS: Final = ("text", "response", "content", "completion", "answer", "reply", "value")
_YES: Final = frozenset({"true", "1", "yes", "desirable", "wanted", "good", "chosen", "thumbs_up"})
_NO: Final = frozenset({"false", "0", "-1", "no", "undesirable", "unwanted", "bad", "rejected", "thumbs_down"})
TEACHER: Final = "teacher"
"""Column with a teacher's likeliest tokens, and key of `Conversation.metadata` that holds them."""

_TEACHER_KEYS: Final = ("token_ids", "log_probabilities")
_TEACHER_SHAPE: Final = '{"token_ids": [[…], …], "log_probabilities": [[…], …]}, one list for each trained token'

_DIALOGUE: Final = re.compile(r"\n\n(Human|Assistant):")

Chosen = Format | Literal["auto"]


# Detection -----------------------------------------------------------------------------------------------------------


def detect_records(
    records: Sequence[Mapping[str, Any]],
    *,
    wanted: Records,
    format: Chosen = "auto",
    columns: Columns | None = None,
    where: Location | None = None,
) -> DetectedFormat:
    """The format of `records` (the first few of a file) for an objective that wants such records.

    Arguments and errors as of `detect_format`; DataError as well when the records are of another kind: `no-pairs`,
    `no-labels`, `text-wanted`, `preference-data`.
    """
    if wanted in ("replies", "taught"):
        detected = detect_format(records, format=format, columns=columns, where=where)
        if wanted == "taught" and not any(TEACHER in record for record in records):
            raise _no_teacher(where)
        return detected
    probe = Probe(records, columns or Columns(), where)
    probe.check_named_columns()
    if wanted == "texts":
        return with_unread(probe, _as_text(probe, format))
    found = _as_preference(probe, format) or _as_ranking(probe, format)
    if wanted == "labels":
        found = _as_labelled(probe, format) or found
    if found is None:
        raise _wrong_kind(probe, wanted)
    if found.format == "tree" and found.columns.prompt is None:
        return found  # the record itself is the tree
    return with_unread(probe, found)


def unread_label(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that says which replies are wanted, in records that are to be trained as they are."""
    for name in ("label", "kto_tag", "kto_label", "desirable"):
        values = [record[name] for record in records if name in record]
        if values and all(isinstance(value, bool) for value in values) and False in values:
            return name
    return None


def _as_text(probe: Probe, format: Chosen) -> DetectedFormat:
    if format == "text" or probe.columns.text or (probe.present(("text",)) and not probe.turn_columns()):
        return probe.as_text()
    column = probe.longest_text_column()
    raise DataError(
        "text-wanted",
        f"training.objective cpt learns from plain text, and these records have {', '.join(probe.seen)}",
        why='no column is called "text", and affina does not guess which to take',
        fix=(
            "for conversations write training.objective: sft"
            if probe.turn_columns() or not column
            else f"name the column: columns: {{text: {column}}}; for prompts with replies write training.objective: sft"
        ),
        where=probe.where,
    )


def _as_preference(probe: Probe, format: Chosen) -> DetectedFormat | None:
    chosen = probe.columns.chosen or probe.one_of(CHOSEN_NAMES)
    rejected = probe.columns.rejected or probe.one_of(REJECTED_NAMES)
    if format not in ("auto", "preference") or (format == "auto" and not (chosen and rejected)):
        return None
    if chosen is None or rejected is None:
        raise probe.missing_error("preference", "rejected" if chosen else "chosen")
    prompt = _prompt_column(probe, besides=(chosen, rejected))
    columns = _with_prompt(probe, prompt, chosen=chosen, rejected=rejected)
    source = f'the prompt is "{prompt}"' if prompt else "the prompt is what both begin with"
    return DetectedFormat("preference", columns, f'"{chosen}" is preferred to "{rejected}"; {source}')


def _as_ranking(probe: Probe, format: Chosen) -> DetectedFormat | None:
    tree = _tree_column(probe)
    if tree is not None and format in ("auto", "tree"):
        columns = replace(probe.common(), prompt=tree or None)
        return DetectedFormat("tree", columns, "a tree of ranked replies; the best against each that is worse")
    replies = probe.columns.replies or next(
        (name for name in probe.present(_REPLY_LISTS) if isinstance(probe.first_value(name), list)), None
    )
    if format not in ("auto", "ranking") or replies is None:
        return None
    ranks = probe.columns.ranks or probe.one_of(_RANKS)
    scores = probe.columns.scores or (None if ranks else probe.one_of(_SCORES))
    items = probe.first_value(replies)
    item = items[0] if isinstance(items, list) and items and isinstance(items[0], Mapping) else {}
    if ranks is None and scores is None:
        ranks = next((name for name in _RANKS if name in item), None)
        scores = next((name for name in _SCORES if name in item), None) if ranks is None else None
    if ranks is None and scores is None:
        if format == "auto" and probe.columns.replies is None:
            return None
        raise DataError(
            "no-ranks",
            f'"{replies}" is a list of replies, and nothing says which is better',
            why=f"a ranking needs {WANTED['ranking']}",
            fix="name the column, or the key of a reply: columns: {ranks: …} or columns: {scores: …}",
            where=probe.where,
        )
    prompt = _prompt_column(probe, besides=(replies,))
    if prompt is None:
        raise probe.missing_error("ranking", "prompt")
    columns = _with_prompt(probe, prompt, replies=replies, ranks=ranks, scores=scores)
    by = f'"{ranks}", the lowest is best' if ranks else f'"{scores}", the highest is best'
    return DetectedFormat("ranking", columns, f'"{replies}" are ordered by {by}; the best against each that is worse')


def _as_labelled(probe: Probe, format: Chosen) -> DetectedFormat | None:
    label = probe.columns.label or next(
        (name for name in probe.present(_LABELS) if _read_label(probe.first_value(name)) is not None), None
    )
    if format not in ("auto", "labelled") or label is None:
        return None
    reply = probe.columns.completion or probe.one_of(_REPLIES)
    prompt = _prompt_column(probe, besides=(reply or "",)) if reply else None
    if reply and prompt:
        columns = _with_prompt(probe, prompt, completion=reply, label=label)
        return DetectedFormat("labelled", columns, f'"{label}" says whether "{reply}" is a wanted reply to "{prompt}"')
    turns = probe.as_turns("auto")
    columns = replace(turns.columns, label=label)
    return DetectedFormat("labelled", columns, f'{turns.why}; "{label}" says whether the last reply is wanted')


def _prompt_column(probe: Probe, *, besides: Sequence[str]) -> str | None:
    """The column of the prompt: the named one, one called like a prompt, or one that holds turns."""
    if probe.columns.prompt:
        return probe.columns.prompt
    names = [name for name in probe.present(PROMPT_NAMES) if name not in besides]
    if len(names) > 1:
        names = [name for name in names if name != "input"]
    if names:
        return probe.one_unambiguous("prompt", names)
    return next((name for name in probe.seen if name not in besides and _holds_turns(probe.first_value(name))), None)


def _holds_turns(value: Any) -> bool:
    turn = first_turn(value)
    return ("role" in turn and any(key in turn for key in ("content", "text"))) or ("from" in turn and "value" in turn)


def _with_prompt(probe: Probe, prompt: str | None, **columns: str | None) -> Columns:
    """The columns with the prompt's companions: system prompt, history, input, and the key of a turn's text."""
    content = probe.columns.content
    if content is None and prompt is not None:
        turn = first_turn(probe.first_value(prompt))
        content = "text" if "text" in turn and "content" not in turn else None
    extra = probe.columns.input or (probe.one_of(("input",)) if prompt not in (None, "input") else None)
    history = probe.columns.history or probe.one_of(("history",))
    common = replace(probe.common(), role=probe.columns.role, content=content, prompt=prompt)
    return replace(common, input=extra, history=history, **columns)


def _tree_column(probe: Probe) -> str | None:
    """The column that holds the root of a tree; "" when the record itself is the root; None when there is none."""
    for name in ("prompt", *probe.seen):
        if name in probe.seen and _is_node(probe.first_value(name)):
            return name
    return "" if _is_node(probe.records[0]) else None


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "text" in value and isinstance(value.get("replies"), list)


def _no_teacher(where: Location | None) -> DataError:
    return DataError(
        "no-teacher",
        f'training.objective distill has no teacher: no record has "{TEACHER}"',
        why="it learns from a teacher's distributions: those of a model, or of the records",
        fix="name a model with the same tokenizer: training.distillation.teacher; or write into each record "
        f'"{TEACHER}": {_TEACHER_SHAPE}',
        where=where,
    )


def _wrong_kind(probe: Probe, wanted: Records) -> DataError:
    label = next((name for name in probe.present(_LABELS) if _read_label(probe.first_value(name)) is not None), None)
    columns = ", ".join(probe.seen)
    if wanted == "labels":
        return DataError(
            "no-labels",
            f"training.objective kto learns from labelled replies, and no column of {columns} is a label",
            why=f"it needs {WANTED['labelled']}; or pairs: {WANTED['preference']}",
            fix="name the column: columns: {label: …}; for conversations alone write training.objective: sft",
            where=probe.where,
        )
    return DataError(
        "no-pairs",
        f"training.objective: {names_with('pairs')} wants pairs, and these records have {columns}",
        why=f"pairs need {WANTED['preference']}; or {WANTED['ranking']}",
        fix=f'"{label}" looks like a label of single replies: write training.objective: kto'
        if label
        else "name the columns: columns: {chosen: …, rejected: …}; for conversations write training.objective: sft",
        where=probe.where,
    )


# Conversion ----------------------------------------------------------------------------------------------------------


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
            fix=f"write {_TEACHER_SHAPE}",
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
        label = _read_label(value)
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


def _read_label(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and not value.is_integer():
        return None
    text = str(int(value) if isinstance(value, int | float) else value).strip().lower()
    return True if text in _YES else False if text in _NO else None
