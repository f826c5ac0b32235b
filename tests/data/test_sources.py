"""Reading files: every format and compression gives the same records; every fault says where it is and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data import json_records, sources
from affina.data.records import RawRecord, RecordProblem
from affina.data.sources import file_sha256, open_source
from affina.errors import AffinaError, DataError

RECORDS = [{"prompt": f"Domanda numero {i}: perché?\nRiga due", "completion": f"risposta {i} 🙂"} for i in range(5)]

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}

# Any text that UTF-8 can hold; null characters are refused by design.
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=30)


def read(path: Path | str, **options: Any) -> tuple[list[RawRecord], list[RecordProblem]]:
    problems: list[RecordProblem] = []
    records = list(open_source(path, **options).read(report=problems.append))
    return records, problems


def values(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    records, problems = read(path, **options)
    assert problems == []
    return [record.value for record in records]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def only_problem(path: Path, **options: Any) -> RecordProblem:
    _, problems = read(path, **options)
    assert len(problems) == 1, problems
    return problems[0]


# Formats and compressions


def as_csv(records: list[dict[str, Any]], delimiter: str = ",") -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    rows = [list(records[0])] + [[record[key] for key in records[0]] for record in records]
    return "".join(delimiter.join(map(cell, row)) + "\r\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.jsonl", json_lines(RECORDS)),
        ("data.json", json.dumps(RECORDS)),
        ("pretty.json", json.dumps(RECORDS, indent=2, ensure_ascii=False)),
        ("container.json", json.dumps({"version": 1, "about": {"n": [1, 2]}, "data": RECORDS})),
        ("lines.json", json_lines(RECORDS)),
        ("concatenated.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("data.csv", as_csv(RECORDS)),
        ("semicolons.csv", as_csv(RECORDS, ";")),
        ("data.tsv", as_csv(RECORDS, "\t")),
        ("bom.jsonl", "\ufeff" + json_lines(RECORDS)),
        ("bom.json", "\ufeff" + json.dumps(RECORDS)),
        ("bom.csv", "\ufeff" + as_csv(RECORDS)),
        ("windows.jsonl", json_lines(RECORDS).replace("\n", "\r\n")),
    ],
)
@pytest.mark.parametrize("suffix", ["", *COMPRESSORS])
def test_every_text_format_gives_the_same_records_plain_and_compressed(
    tmp_path: Path, name: str, content: str, suffix: str
) -> None:
    data = content.encode()
    path = write(tmp_path / f"{name}{suffix}", COMPRESSORS[suffix](data) if suffix else data)
    assert values(path) == RECORDS


def test_parquet_and_arrow_give_the_same_records_with_their_index(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(RECORDS)
    pq.write_table(table, tmp_path / "data.parquet")
    with pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(tmp_path / "stream.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("data.parquet", "file.arrow", "stream.arrow"):
        records, problems = read(tmp_path / name)
        assert [record.value for record in records] == RECORDS
        assert problems == []
        assert str(records[3].location) == f"{tmp_path / name}#3"


def test_what_datasets_saves_to_disk_can_be_read_back(tmp_path: Path) -> None:
    import datasets

    whole = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:2])}
    )
    whole.save_to_disk(str(tmp_path / "saved"))
    assert values(tmp_path / "saved") == RECORDS
    assert values(tmp_path / "saved", split="test") == RECORDS[:2]
    assert "train split" in open_source(tmp_path / "saved").notes[0]
    with pytest.raises(DataError, match=r"split-not-found(.|\n)*use one of: train, test"):
        open_source(tmp_path / "saved", split="dev")


@given(st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_every_file_format(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name, content in {
        "a.jsonl": json_lines(records),
        "b.json": json.dumps(records, ensure_ascii=False, indent=1),
        "c.json": json.dumps({"rows": records}),
    }.items():
        assert values(write(folder / name, content)) == records
        assert values(write(folder / f"{name}.zst", COMPRESSORS[".zst"](content.encode()))) == records
    # A CSV field keeps its line breaks as \n, whatever the file uses.
    unified = [{key: text.replace("\r\n", "\n") for key, text in record.items()} for record in records]
    assert values(write(folder / "d.csv", as_csv(records))) == unified


@given(st.integers(1, 64), st.lists(st.recursive(texts | st.integers() | st.booleans(), st.lists, max_leaves=6)))
@settings(max_examples=60, deadline=None)
def test_a_json_array_is_read_the_same_whatever_the_size_of_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, chunk: int, items: list[Any]
) -> None:
    records = [{"value": item} for item in items]
    path = write(tmp_path_factory.mktemp("pieces") / "data.json", json.dumps(records, ensure_ascii=False, indent=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_CHUNK_BYTES", chunk)
        assert values(path) == records


def test_records_of_json_and_csv_know_the_line_they_start_at(tmp_path: Path) -> None:
    pretty = write(tmp_path / "a.json", '[\n  {"a": "x\\ny"},\n\n  {\n   "a": "z"\n  }\n]')
    assert [record.location.line for record in read(pretty)[0]] == [2, 4]
    table = write(tmp_path / "b.csv", 'a,b\n"one\ntwo\nthree",1\n\n4,"5"\n')
    records, _ = read(table)
    assert [record.location.line for record in records] == [2, 6]
    assert records[0].value == {"a": "one\ntwo\nthree", "b": "1"}


def test_a_json_array_larger_than_memory_pieces_is_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "big.json", json.dumps([{"text": "x" * 1000, "n": n} for n in range(3000)]))
    stream = open_source(path).read()
    assert next(stream).value["n"] == 0
    cursor_buffers = [
        len(value._buffer) for value in stream.gi_frame.f_locals.values() if isinstance(value, json_records._Cursor)
    ]
    assert all(size < 600_000 for size in cursor_buffers)  # the file has 3 MB
    assert sum(1 for _ in stream) == 2999


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.md", "# Titolo\r\n\r\nTesto\r\n")
    assert values(path) == [{"text": "# Titolo\n\nTesto\n"}]


def test_bare_strings_in_json_lines_are_text_records(tmp_path: Path) -> None:
    assert values(write(tmp_path / "a.jsonl", '"uno"\n"due"\n')) == [{"text": "uno"}, {"text": "due"}]


def test_a_json_object_is_one_record_when_its_list_belongs_to_it(tmp_path: Path) -> None:
    record = {"id": 7, "messages": [{"role": "user", "content": "ciao"}]}
    assert values(write(tmp_path / "one.json", json.dumps(record, indent=2))) == [record]


def test_a_json_file_with_two_lists_needs_a_split(tmp_path: Path) -> None:
    path = write(tmp_path / "two.json", json.dumps({"train": [{"a": 1}], "test": [{"a": 2}, {"a": 3}]}))
    assert values(path, split="test") == [{"a": 2}, {"a": 3}]
    assert values(path, split="train") == [{"a": 1}]
    with pytest.raises(DataError, match=r'two-lists\].*two lists of records, "train" and "test"(.|\n)*split: train'):
        read(path)


# Tables


def test_a_tsv_without_a_header_gets_numbered_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "What is 2 + 2?\t4\tAdding two and two gives four.\n")
    assert values(path) == [
        {"column_1": "What is 2 + 2?", "column_2": "4", "column_3": "Adding two and two gives four."}
    ]


def test_quotes_in_an_unquoted_tsv_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'question\tanswer\n"A quote" at the start?\tyes\n"whole"\tno\n')
    assert values(path) == [
        {"question": '"A quote" at the start?', "answer": "yes"},
        {"question": '"whole"', "answer": "no"},
    ]


def test_a_row_with_too_many_fields_is_reported_and_the_rest_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\nc,d,e\nf,g\n")
    records, problems = read(path)
    assert [record.value["prompt"] for record in records] == ["a", "f"]
    assert problems[0].code == "wrong-column-count"
    assert problems[0].location.line == 3
    assert "3 fields, the first row has 2" in problems[0].reason


def test_an_unclosed_quote_is_reported_at_the_row_that_opens_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'p,c\na,b\n"c,d\ne,f\ng,h\n')
    problem = only_problem(path)
    assert (problem.code, problem.location.line) == ("unclosed-quote", 3)


def test_text_after_a_closing_quote_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'p,c\n"a"b,c\nd,e\n')
    records, problems = read(path)
    assert problems[0].code == "stray-quote"
    assert [record.value for record in records] == [{"p": "d", "c": "e"}]


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"duplicate-column\].*names 'p' twice(.|\n)*rename one"):
        read(write(tmp_path / "a.csv", "p,p\n1,2\n"), has_header=True)


# Faults of records


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ('{"a": 1,}', "invalid-json", "trailing comma"),
        ("{'a': 1}", "invalid-json", "double quotes"),
        ('{"a": None}', "invalid-json", "null, true, false"),
        ('{"a": True}', "invalid-json", "null, true, false"),
        ('{"a": NaN}', "non-finite-number", "NaN is not a JSON number"),
        ('{"a": [-Infinity]}', "non-finite-number", "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "non-finite-number", "1e999 is not a JSON number"),
        ('{"a": 1, "b": 2, "a": 3}', "duplicate-key", 'the key "a" appears twice'),
        ('{"x": {"a": 1, "a": 1}}', "duplicate-key", 'the key "a" appears twice'),
        ('{"a": "b\tc"}', "invalid-json", "\\n and \\t"),
        ('{"a": "b\\c"}', "invalid-json", "backslash"),
        ('{"a": 1} {"a": 2}', "invalid-json", "on a line of its own"),
        ('{"a": "b', "invalid-json", "not closed on this line"),
        ('{"a": 1} // note', "invalid-json", "no comments"),
        ("[1, 2]", "record-not-object", "[1, 2], not an object"),
        ("7", "record-not-object", "7, not an object"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "json-too-deep", "too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "invalid-json", "as a string"),
    ],
)
def test_a_faulty_json_line_is_reported_with_its_line_and_a_hint_and_the_rest_is_read(
    tmp_path: Path, line: str, code: str, says: str
) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"ok": 1}}\n\n{line}\n{{"ok": 2}}\n')
    records, problems = read(path)
    assert [record.value for record in records] == [{"ok": 1}, {"ok": 2}]
    assert [(problem.code, str(problem.location)) for problem in problems] == [(code, f"{path}:3")]
    assert says in f"{problems[0].reason} | {problems[0].fix}"


@pytest.mark.parametrize(
    ("element", "code"),
    [
        ('{"a": 1,}', "invalid-json"),
        ("{'a': 1}", "invalid-json"),
        ('{"a": {"b": [1, NaN]}}', "non-finite-number"),
        ('{"a": 1, "a": 2}', "duplicate-key"),
        ("Nothing", "invalid-json"),
        ("[1, [2]]", "record-not-object"),
        ("12", "record-not-object"),
        ('{"a": "b\nc"}', "invalid-json"),
    ],
)
def test_a_faulty_element_of_a_json_array_is_reported_and_the_rest_is_read(
    tmp_path: Path, element: str, code: str
) -> None:
    path = write(tmp_path / "a.json", f'[{{"ok": 1}},\n{element},\n{{"ok": 2}}]')
    records, problems = read(path)
    assert [record.value for record in records] == [{"ok": 1}, {"ok": 2}]
    assert [problem.code for problem in problems] == [code]
    assert problems[0].location.line == 2


def test_invalid_json_names_line_and_column_inside_a_long_element(tmp_path: Path) -> None:
    problem = only_problem(write(tmp_path / "a.json", '[\n{"a": 1,\n "b": 2,\n "c": oops}\n]'))
    assert problem.location.line == 4
    assert "column 7" in problem.reason


def test_bytes_that_are_not_utf8_are_reported_with_their_offset(tmp_path: Path) -> None:
    good, bad = '{"a": "è"}'.encode(), '{"a": "è"}'.encode("latin-1")
    for name, data in {
        "a.jsonl": good + b"\n" + bad + b"\n" + good,
        "a.json": b"[" + good + b"," + bad + b"," + good + b"]",
    }.items():
        records, problems = read(write(tmp_path / name, data))
        assert [record.value for record in records] == [{"a": "è"}, {"a": "è"}]
        assert problems[0].code == "bad-utf8"
        assert f"byte 0xE8 at offset {data.index(bytes([0xE8]))}" in problems[0].reason
        assert "CP1252" in problems[0].fix
    records, problems = read(write(tmp_path / "a.csv", b"p,c\na,b\n\xe8,d\ne,f\n"))
    assert len(records) == 2
    assert (problems[0].code, problems[0].location.line) == ("bad-utf8", 3)


def test_null_bytes_are_reported(tmp_path: Path) -> None:
    for name, data in {
        "a.jsonl": b'{"a": 1}\n\x00\x00\x00\x00\n{"a": 2}\n',
        "a.json": b'[{"a": 1}, {"a": "\x00"}, {"a": 2}]',
        "a.csv": b"a\n1\n\x00\n2\n",
    }.items():
        records, problems = read(write(tmp_path / name, data))
        assert [str(record.value["a"]) for record in records] == ["1", "2"]
        assert [problem.code for problem in problems] == ["null-byte"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet"])
def test_a_record_above_the_limit_is_reported_with_its_size_and_the_rest_is_read(tmp_path: Path, name: str) -> None:
    rows = [{"a": "ok"}, {"a": "x" * 5000}, {"a": "ok"}]
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".txt"):
        write(path, "x" * 5000)
    else:
        write(path, {"a.jsonl": json_lines(rows), "a.json": json.dumps(rows), "a.csv": as_csv(rows)}[name])
    records, problems = read(path, max_record_bytes=1000)
    assert [record.value["a"] for record in records] == ([] if name == "a.txt" else ["ok", "ok"])
    assert [problem.code for problem in problems] == ["record-too-large"]
    assert "the limit is 1,000" in problems[0].reason or "more than 1,000" in problems[0].reason


def test_a_huge_record_is_passed_over_in_constant_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"a": "' + "x" * 2_000_000 + '"}, {"a": "ok"}]')
    records, problems = read(path, max_record_bytes=1000)
    assert [record.value for record in records] == [{"a": "ok"}]
    assert "2,000,009 bytes" in problems[0].reason


def test_without_a_reporter_the_first_fault_raises(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"a": 1}\nbroken\n')
    with pytest.raises(DataError, match=r"invalid JSON at column 1") as caught:
        list(open_source(path).read())
    assert str(caught.value.where) == f"{path}:2"


# Faults of files


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", gzip.compress(b"{}"))
    for wrong in ("trian.jsonl.gz", "train.jsonl"):
        with pytest.raises(
            DataError, match=r"file-not-found\].*does not exist(.|\n)*did you mean .*train\.jsonl\.gz\?"
        ):
            open_source(tmp_path / wrong)
    with pytest.raises(DataError, match=r"file-not-found(.|\n)*the folder .*nowhere does not exist"):
        open_source(tmp_path / "nowhere" / "train.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"empty-file\]: {name} is empty(.|\n)*write it again"):
        read(write(tmp_path / name, b""))


def test_an_archive_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty-file\]: a\.jsonl\.gz holds no data"):
        read(write(tmp_path / "a.jsonl.gz", gzip.compress(b"")))


def test_a_json_file_of_blanks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"empty-file\]: the file holds no JSON(.|\n)*write it again"):
        read(write(tmp_path / "a.json", " \n\t\n"))


@pytest.mark.parametrize("suffix", list(COMPRESSORS))
def test_a_cut_off_archive_is_an_error_and_what_came_before_is_read(tmp_path: Path, suffix: str) -> None:
    data = json_lines([{"n": n, "text": os.urandom(100).hex()} for n in range(3000)]).encode()
    whole = COMPRESSORS[suffix](data)
    path = write(tmp_path / f"a.jsonl{suffix}", whole[: int(len(whole) * 0.95)])
    numbers: list[int] = []
    with pytest.raises(DataError, match="ends too early") as caught:
        numbers.extend(record.value["n"] for record in open_source(path).read())
    assert caught.value.code == "truncated-archive"
    assert numbers == list(range(len(numbers)))
    if suffix != ".bz2":  # its blocks are as large as this file
        assert numbers


@pytest.mark.parametrize("suffix", list(COMPRESSORS))
def test_a_damaged_archive_is_an_error(tmp_path: Path, suffix: str) -> None:
    whole = bytearray(COMPRESSORS[suffix](os.urandom(50_000).hex().encode()))
    if suffix == ".zst":
        whole[12] ^= 0xFF
    else:
        whole[len(whole) // 2] ^= 0xFF
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / f"a.txt{suffix}", bytes(whole)))
    assert caught.value.code in ("damaged-archive", "truncated-archive")


@pytest.mark.parametrize("suffix", list(COMPRESSORS))
def test_archives_written_one_after_the_other_are_read_as_one(tmp_path: Path, suffix: str) -> None:
    first, second = json_lines(RECORDS[:2]).encode(), json_lines(RECORDS[2:]).encode()
    compress = COMPRESSORS[suffix]
    assert values(write(tmp_path / f"a.jsonl{suffix}", compress(first) + compress(second))) == RECORDS


def test_a_compression_that_the_name_does_not_announce_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wrong-extension\].*holds gzip data(.|\n)*rename it to a\.jsonl\.gz"):
        read(write(tmp_path / "a.jsonl", gzip.compress(b"{}")))
    with pytest.raises(DataError, match=r"wrong-extension\].*is not gzip data(.|\n)*rename it to a\.jsonl"):
        read(write(tmp_path / "a.jsonl.gz", b'{"a": 1}'))
    with pytest.raises(DataError, match=r"wrong-extension\].*holds zstd data(.|\n)*rename it to a\.jsonl\.zst"):
        read(write(tmp_path / "a.jsonl.gz", COMPRESSORS[".zst"](b"{}")))


@pytest.mark.parametrize(
    ("name", "content", "code", "says", "fix"),
    [
        ("a.jsonl", b'[\n{"a": 1}\n]', "wrong-extension", "holds a JSON array", "rename it to .json"),
        ("a.jsonl", b'{\n "a": 1\n}', "wrong-extension", "span several lines", "rename it to .json, or"),
        ("a.json", b"plain text", "invalid-json", "a JSON file starts with [ or {", "plain text belongs in .txt"),
        ("a.json", b'[{"a": 1}, {"a"', "truncated-file", "ends inside its array", "download the file again"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "invalid-json", "expected a comma or ]", "put a comma between"),
        ("a.json", b'[{"a": 1}] trailing', "invalid-json", "text after the end", "remove it"),
        ("a.json", b'{"data": [{"a": 1}', "truncated-file", "ends inside its array", "download the file again"),
        ("a.json", b'{"a": 1, "b": 2', "truncated-file", "ends inside an object", "download the file again"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs-pointer", "Git LFS", "`git lfs pull`"),
        ("a.csv", b"<!DOCTYPE html><html>", "web-page", "a web page, not the data", "download the raw file"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "wrong-encoding", "UTF-16", "iconv -f UTF-16 -t UTF-8"),
        ("a.csv", b"PAR1\x00\x00", "wrong-extension", "holds parquet data", "rename it to .parquet"),
        ("a.parquet", b"PAR1 and then nothing", "damaged-file", "not a whole Parquet file", "download the file again"),
        ("a.parquet", b"something else", "wrong-extension", "is not Parquet data", "the extension of what it holds"),
        ("a.arrow", b"something else", "damaged-file", "not a whole Arrow file", "download the file again"),
    ],
)
def test_content_that_contradicts_the_name_is_refused_with_a_fix(
    tmp_path: Path, name: str, content: bytes, code: str, says: str, fix: str
) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, content))
    assert caught.value.code == code
    assert says in caught.value.what
    assert fix in str(caught.value.fix)
    assert str(caught.value.where).startswith(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.arrow.zst"])
def test_a_columnar_file_inside_an_archive_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / name, COMPRESSORS[Path(name).suffix](b"PAR1")))
    assert caught.value.code == "compressed-columnar"
    assert "random access" in str(caught.value.why)
    assert caught.value.fix == f"decompress it and name it {Path(name).stem}"


def test_an_unknown_extension_lists_what_can_be_read(tmp_path: Path) -> None:
    says = r"unknown-extension\].*a\.docx(.|\n)*\.jsonl, \.ndjson, \.json, \.csv(.|\n)*rename it"
    with pytest.raises(DataError, match=says):
        open_source(write(tmp_path / "a.docx", b"x"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_says_how_to_get_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{}")
    path.chmod(0)
    with pytest.raises(DataError, match=r"no permission(.|\n)*chmod u\+r"):
        read(path)


def test_a_refused_permission_is_told_from_other_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "{}")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("affina.data.decompress.io.FileIO", refuse)
    with pytest.raises(DataError, match=r"unreadable-file\]: no permission to read a\.jsonl(.|\n)*chmod u\+r"):
        read(path)


def test_a_disk_that_refuses_is_told_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "{}")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("affina.data.decompress.io.FileIO", refuse)
    with pytest.raises(DataError, match=r"unreadable-file\]: a\.jsonl cannot be opened: Input/output error") as caught:
        read(path)
    assert caught.value.fix == "check the path and the disk"


def damage(data: bytes, generator: random.Random) -> bytes:
    """The data with one to three faults: a flipped bit, a gap, stray bytes, a cut, a repetition."""
    damaged = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        position = generator.randrange(max(1, len(damaged)))
        kind = generator.randrange(5)
        if kind == 0 and damaged:
            damaged[position] ^= 1 << generator.randrange(8)
        elif kind == 1:
            del damaged[position : position + generator.randint(1, 40)]
        elif kind == 2:
            damaged[position:position] = generator.choices(b"{}[]\",:\\'\n\t\x00\xff", k=3)
        elif kind == 3:
            damaged = damaged[: max(1, position)]
        else:
            damaged[position:position] = damaged[max(0, position - 100) : position]
    return bytes(damaged)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.json.zst", "a.parquet", "a.arrow"]
)
def test_no_damage_raises_anything_but_an_explained_error(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / name
    rows = [{"prompt": f'domanda "{n}"\n', "completion": f"perché {n}"} for n in range(40)]
    table = pa.Table.from_pylist(rows)
    if name.endswith(".parquet"):
        pq.write_table(table, path)
    elif name.endswith(".arrow"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        text = {"jsonl": json_lines(rows), "json": json.dumps(rows), "csv": as_csv(rows), "tsv": as_csv(rows, "\t")}
        data = text[name.split(".")[1]].encode()
        suffix = path.suffix if path.suffix in COMPRESSORS else ""
        write(path, COMPRESSORS[suffix](data) if suffix else data)
    whole, generator = path.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(150):
        path.write_bytes(damage(whole, generator))
        try:
            outcomes.update(problem.code for problem in read(path)[1])
        except DataError as error:  # anything else fails the test
            outcomes.add(error.code)
    assert outcomes


# Folders, globs, splits


def test_a_folder_is_read_recursively_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", json_lines([{"n": 2}]))
    write(tmp_path / "a" / "x.jsonl.gz", gzip.compress(json_lines([{"n": 1}]).encode()))
    write(tmp_path / "c.csv", "n\n3\n")
    write(tmp_path / ".hidden.jsonl", "broken")
    write(tmp_path / ".cache" / "x.jsonl", "broken")
    write(tmp_path / "picture.png", b"\x89PNG")
    write(tmp_path / "README.md", "about")
    source = open_source(tmp_path)
    assert [int(record.value["n"]) for record in source.read()] == [1, 2, 3]
    assert source.notes == ("not read as data: README.md",)


def test_a_folder_of_texts_includes_its_readme(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "one")
    write(tmp_path / "chapter.txt", "two")
    assert [value["text"] for value in values(tmp_path)] == ["one", "two"]


def test_a_folder_with_a_train_and_a_test_file_does_not_train_on_the_test_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", json_lines([{"n": 1}]))
    write(tmp_path / "test" / "part-0.jsonl", json_lines([{"n": 2}]))
    write(tmp_path / "my-dev.jsonl", json_lines([{"n": 3}]))
    source = open_source(tmp_path)
    assert [record.value["n"] for record in source.read()] == [1]
    assert "not read: my-dev.jsonl, test/part-0.jsonl" in source.notes[0]
    assert values(tmp_path, split="test") == [{"n": 2}]
    assert values(tmp_path, split="validation") == [{"n": 3}]


def test_words_inside_other_words_are_no_split_names(tmp_path: Path) -> None:
    for name in ("train.jsonl", "latest.jsonl", "devices.jsonl"):
        write(tmp_path / name, json_lines([{"n": name}]))
    assert len(values(tmp_path)) == 3


def test_a_split_that_no_file_has_lists_those_there_are(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match=r'split-not-found\].*the split "test"(.|\n)*use one of: train'):
        open_source(tmp_path, split="test")


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path / "picture.png", b"x")
    with pytest.raises(
        DataError, match=r"no-data-files\].*holds no file that affina reads(.|\n)*it holds picture\.png"
    ):
        open_source(tmp_path)


def test_a_glob_reads_what_matches_in_order(tmp_path: Path) -> None:
    for n in (2, 1):
        write(tmp_path / f"part-{n}.jsonl", json_lines([{"n": n}]))
    write(tmp_path / "other.jsonl", "broken")
    assert values(f"{tmp_path}/part-*.jsonl") == [{"n": 1}, {"n": 2}]
    with pytest.raises(DataError, match=r"no-data-files\]: no file matches(.|\n)*check the pattern"):
        open_source(f"{tmp_path}/*.csv")


# Hub and embedded data


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = open_source("someone/some-data", split="train")
    with pytest.raises(DataError, match=r"hub-offline\].*neither a file nor a folder(.|\n)*HF_HUB_OFFLINE"):
        list(source.read())
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        DataError, match=r"hub-dataset\].*could not be loaded from the hub(.|\n)*check the name and the network"
    ):
        list(open_source("someone/some-data").read())


def test_a_hub_data_set_is_read_with_its_index_and_an_unknown_split_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def load(path: str, *, name: str | None, split: str, streaming: bool) -> Any:
        if split != "train":
            raise ValueError(f'Unknown split "{split}". Should be one of ["train"].')
        assert (path, name) == ("someone/some-data", "italian")
        whole = datasets.Dataset.from_list(RECORDS)
        return whole.to_iterable_dataset() if streaming else whole

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = list(open_source("someone/some-data", subset="italian").read())
    assert [record.value for record in records] == RECORDS
    assert str(records[1].location) == "someone/some-data[train]#1"
    streamed = open_source("someone/some-data", subset="italian", streaming=True)
    assert [record.value for record in streamed.read()] == RECORDS
    assert streamed.fingerprint() == open_source("someone/some-data", subset="italian", streaming=True).fingerprint()
    with pytest.raises(DataError, match=r'hub-dataset(.|\n)*Unknown split "dev"(.|\n)*set `split` and `subset`'):
        list(open_source("someone/some-data", subset="italian", split="dev").read())


def test_a_path_with_a_data_extension_is_never_taken_for_a_hub_id() -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source("data/train.jsonl")


def test_embedded_names_go_through_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    asked = []

    def path_of(name: str, split: str) -> Path:
        asked.append((name, split))
        return write(tmp_path / f"{split}.jsonl", json_lines(RECORDS))

    catalog = types.ModuleType("affina.catalog.embedded")
    catalog.embedded_dataset_path = path_of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "affina.catalog.embedded", catalog)
    assert values("affina/support") == RECORDS
    assert values("affina/support", split="validation") == RECORDS
    assert asked == [("affina/support", "train"), ("affina/support", "validation")]
    with pytest.raises(DataError, match=r'split-not-found\].*no split "test"(.|\n)*train, validation'):
        open_source("affina/support", split="test")


def test_an_unknown_embedded_name_is_refused() -> None:
    with pytest.raises(AffinaError, match=r"embedded-unknown(.|\n)*affina/support"):
        open_source("affina/nothing")


# Fingerprints


def test_the_fingerprint_depends_on_content_and_not_on_the_place(tmp_path: Path) -> None:
    a = write(tmp_path / "a" / "x.jsonl", json_lines(RECORDS))
    b = write(tmp_path / "b" / "y.jsonl", json_lines(RECORDS))
    c = write(tmp_path / "c.jsonl", json_lines(RECORDS[:3]))
    same = {open_source(path).fingerprint() for path in (a, b, a.parent)}
    assert len(same) == 1
    assert open_source(c).fingerprint() not in same


def test_a_changed_file_has_another_fingerprint_and_an_unchanged_one_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "a.jsonl", json_lines(RECORDS)), tmp_path / "cache"
    first = file_sha256(path, cache)
    monkeypatch.setattr(sources, "_known_sha256", {})  # as in a new process
    stored = json.loads((cache / "file-sha256.json").read_text())
    (key,) = stored
    (cache / "file-sha256.json").write_text(json.dumps({key: "remembered"}))
    assert file_sha256(path, cache) == "remembered"
    path.write_text(json_lines(RECORDS[:1]))
    assert file_sha256(path, cache) not in (first, "remembered")


def test_a_damaged_fingerprint_cache_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(RECORDS))
    write(tmp_path / "cache" / "file-sha256.json", "not json")
    monkeypatch.setattr(sources, "_known_sha256", {})
    digest = file_sha256(path, tmp_path / "cache")
    assert json.loads((tmp_path / "cache" / "file-sha256.json").read_text()).popitem()[1] == digest


# Real data


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k/train.jsonl.gz", 7473),
        ("dolly_6400/dolly_6400.jsonl.gz", 6400),
        ("taskmaster4/dialogs.jsonl.gz", 3710),
        ("oasst_en100/en_100_tree.jsonl.gz", 100),
        ("tau_bench/gpt-4o-airline.jsonl.gz", 200),
        ("bfcl_v4/BFCL_v4_multiple.json.gz", 200),
        ("flan_cot/creak_train.tsv.gz", 6915),
        ("flan_cot/strategyqa_train.tsv.gz", 2061),
        ("cuad/master_clauses.csv.gz", 510),
        ("llamafactory_demos/alpaca_en_demo.json.gz", 999),
        ("llamafactory_demos/wiki_demo.txt.gz", 1),
    ],
)
def test_real_files_are_read_whole_and_without_a_fault(
    real_data_folder: Callable[[str], Path], name: str, count: int
) -> None:
    folder, _, rest = name.partition("/")
    assert len(values(real_data_folder(folder) / rest)) == count
