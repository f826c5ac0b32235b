"""The text of a conversation as the comparisons see it: normalised, and cut into prompt and reply."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from affina.data.messages import Conversation, Message

_TURN: Final = "\x1e"
# Chinese, Japanese and Korean are written without spaces: there a character counts as a word.
_CJK: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_WORD: Final = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_ASCII_WORD: Final = re.compile(r"\w+", re.ASCII)
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)


def normalize(text: str) -> str:
    """The text in NFKC, without differences of case and white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def prompt_and_reply(conversation: Conversation) -> tuple[str, str]:
    """Normalised text of everything before the last reply, and of that reply; ("", the text) for plain text."""
    if conversation.text is not None:
        return "", normalize(conversation.text)
    messages = conversation.messages
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    prompt = _TURN.join(f"{message.role}:{_message_text(message)}" for message in messages[:last])
    return prompt, _message_text(messages[last]) if last < len(messages) else ""


def whole_text(conversation: Conversation) -> str:
    """Normalised text of all turns, without the system prompt, which is often the same for the whole set."""
    if conversation.text is not None:
        return normalize(conversation.text)
    return " ".join(_message_text(message) for message in conversation.messages if message.role != "system")


def prompt_text(conversation: Conversation) -> str:
    """Normalised text of what the user and the tools say before the last reply; the whole of a plain text."""
    if conversation.text is not None:
        return normalize(conversation.text)
    messages = conversation.messages
    last = max((index for index, message in enumerate(messages) if message.role == "assistant"), default=len(messages))
    return " ".join(_message_text(message) for message in messages[:last] if message.role != "system")


def _message_text(message: Message) -> str:
    text = normalize(message.content)
    if message.tool_calls:
        calls = [[call.name, call.arguments] for call in message.tool_calls]
        text = f"{text} {normalize(_canonical_json(calls))}"
    return text


def conversation_hash(conversation: Conversation) -> str:
    """sha256 of everything in the conversation that training sees; where it came from does not matter."""
    content: list[Any] = [conversation.text, conversation.tools, _turns_content(conversation.messages)]
    if conversation.rejected:
        content.append([_turns_content(turns) for turns in conversation.rejected])
    if conversation.desirable is not None:
        content.append(conversation.desirable)
    return hashlib.sha256(_canonical_json(content).encode("utf-8", "surrogatepass")).hexdigest()


def _turns_content(messages: Sequence[Message]) -> list[list[Any]]:
    return [
        [
            message.role,
            message.content,
            message.reasoning,
            [[call.name, call.arguments, call.id] for call in message.tool_calls],
            message.tool_call_id,
            message.name,
            message.train,
        ]
        for message in messages
    ]


def _canonical_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def hash128(text: str) -> bytes:
    """16 bytes; two texts of one data set practically never share them."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def word_hashes(text: str) -> NDArray[np.uint64]:
    """[words] uint64, one hash per word of a normalised text."""
    pattern = _ASCII_WORD if text.isascii() else _WORD
    words = pattern.findall(text)
    crc = zlib.crc32
    return np.fromiter((crc(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))


def character_hashes(text: str) -> NDArray[np.uint64]:
    """[characters] uint64, the code points of a normalised text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)


def ngram_hashes(units: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
    """[max(units - width + 1, 0)] uint64, one hash per window of `width` units, in order."""
    count = len(units) - width + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    hashes = np.zeros(count, np.uint64)
    for offset in range(width):
        hashes = hashes * _MULTIPLIER + units[offset : offset + count] + np.uint64(1)
    return scramble(hashes)


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Values whose bits all depend on all bits of the input (the finaliser of MurmurHash3)."""
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> np.uint64(33))
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
