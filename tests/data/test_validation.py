"""What makes a conversation unusable, what is repaired, what is only said; and how many errors are reported."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data import validation
from affina.data.formats import Columns
from affina.data.messages import Conversation, Message, ToolCall
from affina.data.validation import (
    SourceSpec,
    cut_after_last_reply,
    find_mojibake,
    read_conversations,
    validate_conversation,
)
from affina.errors import AffinaErrors, DataError, Location

HERE = Location("data.jsonl", 3)
CALL = ToolCall("meteo", {"city": "Roma"}, "call_1")

_MADE_BY_LETTER = {
    "s": Message("system", "Sii breve."),
    "u": Message("user", "ciao"),
    "a": Message("assistant", "salve"),
    "c": Message("assistant", "", tool_calls=(CALL,)),
    "t": Message("tool", "sole", tool_call_id="call_1"),
}


def conversation(roles: str) -> Conversation:
    """s system, u user, a assistant, c assistant that calls a tool, t tool."""
    return Conversation(messages=tuple(_MADE_BY_LETTER[letter] for letter in roles))


def codes(conversation: Conversation) -> list[str]:
    return [problem.code for problem in validate_conversation(conversation, HERE)]


def reply(content: str, **fields: Any) -> Conversation:
    return Conversation(messages=(Message("user", "ciao"), Message("assistant", content, **fields)))


# One conversation


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "ucta", "ucttaua", "uca", "uc", "ucaua", "suctcta", "uctua"])
def test_well_ordered_conversations_have_no_problem(roles: str) -> None:
    assert codes(conversation(roles)) == []


@pytest.mark.parametrize(
    ("roles", "code", "says"),
    [
        ("usa", "role-order", "message 2 (system) is not the first"),
        ("ssua", "role-order", "message 2 (system) is not the first"),
        ("a", "role-order", "message 1 (assistant) comes before any user message"),
        ("saua", "role-order", "message 2 (assistant) comes before any user message"),
        ("uaa", "role-order", "message 3 (assistant) follows another reply"),
        ("uua", "role-order", "message 2 (user) follows another user message"),
        ("uta", "tool-result-without-call", "message 2 is a tool result, but the reply before it calls no tool"),
        ("uata", "tool-result-without-call", "message 3 is a tool result"),
        ("ucuta", "tool-result-without-call", "message 4 is a tool result"),
        ("u", "no-reply", "no assistant message"),
        ("s", "no-reply", "no assistant message"),
        ("", "no-messages", "no messages"),
        ("uau", "no-final-reply", "ends with a user message after the last reply"),
        ("uct", "no-final-reply", "ends with a tool message after the last reply"),
        ("uactt", None, "x"),
    ],
)
def test_faults_of_the_order_are_found_and_name_the_message(roles: str, code: str | None, says: str) -> None:
    problems = validate_conversation(conversation(roles), HERE)
    if code is None:
        assert {problem.code for problem in problems} == {"role-order", "no-final-reply"}
        assert "ends with 2 messages" in problems[-1].reason
        return
    assert code in [problem.code for problem in problems]
    problem = next(problem for problem in problems if problem.code == code)
    assert says in problem.reason
    assert problem.fix
    assert problem.location == HERE


def test_a_tool_result_must_answer_a_call_of_the_reply_before_it() -> None:
    wrong = Conversation(
        messages=(
            Message("user", "ciao"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "sole", tool_call_id="call_9"),
            Message("assistant", "sole"),
        )
    )
    (problem,) = validate_conversation(wrong, HERE)
    assert problem.code == "tool-result-without-call"
    assert 'answers the call "call_9"' in problem.reason
    assert "call_1" in problem.fix


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [("", {}, "no content"), (" \n\t", {}, "only white space"), ("", {"reasoning": "mmh"}, "only reasoning")],
)
def test_an_empty_reply_is_an_error(content: str, fields: dict[str, Any], says: str) -> None:
    (problem,) = validate_conversation(reply(content, **fields), HERE)
    assert problem.code == "empty-reply"
    assert says in problem.reason


def test_a_reply_that_only_calls_tools_is_not_empty() -> None:
    assert codes(reply("", tool_calls=(CALL,))) == []


def test_an_empty_question_is_an_error_and_an_empty_tool_result_is_not() -> None:
    assert codes(Conversation(messages=(Message("user", " "), Message("assistant", "x")))) == ["empty-turn"]
    quiet = (
        Message("user", "x"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", ""),
        Message("assistant", "y"),
    )
    assert codes(Conversation(messages=quiet)) == []


def test_a_conversation_without_a_trained_reply_is_an_error() -> None:
    assert codes(reply("salve", train=False)) == ["nothing-trained"]


def test_empty_text_is_an_error() -> None:
    assert codes(Conversation(text=" \n")) == ["empty-text"]
    assert codes(Conversation(text="testo")) == []


@pytest.mark.parametrize(
    ("text", "code", "severity", "says"),
    [
        ("taglio \ud83d qui", "lone-surrogate", "error", "U+D83D"),
        ("nullo \x00 qui", "null-character", "error", "null character"),
        ("campana \x07 qui", "control-character", "warning", "U+0007"),
        ("c1 \x9d qui", "control-character", "warning", "U+009D"),
        ("perso \ufffd qui", "replacement-character", "warning", "U+FFFD"),
        ("perchÃ© no", "mojibake", "warning", '"Ã©", which should be "é"'),
        ("itâ€™s", "mojibake", "warning", '"â€™", which should be "’"'),
        ("âˆš2", "mojibake", "warning", "√"),
        ("ðŸ™‚ emoji", "mojibake", "warning", "🙂"),
    ],
)
def test_bad_characters_are_found_in_replies_reasoning_and_tool_arguments(
    text: str, code: str, severity: str, says: str
) -> None:
    for candidate in (
        reply(text),
        reply("ok", reasoning=text),
        reply("ok", tool_calls=(ToolCall("f", {"a": [{"b": text}]}),)),
        Conversation(text=text),
    ):
        problems = validate_conversation(candidate, HERE)
        assert [(problem.code, problem.severity) for problem in problems] == [(code, severity)]
        assert says in problems[0].reason


@pytest.mark.parametrize(
    "text",
    [
        "perché no, già",
        "naïve façade",
        "A\tB\r\n",
        "Ångström",
        "ÂNGELO",
        "Ã is a letter",
        "日本語",
        "« così »",
        "x\u0085",
    ],
)
def test_ordinary_text_is_no_mojibake(text: str) -> None:
    assert codes(reply(text)) == []


@given(
    st.text(
        st.characters(min_codepoint=0xA0, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn")), min_size=1, max_size=8
    )
)
@settings(max_examples=200)
def test_utf8_read_as_windows_1252_is_always_found(text: str) -> None:
    garbled = "".join(
        bytes([byte]).decode("cp1252") if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else chr(byte)
        for byte in text.encode("utf-8")
    )
    found = find_mojibake(garbled)
    assert found is not None
    assert text.startswith(found[1])


def test_cutting_after_the_last_reply_keeps_all_replies() -> None:
    assert cut_after_last_reply(conversation("uauctu")) == conversation("uauc")
    for roles in ("ua", "u", "s", ""):
        assert cut_after_last_reply(conversation(roles)) == conversation(roles)


# Many conversations

GOOD = {"messages": [{"role": "user", "content": "ciao"}, {"role": "assistant", "content": "salve"}]}
NO_REPLY = {"messages": [{"role": "user", "content": "ciao"}]}
TRAILING = {"messages": [*GOOD["messages"], {"role": "user", "content": "grazie"}]}
MOJIBAKE = {"messages": [{"role": "user", "content": "perchÃ©"}, {"role": "assistant", "content": "salve"}]}


def write(path: Path, records: list[dict[str, Any] | str]) -> Path:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_skip_leaves_bad_records_out_and_lists_each_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, "broken", NO_REPLY, TRAILING, MOJIBAKE, {"other": 1}, GOOD])
    stream = read_conversations([SourceSpec(path)], on_error="skip")
    kept = list(stream)
    assert [conversation.origin for conversation in kept] == [f"{path}:{line}" for line in (1, 4, 5, 7)]
    assert [len(conversation.messages) for conversation in kept] == [2, 2, 2, 2]
    assert stream.problems.counts == Counter(
        {
            ("invalid-json", "error"): 1,
            ("no-reply", "error"): 1,
            ("no-final-reply", "repaired"): 1,
            ("mojibake", "warning"): 1,
            ("missing-value", "error"): 1,
        }
    )
    assert [(problem.code, problem.location.line) for problem in stream.problems.listed] == [
        ("invalid-json", 2),
        ("no-reply", 3),
        ("no-final-reply", 4),
        ("mojibake", 5),
        ("missing-value", 6),
    ]
    assert (stream.problems.num_skipped, stream.problems.num_repaired) == (3, 1)
    summary = stream.sources[0]
    assert (summary.num_read, summary.num_kept, summary.num_skipped) == (7, 4, 3)
    json.dumps(stream.problems.to_dict())


def test_a_record_with_several_faults_is_skipped_once(tmp_path: Path) -> None:
    bad = {"messages": [{"role": "assistant", "content": ""}, {"role": "user", "content": " "}]}
    stream = read_conversations([SourceSpec(write(tmp_path / "a.jsonl", [bad, GOOD]))], on_error="skip")
    assert len(list(stream)) == 1
    assert sum(count for (_, severity), count in stream.problems.counts.items() if severity == "error") >= 3
    assert stream.problems.num_skipped == 1


def test_fail_reports_all_errors_together_with_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, "broken", NO_REPLY, NO_REPLY, MOJIBAKE, GOOD])
    kept = []
    with pytest.raises(AffinaErrors) as caught:
        kept.extend(read_conversations([SourceSpec(path)], on_error="fail"))
    text = caught.value.render()
    assert "error[bad-records]: 3 bad records among the first 6" in text
    assert "2 × no-reply, 1 × invalid-json" in text
    assert "data.on_error: skip" in text
    for line in (2, 3, 4):
        assert f"({path}:{line})" in text
    assert [error.code for error in caught.value.errors] == ["invalid-json", "no-reply", "no-reply"]
    assert caught.value.summary is not None
    assert caught.value.code == caught.value.summary.code == "bad-records"


def test_fail_stops_after_twenty_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, *["broken"] * 50])
    with pytest.raises(AffinaErrors, match=r"20 bad records among the first 2\d \(reading stopped here") as caught:
        list(read_conversations([SourceSpec(path)], on_error="fail"))
    assert len(caught.value.errors) == 20


def test_fail_does_not_read_for_ever_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_RECORDS_AFTER_FIRST_ERROR", 10)
    path = write(tmp_path / "a.jsonl", [NO_REPLY, *[GOOD] * 500])
    with pytest.raises(AffinaErrors, match="1 bad record among the first 11"):
        list(read_conversations([SourceSpec(path)], on_error="fail"))


def test_a_trailing_user_turn_fails_with_the_way_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [TRAILING])
    with pytest.raises(AffinaErrors, match=r"ends with a user message(.|\n)*data\.on_error: skip, which cuts it off"):
        list(read_conversations([SourceSpec(path)], on_error="fail"))


def test_warnings_do_not_fail(tmp_path: Path) -> None:
    stream = read_conversations([SourceSpec(write(tmp_path / "a.jsonl", [MOJIBAKE]))], on_error="fail")
    assert len(list(stream)) == 1
    assert stream.problems.counts["mojibake", "warning"] == 1


def test_listed_problems_are_bounded_and_counts_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_LISTED_PROBLEMS", 5)
    path = write(tmp_path / "a.jsonl", [*[NO_REPLY] * 30, GOOD])
    stream = read_conversations([SourceSpec(path)], on_error="skip")
    list(stream)
    assert len(stream.problems.listed) == 5
    assert stream.problems.counts["no-reply", "error"] == 30


def test_sources_come_one_after_the_other_with_their_index(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [GOOD, GOOD, GOOD])
    second = write(tmp_path / "b.jsonl", [{"q": "a", "a": "b"}])
    specs = [SourceSpec(first, max_records=2), SourceSpec(second, columns=Columns(prompt="q", completion="a"))]
    stream = read_conversations(specs, on_error="fail")
    assert [conversation.source for conversation in stream] == [0, 0, 1]
    assert [summary.num_kept for summary in stream.sources] == [2, 1]
    assert stream.sources[1].formats == ['prompt_completion: "q" is the prompt and "a" the reply']


def test_reading_twice_gives_the_same_and_counts_anew(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD, NO_REPLY, GOOD])
    stream = read_conversations([SourceSpec(path)], on_error="skip")
    assert list(stream) == list(stream)
    assert stream.problems.num_skipped == 1


def test_files_of_one_folder_may_differ_in_format(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [GOOD])
    write(tmp_path / "b.jsonl", [{"instruction": "x", "output": "y"}])
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"un testo"))
    stream = read_conversations([SourceSpec(tmp_path)], on_error="fail")
    assert [conversation.text for conversation in stream] == [None, None, "un testo"]
    assert [line.partition(":")[0] for line in stream.sources[0].formats] == ["messages", "alpaca", "text"]


def test_columns_by_number_mean_that_there_is_no_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("domanda,risposta\naltra,replica\n")
    with_header = read_conversations(
        [SourceSpec(path, columns=Columns(prompt="domanda", completion="risposta"))], on_error="fail"
    )
    assert len(list(with_header)) == 1
    without = read_conversations(
        [SourceSpec(path, columns=Columns(prompt="column_1", completion="column_2"))], on_error="fail"
    )
    assert len(list(without)) == 2


def test_a_system_prompt_is_put_in_front_where_there_is_none(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "mio"}, *GOOD["messages"]]}
    path = write(tmp_path / "a.jsonl", [GOOD, own])
    found = list(read_conversations([SourceSpec(path)], on_error="fail", system_prompt="Sii breve."))
    assert [conversation.messages[0].content for conversation in found] == ["Sii breve.", "mio"]
    text = tmp_path / "b.txt"
    text.write_text("testo")
    assert next(iter(read_conversations([SourceSpec(text)], system_prompt="x"))).messages == ()


def test_a_file_without_records_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n")
    with pytest.raises(DataError, match=r"no-records\].*holds no records(.|\n)*the file you meant"):
        list(read_conversations([SourceSpec(path)], on_error="skip"))


def test_a_missing_source_is_found_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_conversations([SourceSpec(write(tmp_path / "a.jsonl", [GOOD])), SourceSpec(tmp_path / "b.jsonl")])


def test_unknown_columns_are_an_error_also_with_skip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known format fits"):
        list(read_conversations([SourceSpec(write(tmp_path / "a.jsonl", [{"x": "y"}]))], on_error="skip"))


def test_the_fingerprint_covers_content_and_settings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD])
    base = read_conversations([SourceSpec(path)], on_error="skip").fingerprint()
    assert base == read_conversations([SourceSpec(str(path))], on_error="skip").fingerprint()
    others = [
        read_conversations([SourceSpec(path)], on_error="fail").fingerprint(),
        read_conversations([SourceSpec(path, max_records=1)], on_error="skip").fingerprint(),
        read_conversations([SourceSpec(path)], on_error="skip", system_prompt="x").fingerprint(),
        read_conversations([SourceSpec(path, format="messages")], on_error="skip").fingerprint(),
    ]
    write(path, [GOOD, GOOD])
    others.append(read_conversations([SourceSpec(path)], on_error="skip").fingerprint())
    assert len({base, *others}) == 6


def test_stopping_early_closes_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [GOOD] * 1000)
    iterator = iter(read_conversations([SourceSpec(path)]))
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    # An unclosed file would be a ResourceWarning here, and warnings are errors.


def test_every_code_of_a_data_problem_is_documented() -> None:
    package = Path(validation.__file__).parent
    modules = ["decompress", "json_records", "tables", "sources", "formats", "validation", "mixing", "splits"]
    modules += ["preferences", "preference_formats"]
    code = re.compile(r'(?:Error|Problem|_problem|\.error)\(\s*"([a-z0-9-]+)"')
    used = {found for name in modules for found in code.findall((package / f"{name}.py").read_text(encoding="utf-8"))}
    page = Path(__file__).parents[2] / "docs" / "reference" / "errors-data.md"
    documented = set(re.findall(r"^\| `([a-z0-9-]+)` \|", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(used) > 60
    assert used == documented
