"""Personal data: found by form and check digits, masked completely, and hardly ever seen where there is none."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.data.messages import Conversation, Message, ToolCall
from affina.data.pii import (
    count_pii,
    find_pii,
    is_card_number,
    is_codice_fiscale,
    is_iban,
    mask_conversation,
    mask_pii,
)
from affina.data.validation import SourceSpec, read_conversations

# Example numbers that issuers publish for tests, and ones made up with right check digits.
FOUND = [
    ("email", "mario.rossi@example.com"),
    ("email", "m+fatture_2024@posta.esempio.co.uk"),
    ("iban", "IT60X0542811101000000123456"),
    ("iban", "IT60 X054 2811 1010 0000 0123 456"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "gb82west12345698765432"),
    ("card", "4111 1111 1111 1111"),
    ("card", "5555555555554444"),
    ("card", "3782 822463 10005"),
    ("codice_fiscale", "RSSMRA80A01H501U"),
    ("codice_fiscale", "rssmra80a01h501u"),
    ("ipv4", "192.168.1.44"),
    ("ipv4", "8.8.200.8"),
    ("phone", "+39 06 1234 5678"),
    ("phone", "+393331234567"),
    ("phone", "0039 333 1234567"),
    ("phone", "333 1234567"),
    ("phone", "347-123-4567"),
    ("phone", "(415) 555-2671"),
    ("phone", "415-555-2671"),
    ("secret", "sk-" + "a1B2c3D4e5F6g7H8i9J0"),
    ("secret", "ghp_" + "a1B2c3D4e5F6g7H8i9J0a1B2c3D4e5F6g7H8"),
    ("secret", "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"),
    ("secret", "AKIA" + "IOSFODNN7EXAMPLE"),
]


@pytest.mark.parametrize(("kind", "value"), FOUND)
@pytest.mark.parametrize("around", ["{}", "Ecco: {}.", "({})", "a {}, b", '"{}"', "riga\n{}\nriga"])
def test_personal_data_is_found_with_its_exact_extent(kind: str, value: str, around: str) -> None:
    text = around.format(value)
    assert [(hit.kind, text[hit.start : hit.end]) for hit in find_pii(text)] == [(kind, value)]


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("Tel. 06 12345678", "phone", "06 12345678"),
        ("chiamami al 02/1234567", "phone", "02/1234567"),
        ("phone number: 0410787999", "phone", "0410787999"),
        ("server 10.0.0.12 is down", "ipv4", "10.0.0.12"),
        ("http://10.1.2.3/x", "ipv4", "10.1.2.3"),
        ('api_key = "Zx81kQp05TtR2mNa"', "secret", "Zx81kQp05TtR2mNa"),
        ("password: aB3#fG7!kL9@", "secret", "aB3#fG7!kL9@"),
    ],
)
def test_numbers_without_check_digits_are_found_where_the_text_says_what_they_are(
    text: str, kind: str, value: str
) -> None:
    assert [(hit.kind, text[hit.start : hit.end]) for hit in find_pii(text)] == [(kind, value)]


def test_a_private_key_is_one_secret() -> None:
    text = "x\n-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7\n-----END RSA PRIVATE KEY-----\ny"
    (hit,) = find_pii(text)
    assert hit.kind == "secret"
    assert mask_pii(text) == "x\n[SECRET]\ny"


@pytest.mark.parametrize(
    "text",
    [
        "IT60X0542811101000000123457",  # check digits
        "4111 1111 1111 1112",  # Luhn
        "1234 5678 9012 3452",  # no card prefix
        "0000 0000 0000 0000",
        "RSSMRA80A01H501X",  # check letter
        "999.1.1.1",
        "version 10.15.7.200",
        "127.0.0.1 and 255.255.255.0 and 0.0.0.0",
        "section 3.11.2.1 and 5.4.1.2",
        "1.2.3.4.5",
        "Natalia sold 48/2 = <<48/2=24>>24 clips, 1,234,567 in all, for $12,500.00",
        "3.14159265358979 and 1618033988749894",
        "2023-10-05 12:30:45, 1990-2024, 370 860 1550 2440",
        "user@localhost, @handle, a@b, foo@bar.",
        "sk-learn and hf_hub and password: something",
        "api_key = YOUR_API_KEY_GOES_HERE",
        "ISBN 978-3-16-148410-0",
        "the year 2024 and 100000 people in 20121 Milano",
        "UUID 123e4567-e89b-12d3-a456-426614174000",
        "sha 4111111111111111abcdef",
        "call it 5 times",
        "",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert find_pii(text) == []


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_masking_changes_nothing_else_and_masking_twice_changes_nothing_more(text: str) -> None:
    hits = find_pii(text)
    assert all(0 <= hit.start < hit.end <= len(text) for hit in hits)
    assert all(first.end <= second.start for first, second in itertools.pairwise(hits))
    masked = mask_pii(text)
    assert mask_pii(masked) == masked
    if not hits:
        assert masked == text


@given(st.lists(st.sampled_from([value for _, value in FOUND]), min_size=1, max_size=5))
@settings(max_examples=100)
def test_no_found_value_survives_masking(values: list[str]) -> None:
    masked = mask_pii(" ; ".join(values))
    assert not any(value in masked for value in values)
    assert masked.count("[") == len(values)


@given(st.text("0123456789", min_size=15, max_size=15))
def test_luhn_accepts_exactly_one_of_ten_last_digits(digits: str) -> None:
    start = "4" + digits[1:]
    accepted = [last for last in range(10) if is_card_number(f"{start}{last}")]
    assert len(accepted) == (1 if len(set(start)) > 1 else 0)  # one digit sixteen times is nobody's card


@given(st.text("0123456789", min_size=18, max_size=18), st.integers(0, 17))
def test_iban_check_digits_catch_every_changed_digit(account: str, position: int) -> None:
    check = 98 - int(f"{account}131400") % 97  # DE = 13 14
    good = f"DE{check:02d}{account}"
    assert is_iban(good)
    changed = str((int(account[position]) + 1) % 10)
    assert not is_iban(f"DE{check:02d}{account[:position]}{changed}{account[position + 1 :]}")


@given(st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=6, max_size=6), st.integers(10, 99), st.integers(1, 31))
def test_a_codice_fiscale_has_one_right_check_letter(name: str, year: int, day: int) -> None:
    start = f"{name}{year:02d}A{day:02d}H501"
    accepted = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if is_codice_fiscale(start + letter)]
    assert len(accepted) == 1


def test_a_conversation_is_masked_in_content_reasoning_and_tool_arguments() -> None:
    mail = "mario.rossi@example.com"
    conversation = Conversation(
        messages=(
            Message("user", f"scrivi a {mail}"),
            Message(
                "assistant",
                "fatto",
                reasoning=f"l'indirizzo è {mail}",
                tool_calls=(ToolCall("send", {"to": [mail], "cc": {"x": mail}, "n": 3}),),
            ),
        ),
        group="g",
    )
    assert count_pii(conversation) == Counter(email=4)
    masked = mask_conversation(conversation)
    assert mail not in repr(masked)
    assert masked.messages[1].tool_calls[0].arguments == {"to": ["[EMAIL]"], "cc": {"x": "[EMAIL]"}, "n": 3}
    assert masked.group == "g"
    assert mask_conversation(Conversation(text=f"a {mail}")).text == "a [EMAIL]"


@pytest.mark.parametrize(
    ("name", "limit"),
    [("gsm8k/train.jsonl.gz", 0), ("gsm8k/test.jsonl.gz", 0), ("llamafactory_demos/wiki_demo.txt.gz", 0)],
)
def test_real_texts_without_personal_data_raise_no_alarm(
    real_data_folder: Callable[[str], Path], name: str, limit: int
) -> None:
    folder, _, rest = name.partition("/")
    total: Counter[str] = Counter()
    for conversation in read_conversations([SourceSpec(real_data_folder(folder) / rest)], on_error="skip"):
        total.update(count_pii(conversation))
    assert total.total() <= limit


def test_the_addresses_of_real_tool_conversations_are_found(real_data_folder: Callable[[str], Path]) -> None:
    total: Counter[str] = Counter()
    for conversation in read_conversations(
        [SourceSpec(real_data_folder("tau_bench") / "gpt-4o-airline.jsonl.gz")], on_error="skip"
    ):
        total.update(count_pii(conversation))
    assert total == Counter(email=127)
