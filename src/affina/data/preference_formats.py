"""Which preference format a file has: found by looking at its first records, and told with the reason.

What an objective wants decides what is looked for; records of another kind are an error that says what works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from affina.config.objectives import Records, names_with
from affina.data.formats import (
    CHOSEN_NAMES,
    PROMPT_NAMES,
    REJECTED_NAMES,
    WANTED,
    Columns,
    DetectedFormat,
    Format,
    Probe,
    detect_format,
    first_turn,
    with_unread,
)
from affina.errors import DataError, Location

_REPLY_LISTS: Final = ("replies", "responses", "completions", "answers", "candidates", "outputs", "generations")
_RANKS: Final = ("ranks", "rank", "ranking")
_SCORES: Final = ("scores", "score", "ratings", "rating", "rewards", "overall_score")
_LABELS: Final = ("label", "kto_tag", "kto_label", "desirable", "is_desirable", "thumbs_up", "reward")
_REPLIES: Final = ("completion", "response", "output", "answer", "reply", "generation")
_YES: Final = frozenset({"true", "1", "yes", "desirable", "wanted", "good", "chosen", "thumbs_up"})
_NO: Final = frozenset({"false", "0", "-1", "no", "undesirable", "unwanted", "bad", "rejected", "thumbs_down"})

TEACHER: Final = "teacher"
"""Column with a teacher's likeliest tokens, and key of `Conversation.metadata` that holds them."""

TEACHER_SHAPE: Final = '{"token_ids": [[…], …], "log_probabilities": [[…], …]}, one list for each trained token'

Chosen = Format | Literal["auto"]


def detect_records(
    records: Sequence[Mapping[str, Any]],
    *,
    wanted: Records,
    format: Chosen = "auto",
    columns: Columns | None = None,
    where: Location | None = None,
) -> DetectedFormat:
    """The format of `records` (the first few of a file) for an objective that wants such records.

    Arguments and errors as of `detect_format`; DataError as well when the records are of another kind: `no-pairs`,
    `no-labels`, `text-wanted`, `preference-data`.
    """
    if wanted in ("replies", "taught"):
        detected = detect_format(records, format=format, columns=columns, where=where)
        if wanted == "taught" and not any(TEACHER in record for record in records):
            raise _no_teacher(where)
        return detected
    probe = Probe(records, columns or Columns(), where)
    probe.check_named_columns()
    if wanted == "texts":
        return with_unread(probe, _as_text(probe, format))
    found = _as_preference(probe, format) or _as_ranking(probe, format)
    if wanted == "labels":
        found = _as_labelled(probe, format) or found
    if found is None:
        raise _wrong_kind(probe, wanted)
    if found.format == "tree" and found.columns.prompt is None:
        return found  # the record itself is the tree
    return with_unread(probe, found)


def unread_label(records: Sequence[Mapping[str, Any]]) -> str | None:
    """The column that says which replies are wanted, in records that are to be trained as they are."""
    for name in ("label", "kto_tag", "kto_label", "desirable"):
        values = [record[name] for record in records if name in record]
        if values and all(isinstance(value, bool) for value in values) and False in values:
            return name
    return None


def _as_text(probe: Probe, format: Chosen) -> DetectedFormat:
    if format == "text" or probe.columns.text or (probe.present(("text",)) and not probe.turn_columns()):
        return probe.as_text()
    column = probe.longest_text_column()
    raise DataError(
        "text-wanted",
        f"training.objective cpt learns from plain text, and these records have {', '.join(probe.seen)}",
        why='no column is called "text", and affina does not guess which to take',
        fix=(
            "for conversations write training.objective: sft"
            if probe.turn_columns() or not column
            else f"name the column: columns: {{text: {column}}}; for prompts with replies write training.objective: sft"
        ),
        where=probe.where,
    )


def _as_preference(probe: Probe, format: Chosen) -> DetectedFormat | None:
    chosen = probe.columns.chosen or probe.one_of(CHOSEN_NAMES)
    rejected = probe.columns.rejected or probe.one_of(REJECTED_NAMES)
    if format not in ("auto", "preference") or (format == "auto" and not (chosen and rejected)):
        return None
    if chosen is None or rejected is None:
        raise probe.missing_error("preference", "rejected" if chosen else "chosen")
    prompt = _prompt_column(probe, besides=(chosen, rejected))
    columns = _with_prompt(probe, prompt, chosen=chosen, rejected=rejected)
    source = f'the prompt is "{prompt}"' if prompt else "the prompt is what both begin with"
    return DetectedFormat("preference", columns, f'"{chosen}" is preferred to "{rejected}"; {source}')


def _as_ranking(probe: Probe, format: Chosen) -> DetectedFormat | None:
    tree = _tree_column(probe)
    if tree is not None and format in ("auto", "tree"):
        columns = replace(probe.common(), prompt=tree or None)
        return DetectedFormat("tree", columns, "a tree of ranked replies; the best against each that is worse")
    replies = probe.columns.replies or next(
        (name for name in probe.present(_REPLY_LISTS) if isinstance(probe.first_value(name), list)), None
    )
    if format not in ("auto", "ranking") or replies is None:
        return None
    ranks = probe.columns.ranks or probe.one_of(_RANKS)
    scores = probe.columns.scores or (None if ranks else probe.one_of(_SCORES))
    items = probe.first_value(replies)
    item = items[0] if isinstance(items, list) and items and isinstance(items[0], Mapping) else {}
    if ranks is None and scores is None:
        ranks = next((name for name in _RANKS if name in item), None)
        scores = next((name for name in _SCORES if name in item), None) if ranks is None else None
    if ranks is None and scores is None:
        if format == "auto" and probe.columns.replies is None:
            return None
        raise DataError(
            "no-ranks",
            f'"{replies}" is a list of replies, and nothing says which is better',
            why=f"a ranking needs {WANTED['ranking']}",
            fix="name the column, or the key of a reply: columns: {ranks: …} or columns: {scores: …}",
            where=probe.where,
        )
    prompt = _prompt_column(probe, besides=(replies,))
    if prompt is None:
        raise probe.missing_error("ranking", "prompt")
    columns = _with_prompt(probe, prompt, replies=replies, ranks=ranks, scores=scores)
    by = f'"{ranks}", the lowest is best' if ranks else f'"{scores}", the highest is best'
    return DetectedFormat("ranking", columns, f'"{replies}" are ordered by {by}; the best against each that is worse')


def _as_labelled(probe: Probe, format: Chosen) -> DetectedFormat | None:
    label = probe.columns.label or next(
        (name for name in probe.present(_LABELS) if read_label(probe.first_value(name)) is not None), None
    )
    if format not in ("auto", "labelled") or label is None:
        return None
    reply = probe.columns.completion or probe.one_of(_REPLIES)
    prompt = _prompt_column(probe, besides=(reply or "",)) if reply else None
    if reply and prompt:
        columns = _with_prompt(probe, prompt, completion=reply, label=label)
        return DetectedFormat("labelled", columns, f'"{label}" says whether "{reply}" is a wanted reply to "{prompt}"')
    turns = probe.as_turns("auto")
    columns = replace(turns.columns, label=label)
    return DetectedFormat("labelled", columns, f'{turns.why}; "{label}" says whether the last reply is wanted')


def _prompt_column(probe: Probe, *, besides: Sequence[str]) -> str | None:
    """The column of the prompt: the named one, one called like a prompt, or one that holds turns."""
    if probe.columns.prompt:
        return probe.columns.prompt
    names = [name for name in probe.present(PROMPT_NAMES) if name not in besides]
    if len(names) > 1:
        names = [name for name in names if name != "input"]
    if names:
        return probe.one_unambiguous("prompt", names)
    return next((name for name in probe.seen if name not in besides and _holds_turns(probe.first_value(name))), None)


def _holds_turns(value: Any) -> bool:
    turn = first_turn(value)
    return ("role" in turn and any(key in turn for key in ("content", "text"))) or ("from" in turn and "value" in turn)


def _with_prompt(probe: Probe, prompt: str | None, **columns: str | None) -> Columns:
    """The columns with the prompt's companions: system prompt, history, input, and the key of a turn's text."""
    content = probe.columns.content
    if content is None and prompt is not None:
        turn = first_turn(probe.first_value(prompt))
        content = "text" if "text" in turn and "content" not in turn else None
    extra = probe.columns.input or (probe.one_of(("input",)) if prompt not in (None, "input") else None)
    history = probe.columns.history or probe.one_of(("history",))
    common = replace(probe.common(), role=probe.columns.role, content=content, prompt=prompt)
    return replace(common, input=extra, history=history, **columns)


def _tree_column(probe: Probe) -> str | None:
    """The column that holds the root of a tree; "" when the record itself is the root; None when there is none."""
    for name in ("prompt", *probe.seen):
        if name in probe.seen and _is_node(probe.first_value(name)):
            return name
    return "" if _is_node(probe.records[0]) else None


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "text" in value and isinstance(value.get("replies"), list)


def _no_teacher(where: Location | None) -> DataError:
    return DataError(
        "no-teacher",
        f'training.objective distill has no teacher: no record has "{TEACHER}"',
        why="it learns from a teacher's distributions: those of a model, or of the records",
        fix="name a model with the same tokenizer: training.distillation.teacher; or write into each record "
        f'"{TEACHER}": {TEACHER_SHAPE}',
        where=where,
    )


def _wrong_kind(probe: Probe, wanted: Records) -> DataError:
    label = next((name for name in probe.present(_LABELS) if read_label(probe.first_value(name)) is not None), None)
    columns = ", ".join(probe.seen)
    if wanted == "labels":
        return DataError(
            "no-labels",
            f"training.objective kto learns from labelled replies, and no column of {columns} is a label",
            why=f"it needs {WANTED['labelled']}; or pairs: {WANTED['preference']}",
            fix="name the column: columns: {label: …}; for conversations alone write training.objective: sft",
            where=probe.where,
        )
    return DataError(
        "no-pairs",
        f"training.objective: {names_with('pairs')} wants pairs, and these records have {columns}",
        why=f"pairs need {WANTED['preference']}; or {WANTED['ranking']}",
        fix=f'"{label}" looks like a label of single replies: write training.objective: kto'
        if label
        else "name the columns: columns: {chosen: …, rejected: …}; for conversations write training.objective: sft",
        where=probe.where,
    )


def read_label(value: Any) -> bool | None:
    """What a label says: wanted, unwanted, or None where it is no label."""
    if isinstance(value, bool):
        return value
    if isinstance(value, float) and not value.is_integer():
        return None
    text = str(int(value) if isinstance(value, int | float) else value).strip().lower()
    return True if text in _YES else False if text in _NO else None
