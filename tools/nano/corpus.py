"""The public-domain text that nano is pre-trained on: read, checked by hash, unwrapped, split by work."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCES: dict[str, dict[str, str]] = {
    "books_en.jsonl.gz": {
        "language": "en",
        "sha256": "3f2d42550fcb5701ec6be0226847e5433e1a75398e39aff1ffe889a037368327",
        "what": "211 English books by authors dead before 1931 (github.com/mlschmitt/classic-books-markdown @ 9448827)",
        "licence": "public domain",
    },
    "eltec_ita.jsonl.gz": {
        "language": "it",
        "sha256": "d1748aefee71729865e05cc896fb634515fa00493d61501dc8f54feff0154992",
        "what": "68 Italian novels 1840-1922, ELTeC-ita (github.com/COST-ELTeC/ELTeC-ita @ 100a485)",
        "licence": "texts in the public domain; ELTeC markup CC BY 4.0, credit COST Action CA16204",
    },
    "divina_commedia.txt.gz": {
        "language": "it",
        "sha256": "a9199d5ff94683fe1582b6ab96600848267351615716314eff79c4d9a9bc80e6",
        "what": "Dante, Divina Commedia (github.com/DanieleVeri/deep_comedy @ c0c773b)",
        "licence": "public domain",
    },
}
"""File name -> language, sha256 of the compressed file, origin, licence."""

HELD_OUT_EVERY = 25
"""Every 25th prose work is never trained on; held-out perplexity is measured on it."""

_SENTENCE_END = tuple(".!?:;»”\"'…-—_)*")


@dataclass(frozen=True, slots=True)
class Work:
    """One book: its language, title, text with one paragraph per line, and whether it is held out of training."""

    language: str
    title: str
    text: str
    held_out: bool


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def unwrap(text: str) -> str:
    """One paragraph per line: joins lines that an edition broke, drops markdown and runs of blanks."""
    paragraphs: list[str] = []
    for raw in re.split(r"\n\s*\n", text):
        piece = re.sub(r"\s+", " ", re.sub(r"^#+\s*", "", raw.strip())).replace("_", "").replace("*", "")
        if not piece:
            continue
        broken = paragraphs and not paragraphs[-1].endswith(_SENTENCE_END) and (piece[0].islower() or piece[0] in ",;")
        if broken:
            paragraphs[-1] += " " + piece
        else:
            paragraphs.append(piece)
    return "\n".join(paragraphs)


def read_works(folder: Path) -> Iterator[Work]:
    """Every work of SOURCES under `folder`; ValueError when a file is not the one that the hash names."""
    for name, source in SOURCES.items():
        path = folder / name
        if (found := sha256_of(path)) != source["sha256"]:
            raise ValueError(f"{path}: sha256 {found}, expected {source['sha256']}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            if name.endswith(".jsonl.gz"):
                for index, line in enumerate(file):
                    record = json.loads(line)
                    held_out = index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
                    yield Work(source["language"], record["title"], unwrap(record["text"]), held_out)
            else:
                # Verse keeps its lines; only the indentation of the tercets goes.
                text = "\n".join(line.strip() for line in file if line.strip())
                yield Work(source["language"], name.removesuffix(".txt.gz"), text, held_out=False)
