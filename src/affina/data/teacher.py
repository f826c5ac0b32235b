"""Whether a teacher speaks the student's tokens: their distributions are over the same vocabulary, or mean nothing."""

from __future__ import annotations

from affina.data.tokenizer import PROBE_TEXTS, LoadedTokenizer, load_tokenizer
from affina.errors import ModelError


def check_teacher(teacher: str, tokenizer: LoadedTokenizer) -> None:
    """Raises ModelError `teacher-tokenizer` when the teacher's tokens are not the student's."""
    other = load_tokenizer(teacher)
    mine, theirs = tokenizer.hf.get_vocab(), other.hf.get_vocab()
    different = [text for text in mine if theirs.get(text) != mine[text]]
    why = None
    if different or len(theirs) != len(mine):
        example = f", for instance {different[0]!r}" if different else ""
        why = (
            f"its vocabulary has {len(theirs):,} tokens, this model's {len(mine):,}; {len(different):,} differ{example}"
        )
    elif any(mine_ids != their_ids for mine_ids, their_ids in _segmentations(tokenizer, other)):
        why = "the vocabularies agree, and the two cut the same text into different tokens"
    if why is not None:
        raise ModelError(
            "teacher-tokenizer",
            f"{teacher} cannot teach {tokenizer.name}: they have different tokens",
            why=why,
            fix="take a teacher of the same family; or let it write replies and train on those with "
            "training.objective: sft",
        )


def _segmentations(first: LoadedTokenizer, second: LoadedTokenizer) -> list[tuple[list[int], list[int]]]:
    return [(first.hf.encode(text), second.hf.encode(text)) for text in PROBE_TEXTS]
