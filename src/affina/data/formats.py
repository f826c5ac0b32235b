"""Records in the formats that people have, turned into conversations.

Five formats: `messages` (OpenAI, ChatML), `sharegpt`, `alpaca`, `prompt_completion`, `text`; those of preferences are
in preference_formats.py. Which one a file has is found by looking at its first records and is always told with the
reason; where it is not certain, that is an error which says what to write. Columns are mapped by name; dotted paths
reach into objects (`prompt.replies.0.text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal

from affina.data.json_records import decode_json
from affina.data.messages import Conversation, Message, Role, ToolCall
from affina.data.records import RawRecord, shorten
from affina.errors import DataError, Location

Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "ranking", "tree", "labelled"
]

ROLE_NAMES: Final[dict[str, Role]] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "agent", "function_call"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "tool_response", "function_response", "ipython", "api"), "tool"
    ),
}
"""What data sets call the four roles; upper and lower case are the same."""

_TURN_COLUMNS: Final = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ROLE_KEYS: Final = ("role", "from")
_CONTENT_KEYS: Final = ("content", "value")
CHOSEN_NAMES: Final = ("chosen", "chosen_messages", "chosen_response", "preferred", "response_chosen")
REJECTED_NAMES: Final = ("rejected", "rejected_messages", "rejected_response", "dispreferred", "response_rejected")
PROMPT_NAMES: Final = ("prompt", "instruction", "question", "query", "problem", "user", "input")
_COMPLETIONS: Final = ("completion", "response", "output", "answer", "reply", "solution", "target", "assistant")
_INPUTS: Final = ("input", "context")
_TEXTS: Final = ("text", "content", "document")
_SYSTEMS: Final = ("system", "system_prompt")
_TOOLS: Final = ("tools", "functions")
_GROUPS: Final = (
    *("group", "conversation_id", "dialog_id", "dialogue_id", "thread_id", "session_id"),
    *("document_id", "doc_id", "message_tree_id"),
)
_IS_ID: Final = re.compile(r"(^|_)(id|ids|uuid|index|idx)$", re.I)
_MEDIA: Final = ("images", "image", "audios", "audio", "videos", "video")

WANTED: Final[dict[Format, str]] = {
    "messages": 'a list "messages" of {"role": "user" | "assistant" | …, "content": "…"}',
    "sharegpt": 'a list "conversations" of {"from": "human" | "gpt" | …, "value": "…"}',
    "alpaca": '"instruction", "output", and where there are any "input", "system", "history"',
    "prompt_completion": '"prompt" and "completion" (or question/answer, …), each a string or a list of messages',
    "text": '"text"',
    "preference": '"chosen" and "rejected", each a reply or a list of messages, and "prompt" unless they hold it',
    "ranking": '"prompt", a list "replies", and "ranks" (the lowest is best) or "scores" (the highest is)',
    "tree": '"prompt" as a tree: {"text": "…", "replies": [{"text": "…", "rank": 0, "replies": […]}]}',
    "labelled": 'a conversation, or "prompt" and "completion", and "label": true or false',
}
"""What each format needs, for messages."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what, where it is not called as the format calls it. None: found by its usual names.

    `role` and `content` are keys inside a message; all others are columns, or dotted paths into nested objects.
    """

    messages: str | None = None
    role: str | None = None
    content: str | None = None
    system: str | None = None
    tools: str | None = None
    prompt: str | None = None
    input: str | None = None
    completion: str | None = None
    history: str | None = None
    text: str | None = None
    group: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    replies: str | None = None
    ranks: str | None = None
    scores: str | None = None
    label: str | None = None

    def named(self) -> dict[str, str]:
        """The columns that are given."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}


@dataclass(frozen=True, slots=True)
class DetectedFormat:
    """A format with every column it reads, and how it was recognised."""

    format: Format
    columns: Columns
    why: str


class Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = Missing()


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """The value at a column name or dotted path; `MISSING` when there is none."""
    if path in record:
        return record[path]
    value: Any = record
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", part) and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


# Detection -----------------------------------------------------------------------------------------------------------


def detect_format(
    records: Sequence[Mapping[str, Any]],
    *,
    format: Format | Literal["auto"] = "auto",
    columns: Columns | None = None,
    where: Location | None = None,
) -> DetectedFormat:
    """The format of `records` (the first few of a file), with its columns resolved.

    format:  a format to take instead of looking for one; its columns are still looked for
    columns: what the user said; it always wins
    raises:  DataError when a named column does not exist, when nothing fits, or when more than one reading does
    """
    probe = Probe(records, columns or Columns(), where)
    probe.check_named_columns()
    return with_unread(probe, _choose(probe, format))


def with_unread(probe: Probe, detected: DetectedFormat) -> DetectedFormat:
    """The same format; its reason names the columns that are not read."""
    read = {path.partition(".")[0] for path in detected.columns.named().values()}
    unread = [name for name in probe.seen if name not in read and name not in detected.columns.named().values()]
    return replace(detected, why=f"{detected.why}; not read: {', '.join(unread)}") if unread else detected


def _choose(probe: Probe, format: Format | Literal["auto"]) -> DetectedFormat:
    if format in ("preference", "ranking", "tree", "labelled"):
        raise probe.preference_error(probe.turn_columns())
    if format == "text" or (format == "auto" and probe.columns.text):
        return probe.as_text()
    if format in ("messages", "sharegpt") or (format == "auto" and probe.columns.messages):
        return probe.as_turns(format)
    if format in ("alpaca", "prompt_completion") or (
        format == "auto" and (probe.columns.prompt or probe.columns.completion)
    ):
        return probe.as_pair(format)
    return probe.find()


class Probe:
    """The first records of a file, and the questions that detection asks about them."""

    def __init__(self, records: Sequence[Mapping[str, Any]], columns: Columns, where: Location | None) -> None:
        assert records, "detection needs at least one record"
        self.records = records
        self.columns = columns
        self.where = where
        self.seen = list(dict.fromkeys(name for record in records for name in record))

    def first_value(self, path: str) -> Any:
        """The first value at `path` that is there and not null; one that is no empty list, if there is any."""
        empty: Any = MISSING
        for record in self.records:
            value = lookup(record, path)
            if value == []:
                empty = value  # says nothing about turns; validation names this record
            elif value is not None and value is not MISSING:
                return value
        return empty

    def present(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.seen and self.first_value(name) is not MISSING]

    def one_of(self, names: Sequence[str]) -> str | None:
        return next(iter(self.present(names)), None)

    def check_named_columns(self) -> None:
        for field, path in self.columns.named().items():
            # Ranks and scores may be keys inside a reply.
            if field in ("role", "content", "ranks", "scores") or any(
                lookup(record, path) is not MISSING for record in self.records
            ):
                continue
            raise DataError(
                "unknown-column",
                f'columns.{field} names "{path}", which no record has',
                why=f"the columns are {', '.join(self.seen)}",
                fix=_did_you_mean(path, self.seen),
                where=self.where,
            )

    # One format each

    def as_text(self) -> DetectedFormat:
        name = self.columns.text or self.one_of(_TEXTS)
        if name is None:
            raise self.missing_error("text", "text")
        return DetectedFormat("text", replace(self.common(), text=name), f'plain text in "{name}"')

    def as_turns(self, format: str) -> DetectedFormat:
        name = self.columns.messages or next((name for name, _, _ in self.turn_columns()), None)
        name = name or self.one_of(_TURN_COLUMNS)
        if name is None:
            raise self.missing_error(format, "messages")
        turn = first_turn(self.first_value(name))
        role = self.columns.role or next((key for key in _ROLE_KEYS if key in turn), None)
        content = self.columns.content or next((key for key in _CONTENT_KEYS if key in turn), None)
        if role is None or content is None:
            raise DataError(
                "unknown-turns",
                f'the turns in "{name}" have the keys {", ".join(turn) or "(none)"}',
                why='a message needs "role" and "content", or "from" and "value"',
                fix=f"map them: {_suggest_turns(name, self.first_value(name)) or 'columns: {role: …, content: …}'}",
                where=self.where,
            )
        chosen: Format = "sharegpt" if format == "sharegpt" or (role, content) == ("from", "value") else "messages"
        if format == "messages":
            chosen = "messages"
        resolved = replace(self.common(), messages=name, role=role, content=content)
        return DetectedFormat(chosen, resolved, f'"{name}" is a list of turns with "{role}" and "{content}"')

    def as_pair(self, format: str) -> DetectedFormat:
        completion = self.columns.completion or self.one_unambiguous("completion", _COMPLETIONS)
        given = self.columns.prompt
        names = self.present(PROMPT_NAMES)
        if len(names) > 1:
            # Next to an instruction, "input" is what the instruction is about.
            names = [name for name in names if name != "input"]
        prompt = given or self.one_unambiguous("prompt", names)
        if prompt is None or completion is None:
            raise self.missing_error(format, "prompt" if prompt is None else "completion")
        extra = self.columns.input
        if extra is None:
            extra = next((name for name in self.present(_INPUTS) if name not in (prompt, completion)), None)
        history = self.columns.history or self.one_of(("history",))
        is_alpaca = (prompt, completion) == ("instruction", "output")
        chosen: Format = "alpaca" if format == "alpaca" or (is_alpaca and format == "auto") else "prompt_completion"
        resolved = replace(self.common(), prompt=prompt, completion=completion, input=extra, history=history)
        why = f'"{prompt}" is the prompt and "{completion}" the reply'
        if extra:
            why += f', "{extra}" follows the prompt'
        return DetectedFormat(chosen, resolved, why)

    def common(self) -> Columns:
        """What all formats share: system prompt, tools, group."""
        system = self.columns.system or self.one_of(_SYSTEMS)
        tools = self.columns.tools or self.one_of(_TOOLS)
        group = self.columns.group or self.one_of(_GROUPS)
        return Columns(system=system, tools=tools, group=group)

    # Finding one

    def find(self) -> DetectedFormat:
        turns = self.turn_columns()
        prompts, completions = self.present(PROMPT_NAMES), self.present(_COMPLETIONS)
        if self.present(CHOSEN_NAMES) and self.present(REJECTED_NAMES):
            raise self.preference_error(turns)
        names = {name for name, _, _ in turns}
        if names == {"prompt", "completion"}:
            return self.as_pair("prompt_completion")
        if len(turns) > 1:
            listed = ", ".join(f'"{name}"' for name, _, _ in turns)
            raise self.ambiguous_error(f"{listed} are all lists of turns", f"columns: {{messages: {turns[0][0]}}}")
        if turns and "prompt" in names and completions:
            return self.as_pair("prompt_completion")
        if turns:
            self.columns = replace(self.columns, messages=turns[0][0])
            return self.as_turns("auto")
        if prompts and completions:
            return self.as_pair("auto")
        if self.present(_TEXTS) and not prompts and not completions:
            return self.as_text()
        raise self.nothing_fits()

    def turn_columns(self) -> list[tuple[str, str, str]]:
        """(column, role key, content key) of every column that holds lists of turns; the usual names first."""
        found = []
        for name in sorted(self.seen, key=lambda name: (name not in _TURN_COLUMNS, self.seen.index(name))):
            turn = first_turn(self.first_value(name))
            for role, content in zip(_ROLE_KEYS, _CONTENT_KEYS, strict=True):
                role, content = self.columns.role or role, self.columns.content or content
                if role in turn and (content in turn or "tool_calls" in turn or "function_call" in turn):
                    found.append((name, role, content))
                    break
        return found

    def one_unambiguous(self, field: str, names: Sequence[str]) -> str | None:
        present = self.present(names)
        if len(present) > 1:
            listed = " and ".join(f'"{name}"' for name in present)
            raise self.ambiguous_error(f"both {listed} could be the {field}", f"columns: {{{field}: {present[0]}}}")
        return present[0] if present else None

    # Failing

    def missing_error(self, format: str, field: str) -> DataError:
        wanted = next((wanted for name, wanted in WANTED.items() if name == format), WANTED["prompt_completion"])
        return DataError(
            "missing-column",
            f"no column for the {field} was found among {', '.join(self.seen)}",
            why=f"{format} needs {wanted}" if format != "auto" else f"needed: {wanted}",
            fix=f"name it: columns: {{{field}: {self.longest_text_column() or '…'}}}",
            where=self.where,
        )

    def ambiguous_error(self, what: str, fix: str) -> DataError:
        return DataError(
            "ambiguous-format",
            what,
            why=f"the columns are {', '.join(self.seen)}; affina does not guess which to train on",
            fix=f"say which, e.g. {fix}",
            where=self.where,
        )

    def preference_error(self, turns: list[tuple[str, str, str]]) -> DataError:
        lists = [name for name, _, _ in turns]
        if "chosen_messages" in self.seen:
            fix = "columns: {messages: chosen_messages}"
        elif "chosen" in lists:
            fix = "columns: {messages: chosen}"
        else:
            prompt = next((name for name in (*lists, *self.present(PROMPT_NAMES))), "prompt")
            fix = f"columns: {{prompt: {prompt}, completion: chosen}}"
        return DataError(
            "preference-data",
            "these are preference pairs (chosen, rejected), not conversations",
            why="supervised fine-tuning trains on one reply per prompt",
            fix=f"to learn the preference: training.objective: dpo; to train on the chosen replies: {fix}",
            where=self.where,
        )

    def nothing_fits(self) -> DataError:
        if (
            name := next((name for name in self.present(_TURN_COLUMNS) if self.first_value(name) == []), None)
        ) is not None:
            return DataError(
                "unknown-format",
                f'"{name}" is an empty list in each of the first {len(self.records):,} records',
                why="without a message there is no telling what its keys are, and nothing to learn",
                fix="check what wrote this file, or name the column that holds the conversations: "
                "columns: {messages: …}",
                where=self.where,
            )
        wants = "; ".join(f"{name}: {wanted}" for name, wanted in list(WANTED.items())[:5])
        return DataError(
            "unknown-format",
            f"no known format fits the columns {', '.join(self.seen)}",
            why=f"what each format wants — {wants}",
            fix=f"map the columns, e.g. {self.closest_mapping()}",
            where=self.where,
        )

    def closest_mapping(self) -> str:
        """The mapping that these columns come nearest to, as YAML."""
        for name in self.seen:
            if suggestion := _suggest_turns(name, self.first_value(name)):
                return suggestion
        if all(re.fullmatch(r"column_\d+", name) for name in self.seen) and len(self.seen) > 1:
            return "columns: {prompt: column_1, completion: column_2} (the file has no header row)"
        paths = list(dict.fromkeys(path for name in self.seen if (path := self.text_path(name))))
        prompt = next((path for path in paths if path.partition(".")[0].rstrip("s") in PROMPT_NAMES), None)
        completion = next((path for path in paths if path.partition(".")[0].rstrip("s") in _COMPLETIONS), None)
        others = [path for path in paths if path not in (prompt, completion) and not _IS_ID.search(path)]
        prompt = prompt or (others.pop(0) if others else None)
        completion = completion or (others.pop(0) if others else None)
        if prompt and completion:
            return f"columns: {{prompt: {prompt}, completion: {completion}}}"
        return f"columns: {{text: {prompt or completion or '…'}}}"

    def text_path(self, name: str) -> str | None:
        """The column, or the path inside it, where there is text."""
        value = self.first_value(name)
        if isinstance(value, str):
            return name
        if isinstance(value, list) and value and isinstance(value[0], str):
            return f"{name}.0"
        if isinstance(value, Mapping):
            return next((f"{name}.{key}" for key in _TEXTS if isinstance(value.get(key), str)), None)
        return None

    def text_columns(self) -> list[str]:
        return [name for name in self.seen if isinstance(self.first_value(name), str)]

    def longest_text_column(self) -> str | None:
        names = [name for name in self.text_columns() if name not in self.columns.named().values()]
        return max(names, key=lambda name: len(self.first_value(name)), default=None)


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]}?" if close else "use one of these columns, or a dotted path into one"


def first_turn(value: Any) -> Mapping[str, Any]:
    """The first object of a list of turns (also when the list is written as a string); {} for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return value[0]
    return {}


def _suggest_turns(name: str, value: Any) -> str | None:
    """A mapping for a list of objects one of whose keys holds role names."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return _suggest_turns(f"{name}.0", value[0])
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        return None
    keys = list(first_turn(value))
    roles = [key for key in keys if all(str(turn.get(key)).lower() in ROLE_NAMES for turn in value)]
    texts = [key for key in keys if key not in roles and all(isinstance(turn.get(key), str) for turn in value)]
    if not roles or not texts:
        return None
    longest = max(texts, key=lambda key: sum(len(turn[key]) for turn in value))
    if (roles[0], longest) in zip(_ROLE_KEYS, _CONTENT_KEYS, strict=True):
        return f"columns: {{messages: {name}}}"
    return f"columns: {{messages: {name}, role: {roles[0]}, content: {longest}}}"


# Conversion ----------------------------------------------------------------------------------------------------------


def to_conversation(record: RawRecord, detected: DetectedFormat, *, source: int = 0) -> Conversation:
    """The record as a conversation.

    raises: DataError at the record's location
    """
    convert = Converter(record, detected.columns)
    if detected.format == "text":
        conversation = convert.text()
    elif detected.format in ("messages", "sharegpt"):
        conversation = convert.turns()
    else:
        conversation = convert.pair()
    return replace(conversation, group=convert.group(), origin=str(record.location), source=source)


@dataclass(frozen=True, slots=True)
class Converter:
    record: RawRecord
    columns: Columns

    def error(self, code: str, what: str, fix: str, why: str | None = None) -> DataError:
        return DataError(code, what, why=why, fix=fix, where=self.record.location)

    def value(self, path: str | None) -> Any:
        """The value of a column; None when there is no such column, or it is null."""
        if path is None:
            return None
        value = lookup(self.record.value, path)
        return None if value is MISSING else value

    def required(self, field: str, path: str | None) -> Any:
        value = self.value(path)
        if value is None:
            has = ", ".join(self.record.value) or "no columns"
            raise self.error(
                "missing-value",
                f'the record has no "{path}" (the {field}); it has {has}',
                f"add it, or map another column: columns: {{{field}: …}}",
            )
        return value

    def string(self, field: str, path: str | None) -> str:
        value = self.required(field, path)
        if isinstance(value, str):
            return value
        if isinstance(value, int | float):
            return json.dumps(value)
        kind = "a list" if isinstance(value, list) else "an object"
        raise self.error(
            "not-text",
            f'"{path}" (the {field}) is {kind}, not text: {shorten(value, limit=40)}',
            f"name what is inside it: columns: {{{field}: {path}.{_inner_path(value)}}}",
        )

    def group(self) -> str | None:
        value = self.value(self.columns.group)
        return None if value is None or value == "" else str(value)

    def refuse_media(self) -> None:
        for name in _MEDIA:
            if self.record.value.get(name):
                raise self.error(
                    "unsupported-content",
                    f'the record has "{name}"',
                    "remove such records; affina trains on text",
                    "a language model cannot read images, audio or video",
                )

    # Formats

    def text(self) -> Conversation:
        return Conversation(text=self.string("text", self.columns.text))

    def turns(self) -> Conversation:
        self.refuse_media()
        turns = self.list_of_objects("messages", self.required("messages", self.columns.messages))
        messages, inner_tools = self.messages(turns, self.columns.role or "role", self.columns.content or "content")
        return Conversation(messages=self.with_system(messages), tools=self.tools() or inner_tools)

    def pair(self) -> Conversation:
        self.refuse_media()
        messages, tools = self.prompt()
        messages += self.reply("completion", self.columns.completion)
        return Conversation(messages=self.with_system(messages), tools=self.tools() or tools)

    def prompt(self) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """History and prompt, and tool definitions found inside. Replies in the prompt are context: not trained."""
        prompt = self.required("prompt", self.columns.prompt)
        messages = self.history()
        if is_turns(prompt):
            before, tools = self.guess_messages("prompt", prompt)
            return messages + untrained(before), tools
        extra = self.value(self.columns.input)
        content = self.string("prompt", self.columns.prompt)
        if extra is not None and extra != "":
            content = f"{content}\n\n{self.string('input', self.columns.input)}"
        return (*messages, Message("user", content)), ()

    def reply(self, field: str, path: str | None) -> tuple[Message, ...]:
        """A reply that is written as text, as a message, or as a list of them."""
        value = self.required(field, path)
        if is_turns(value):
            return self.guess_messages(field, value)[0]
        return (self.assistant(self.string(field, path)),)

    def history(self) -> tuple[Message, ...]:
        history = self.value(self.columns.history)
        if not history:
            return ()
        if isinstance(history, str):
            history = self.decode("history", history)
        messages: list[Message] = []
        for pair in history if isinstance(history, list) else [history]:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise self.error(
                    "bad-history",
                    f'"{self.columns.history}" holds {shorten(pair, limit=40)}',
                    'write the history as [["prompt", "reply"], …]',
                )
            messages += [Message("user", pair[0]), self.assistant(pair[1])]
        return tuple(messages)

    def with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The messages with the system prompt of the system column in front."""
        system = self.value(self.columns.system)
        if system is None or system == "":
            return messages
        content = self.string("system", self.columns.system)
        if messages and messages[0].role == "system":
            if messages[0].content == content:
                return messages
            raise self.error(
                "two-system-prompts",
                f'the record has a system message and another system prompt in "{self.columns.system}"',
                "keep one of them",
            )
        return (Message("system", content), *messages)

    # Messages

    def list_of_objects(self, field: str, value: Any) -> list[Mapping[str, Any]]:
        if isinstance(value, str):
            value = self.decode(field, value)
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            items = value if isinstance(value, list) else [value]
            wrong = next(item for item in items if not isinstance(item, Mapping))
            raise self.error(
                "bad-messages",
                f"the {field} must be a list of objects, found {shorten(wrong, limit=40)}",
                'write [{"role": "user", "content": "…"}, …]',
            )
        return value

    def decode(self, field: str, text: str) -> Any:
        try:
            return decode_json(text)
        except (ValueError, RecursionError) as error:
            raise self.error(
                "bad-nested-json",
                f"the {field} are written as a string that is not valid JSON: {error}",
                "write valid JSON there, or an object instead of a string",
            ) from None

    def guess_messages(self, field: str, value: Any) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        turns = self.list_of_objects(field, value)
        keys = turns[0] if turns else {}
        role = self.columns.role or next((key for key in _ROLE_KEYS if key in keys), "role")
        content = self.columns.content or next((key for key in _CONTENT_KEYS if key in keys), "content")
        return self.messages(turns, role, content)

    def messages(
        self, turns: Sequence[Mapping[str, Any]], role_key: str, content_key: str
    ) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
        """The turns as messages, and tool definitions that were found inside them."""
        messages: list[Message] = []
        tools: tuple[dict[str, Any], ...] = ()
        for index, turn in enumerate(turns):
            message, found = self.message(index, turn, role_key, content_key)
            messages.append(message)
            tools += found
        return tuple(messages), tools

    def message(
        self, index: int, turn: Mapping[str, Any], role_key: str, content_key: str
    ) -> tuple[Message, tuple[dict[str, Any], ...]]:
        name = turn.get(role_key)
        role = ROLE_NAMES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise self.error(
                "unknown-role",
                f"message {index + 1} has the role {shorten(name)}",
                f"use system, user, assistant or tool (also understood: {', '.join(ROLE_NAMES)})",
            )
        value = turn.get(content_key)
        if value is None and role == "tool" and "response" in turn:  # Taskmaster: {"role": "api", "response": {…}}
            value = json.dumps(turn["response"], ensure_ascii=False)
        parts = self.content(index, value)
        calls = parts.tool_calls + self.tool_calls(index, turn)
        content = parts.text
        if isinstance(name, str) and name.lower() == "function_call":
            calls, content = calls + self.calls_in_text(index, content), ""
        if calls and role != "assistant":
            raise self.error(
                "bad-tool-call", f"message {index + 1} has tool calls and the role {name}", "only replies call tools"
            )
        train = self.train_flag(index, turn)
        if role == "assistant":
            reasoning = _first_string(turn, ("reasoning_content", "reasoning", "thinking"))
            if reasoning is None:
                reasoning = parts.reasoning
            message = self.assistant(content, reasoning=reasoning, tool_calls=calls, train=train, index=index)
            speaker = turn.get("name")
            return (replace(message, name=speaker) if isinstance(speaker, str) and speaker else message), parts.tools
        call_id = turn.get("tool_call_id")
        speaker = turn.get("name")
        message = Message(
            role,
            content,
            tool_call_id=call_id if isinstance(call_id, str) and role == "tool" else None,
            name=speaker if isinstance(speaker, str) and speaker else None,
            train=train,
        )
        return message, parts.tools

    def content(self, index: int, value: Any) -> _Content:
        """Text, reasoning, tool calls and tool definitions of a content that is a string, null, or a list of parts."""
        if value is None:
            return _Content("")
        if isinstance(value, str):
            return _Content(value)
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            if isinstance(value, int | float):
                return _Content(json.dumps(value))
            raise self.error(
                "bad-content", f"the content of message {index + 1} is {shorten(value)}", "write it as a string"
            )
        text: list[str] = []
        reasoning: list[str] = []
        calls: tuple[ToolCall, ...] = ()
        tools: tuple[dict[str, Any], ...] = ()
        for part in value:
            if isinstance(part, str):
                text.append(part)
                continue
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind in ("text", "input_text", "output_text"):
                text.append(self.part_text(index, part))
            elif kind in ("reasoning", "thinking"):
                reasoning.append(self.part_text(index, part))
            elif kind in ("tool_call", "tool_calls"):
                calls += self.calls_in_text(index, self.part_text(index, part))
            elif kind == "tools":
                tools += self.tool_definitions(self.part_text(index, part))
            else:
                raise self.error(
                    "unsupported-content",
                    f"message {index + 1} has a part of type {shorten(kind)}",
                    "remove such parts or records; affina trains on text",
                    "a language model cannot read images, audio or video" if kind else "a part needs a type and a text",
                )
        return _Content("".join(text), "".join(reasoning) if reasoning else None, calls, tools)

    def part_text(self, index: int, part: Mapping[str, Any]) -> str:
        text = _first_string(part, ("text", "value", "content", "thinking"))
        if text is None:
            raise self.error(
                "bad-content",
                f"message {index + 1} has a {part.get('type')} part without text: {shorten(dict(part))}",
                'write {"type": "text", "text": "…"}',
            )
        return text

    def assistant(
        self,
        content: str,
        *,
        reasoning: str | None = None,
        tool_calls: tuple[ToolCall, ...] = (),
        train: bool = True,
        index: int | None = None,
    ) -> Message:
        """A reply; a <think> block at its start becomes `reasoning`."""
        thought, rest = self.split_reasoning(content, index)
        if thought is not None and reasoning is not None:
            raise self.error(
                "bad-think-block",
                f"{_reply_name(index)} has reasoning in a field of its own and a <think> block",
                "keep one of them",
            )
        return Message(
            "assistant",
            rest,
            reasoning=thought if thought is not None else reasoning,
            tool_calls=tool_calls,
            train=train,
        )

    def split_reasoning(self, content: str, index: int | None) -> tuple[str | None, str]:
        opened, closed = content.count("<think>"), content.count("</think>")
        if opened == closed == 0:
            return None, content
        match = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", content, re.DOTALL)
        if opened == closed == 1 and match is not None:
            # The line breaks around the block belong to the template, which writes its own.
            return match[1].strip("\n"), match[2].lstrip("\n")
        if opened > closed:
            what, fix = "a <think> that is never closed", "close it with </think>, or remove the record"
        elif closed > opened:
            what, fix = "a </think> without <think>", "put <think> at the start of the reply"
        elif opened > 1:
            what, fix = f"{opened} <think> blocks", "keep one, at the start of the reply"
        else:
            what, fix = "a <think> block that is not at its start", "move it to the start of the reply"
        why = "the template cuts a reply at </think>; what is before it would be lost or taken for the reply"
        raise self.error("bad-think-block", f"{_reply_name(index)} has {what}", fix, why)

    def train_flag(self, index: int, turn: Mapping[str, Any]) -> bool:
        flags: list[bool] = []
        for key in ("weight", "loss_weight", "train"):
            value = turn.get(key)
            if value is None:
                continue
            if value not in (0, 1):
                raise self.error(
                    "bad-weight",
                    f"message {index + 1} has {key} {shorten(value)}",
                    "use 1 (train on it) or 0 (do not)",
                    "a fractional weight per message is not supported",
                )
            flags.append(bool(value))
        if len(set(flags)) > 1:
            raise self.error(
                "bad-weight", f"weight and train of message {index + 1} contradict each other", "keep one of them"
            )
        return flags[0] if flags else True

    # Tools

    def tool_calls(self, index: int, turn: Mapping[str, Any]) -> tuple[ToolCall, ...]:
        calls = turn.get("tool_calls")
        if isinstance(calls, str):
            calls = self.decode("tool calls", calls)
        found = tuple(self.tool_call(index, call) for call in calls) if isinstance(calls, list) else ()
        if calls is not None and not isinstance(calls, list):
            raise self.error(
                "bad-tool-call", f"tool_calls of message {index + 1} is {shorten(calls)}", "write it as a list"
            )
        by_name = turn.get("api")  # Taskmaster: {"role": "agent", "api": {name: arguments}}
        if isinstance(by_name, Mapping):
            found += tuple(self.tool_call(index, {"name": name, "arguments": by_name[name]}) for name in by_name)
        legacy = turn.get("function_call")
        return found if legacy is None else (*found, self.tool_call(index, legacy))

    def calls_in_text(self, index: int, text: str) -> tuple[ToolCall, ...]:
        decoded = self.decode("tool calls", text)
        return tuple(self.tool_call(index, call) for call in (decoded if isinstance(decoded, list) else [decoded]))

    def tool_call(self, index: int, call: Any) -> ToolCall:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise self.error(
                "bad-tool-call",
                f"message {index + 1} has a tool call without a function name: {shorten(call)}",
                'write {"type": "function", "function": {"name": "…", "arguments": {…}}}',
            )
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = self.decode_arguments(index, name, arguments)
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise self.error(
                "bad-tool-call",
                f"the arguments of {name} in message {index + 1} are {shorten(arguments)}",
                "write them as an object, or as a string that holds one",
            )
        call_id = call.get("id")
        return ToolCall(name, arguments, call_id if isinstance(call_id, str) and call_id else None)

    def decode_arguments(self, index: int, name: str, text: str) -> Any:
        if not text.strip():
            return {}
        try:
            return decode_json(text)
        except (ValueError, RecursionError) as error:
            raise self.error(
                "bad-tool-call",
                f"the arguments of {name} in message {index + 1} are not valid JSON ({error}): {shorten(text)}",
                "correct them, or remove the record: the model would learn to write broken calls",
            ) from None

    def tools(self) -> tuple[dict[str, Any], ...]:
        return self.tool_definitions(self.value(self.columns.tools))

    def tool_definitions(self, value: Any) -> tuple[dict[str, Any], ...]:
        """Tool definitions as `{"type": "function", "function": {…}}`; a bare function is wrapped."""
        if isinstance(value, str):
            value = self.decode("tool definitions", value) if value.strip() else None
        if not value:
            return ()
        if isinstance(value, dict):
            value = [value]
        tools = []
        for tool in value if isinstance(value, list) else [value]:
            function = tool.get("function", tool) if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                raise self.error(
                    "bad-tool-definition",
                    f"a tool definition has no name: {shorten(tool)}",
                    'write {"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}',
                )
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
        return tuple(tools)


@dataclass(frozen=True, slots=True)
class _Content:
    text: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


def untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same turns, none of them in the loss."""
    return tuple(replace(m, train=False) if m.role == "assistant" else m for m in messages)


def is_turns(value: Any) -> bool:
    """Whether a prompt or completion is a message or a list of them (also written as a string of JSON)."""
    if isinstance(value, Mapping):
        return any(key in value for key in _ROLE_KEYS)
    if isinstance(value, str):
        opening = value.lstrip()
        if opening.startswith("{") and '"role"' in opening:
            return any(key in first_turn(f"[{value}]") for key in _ROLE_KEYS)
        return opening.startswith("[") and any(key in first_turn(value) for key in _ROLE_KEYS)
    return isinstance(value, list) and all(isinstance(item, Mapping) for item in value)


def _first_string(value: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    return next((value[key] for key in keys if isinstance(value.get(key), str)), None)


def _inner_path(value: Any) -> str:
    return "0" if isinstance(value, list) else str(next(iter(value), "…"))


def _reply_name(index: int | None) -> str:
    return "the reply" if index is None else f"message {index + 1}"
