from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affina.evaluation.matchers import (
    are_tool_calls_equal,
    choose_matcher,
    final_answer,
    is_contained,
    is_exact,
    is_json_equal,
    is_normalized_equal,
    is_number_equal,
    json_values_equal,
    last_number,
    normalize,
    parse_json,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\nhm\n</think>\n\n42", "42"),
        ("<think>\n\n</think>\n\n42", "42"),
        ("42", "42"),
        ("hm, so\n</think>\n42", "42"),
        ("<think>I never finish", ""),
        ("42 <think>or is it", "42"),
        ("<think>a</think>4<think>b</think>2", "42"),
        ("  \n", ""),
    ],
)
def test_final_answer_is_what_is_said_after_thinking(reply: str, answer: str) -> None:
    assert final_answer(reply) == answer


def test_exact_ignores_only_white_space_at_the_ends() -> None:
    assert is_exact(" Rome\n", "Rome")
    assert not is_exact("rome", "Rome")
    assert not is_exact("Rome.", "Rome")


@pytest.mark.parametrize(
    ("reply", "reference"),
    [
        ("  rome ", "Rome."),
        ("ROME!", "rome"),
        ("New\n  York", "new york"),
        ("ﬁne", "FINE"),
        ("１２", "12"),
        ("STRASSE", "Straße"),
        ("e\u0301", "é"),
        ("好。", "好"),
        ("Yes…", "yes"),
    ],
)
def test_normalized_ignores_case_space_forms_and_final_punctuation(reply: str, reference: str) -> None:
    assert is_normalized_equal(reply, reference)


@pytest.mark.parametrize(
    ("reply", "reference"), [("Rome, Italy", "Rome"), ("1.5", "15"), ("(a)", "a"), ("?", "!"), ("", "?")]
)
def test_normalized_keeps_what_carries_meaning(reply: str, reference: str) -> None:
    assert not is_normalized_equal(reply, reference)


@given(st.text())
def test_normalizing_twice_is_normalizing_once(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


def test_json_ignores_key_order_and_space() -> None:
    assert is_json_equal('{"b": [1, 2],\n "a": null}', '{"a":null,"b":[1,2]}')
    assert not is_json_equal('{"b": [2, 1], "a": null}', '{"a":null,"b":[1,2]}')
    assert not is_json_equal('{"a": null}', '{"a":null,"b":[1,2]}')


def test_json_in_a_fence_is_accepted_and_json_beside_chatter_is_not() -> None:
    assert is_json_equal('```json\n{"a": 1}\n```', '{"a": 1}')
    assert is_json_equal('{"a": 1}', '```\n{"a": 1}\n```')
    assert not is_json_equal('Here it is: {"a": 1}', '{"a": 1}')
    assert not is_json_equal('```json\n{"a": 1}\n```\nAnything else?', '{"a": 1}')


@pytest.mark.parametrize(
    ("left", "right", "are_equal"),
    [
        (True, 1, False),
        (False, 0, False),
        (1, 1.0, True),
        ("1", 1, False),
        (None, False, False),
        ([True], [1], False),
        ({"a": {"b": 1}}, {"a": {"b": 1.0}}, True),
        ([], {}, False),
    ],
)
def test_json_values_are_compared_by_json_s_own_types(left: object, right: object, are_equal: bool) -> None:
    assert json_values_equal(left, right) is are_equal
    assert json_values_equal(right, left) is are_equal


@given(JSON)
def test_every_json_value_equals_itself_in_any_layout(value: object) -> None:
    assert is_json_equal(json.dumps(value, indent=3), json.dumps(value, sort_keys=True, ensure_ascii=False))


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", '{"a": NaN}', "Infinity", '{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000]
)
def test_what_strict_json_readers_refuse_is_no_json(text: str) -> None:
    assert parse_json(text) is None


def test_json_null_is_a_value_and_not_a_failure() -> None:
    assert parse_json("null") == (None,)
    assert is_json_equal("null", "null")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234 apples in 5 baskets", "1234"),
        ("The answer is 42.", "42"),
        ("**42**", "42"),
        ("$1,234.50", "1234.50"),
        ("1.234,50 euro", "1234.50"),
        ("1.234.567", "1234567"),
        ("3,5 kg", "3.5"),
        ("1 234 567 (thin spaces: 1\u2009234\u2009567)", "1234567"),
        ("-5", "-5"),
        ("x = −7.5", "-7.5"),
        ("10-5", "5"),
        ("1.5e3", "1500"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("so...5", "5"),
        (".5", "0.5"),
        ("3/4", "4"),
        ("100%", "100"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text: str, number: str) -> None:
    assert last_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "abc1", "v2.0", "#### unknown", "step 3\n#### none"])
def test_text_without_a_number_of_its_own_has_none(text: str) -> None:
    assert last_number(text) is None


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_do_not_change_a_number(number: int) -> None:
    assert is_number_equal(f"It is {number:,}.", f"work\n#### {number}")


@given(st.text(max_size=60))
def test_no_text_breaks_the_number_reader(text: str) -> None:
    number = last_number(text)
    assert number is None or number.is_finite()


def test_numbers_are_compared_by_value() -> None:
    assert is_number_equal("42.00", "#### 42")
    assert not is_number_equal("42.01", "#### 42")
    assert not is_number_equal("", "#### 42")
    assert not is_number_equal("7", "no number")


def test_contains_wants_whole_words() -> None:
    assert is_contained("The capital is Rome, of course.", "rome")
    assert not is_contained("I do not know", "no")
    assert is_contained("No, I do not know", "no")
    assert not is_contained("42", "4")


def test_contains_does_not_ask_for_spaces_where_a_script_has_none() -> None:
    assert is_contained("首都是东京吗", "东京")


def test_an_empty_reference_is_not_contained_in_everything() -> None:
    assert not is_contained("anything", "")


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>'
OTHER = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


def test_tool_calls_are_compared_as_calls_in_any_order_and_with_any_words_around() -> None:
    reordered = '<tool_call>{"arguments": {"days": 2.0, "city": "Rome"}, "name": "weather"}</tool_call>'
    assert are_tool_calls_equal(f"I look it up. {reordered}", CALL)
    assert are_tool_calls_equal(OTHER + CALL, CALL + OTHER)
    assert not are_tool_calls_equal(CALL + CALL, CALL + OTHER)
    assert not are_tool_calls_equal(CALL, CALL + OTHER)
    assert not are_tool_calls_equal(CALL.replace("Rome", "Milan"), CALL)
    assert not are_tool_calls_equal("<tool_call>{</tool_call>", CALL)
    assert not are_tool_calls_equal("It is sunny.", CALL)


@pytest.mark.parametrize(
    ("setting", "reference", "matcher"),
    [
        ("auto", '{"a": 1}', "json"),
        ("auto", "```json\n[1, 2]\n```", "json"),
        ("auto", "42", "normalized"),
        ("auto", '"text"', "normalized"),
        ("auto", "6 * 7\n#### 42", "number"),
        ("auto", "6 * 7\n#### 42\nand more", "normalized"),
        ("auto", "#### heading", "normalized"),
        ("auto", "Rome", "normalized"),
        ("auto", CALL, "tool_calls"),
        ("exact", '{"a": 1}', "exact"),
        ("contains", "6 * 7\n#### 42", "contains"),
        ("exact", CALL, "tool_calls"),
    ],
)
def test_auto_looks_at_the_reference_alone(setting: str, reference: str, matcher: str) -> None:
    assert choose_matcher(setting, reference) == matcher  # type: ignore[arg-type]
