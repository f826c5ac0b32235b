"""Which tokens are trained: character spans of a rendered text become labels.

A token is trained when all of its characters lie inside a trained span. A token that straddles a border is not: part of
it belongs to the prompt, and serving would never predict it from there. Such tokens are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from affina.data.messages import Message
from affina.data.samples import IGNORED_LABEL, Sample

Mask = Literal["assistant", "last", "all"]


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """ids [L] int32, and for each token the characters it stands for: starts [L], ends [L] (exclusive) int32."""

    ids: NDArray[np.int32]
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]


def tokenize_text(hf: Any, text: str, *, add_special_tokens: bool = False) -> TokenizedText:
    """Ids and offsets; without added special tokens, exactly as `apply_chat_template(tokenize=True)` does it."""
    encoding = hf(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = np.asarray(encoding["offset_mapping"], dtype=np.int32).reshape(-1, 2)
    return TokenizedText(np.asarray(encoding["input_ids"], dtype=np.int32), offsets[:, 0], offsets[:, 1])


def select_replies(messages: Sequence[Message], mask: Mask) -> list[int]:
    """Indices of the messages that are trained: replies whose `train` is set, all of them or only the last.

    `last` means the last reply of the conversation; if that one has `train=False`, nothing is trained.
    """
    replies = [index for index, message in enumerate(messages) if message.role == "assistant"]
    chosen = replies[-1:] if mask == "last" else replies
    return [index for index in chosen if messages[index].train]


def tokens_inside(tokens: TokenizedText, start: int, end: int) -> tuple[slice, int]:
    """The tokens that lie in characters start..end, and how many tokens straddle one of the two borders."""
    first = int(np.searchsorted(tokens.starts, start, side="left"))
    stop = int(np.searchsorted(tokens.starts, end, side="left"))
    num_straddling = 0
    if first > 0 and tokens.ends[first - 1] > start > tokens.starts[first - 1]:
        num_straddling += 1
    while stop > first and tokens.ends[stop - 1] > end:
        stop -= 1
        num_straddling += 1
    return slice(first, stop), num_straddling


def build_sample(ids: NDArray[np.int32], trained: Sequence[slice]) -> Sample:
    """A sample whose labels are the ids inside the trained slices; the first label is always ignored."""
    labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int32)
    for part in trained:
        labels[part] = ids[part]
    labels[:1] = IGNORED_LABEL
    return Sample(ids, labels)


def invert(slices: Sequence[slice], length: int) -> list[slice]:
    """What the slices leave out of 0..length. The slices are sorted and do not overlap."""
    rest: list[slice] = []
    cursor = 0
    for part in slices:
        rest.append(slice(cursor, part.start))
        cursor = part.stop
    rest.append(slice(cursor, length))
    return [part for part in rest if part.stop > part.start]
