"""Reads sources into valid conversations, and says what is wrong with those that are not.

Three severities. An *error* makes a record unusable: with `on_error: fail` it ends the reading, with `skip` the record
is left out, counted and listed. A *repaired* record was used after a change that takes nothing from training: turns
after the last reply carry no trained token, so they are cut off (with `fail`, that too is an error, for the user to
decide). A *warning* is about a record that is used as it is.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from affina.config.objectives import Records
from affina.data.formats import Columns, DetectedFormat, Format
from affina.data.messages import Conversation, Message
from affina.data.preference_formats import detect_records, unread_label
from affina.data.preferences import to_conversations
from affina.data.records import RawRecord, RecordProblem
from affina.data.sources import DEFAULT_MAX_RECORD_BYTES, Source, open_source
from affina.errors import AffinaError, AffinaErrors, DataError, Location

OnError = Literal["fail", "skip"]

MAX_REPORTED_ERRORS: Final = 20
"""With `on_error: fail`, reading stops after this many errors and reports them together."""

MAX_LISTED_PROBLEMS: Final = 1000
"""Problems kept in memory for reports; counts are exact beyond."""

_PROBE_RECORDS: Final = 100
# With `fail`, how many more records are read after the first error in search of others to report with it.
_RECORDS_AFTER_FIRST_ERROR: Final = 100_000

# C0 and C1 control characters that no text needs; NEL (U+0085) and the usual white space are left alone.
_CONTROL: Final = re.compile("[\x01-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]")
_LONE_SURROGATE: Final = re.compile("[\ud800-\udfff]")
# UTF-8 that was read as Windows-1252: a lead byte C2–F4 and its continuation bytes, as that code page shows them.
_MOJIBAKE: Final = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc\u2013-\u2122]+"
)


# One conversation ----------------------------------------------------------------------------------------------------


def validate_conversation(conversation: Conversation, location: Location) -> list[RecordProblem]:
    """Everything that is wrong with one conversation; empty when it can be trained on as it is."""
    if conversation.text is not None:
        problems = list(_text_problems(conversation.text, location, "the text"))
        if not conversation.text.strip():
            problems.append(_problem("empty-text", location, "the text is empty", "remove the record"))
        return problems
    problems = list(_order_problems(conversation.messages, location))
    problems += _tool_problems(conversation.messages, location)
    for number, message in enumerate(conversation.messages, start=1):
        problems += _message_problems(message, number, location)
    return problems


def cut_after_last_reply(conversation: Conversation) -> Conversation:
    """The conversation without the turns that follow its last reply; unchanged when there are none, or no reply."""
    rejected = tuple(_cut_after_last_reply(turns) for turns in conversation.rejected)
    return replace(conversation, messages=_cut_after_last_reply(conversation.messages), rejected=rejected)


def _cut_after_last_reply(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return messages[: last + 1] if last >= 0 else messages


def _problem(code: str, location: Location, reason: str, fix: str) -> RecordProblem:
    return RecordProblem(code, location, reason, fix)


def _order_problems(messages: Sequence[Message], location: Location) -> Iterator[RecordProblem]:
    if not messages:
        yield _problem("no-messages", location, "the conversation has no messages", "remove the record")
        return
    previous: Message | None = None
    for number, message in enumerate(messages, start=1):
        if (fault := _order_fault(previous, message)) is not None:
            reason, fix = fault
            yield _problem("role-order", location, f"message {number} ({message.role}) {reason}", fix)
        previous = message
    replies = [message for message in messages if message.role == "assistant"]
    if not replies:
        yield _problem(
            "no-reply",
            location,
            "the conversation has no assistant message, so there is nothing to train",
            "add the wanted reply, or remove the record",
        )
        return
    if not any(reply.train for reply in replies):
        yield _problem(
            "nothing-trained",
            location,
            "every reply has weight 0 or train false, so there is nothing to train",
            "set weight 1 on the replies to learn, or remove the record",
        )
    if messages[-1].role != "assistant":
        count = next(count for count, m in enumerate(reversed(messages)) if m.role == "assistant")
        what = f"{count} messages" if count > 1 else f"a {messages[-1].role} message"
        yield _problem(
            "no-final-reply",
            location,
            f"the conversation ends with {what} after the last reply",
            "remove what follows the last reply, or set data.on_error: skip, which cuts it off",
        )


def _order_fault(previous: Message | None, message: Message) -> tuple[str, str] | None:
    """Why `message` may not follow `previous`, and the remedy; None when it may."""
    before = previous.role if previous is not None else None
    if message.role == "system":
        if previous is None:
            return None
        return "is not the first: only the first message may be a system message", "move it to the start, or merge it"
    if before in (None, "system"):
        # A greeting that is context, as in a prompt that the assistant opens, is no reply to learn.
        if message.role == "user" or (message.role == "assistant" and not message.train):
            return None
        return "comes before any user message", "start with a user message, or remove this one"
    if message.role == "user":
        if before != "user":
            return None
        return "follows another user message", "join them into one, or add the missing reply"
    if message.role == "assistant":
        if before != "assistant" or (previous is not None and previous.tool_calls):
            return None
        return "follows another reply", "join them into one, or add the missing user message"
    return None  # tool results are checked against their calls


def _tool_problems(messages: Sequence[Message], location: Location) -> Iterator[RecordProblem]:
    """Tool results need a call right before them (other results may lie between), with the same id where ids are."""
    open_ids: set[str] = set()
    has_call = False
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant":
            has_call = bool(message.tool_calls)
            open_ids = {call.id for call in message.tool_calls if call.id}
        elif message.role != "tool":
            has_call = False
        elif not has_call:
            yield _problem(
                "tool-result-without-call",
                location,
                f"message {number} is a tool result, but the reply before it calls no tool",
                "add tool_calls to that reply, or remove the result",
            )
        elif message.tool_call_id and open_ids and message.tool_call_id not in open_ids:
            yield _problem(
                "tool-result-without-call",
                location,
                f'message {number} answers the call "{message.tool_call_id}", which the reply before it does not make',
                f"use one of its ids: {', '.join(sorted(open_ids))}",
            )


def _message_problems(message: Message, number: int, location: Location) -> Iterator[RecordProblem]:
    name = f"message {number} ({message.role})"
    if message.role == "assistant" and not message.content.strip() and not message.tool_calls:
        has = "only reasoning" if message.reasoning else "only white space" if message.content else "no content"
        yield _problem(
            "empty-reply", location, f"{name} has {has} and no tool call", "write the reply, or remove the record"
        )
    elif message.role == "user" and not message.content.strip():
        yield _problem("empty-turn", location, f"{name} is empty", "write what the user says, or remove the record")
    yield from _text_problems(message.content, location, name)
    if message.reasoning:
        yield from _text_problems(message.reasoning, location, f"the reasoning of {name}")
    for call in message.tool_calls:
        for text in _strings_inside(call.arguments):
            yield from _text_problems(text, location, f"a tool call of {name}")


def _strings_inside(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings_inside(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings_inside(item)


def _text_problems(text: str, location: Location, name: str) -> Iterator[RecordProblem]:
    if text.isascii() and text.isprintable():
        return
    if match := _LONE_SURROGATE.search(text):
        yield _problem(
            "lone-surrogate",
            location,
            f"{name} holds the lone surrogate U+{ord(match[0]):04X}, half of a character",
            "the text was cut inside an emoji or the like: write it again, or remove the half",
        )
    if "\x00" in text:
        yield _problem("null-character", location, f"{name} holds a null character", "remove it")
    if match := _CONTROL.search(text):
        yield RecordProblem(
            "control-character",
            location,
            f"{name} holds the control character U+{ord(match[0]):04X}",
            "remove it, unless the model should write it",
            "warning",
        )
    if "\ufffd" in text:
        yield RecordProblem(
            "replacement-character",
            location,
            f"{name} holds U+FFFD, which stands for a character that was lost",
            "read the original with the right encoding",
            "warning",
        )
    if (wrong := find_mojibake(text)) is not None:
        yield RecordProblem(
            "mojibake",
            location,
            f'{name} holds "{wrong[0]}", which should be "{wrong[1]}"',
            "the text was UTF-8 read as Windows-1252: read the original as UTF-8",
            "warning",
        )


def find_mojibake(text: str) -> tuple[str, str] | None:
    """The first piece that is UTF-8 read as Windows-1252, and what it should be; None when there is none."""
    for match in _MOJIBAKE.finditer(text):
        if (right := _repaired(match[0])) is not None:
            return match[0], right
    return None


def _repaired(piece: str) -> str | None:
    """The text whose UTF-8 bytes Windows-1252 shows as `piece`; None when it is not of that kind."""
    data = bytearray()
    for char in piece:
        try:
            data += char.encode("cp1252")
        except UnicodeEncodeError:
            if ord(char) > 0xFF:
                return None
            data.append(ord(char))  # the five bytes that Windows-1252 leaves undefined
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


# Many conversations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of conversations, as the configuration names it."""

    path: str | Path
    format: Format | Literal["auto"] = "auto"
    columns: Columns = field(default_factory=Columns)
    split: str | None = None
    subset: str | None = None
    max_records: int | None = None

    def open(
        self,
        *,
        max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
        cache_directory: Path | None = None,
        streaming: bool = False,
    ) -> Source:
        """raises: DataError when there is nothing to read at `path`"""
        names_numbers = any(re.fullmatch(r"column_\d+", path) for path in self.columns.named().values())
        return open_source(
            self.path,
            split=self.split,
            subset=self.subset,
            has_header=False if names_numbers else None,
            max_record_bytes=max_record_bytes,
            cache_directory=cache_directory,
            streaming=streaming,
        )


@dataclass(slots=True)
class SourceSummary:
    """What was read from one source."""

    description: str
    formats: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_read: int = 0
    num_kept: int = 0
    num_skipped: int = 0


@dataclass(slots=True)
class ProblemSummary:
    """Problems of all records: exact counts, and the first of them in full.

    counts: (code, severity) → how often
    listed: at most MAX_LISTED_PROBLEMS of them, in order
    """

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    listed: list[RecordProblem] = field(default_factory=list)
    num_skipped: int = 0
    num_repaired: int = 0

    def add(self, problem: RecordProblem) -> None:
        self.counts[problem.code, problem.severity] += 1
        if len(self.listed) < MAX_LISTED_PROBLEMS:
            self.listed.append(problem)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: counts by code, and the listed problems."""
        return {
            "num_skipped": self.num_skipped,
            "num_repaired": self.num_repaired,
            "counts": [
                {"code": code, "severity": severity, "count": count}
                for (code, severity), count in self.counts.most_common()
            ],
            "listed": [problem.to_dict() for problem in self.listed],
        }


class ConversationStream:
    """Valid conversations of several sources, one after the other; its summaries are complete once it is exhausted.

    Iterating twice reads twice, and starts the summaries anew.
    """

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        *,
        on_error: OnError,
        max_record_bytes: int,
        system_prompt: str | None,
        cache_directory: Path | None,
        streaming: bool,
        wanted: Records = "replies",
    ) -> None:
        self._wanted: Records = wanted
        self._specs = tuple(specs)
        self._on_error = on_error
        self._system_prompt = system_prompt
        self._opened = [
            spec.open(max_record_bytes=max_record_bytes, cache_directory=cache_directory, streaming=streaming)
            for spec in self._specs
        ]
        self._reset()

    def _reset(self) -> None:
        self.problems = ProblemSummary()
        self.sources = [SourceSummary(source.description, notes=list(source.notes)) for source in self._opened]
        self._errors: list[AffinaError] = []

    def fingerprint(self) -> str:
        """sha256 over the content of all sources and everything here that decides what comes out."""
        import hashlib

        digest = hashlib.sha256(f"{self._on_error}|{self._system_prompt!r}|{self._wanted}".encode())
        for spec, source in zip(self._specs, self._opened, strict=True):
            digest.update(f"{spec.format}|{spec.columns}|{spec.max_records}|{source.fingerprint()};".encode())
        return digest.hexdigest()

    def __iter__(self) -> Iterator[Conversation]:
        self._reset()
        for index in range(len(self._specs)):
            yield from self.read_source(index)
        self.raise_errors()

    def read_source(self, index: int) -> Iterator[Conversation]:
        """The conversations of one source; after the last source the caller calls `raise_errors`.

        raises: DataError for a fault of a file, AffinaErrors for records with `on_error: fail`
        """
        spec, summary = self._specs[index], self.sources[index]

        def take_unreadable(problem: RecordProblem) -> None:
            summary.num_read += 1
            self._take_problem(problem, summary)

        with contextlib.closing(self._opened[index].read(report=take_unreadable)) as records:
            yield from self._read_records(records, index)
        if summary.num_read == 0:
            raise DataError(
                "no-records",
                f"{summary.description} holds no records",
                fix="check that this is the file you meant",
                where=Location(spec.path),
            )

    def _read_records(self, records: Iterator[RawRecord], index: int) -> Iterator[Conversation]:
        spec, summary = self._specs[index], self.sources[index]
        num_after_first_error = 0
        # Files of one folder may differ in format, so each is looked at anew.
        for name, group in itertools.groupby(records, key=_file_of):
            head = list(itertools.islice(group, _PROBE_RECORDS))
            detected = detect_records(
                [record.value for record in head],
                wanted=self._wanted,
                format=spec.format,
                columns=spec.columns,
                where=Location(name),
            )
            _add_once(summary.formats, f"{detected.format}: {detected.why}")
            if self._wanted == "replies" and (label := unread_label([record.value for record in head])) is not None:
                self._take_problem(_label_not_read(label, head[0].location), summary)
            for record in itertools.chain(head, group):
                if spec.max_records is not None and summary.num_kept >= spec.max_records:
                    return
                summary.num_read += 1
                conversations = self._conversations(record, detected, index, summary)
                if self._errors:
                    num_after_first_error += 1
                    if num_after_first_error > _RECORDS_AFTER_FIRST_ERROR:
                        self.raise_errors()
                elif conversations:
                    summary.num_kept += 1
                    yield from conversations

    def _conversations(
        self, record: RawRecord, detected: DetectedFormat, index: int, summary: SourceSummary
    ) -> list[Conversation]:
        """The record as valid conversations: one, or of a tree one for each question; [] after its problems were
        taken down."""
        try:
            conversations = to_conversations(record, detected, wanted=self._wanted, source=index)
        except DataError as error:
            self._take_problem(_problem_of(error, record.location), summary)
            return []
        if not conversations:
            reason = "no reply of the record is better than another"
            fix = "nothing to do: it is left out"
            self._take_problem(RecordProblem("no-preference", record.location, reason, fix, "warning"), summary)
        num_skipped = summary.num_skipped
        kept = [self._checked(conversation, record.location, summary) for conversation in conversations]
        if summary.num_skipped > num_skipped + 1:  # one record, however many of its questions are faulty
            self.problems.num_skipped -= summary.num_skipped - num_skipped - 1
            summary.num_skipped = num_skipped + 1
        return [conversation for conversation in kept if conversation is not None]

    def _checked(self, conversation: Conversation, location: Location, summary: SourceSummary) -> Conversation | None:
        """The conversation as it can be used; None after its problems were taken down."""
        problems = validate_conversation(conversation, location)
        for turns in conversation.rejected:
            seen = set(problems)
            other = validate_conversation(replace(conversation, messages=turns, rejected=()), location)
            problems += [replace(p, reason=f"in the rejected conversation, {p.reason}") for p in other if p not in seen]
        if self._on_error == "skip":
            problems = [
                replace(problem, severity="repaired") if problem.code == "no-final-reply" else problem
                for problem in problems
            ]
        errors = [problem for problem in problems if problem.severity == "error"]
        for problem in problems:
            # A record is skipped once, whatever the number of its faults.
            self._take_problem(problem, summary, is_first=not errors or problem is errors[0])
        if errors:
            return None
        if any(problem.severity == "repaired" for problem in problems):
            self.problems.num_repaired += 1
            conversation = cut_after_last_reply(conversation)
        return self._with_system_prompt(conversation)

    def _with_system_prompt(self, conversation: Conversation) -> Conversation:
        messages = conversation.messages
        if self._system_prompt is None or not messages or messages[0].role == "system":
            return conversation
        system = Message("system", self._system_prompt)
        rejected = tuple((system, *turns) for turns in conversation.rejected)
        return replace(conversation, messages=(system, *messages), rejected=rejected)

    def _take_problem(self, problem: RecordProblem, summary: SourceSummary, *, is_first: bool = True) -> None:
        self.problems.add(problem)
        if problem.severity != "error":
            return
        if is_first:
            summary.num_skipped += 1
            self.problems.num_skipped += 1
        if self._on_error == "fail":
            self._errors.append(problem.to_error())
            if len(self._errors) >= MAX_REPORTED_ERRORS:
                self.raise_errors()

    def raise_errors(self) -> None:
        """Raises what `on_error: fail` has collected, with the counts in front; does nothing when there is nothing."""
        if not self._errors:
            return
        num_bad = self.problems.num_skipped
        counts = Counter(error.code for error in self._errors)
        num_read = sum(summary.num_read for summary in self.sources)
        noun = "record" if num_bad == 1 else "records"
        limit = " (reading stopped here; there may be more)" if len(self._errors) >= MAX_REPORTED_ERRORS else ""
        summary = DataError(
            "bad-records",
            f"{num_bad} bad {noun} among the first {num_read:,}{limit}",
            why=", ".join(f"{count} × {code}" for code, count in counts.most_common()),
            fix="correct them as said below, or set data.on_error: skip to leave them out",
        )
        errors, self._errors = self._errors, []
        raise AffinaErrors(errors, summary)


def read_conversations(
    sources: Sequence[SourceSpec],
    *,
    on_error: OnError = "fail",
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    system_prompt: str | None = None,
    cache_directory: Path | None = None,
    streaming: bool = False,
    wanted: Records = "replies",
) -> ConversationStream:
    """A stream of the valid conversations of `sources`, in order, with `Conversation.source` set to the source's index.

    on_error:      fail: the first errors (up to 20) end the reading together. skip: bad records are left out, counted
                   and listed in `.problems`
    system_prompt: put in front of conversations that have none
    streaming:     hub data sets are read over the network instead of being downloaded first
    wanted:        what the objective learns from
    raises:        DataError at once when a source does not exist; while reading for faults of files and formats
    """
    return ConversationStream(
        sources,
        on_error=on_error,
        max_record_bytes=max_record_bytes,
        system_prompt=system_prompt,
        cache_directory=cache_directory,
        streaming=streaming,
        wanted=wanted,
    )


def _label_not_read(label: str, location: Location) -> RecordProblem:
    return RecordProblem(
        "label-not-read",
        location,
        f'"{label}" says that some replies are not wanted, and all of them are trained',
        "write training.objective: kto, or leave the unwanted ones out",
        "warning",
    )


def _file_of(record: RawRecord) -> str:
    return str(record.location.path).partition("#")[0]


def _problem_of(error: DataError, location: Location) -> RecordProblem:
    reason = error.what if error.why is None else f"{error.what}; {error.why}"
    return RecordProblem(error.code, error.where or location, reason, error.fix or "correct or remove the record")


def _add_once(items: list[str], item: str) -> None:
    if item not in items:
        items.append(item)
