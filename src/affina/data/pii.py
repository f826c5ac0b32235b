"""Personal data and secrets in texts, found by form and check digits: few false alarms, no model, no network.

What has check digits is only reported when they are right (IBAN, card, codice fiscale); what has none needs an
unmistakable form (e-mail, prefixed keys) or a form and a sign that it is meant (a phone number needs a plus sign, an
Italian or North American layout, or a word such as "tel" before it). Names and addresses are not looked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from affina.data.messages import Conversation, Message, ToolCall

PiiKind = Literal["email", "phone", "iban", "card", "codice_fiscale", "ipv4", "secret"]

PLACEHOLDERS: Final[dict[PiiKind, str]] = {
    "email": "[EMAIL]",
    "phone": "[PHONE]",
    "iban": "[IBAN]",
    "card": "[CARD]",
    "codice_fiscale": "[CODICE_FISCALE]",
    "ipv4": "[IP]",
    "secret": "[SECRET]",
}
"""What `mask_pii` writes instead. Square brackets, because angle brackets look like special tokens."""


@dataclass(frozen=True, slots=True)
class PiiHit:
    """One find: `text[start:end]` is personal data of this kind."""

    kind: PiiKind
    start: int
    end: int


def find_pii(text: str) -> list[PiiHit]:
    """Personal data and secrets in `text`, in order, without overlaps."""
    hits: list[PiiHit] = []
    taken = bytearray()
    for find in _FINDERS:
        for hit in find(text):
            if not taken:
                taken = bytearray(len(text))
            if not any(taken[hit.start : hit.end]):
                taken[hit.start : hit.end] = b"\x01" * (hit.end - hit.start)
                hits.append(hit)
    return sorted(hits, key=lambda hit: hit.start)


def mask_pii(text: str) -> str:
    """The text with every find replaced by its placeholder; masking twice changes nothing more."""
    hits = find_pii(text)
    if not hits:
        return text
    pieces, position = [], 0
    for hit in hits:
        pieces += [text[position : hit.start], PLACEHOLDERS[hit.kind]]
        position = hit.end
    return "".join([*pieces, text[position:]])


def count_pii(conversation: Conversation) -> Counter[PiiKind]:
    """How often each kind occurs in a conversation."""
    return Counter(hit.kind for text in _texts(conversation) for hit in find_pii(text))


def mask_conversation(conversation: Conversation) -> Conversation:
    """The conversation with personal data masked in its texts, reasoning and tool arguments."""
    return replace(
        conversation,
        text=None if conversation.text is None else mask_pii(conversation.text),
        messages=tuple(_mask_message(message) for message in conversation.messages),
        rejected=tuple(tuple(_mask_message(message) for message in turns) for turns in conversation.rejected),
    )


def _mask_message(message: Message) -> Message:
    return replace(
        message,
        content=mask_pii(message.content),
        reasoning=None if message.reasoning is None else mask_pii(message.reasoning),
        tool_calls=tuple(
            ToolCall(call.name, {key: _mask_value(value) for key, value in call.arguments.items()}, call.id)
            for call in message.tool_calls
        ),
    )


def _mask_value(value: Any) -> Any:
    if isinstance(value, str):
        return mask_pii(value)
    if isinstance(value, list):
        return [_mask_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _mask_value(item) for key, item in value.items()}
    return value


def _texts(conversation: Conversation) -> Iterator[str]:
    if conversation.text is not None:
        yield conversation.text
    # Of worse replies only the turns of their own: the prompt is counted once.
    own = [message for turns in conversation.rejected for message in turns if message not in conversation.messages]
    for message in (*conversation.messages, *own):
        yield message.content
        if message.reasoning is not None:
            yield message.reasoning
        for call in message.tool_calls:
            yield from _strings(call.arguments)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


# One finder per kind -------------------------------------------------------------------------------------------------

_EMAIL: Final = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_+-])?"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)


def _emails(text: str) -> Iterator[PiiHit]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield PiiHit("email", match.start(), match.end())


# Prefixes that only keys have, with the length that each issuer uses.
_KEY: Final = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"sk-(?:ant-|proj-|or-)?[A-Za-z0-9_-]{20,200}"  # OpenAI, Anthropic, OpenRouter
    r"|(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,200}"  # Stripe
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255}"  # GitHub
    r"|glpat-[A-Za-z0-9_-]{20,64}"  # GitLab
    r"|hf_[A-Za-z0-9]{30,64}"  # Hugging Face
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|xox[abprs]-[A-Za-z0-9-]{10,200}"  # Slack
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}"  # JSON Web Token
    r")(?![A-Za-z0-9_])"
)
_PRIVATE_KEY: Final = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----.*?(?:-----END (?:[A-Z]+ )*PRIVATE KEY-----|\Z)", re.DOTALL
)
_ASSIGNMENT: Final = re.compile(
    r"(?i)\b(?:api[_-]?key|secret[_-]?key|access[_-]?token|auth[_-]?token|client[_-]?secret|passw(?:or)?d)"
    r"['\"]?\s{0,3}[:=]\s{0,3}['\"]?([A-Za-z0-9+/_=.!@#$%^&*-]{12,200})"
)


def _secrets(text: str) -> Iterator[PiiHit]:
    if "PRIVATE KEY-----" in text:
        for match in _PRIVATE_KEY.finditer(text):
            yield PiiHit("secret", match.start(), match.end())
    for match in _KEY.finditer(text):
        if _looks_random(match[0]):
            yield PiiHit("secret", match.start(), match.end())
    for match in _ASSIGNMENT.finditer(text):
        if _looks_random(match[1]):
            yield PiiHit("secret", match.start(1), match.end(1))


def _looks_random(value: str) -> bool:
    """Letters and digits, and more variety than words and placeholders have (at least 3 bits per character)."""
    if not any(char.isdigit() for char in value) or not any(char.isalpha() for char in value):
        return False
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values()) >= 3.0


# Lengths of an IBAN by country (ISO 13616 registry).
_IBAN_LENGTHS: Final = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24
FI18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28
LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31 MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22
SA24 SE24 SI19 SK24 SM27 TN24 TR26 UA29 VA22 VG24 XK20
"""
_IBAN_LENGTH: Final = {entry[:2]: int(entry[2:]) for entry in _IBAN_LENGTHS.split()}
_IBAN_START: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}[0-9]{2}(?=[ -]?[A-Za-z0-9]{4})")


def _ibans(text: str) -> Iterator[PiiHit]:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTH.get(match[0][:2].upper())
        if length is None:
            continue
        end = _end_of_group_run(text, match.start(), length)
        if end is not None and is_iban(text[match.start() : end]):
            yield PiiHit("iban", match.start(), end)


def _end_of_group_run(text: str, start: int, length: int) -> int | None:
    """Where `length` letters and digits, with single spaces or hyphens between them, end; None when there are fewer or
    the run goes on."""
    count, position = 0, start
    while position < len(text) and count < length:
        if text[position].isascii() and text[position].isalnum():
            count += 1
        elif not (text[position] in " -" and text[position - 1].isalnum()):
            return None
        position += 1
    if count < length or (position < len(text) and text[position].isalnum()):
        return None
    return position


def is_iban(value: str) -> bool:
    """Whether the check digits are right (ISO 7064, mod 97).

    The number with its first four characters moved to the end must be 1 mod 97, letters counting as 10 to 35.
    """
    compact = re.sub(r"[ -]", "", value).upper()
    if not re.fullmatch(r"[A-Z]{2}[0-9]{2}[A-Z0-9]{11,30}", compact):
        return False
    return int("".join(str(int(char, 36)) for char in compact[4:] + compact[:4])) % 97 == 1


_CARD: Final = re.compile(r"(?<![\w.,/+-])[2-6](?:[ -]?[0-9]){12,18}(?![\w/]|[.,-][0-9])")


def _cards(text: str) -> Iterator[PiiHit]:
    for match in _CARD.finditer(text):
        if is_card_number(match[0]):
            yield PiiHit("card", match.start(), match.end())


def is_card_number(value: str) -> bool:
    """Whether it has the prefix, the length and the check digit (Luhn, ISO/IEC 7812-1) of a payment card, in one piece
    or in the groups that cards show."""
    groups = re.split(r"[ -]", value)
    digits = "".join(groups)
    sizes = tuple(map(len, groups))
    if len(groups) > 1 and sizes not in ((4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3)):
        return False
    if len(set(digits)) == 1 or not _has_card_prefix(digits):
        return False
    total = 0
    for position, char in enumerate(reversed(digits)):
        digit = int(char) * (2 if position % 2 else 1)
        total += digit - 9 if digit > 9 else digit
    return total % 10 == 0


def _has_card_prefix(digits: str) -> bool:
    first, size = int(digits[:4]), len(digits)
    return (
        (digits[0] == "4" and size in (13, 16, 19))  # Visa
        or ((5100 <= first <= 5599 or 2221 <= first <= 2720) and size == 16)  # Mastercard
        or (digits[:2] in ("34", "37") and size == 15)  # American Express
        or (digits[:2] in ("36", "38", "39", "30") and size == 14)  # Diners Club
        or ((first == 6011 or digits[:2] == "65" or 6440 <= first <= 6499) and size == 16)  # Discover
        or (3528 <= first <= 3589 and size == 16)  # JCB
        or (digits[:2] in ("50", "56", "57", "58", "63", "67") and size in (16, 18, 19))  # Maestro
    )


_CODICE_FISCALE: Final = re.compile(
    r"(?<![A-Za-z0-9])[A-Z]{6}[0-9LMNP-V]{2}[ABCDEHLMPRST][0-9LMNP-V]{2}[A-Z][0-9LMNP-V]{3}[A-Z](?![A-Za-z0-9])",
    re.IGNORECASE,
)
# Values of the characters at odd places (first, third, …), Decreto Ministeriale 23/12/1976; digits as letters A to J.
_ODD: Final = dict(zip("0123456789", (1, 0, 5, 7, 9, 13, 15, 17, 19, 21), strict=True)) | dict(
    zip(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23),
        strict=True,
    )
)


def _codici_fiscali(text: str) -> Iterator[PiiHit]:
    for match in _CODICE_FISCALE.finditer(text):
        if is_codice_fiscale(match[0]):
            yield PiiHit("codice_fiscale", match.start(), match.end())


def is_codice_fiscale(value: str) -> bool:
    """Whether it has the form and the check letter of an Italian codice fiscale."""
    code = value.upper()
    if not _CODICE_FISCALE.fullmatch(code):
        return False
    total = sum(
        _ODD[char] if index % 2 == 0 else (int(char) if char.isdigit() else ord(char) - ord("A"))
        for index, char in enumerate(code[:15])
    )
    return code[15] == chr(ord("A") + total % 26)


_IPV4: Final = re.compile(r"(?<![\w.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![\w]|\.[0-9])")
_ADDRESS_BEFORE: Final = re.compile(
    r"(?i)(?:\bip(?:v4)?\b|address|host|server|subnet|gateway|dns|ping|ssh|://)[^\n]{0,20}$"
)
_VERSION_BEFORE: Final = re.compile(r"(?i)(?:version|release|firmware|build|section|v)\W{0,3}$")


def _addresses(text: str) -> Iterator[PiiHit]:
    for match in _IPV4.finditer(text):
        parts = match[0].split(".")
        if any(int(part) > 255 or (len(part) > 1 and part[0] == "0") for part in parts):
            continue
        # Loopback, unspecified, broadcast and netmasks tell nothing about anybody.
        before = text[max(0, match.start() - 30) : match.start()]
        if parts[0] in ("0", "127", "255") or _VERSION_BEFORE.search(before):
            continue
        # 3.11.2.1 is a section of a contract; small numbers are an address only where the text says so.
        if max(map(int, parts)) < 32 and not _ADDRESS_BEFORE.search(before):
            continue
        yield PiiHit("ipv4", match.start(), match.end())


_PHONE_INTERNATIONAL: Final = re.compile(r"(?<![\w+])(?:\+|00)[1-9](?:[ ./()-]{0,2}[0-9]){7,14}(?![\w]|[.,][0-9])")
_PHONE_NORTH_AMERICAN: Final = re.compile(
    r"(?<![\w.+-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}([-.]))[2-9][0-9]{2}[-.][0-9]{4}(?![\w-]|\.[0-9])"
)
_PHONE_ITALIAN: Final = re.compile(
    r"(?<![\w.,+/-])(?<![0-9] )3[2-9][0-9](?:[ ./-][0-9]{6,7}|[ ./-][0-9]{3}[ .-]?[0-9]{3,4})(?![\w-]|[., ][0-9])"
)
_PHONE_NAMED: Final = re.compile(
    r"(?i)\b(?:tel|telefono|telephone|phone|mobile|cell|cellulare|whatsapp|fax|call|chiama(?:mi|re)?|numero)\b"
    r"[^\w\n+]{0,3}(?:(?:at|al|on|is|number|no|n|numero|di telefono)\b[^\w\n+]{0,3}){0,3}"
    r"([0-9(](?:[ ./()-]{0,2}[0-9]){6,12})(?![\w]|[.,][0-9])"
)


def _phones(text: str) -> Iterator[PiiHit]:
    for match in _PHONE_INTERNATIONAL.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if match[0].startswith("+") or (digits.startswith("00") and 11 <= len(digits) <= 15 and _is_grouped(match[0])):
            yield PiiHit("phone", match.start(), match.end())
    for match in _PHONE_NORTH_AMERICAN.finditer(text):
        yield PiiHit("phone", match.start(), match.end())
    for match in _PHONE_ITALIAN.finditer(text):
        yield PiiHit("phone", match.start(), match.end())
    for match in _PHONE_NAMED.finditer(text):
        yield PiiHit("phone", match.start(1), match.end(1))


def _is_grouped(number: str) -> bool:
    return re.search(r"\d[ ./-]\d", number) is not None


# In this order: what has check digits first, so that a phone number is not found inside an IBAN.
_FINDERS: Final = (_secrets, _emails, _ibans, _cards, _codici_fiscali, _addresses, _phones)
