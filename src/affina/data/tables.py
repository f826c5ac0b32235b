"""CSV, TSV, Parquet, Arrow and plain text as streams of records.

CSV is read by a small parser of our own: Python's `csv` module cannot say on which line a quoted field was left open,
it goes on to the end of the file when a quote is missing, and its field limit is a setting of the whole process.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from affina.data.json_records import decode_utf8, refuse_foreign_content
from affina.data.records import ProblemReporter, RawRecord, RecordProblem, shorten
from affina.errors import DataError, Location

_DELIMITERS: Final = (",", ";", "\t", "|")
_COLUMNAR_BATCH: Final = 256
_NAME: Final = re.compile(r"[^\W\d][\w .:/()\[\]#-]{0,47}")
_SENTENCE: Final = re.compile(r".{101,}|.*[\n.?!]|[\d.,+-]+", re.DOTALL)


class _QuoteError(ValueError):
    """Text follows the closing quote of a field."""


def read_table(
    stream: io.BufferedReader,
    *,
    name: str,
    is_tsv: bool,
    has_header: bool | None,
    max_record_bytes: int,
    report: ProblemReporter,
) -> Iterator[RawRecord]:
    """Rows of a CSV or TSV file as records of strings.

    has_header: None decides by the look of the first row: that of a TSV file must look like names, that of a CSV file
    only not like sentences or numbers. Without a header the columns are column_1, column_2, …
    The delimiter of a .csv file is the most frequent of `, ; tab |` in its first line. A TSV file uses quotes as
    ordinary characters unless all its quoted fields are well formed.
    """
    refuse_foreign_content(stream, name)
    head = stream.peek(1 << 18)
    delimiter = "\t" if is_tsv else _find_delimiter(head)
    quoting = not (is_tsv and _quotes_are_literal(head))
    columns: list[str] | None = None
    for where, fields, size in _rows(stream, name, delimiter, quoting, max_record_bytes, report):
        if columns is None:
            if has_header or (has_header is None and looks_like_header(fields, is_strict=is_tsv)):
                columns = _check_header(fields, where)
                continue
            columns = [f"column_{index}" for index in range(1, len(fields) + 1)]
        if len(fields) != len(columns):
            report(_wrong_width(where, fields, columns, delimiter))
            continue
        yield RawRecord(dict(zip(columns, fields, strict=True)), where, size)


def looks_like_header(fields: Sequence[str], *, is_strict: bool) -> bool:
    """Whether a first row is column names: all different and none of them a sentence or a number.

    is_strict: they must also be a few short words that start with a letter
    """
    names = [field.strip() for field in fields]
    if len(set(names)) != len(names):
        return False
    if is_strict:
        return all(_NAME.fullmatch(name) is not None and len(name.split()) <= 4 for name in names)
    return not any(_SENTENCE.fullmatch(name) for name in names)


def _check_header(fields: list[str], where: Location) -> list[str]:
    names = [field.strip() for field in fields]
    for name in names:
        if names.count(name) > 1:
            raise DataError(
                "duplicate-column",
                f"the header names {shorten(name)} twice",
                fix="rename one; if the first row is data, map columns by number: columns: {prompt: column_1, …}",
                where=where,
            )
    return names


def _wrong_width(where: Location, fields: list[str], columns: list[str], delimiter: str) -> RecordProblem:
    shown = "a tab" if delimiter == "\t" else f"`{delimiter}`"
    return RecordProblem(
        "wrong-column-count",
        where,
        f"the row has {len(fields)} fields, the first row has {len(columns)}",
        f'put fields that contain {shown} or a line break in double quotes, and write " inside them as ""',
    )


def _find_delimiter(head: bytes) -> str:
    first = re.sub(rb'"[^"]*"', b"", head.partition(b"\n")[0])
    return max(_DELIMITERS, key=lambda delimiter: (first.count(delimiter.encode()), delimiter == ","))


def _quotes_are_literal(head: bytes) -> bool:
    """Whether quotes in this TSV are ordinary characters: some field starts with one and is not well quoted."""
    for line in head.splitlines()[:-1] or [head]:
        for field in line.rstrip(b"\r").split(b"\t"):
            if field.startswith(b'"') and not re.fullmatch(rb'"(?:[^"]|"")*"?', field):
                return True
    return False


def _rows(
    stream: io.BufferedReader,
    name: str,
    delimiter: str,
    quoting: bool,
    max_record_bytes: int,
    report: ProblemReporter,
) -> Iterator[tuple[Location, list[str], int]]:
    """(location of the first line, fields, bytes) of each row; a row goes on while a quoted field is open."""
    parser = _RowParser(delimiter, quoting)
    line_number = 0
    offset = 0
    start_line, size = 1, 0
    is_faulty = False
    while line := stream.readline(max_record_bytes + 1):
        line_number += 1
        if not parser.is_open:
            start_line, size, is_faulty = line_number, 0, False
        where = Location(name, start_line)
        line_offset, offset = offset, offset + len(line)
        size += len(line)
        if size > max_record_bytes:
            report(_unclosed_or_large(where, size, max_record_bytes, was_open=parser.is_open))
            while line and not line.endswith(b"\n"):
                line = stream.readline(1 << 18)
                offset += len(line)
            parser = _RowParser(delimiter, quoting)
            continue
        if line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        text = decode_utf8(line, line_offset, where, report)
        if text is None:
            is_faulty = True
            text = line.decode("utf-8", "replace")
        if "\x00" in text and not is_faulty:
            report(
                RecordProblem(
                    "null-byte",
                    where,
                    f"null byte at offset {line_offset + line.index(0):,}",
                    "the file was damaged while it was written, or it is UTF-16: write it again as UTF-8",
                )
            )
            is_faulty = True
        try:
            fields = parser.feed(text)
        except _QuoteError as error:
            parser = _RowParser(delimiter, quoting)
            if delimiter == "\t" and start_line == line_number:
                yield where, text.rstrip("\r\n").split("\t"), size  # quotes are ordinary characters in most TSV files
                continue
            report(
                RecordProblem(
                    "stray-quote",
                    where,
                    f"{shorten(str(error))} follows the closing quote of a field",
                    'write a quote inside a quoted field twice: ""',
                )
            )
            continue
        if fields is None or is_faulty or fields == [""]:
            continue
        yield where, fields, size
    if parser.is_open:
        report(
            RecordProblem(
                "unclosed-quote",
                Location(name, start_line),
                f"the quoted field that starts in this row is never closed (the file ends at line {line_number})",
                'close it with ", and write quotes inside it as ""',
            )
        )


def _unclosed_or_large(where: Location, size: int, limit: int, *, was_open: bool) -> RecordProblem:
    fix = (
        'a quote is not closed, most often: close it with ", and write quotes inside as ""'
        if was_open
        else "a missing line break, most often; raise data.max_record_bytes if it is meant"
    )
    return RecordProblem(
        "record-too-large", where, f"the record has more than {size - 1:,} bytes, the limit is {limit:,}", fix
    )


class _RowParser:
    """Splits rows into fields, one physical line at a time (RFC 4180; `""` inside quotes is one quote)."""

    def __init__(self, delimiter: str, quoting: bool) -> None:
        self._delimiter = delimiter
        self._quoting = quoting
        self._fields: list[str] = []
        self._quoted: list[str] = []
        self.is_open = False

    def feed(self, line: str) -> list[str] | None:
        """The fields of the row that ends with this line, or None while a quoted field is open.

        raises: _QuoteError
        """
        if not self.is_open:
            if not self._quoting or '"' not in line:
                return line.rstrip("\r\n").split(self._delimiter)
            self._fields = []
        position = 0
        while True:
            if self.is_open or line.startswith('"', position):
                after = self._read_quoted(line, position if self.is_open else position + 1)
                if after is None:
                    return None
                self._fields.append("".join(self._quoted))
                position = after
                rest = line[position:].rstrip("\r\n")
                if rest and not rest.startswith(self._delimiter):
                    raise _QuoteError(rest)
                if not rest:
                    return self._fields
                position += 1
            else:
                end = line.find(self._delimiter, position)
                if end < 0:
                    self._fields.append(line[position:].rstrip("\r\n"))
                    return self._fields
                self._fields.append(line[position:end])
                position = end + 1

    def _read_quoted(self, line: str, position: int) -> int | None:
        """Index after the closing quote, or None when the line ends first."""
        if not self.is_open:
            self._quoted = []
        while True:
            quote = line.find('"', position)
            if quote < 0:
                # Line ends inside quotes are kept, as \n whatever the file uses.
                self._quoted.append(line[position:].replace("\r\n", "\n"))
                self.is_open = True
                return None
            self._quoted.append(line[position:quote])
            if not line.startswith('"', quote + 1):
                self.is_open = False
                return quote + 1
            self._quoted.append('"')
            position = quote + 2


# ---------------------------------------------------------------------------------------------------------------------


def read_text(
    stream: io.BufferedReader, *, name: str, max_record_bytes: int, report: ProblemReporter
) -> Iterator[RawRecord]:
    """The whole file as one document."""
    refuse_foreign_content(stream, name)
    where = Location(name)
    data = stream.read(max_record_bytes + 1)
    if len(data) > max_record_bytes:
        report(
            RecordProblem(
                "record-too-large",
                where,
                f"the document has more than {max_record_bytes:,} bytes",
                "split it into several files, or raise data.max_record_bytes",
            )
        )
        return
    if b"\x00" in data:
        report(
            RecordProblem(
                "null-byte",
                where,
                f"null byte at offset {data.index(0):,}",
                "this is not a text file, or it was damaged: convert it to UTF-8 text",
            )
        )
        return
    text = decode_utf8(data, 0, where, report)
    if text is not None:
        yield RawRecord({"text": text.removeprefix("\ufeff").replace("\r\n", "\n")}, where, len(data))


def read_parquet(path: Path, *, name: str, max_record_bytes: int, report: ProblemReporter) -> Iterator[RawRecord]:
    """Rows of a Parquet file, a few hundred in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            yield from _columnar_rows(file.iter_batches(batch_size=_COLUMNAR_BATCH), name, max_record_bytes, report)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable_columnar(name, "Parquet", error) from None


def read_arrow(path: Path, *, name: str, max_record_bytes: int, report: ProblemReporter) -> Iterator[RawRecord]:
    """Rows of an Arrow file or stream (what `datasets` writes), memory-mapped."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
            yield from _columnar_rows(_sliced(batches), name, max_record_bytes, report)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable_columnar(name, "Arrow", error) from None


def _sliced(batches: Any) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, _COLUMNAR_BATCH):
            yield batch.slice(start, _COLUMNAR_BATCH)


def _unreadable_columnar(name: str, kind: str, error: Exception) -> DataError:
    return DataError(
        "damaged-file",
        f"this is not a whole {kind} file: {str(error).splitlines()[0]}",
        why="the name is wrong, or the download was cut off",
        fix="check the extension, or download the file again",
        where=Location(name),
    )


def _columnar_rows(batches: Any, name: str, max_record_bytes: int, report: ProblemReporter) -> Iterator[RawRecord]:
    index = 0
    for batch in batches:
        # A damaged Arrow file can hold offsets outside its buffers, and reading them would end the process.
        batch.validate(full=True)
        for value in batch.to_pylist():
            where = Location(f"{name}#{index}")
            index += 1
            size = estimate_bytes(value)
            if size > max_record_bytes:
                report(
                    RecordProblem(
                        "record-too-large",
                        where,
                        f"the record has about {size:,} bytes, the limit is {max_record_bytes:,}",
                        "raise data.max_record_bytes if it is meant",
                    )
                )
                continue
            yield RawRecord(value, where, size)


def estimate_bytes(value: Any) -> int:
    """About how many bytes `value` would take as JSON."""
    if isinstance(value, str | bytes):
        return len(value) + 2
    if isinstance(value, dict):
        return 2 + sum(len(key) + 4 + estimate_bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return 2 + sum(2 + estimate_bytes(item) for item in value)
    return 8
