"""Write the built-in data set affina/support: an assistant that answers questions about affina and files requests.

    python tools/nano/make_support.py --output src/affina/catalog/assets/support

Two kinds of conversations, English and Italian. Questions about affina have one true answer per language and many
wordings. A support request is a customer's message; the reply is one line of JSON whose fields are copied (customer,
order) or classified (product, category, urgency, language).

Validation asks for what was never seen in this form: an indirect question whose frame and clause occur in training
but not together, a problem whose beginning and end occur in training but not together, an order and a customer that
occur nowhere in training. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support_questions import FRAMES, LANGUAGES, QUESTIONS, Question
from support_requests import CATEGORIES, PRODUCTS, new_request

SEED = 20417
FRAMED_PER_QUESTION = 6
TRAIN_REQUESTS = 420
VALIDATION_REQUESTS = 64

Example = dict[str, Any]

OPENINGS = {
    "en": ("", "", "", "Hi, ", "Hello, ", "Excuse me, ", "One question: ", "Please, "),
    "it": ("", "", "", "Ciao, ", "Buongiorno, ", "Scusa, ", "Una domanda: ", "Per favore, "),
}


def conversation(user: str, assistant: str) -> Example:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def opened(rng: random.Random, question: str, language: str) -> str:
    """The question behind one of the openings, its first letter lowered unless it is a name or an acronym."""
    opening = rng.choice(OPENINGS[language])
    first = question.split(maxsplit=1)[0]
    if opening.endswith(", ") and first.istitle() and first != "I":
        question = question[0].lower() + question[1:]
    return opening + question


def question_wordings(rng: random.Random, question: Question, language: str) -> tuple[list[str], str]:
    """(wordings for training, one for validation): every direct question, and clauses in frames.

    The clause of the validation wording is in training in other frames, its frame in training with other clauses.
    """
    frames, clauses = FRAMES[language], question.clauses[language]
    direct = {wording.casefold() for wording in question.direct[language]}
    pairs = [
        (frame, clause)
        for clause in clauses
        for frame in frames
        if frame.format(clause=clause).casefold() not in direct
    ]
    held_out = rng.choice(pairs)
    chosen = []
    for clause in clauses:
        others = [pair for pair in pairs if pair[1] == clause and pair != held_out]
        chosen += rng.sample(others, FRAMED_PER_QUESTION // len(clauses))
    train = [opened(rng, direct, language) for direct in question.direct[language]]
    train += [frame.format(clause=clause) for frame, clause in chosen]
    return train, held_out[0].format(clause=held_out[1])


def requests(rng: random.Random, count: int, *, held_out: bool, taken: set[str]) -> Iterator[Example]:
    """`count` requests, all combinations of language, category and product equally often."""
    kinds = [(language, category, product) for language in LANGUAGES for category in CATEGORIES for product in PRODUCTS]
    order: list[tuple[str, str, str]] = []
    while len(order) < count:
        order += rng.sample(kinds, len(kinds))
    for language, category, product in order[:count]:
        while True:
            text, fields = new_request(rng, language, category, product, held_out=held_out)
            if not taken & {fields["customer"], fields["order"]}:
                break
        if held_out:
            taken |= {fields["customer"], fields["order"]}
        yield conversation(text, json.dumps(fields, ensure_ascii=False))


def build(seed: int = SEED) -> dict[str, list[Example]]:
    """The two splits, each shuffled."""
    rng = random.Random(seed)
    train: list[Example] = []
    validation: list[Example] = []
    for question in QUESTIONS:
        for language in LANGUAGES:
            wordings, held_out = question_wordings(rng, question, language)
            train += [conversation(wording, question.answer[language]) for wording in wordings]
            validation.append(conversation(held_out, question.answer[language]))
    taken: set[str] = set()
    validation += requests(rng, VALIDATION_REQUESTS, held_out=True, taken=taken)
    train += requests(rng, TRAIN_REQUESTS, held_out=False, taken=taken)
    rng.shuffle(train)
    rng.shuffle(validation)
    return {"train": train, "validation": validation}


def to_jsonl(examples: list[Example]) -> bytes:
    return "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples).encode()


def write(output: Path) -> None:
    """train.jsonl, validation.jsonl and manifest.json with their sizes and hashes."""
    output.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, examples in build().items():
        content = to_jsonl(examples)
        (output / f"{split}.jsonl").write_bytes(content)
        files[f"{split}.jsonl"] = {
            "records": len(examples),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    manifest = {"name": "affina/support", "licence": "Apache-2.0", "seed": SEED, "files": files}
    (output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    write(parser.parse_args().output)


if __name__ == "__main__":
    main()
