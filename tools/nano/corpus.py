"""The public-domain text that nano is pre-trained on: read, checked by hash, unwrapped, split by work.

    python tools/nano/corpus.py sample --text FOLDER --output SMALLER --every 8

A sample has every n-th work of each file of prose, of the held-out ones too, and the verse: enough to try something on,
small enough to carry.
"""

from __future__ import annotations

import argparse
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


def is_held_out(index: int) -> bool:
    """Whether the work of that index in its file is kept from training."""
    return index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1


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


def read_works(folder: Path, *, is_sample: bool = False) -> Iterator[Work]:
    """Every work of SOURCES under `folder`; ValueError when a file is not the one that the hash names.

    is_sample: the files are `write_sample`'s, which no hash names
    """
    for name, source in SOURCES.items():
        path = folder / name
        if not is_sample and (found := sha256_of(path)) != source["sha256"]:
            raise ValueError(f"{path}: sha256 {found}, expected {source['sha256']}")
        with gzip.open(path, "rt", encoding="utf-8") as file:
            if name.endswith(".jsonl.gz"):
                for index, line in enumerate(file):
                    record = json.loads(line)
                    held_out = record.get("held_out", is_held_out(index))
                    yield Work(source["language"], record["title"], unwrap(record["text"]), held_out)
            else:
                # Verse keeps its lines; only the indentation of the tercets goes.
                text = "\n".join(line.strip() for line in file if line.strip())
                yield Work(source["language"], name.removesuffix(".txt.gz"), text, held_out=False)


def write_sample(folder: Path, output: Path, *, every: int) -> int:
    """A part of the works as files of the same names, each work marked held out or not; their bytes together."""
    output.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    for name in SOURCES:
        content = gzip.decompress((folder / name).read_bytes())
        if name.endswith(".jsonl.gz"):
            works = [{**json.loads(line), "held_out": is_held_out(i)} for i, line in enumerate(content.splitlines())]
            chosen = [work for kind in (False, True) for work in [w for w in works if w["held_out"] is kind][::every]]
            content = "".join(json.dumps(work, ensure_ascii=False) + "\n" for work in chosen).encode()
        # Without a date, so that the same works are the same bytes.
        num_bytes += (output / name).write_bytes(gzip.compress(content, mtime=0))
    return num_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="write a part of the text")
    sample.add_argument("--text", type=Path, required=True)
    sample.add_argument("--output", type=Path, required=True)
    sample.add_argument("--every", type=int, default=8, help="take every so-manieth work")
    arguments = parser.parse_args()
    print(f"{write_sample(arguments.text, arguments.output, every=arguments.every):,} bytes in {arguments.output}")


if __name__ == "__main__":
    main()
