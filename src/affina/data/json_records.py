"""JSON Lines and JSON files as a stream of records, in constant memory, with the line of every record and every fault.

A `.json` file may be an array, an object that holds one array (`{"data": […]}`), one record, or several objects one
after the other (JSON Lines under the wrong name, which is common). Arrays of any size are read piece by piece.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from affina.data.records import ProblemReporter, RawRecord, RecordProblem, shorten
from affina.errors import DataError, Location

RECORD_COLUMNS: Final = frozenset(
    {
        *("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat", "utterances"),
        *("tools", "functions", "history", "prompt", "completion", "chosen", "rejected"),
    }
)
"""Keys whose list belongs to one record. A list under any other key holds the records of the file."""

_CHUNK_BYTES: Final = 256 * 1024
_SURROGATE: Final = re.compile("[\udc80-\udcff]")
_STRUCTURE: Final = re.compile(r'["\\{}\[\]]')
_SPACE: Final = re.compile(r"[ \t\n\r]*")


class _DuplicateKeyError(ValueError):
    pass


class _NonFiniteError(ValueError):
    pass


def _unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return value


def _refuse_constant(name: str) -> Any:
    raise _NonFiniteError(name)


def _finite_float(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise _NonFiniteError(text)
    return number


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique_object, parse_constant=_refuse_constant, parse_float=_finite_float
)


def decode_json(text: str) -> Any:
    """`json.loads` that refuses duplicate keys, NaN and infinities.

    raises: ValueError (json.JSONDecodeError for syntax), RecursionError
    """
    return _DECODER.decode(text)


def read_json_lines(
    stream: io.BufferedReader, *, name: str, max_record_bytes: int, report: ProblemReporter
) -> Iterator[RawRecord]:
    """Records of a JSON Lines file: one object per line; blank lines are skipped; a bare string is a text record."""
    refuse_foreign_content(stream, name)
    offset = 0
    is_first = True
    for line_number, line, size in _bounded_lines(stream, max_record_bytes):
        where = Location(name, line_number)
        start, offset = offset, offset + size
        if line is None:
            report(_too_large(where, size, max_record_bytes))
            continue
        if line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        content = line.strip(b" \t\r\n")
        if not content:
            continue
        if is_first:
            _refuse_multiline_json(content, where)
            is_first = False
        text = _decode_line(content, start + line.index(content), where, report)
        if text is None:
            continue
        record = _parse_record(text, where, size, report, is_last_line=not line.endswith(b"\n"))
        if record is not None:
            yield record


def _bounded_lines(stream: io.BufferedReader, max_bytes: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(line number, the line or None when it is too long, its size); never more than `max_bytes` in memory."""
    line_number = 0
    while line := stream.readline(max_bytes + 1):
        line_number += 1
        size = len(line)
        if size <= max_bytes or (size == max_bytes + 1 and line.endswith(b"\n")):
            yield line_number, line, size
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_CHUNK_BYTES)
            size += len(line)
        yield line_number, None, size


def _refuse_multiline_json(content: bytes, where: Location) -> None:
    if content.startswith(b"["):
        raise DataError(
            "wrong-extension",
            "this .jsonl file holds a JSON array, not one object per line",
            fix="rename it to .json",
            where=where,
        )
    if content == b"{":
        raise DataError(
            "wrong-extension",
            "this .jsonl file holds objects that span several lines",
            fix="rename it to .json, or write each object on one line",
            where=where,
        )


def refuse_foreign_content(stream: io.BufferedReader, name: str) -> None:
    """Raises for content that is clearly not the data: a Git LFS pointer, a web page, UTF-16, Parquet."""
    head = stream.peek(64)[:64]
    where = Location(name)
    if head.startswith(b"version https://git-lfs"):
        raise DataError(
            "git-lfs-pointer",
            "this is a Git LFS pointer, not the data",
            fix="run `git lfs pull` in that repository",
            where=where,
        )
    if head[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise DataError(
            "web-page",
            "this is a web page, not the data",
            why="a login or error page was saved instead of the file, most often",
            fix="download the raw file",
            where=where,
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            "wrong-encoding",
            "this file is UTF-16",
            fix="convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW",
            where=where,
        )
    if head.startswith((b"PAR1", b"ARROW1")):
        kind = "parquet" if head.startswith(b"PAR1") else "arrow"
        raise DataError("wrong-extension", f"this file holds {kind} data", fix=f"rename it to .{kind}", where=where)


def decode_utf8(data: bytes, offset: int, where: Location, report: ProblemReporter) -> str | None:
    """The text, or None after reporting the byte that is not UTF-8. `offset` is where `data` starts in the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report(_bad_utf8(data[error.start], offset + error.start, where))
        return None


def _bad_utf8(byte: int, offset: int, where: Location) -> RecordProblem:
    return RecordProblem(
        "bad-utf8",
        where,
        f"byte 0x{byte:02X} at offset {offset:,} is not UTF-8",
        "save the file as UTF-8; from Windows: iconv -f CP1252 -t UTF-8 OLD > NEW",
    )


def _decode_line(content: bytes, offset: int, where: Location, report: ProblemReporter) -> str | None:
    if b"\x00" in content:
        position = offset + content.index(b"\x00")
        report(
            RecordProblem(
                "null-byte",
                where,
                f"null byte at offset {position:,}",
                "the file was damaged while it was written (a crash, a full disk): write it again",
            )
        )
        return None
    return decode_utf8(content, offset, where, report)


def _parse_record(
    text: str, where: Location, size: int, report: ProblemReporter, *, is_last_line: bool = False
) -> RawRecord | None:
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        report(_describe_json_error(error, text, where, is_last_line=is_last_line))
        return None
    return _to_record(value, where, size, report)


def _to_record(value: Any, where: Location, size: int, report: ProblemReporter) -> RawRecord | None:
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, dict):
        return RawRecord(value, where, size)
    report(
        RecordProblem(
            "record-not-object",
            where,
            f"the record is {shorten(value, limit=40)}, not an object",
            'write each record as an object: {"messages": […]}',
        )
    )
    return None


def _too_large(where: Location, size: int, limit: int) -> RecordProblem:
    return RecordProblem(
        "record-too-large",
        where,
        f"the record has {size:,} bytes, the limit is {limit:,}",
        "a missing line break or quote, most often; raise data.max_record_bytes if it is meant",
    )


def _describe_json_error(
    error: ValueError | RecursionError, text: str, where: Location, *, first_line: int = 1, is_last_line: bool = False
) -> RecordProblem:
    """The problem for a decoding error of `text`, with its column and a guess at the cause."""
    if isinstance(error, _DuplicateKeyError):
        return RecordProblem(
            "duplicate-key",
            where,
            f'the key "{error}" appears twice in one object',
            "JSON readers keep the last and drop the others: remove or rename one",
        )
    if isinstance(error, _NonFiniteError):
        return RecordProblem(
            "non-finite-number",
            where,
            f"{error} is not a JSON number",
            'write null, or a string such as "NaN"; from Python: json.dumps(…, allow_nan=False)',
        )
    if isinstance(error, RecursionError):
        return RecordProblem("json-too-deep", where, "the record is nested too deeply", "flatten the record")
    if not isinstance(error, json.JSONDecodeError):
        return RecordProblem("invalid-json", where, str(error), "write such a number as a string")
    line = where.line if where.line is None else where.line + error.lineno - 1
    hint = _json_hint(text, error, is_last_line=is_last_line)
    return RecordProblem(
        "invalid-json", Location(where.path, line), f"invalid JSON at column {error.colno}: {_phrase(error)}", hint
    )


def _phrase(error: json.JSONDecodeError) -> str:
    return error.msg[0].lower() + error.msg[1:]


def _json_hint(text: str, error: json.JSONDecodeError, *, is_last_line: bool) -> str:
    rest = text[error.pos :].lstrip()
    before = text[: error.pos].rstrip()
    # Python 3.13 points at a trailing comma itself, earlier versions behind it.
    if (rest[:1] in ("}", "]") and before.endswith(",")) or re.match(r",\s*[}\]]", rest):
        return "remove the trailing comma"
    if rest[:1] == "'":
        return "JSON strings take double quotes, not single ones; from Python: json.dumps(record), not str(record)"
    if re.match(r"(None|True|False)\b", rest):
        return "JSON writes null, true, false; from Python: json.dumps(record), not str(record)"
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: remove it"
    if error.msg.startswith("Invalid control character"):
        return "write line breaks and tabs inside strings as \\n and \\t"
    if error.msg.startswith("Invalid \\escape"):
        return "write a backslash as \\\\"
    if error.msg.startswith("Extra data") and rest[:1] == "{":
        return "put each object on a line of its own"
    if not rest or error.msg.startswith("Unterminated string"):
        return (
            "the record was cut off at the end of the file: write or download the file again"
            if is_last_line
            else "the record is not closed on this line; a line break inside a string is written \\n"
        )
    return f"look at {shorten(text[max(0, error.pos - 20) : error.pos + 20])}"


# ---------------------------------------------------------------------------------------------------------------------


def read_json(
    stream: io.BufferedReader, *, name: str, split: str | None, max_record_bytes: int, report: ProblemReporter
) -> Iterator[RawRecord]:
    """Records of a JSON file: the elements of its array, wherever that is, or the objects it holds."""
    refuse_foreign_content(stream, name)
    if _is_json_lines(stream.peek(_CHUNK_BYTES)):
        yield from read_json_lines(stream, name=name, max_record_bytes=max_record_bytes, report=report)
        return
    cursor = _Cursor(stream, name, max_record_bytes, report)
    first = cursor.peek()
    if first == "[":
        cursor.advance()
        yield from cursor.elements()
        cursor.expect_end()
    elif first == "{":
        yield from _objects(cursor, split)
    elif first == "":
        raise DataError("empty-file", "the file holds no JSON", fix="remove it, or write it again", where=cursor.where)
    else:
        raise DataError(
            "invalid-json",
            f"a JSON file starts with [ or {{, this one with {shorten(first)}",
            fix="look at the file; plain text belongs in .txt, tables in .csv",
            where=cursor.where,
        )


def _is_json_lines(head: bytes) -> bool:
    """Whether the first line is a whole object and another one follows on a later line."""
    first, _, rest = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    if not rest.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _objects(cursor: _Cursor, split: str | None) -> Iterator[RawRecord]:
    """A file that starts with an object: a container of one array, one record, or one object after the other."""
    while cursor.peek() == "{":
        where = cursor.where
        cursor.advance()
        fields: dict[str, Any] = {}
        container: str | None = None
        size = 2
        while (char := cursor.peek()) not in ("}", ""):
            if char == ",":
                cursor.advance()
                continue
            key = cursor.read_key()
            if key in fields or key == container:
                raise DataError(
                    "duplicate-key", f'the key "{key}" appears twice in one object', fix="remove one", where=where
                )
            is_list = cursor.peek() == "["
            if is_list and key not in RECORD_COLUMNS and cursor.list_holds_records() and split in (None, key):
                if container is not None:
                    raise DataError(
                        "two-lists",
                        f'the file holds two lists of records, "{container}" and "{key}"',
                        fix=f"name the one to read, e.g. split: {container}",
                        where=cursor.where,
                    )
                container = key
                cursor.advance()
                yield from cursor.elements()
                continue
            value, value_size = cursor.read_value()
            fields[key] = value
            size += value_size + len(key)
        if cursor.peek() == "":
            raise DataError(
                "truncated-file",
                "the file ends inside an object",
                fix="write or download the file again",
                where=cursor.where,
            )
        cursor.advance()
        if container is None:
            if split is not None and isinstance(fields.get(split), list):
                container = split
                continue
            yield RawRecord(fields, where, size)
        if cursor.peek() == ",":
            cursor.advance()
    cursor.expect_end()


class _Cursor:
    """A position in a stream of JSON text that only ever holds about one record.

    Bytes that are not UTF-8 become lone surrogates (PEP 383), which valid UTF-8 cannot contain; so they are found, with
    their offset, in the record they belong to, and the rest of the file is still read.
    """

    def __init__(self, stream: io.BufferedReader, name: str, max_record_bytes: int, report: ProblemReporter) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._name = name
        self._limit = max_record_bytes
        self._report = report
        self._buffer = ""
        self._position = 0
        self._line = 1
        self._offset = 3 if stream.peek(3)[:3] == codecs.BOM_UTF8 else 0
        self._is_exhausted = False

    @property
    def where(self) -> Location:
        return Location(self._name, self._line)

    def _fill(self, size: int = _CHUNK_BYTES) -> bool:
        """Appends more text to the buffer, after dropping what is behind the position; False at the end."""
        if self._is_exhausted:
            return False
        data = self._stream.read(size)
        self._is_exhausted = not data
        self._buffer = self._buffer[self._position :] + self._decoder.decode(data, final=not data)
        self._position = 0
        return bool(data)

    def _consume(self, end: int) -> str:
        """The text up to buffer index `end`, which is left behind; counts its lines and bytes."""
        text = self._buffer[self._position : end]
        self._line += text.count("\n")
        self._offset += len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))
        self._position = end
        return text

    def peek(self) -> str:
        """The next character that is not white space, "" at the end of the file."""
        while True:
            match = _SPACE.match(self._buffer, self._position)
            assert match is not None
            self._consume(match.end())
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._fill() and self._position >= len(self._buffer):
                return ""

    def advance(self) -> None:
        """Goes over the character that `peek` returned."""
        self._consume(self._position + 1)

    def expect_end(self) -> None:
        if rest := self.peek():
            raise DataError(
                "invalid-json",
                f"text after the end of the JSON data: {shorten(rest + self._buffer[self._position + 1 :][:20])}",
                fix="remove it; several arrays belong in several files",
                where=self.where,
            )

    def read_key(self) -> str:
        """A key of an object and its colon."""
        where = self.where
        key, _ = self.read_value()
        if not isinstance(key, str) or self.peek() != ":":
            raise DataError(
                "invalid-json",
                f"expected a key in double quotes and a colon, found {shorten(key)}",
                fix="look at this line",
                where=where,
            )
        self.advance()
        return key

    def list_holds_records(self) -> bool:
        """Whether the list that starts here has an object (or nothing) as its first element."""
        while True:
            match = re.compile(r"\[\s*(\S)").match(self._buffer, self._position)
            if match is not None:
                return match[1] == "{"
            if not self._fill():
                return False

    def read_value(self) -> tuple[Any, int]:
        """A whole value and its size in bytes. raises: DataError when it is not valid or too large"""
        where = self.where
        problem, value, size = self._next_value()
        if problem is not None:
            raise DataError(problem.code, problem.reason, fix=problem.fix, where=problem.location or where)
        return value, size

    def elements(self) -> Iterator[RawRecord]:
        """The elements of the array whose `[` was just passed; faulty ones are reported and passed over."""
        is_first = True
        while (char := self.peek()) != "]":
            if char == "":
                raise DataError(
                    "truncated-file",
                    "the file ends inside its array of records",
                    fix="write or download the file again",
                    where=self.where,
                )
            if not is_first:
                if char != ",":
                    raise DataError(
                        "invalid-json",
                        f"expected a comma or ] between two records, found {shorten(char)}",
                        fix="put a comma between the records; one object per line without commas belongs in .jsonl",
                        where=self.where,
                    )
                self.advance()
                if self.peek() == "]":
                    break  # a comma after the last record: nothing is lost by accepting it
                if self.peek() == "":
                    continue
            is_first = False
            where = self.where
            problem, value, size = self._next_value()
            if problem is not None:
                self._report(problem)
                continue
            record = _to_record(value, where, size, self._report)
            if record is not None:
                yield record
        self.advance()

    def _next_value(self) -> tuple[RecordProblem | None, Any, int]:
        """The value at the position, or what is wrong with it; either way the position is behind it afterwards."""
        self.peek()
        where = self.where
        while True:
            try:
                value, end = _DECODER.raw_decode(self._buffer, self._position)
            except (ValueError, RecursionError) as error:
                if self._may_be_incomplete(error):
                    if len(self._buffer) - self._position > self._limit:
                        return _too_large(where, self._skip_value(), self._limit), None, 0
                    # Doubling keeps the total work of repeated attempts linear. At the end of the file the next attempt
                    # fails for good, with positions that fit the buffer.
                    self._fill(max(_CHUNK_BYTES, len(self._buffer) - self._position))
                    continue
                return self._faulty_value(error, where), None, 0
            if end == len(self._buffer) and not self._is_exhausted and self._fill():
                continue  # a number may go on in the next piece
            start_offset = self._offset
            text = self._consume(end)
            size = self._offset - start_offset
            if size > self._limit:
                return _too_large(where, size, self._limit), None, 0
            if not text.isascii() and (bad := _SURROGATE.search(text)):
                return self._undecodable(text, bad.start(), start_offset, where), None, 0
            return None, value, size

    def _may_be_incomplete(self, error: ValueError | RecursionError) -> bool:
        """Whether the error may only say that the buffer ends inside the value."""
        if self._is_exhausted or not isinstance(error, json.JSONDecodeError):
            return False
        # 16 characters cover a cut `\\uXXXX\\uXXXX` escape, which is reported at its start.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - 16

    def _undecodable(self, text: str, position: int, offset: int, where: Location) -> RecordProblem:
        offset += len(text[:position].encode("utf-8", "surrogateescape"))
        return _bad_utf8(ord(text[position]) - 0xDC00, offset, Location(where.path, _line_at(where, text, position)))

    def _faulty_value(self, error: ValueError | RecursionError, where: Location) -> RecordProblem:
        """The problem behind `error`; goes over the value by its brackets."""
        text = self._buffer[self._position : self._position + self._limit]
        if isinstance(error, json.JSONDecodeError):
            error = json.JSONDecodeError(error.msg, text, max(0, error.pos - self._position))
            if "\x00" in text[error.pos : error.pos + 1]:
                line = _line_at(where, text, error.pos)
                self._skip_value()
                return RecordProblem(
                    "null-byte",
                    Location(where.path, line),
                    "the record holds a null byte",
                    "the file was damaged while it was written (a crash, a full disk): write it again",
                )
        problem = _describe_json_error(error, text, where)
        self._skip_value()
        return problem

    def _skip_value(self) -> int:
        """Goes over a value that cannot be decoded, by matching its brackets; returns its size in bytes."""
        start = self._offset
        if self.peek() not in ("{", "[", '"'):
            while (stop := re.compile(r"[,\]}]").search(self._buffer, self._position)) is None:
                self._consume(len(self._buffer))
                if not self._fill():
                    return self._offset - start
            self._consume(stop.start())
            return self._offset - start
        depth = 0
        in_string = False
        index = self._position
        while True:
            match = _STRUCTURE.search(self._buffer, index)
            if match is None:
                self._consume(len(self._buffer))
                if not self._fill():
                    return self._offset - start
                index = self._position
                continue
            char, index = match[0], match.end()
            if char == "\\" and in_string:
                if index >= len(self._buffer):
                    self._consume(index)
                    self._fill()
                    index = self._position
                index += 1
            elif char == '"':
                in_string = not in_string
            elif not in_string and char in "{[":
                depth += 1
            elif not in_string and char in "}]":
                depth -= 1
            if depth <= 0 and not in_string and char != "\\":
                self._consume(index)
                return self._offset - start


def _line_at(where: Location, text: str, position: int) -> int | None:
    return None if where.line is None else where.line + text.count("\n", 0, position)
