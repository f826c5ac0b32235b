"""When a generated reply counts as right.

Every matcher is a pure function of two strings, reply and reference, without thinking blocks (`final_answer` removes
them). `auto` chooses per record, by looking at the reference alone: a choice that looked at the reply would let a model
pick how it is judged.

Decisions, and their reasons:
    A Markdown fence around the whole reply is accepted for JSON, text beside it is not. Programs that read JSON from a
    model take fences off and cannot take chatter off; and the lenient side favours the base model, so that the gain
    that is reported errs on the low side.
    JSON true is not 1, and 1 is 1.0. Order of keys and white space do not count, order of arrays does.
    The number of a reply is what follows its last `####` (GSM8K), else its last number. 1,234 and 1.234,5 are read as
    thousands (and decimal comma) where the digits leave no other reading.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

MatcherName = Literal["exact", "normalized", "json", "number", "contains", "tool_calls"]
MatchSetting = Literal["auto", "exact", "normalized", "json", "number", "contains"]
Matcher = Callable[[str, str], bool]

_CLOSED_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_FENCE = re.compile(r"\A```[\w+-]*[ \t]*\n(.*?)\n?[ \t]*```\Z", re.DOTALL)
_TOOL_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_HASH_ANSWER = re.compile(r"####\s*([^\n]*)\s*\Z")
# Digits in groups of three (1,234,567 · 1 234 567 with a no-break or thin space), then 1.234.567,89, then plain.
_NUMBER = re.compile(
    r"""(?<!\w)(?<!\d\.)                    # a dash after a word or digit joins, it does not negate
        (?P<sign>[-−+])?\s?[$€£]?\s?
        (?:
            (?P<dots>\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,})(?![\d])
          | (?P<groups>\d{1,3}(?:[,\u00a0\u2009\u202f']\d{3})+(?:\.\d+)?)(?![\d])
          | (?P<comma>(?<!\d,)(?:\d+,\d{1,2}|\d+,\d{4,}|\d{4,},\d{3}))(?![\d,])
          | (?P<plain>(?:\d+(?:\.\d+)?|(?<!\.)\.\d+)(?:[eE][-+]?\d{1,3})?)
        )""",
    re.VERBOSE,
)


def final_answer(reply: str) -> str:
    """The reply without its thinking, and without white space around it.

    A block that was opened and never closed (the reply was cut off while thinking) leaves nothing of what follows it; a
    closing tag without an opening one (some templates open the block in the prompt) removes what precedes it.
    """
    answer = _CLOSED_THINKING.sub("", reply)
    if "</think>" in answer:
        answer = answer.rpartition("</think>")[2]
    return answer.partition("<think>")[0].strip()


def is_exact(reply: str, reference: str) -> bool:
    """Equal but for white space at the ends."""
    return reply.strip() == reference.strip()


def is_normalized_equal(reply: str, reference: str) -> bool:
    """Equal without case, white space, compatibility forms (ﬁ, １, …) and punctuation at the end."""
    return normalize(reply) == normalize(reference)


def is_json_equal(reply: str, reference: str) -> bool:
    """Both are JSON and their values are equal. A reference that is no JSON matches nothing."""
    wanted, given = parse_json(reference), parse_json(reply)
    return wanted is not None and given is not None and json_values_equal(given[0], wanted[0])


def is_number_equal(reply: str, reference: str) -> bool:
    """The last number of both is the same. A reference without a number matches nothing."""
    wanted, given = last_number(reference), last_number(reply)
    return wanted is not None and wanted == given


def is_contained(reply: str, reference: str) -> bool:
    """The normalized reference occurs in the normalized reply, not as a part of a longer word ("no" in "note")."""
    wanted, text = normalize(reference), normalize(reply)
    if not wanted:
        return not text
    start = text.find(wanted)
    while start >= 0:
        end = start + len(wanted)
        inside_left = start > 0 and _joins(text[start - 1], text[start])
        inside_right = end < len(text) and _joins(text[end - 1], text[end])
        if not inside_left and not inside_right:
            return True
        start = text.find(wanted, start + 1)
    return False


def are_tool_calls_equal(reply: str, reference: str) -> bool:
    """The same calls with the same arguments, in any order; text around the calls does not count."""
    wanted, given = parse_tool_calls(reference), parse_tool_calls(reply)
    if not wanted or given is None or len(given) != len(wanted):
        return False
    remaining = list(given)
    for call in wanted:
        found = next((index for index, other in enumerate(remaining) if json_values_equal(other, call)), None)
        if found is None:
            return False
        del remaining[found]
    return True


MATCHERS: dict[MatcherName, Matcher] = {
    "exact": is_exact,
    "normalized": is_normalized_equal,
    "json": is_json_equal,
    "number": is_number_equal,
    "contains": is_contained,
    "tool_calls": are_tool_calls_equal,
}


def choose_matcher(setting: MatchSetting, reference: str) -> MatcherName:
    """The matcher of one record. Tool calls are always compared as calls; `auto` looks at the reference."""
    if parse_tool_calls(reference):
        return "tool_calls"
    if setting != "auto":
        return setting
    parsed = parse_json(reference)
    if parsed is not None and isinstance(parsed[0], dict | list):
        return "json"
    answer = _HASH_ANSWER.search(reference)
    if answer is not None and last_number(answer[1]) is not None:
        return "number"
    return "normalized"


def normalize(text: str) -> str:
    """Case-folded compatibility form, single spaces, no punctuation at the end (unless there is nothing else).

    Unicode's NFKC_Casefold without the removal of ignorable characters: NFKC(fold(NFKC(fold(NFD(text))))), which
    unlike a single pass does not change when applied again.
    """
    folded = unicodedata.normalize("NFD", text).casefold()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", folded).casefold())
    words = " ".join(folded.split())
    end = len(words)
    while end and (words[end - 1].isspace() or unicodedata.category(words[end - 1]) in _FINAL_PUNCTUATION):
        end -= 1
    return words[:end] or words


# Po: . ! ? , ; : … 。 ！ ？    Pe, Pf stay: a closing bracket or quote belongs to its opening one.
_FINAL_PUNCTUATION = ("Po",)


def parse_json(text: str) -> tuple[Any] | None:
    """The value in a 1-tuple (it may be null), or None when the text is no JSON.

    Stricter than `json.loads`: NaN, Infinity and repeated keys are refused, as other readers refuse them.
    """
    body = text.strip()
    fenced = _FENCE.match(body)
    if fenced is not None:
        body = fenced[1].strip()
    try:
        return (json.loads(body, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys),)
    except (ValueError, RecursionError):
        return None


def json_values_equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: true ≠ 1, 1 = 1.0, objects without order, arrays with."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(json_values_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(json_values_equal, left, right))
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    return bool(left == right)


def parse_tool_calls(text: str) -> list[Any] | None:
    """The JSON objects inside <tool_call> tags, empty without tags; None when one of them is no object."""
    calls = [parse_json(body) for body in _TOOL_CALL.findall(text)]
    if any(call is None or not isinstance(call[0], dict) for call in calls):
        return None
    return [call[0] for call in calls if call is not None]


def last_number(text: str) -> Decimal | None:
    """The number after the last `####`, else the last number of the text; None without one."""
    marked = text.rpartition("####")[2]
    found = None
    # After #### the answer comes first and a unit may follow; elsewhere the last number is the answer.
    for found in _NUMBER.finditer(marked):  # noqa: B007
        if "####" in text:
            break
    if found is None:
        return None
    try:
        value = Decimal(_plain_digits(found))
    except InvalidOperation:
        return None
    return -value if found["sign"] in ("-", "−") else value


def _plain_digits(found: re.Match[str]) -> str:
    if found["dots"] is not None:
        return found["dots"].replace(".", "").replace(",", ".")
    if found["groups"] is not None:
        return re.sub(r"[,\u00a0\u2009\u202f']", "", found["groups"])
    if found["comma"] is not None:
        return found["comma"].replace(",", ".")
    return found["plain"]


def _joins(left: str, right: str) -> bool:
    """Whether two neighbouring characters are inside one word. Scripts from U+2E80 on (CJK) put no spaces between."""
    return left.isalnum() and right.isalnum() and left < "\u2e80" and right < "\u2e80"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("repeated key")
    return value
