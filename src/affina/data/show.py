"""Samples as a person reads them: token by token, with what is trained marked.

`segments` gives data, so that every front end (terminal, HTML) can draw it in its own way; `to_plain` draws it without
colour, with trained text in ⟦ ⟧.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from affina.data.samples import IGNORED_LABEL, Sample


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token, or a few that only together form a character."""

    ids: tuple[int, ...]
    text: str
    is_trained: bool
    is_control: bool


def view_tokens(sample: Sample, hf: Any) -> Iterator[TokenView]:
    """The tokens of a sample in order. Tokens that split a character come together, so that no � appears."""
    control = {int(index) for index, token in hf.added_tokens_decoder.items() if token.special}
    pending: list[int] = []
    trained = False
    for token_id, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        is_trained = label != IGNORED_LABEL
        if pending and (is_trained != trained or token_id in control or len(pending) >= 8):
            yield TokenView(tuple(pending), hf.decode(pending), trained, False)
            pending = []
        pending.append(token_id)
        trained = is_trained
        text = hf.decode(pending)
        if token_id in control or not text.endswith("�"):
            yield TokenView(tuple(pending), text, trained, token_id in control)
            pending = []
    if pending:
        yield TokenView(tuple(pending), hf.decode(pending), trained, False)


def to_plain(sample: Sample, hf: Any) -> str:
    """The sample as text; what is trained stands in ⟦ ⟧, end-of-turn token included."""
    pieces: list[str] = []
    is_open = False
    for view in view_tokens(sample, hf):
        if view.is_trained != is_open:
            pieces.append("⟦" if view.is_trained else "⟧")
            is_open = view.is_trained
        pieces.append(view.text)
    return "".join(pieces) + ("⟧" if is_open else "")
