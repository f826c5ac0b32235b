"""Generated instruction tasks, English and Italian: what gives nano its base skills.

Each skill is one function from a random generator and a language to a conversation with its only right reply, so
that exact match measures it. `SKILLS` names them with their share of the mix.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from chat import Example, render
from task_texts import (
    AFTER,
    BEFORE,
    BULLETS,
    CALCULATE,
    CAPITAL,
    CAPITALS,
    CLASSIFY,
    COMPARE,
    COUNT,
    DO_NOT_KNOW,
    ECHO,
    FILLERS,
    JOINED,
    JSON_FIELDS,
    JSON_MESSAGE,
    LANGUAGE_NAMES,
    MOODS,
    NUMBERED,
    OPPOSITE,
    OPPOSITES,
    OR,
    PICK,
    QUESTION,
    REMEMBER,
    REPEAT,
    REVERSE_DIGITS,
    REVERSE_WORDS,
    SEQUENCES,
    SINGLE_FACTS,
    SMALL_TALK,
    SORT_NUMBERS,
    SORT_WORDS,
    STATEMENTS,
    SYSTEM_PROMPTS,
    THINK,
    TOOL_RESULTS,
    TOOL_USES,
    TOPICS,
    TRANSLATE,
    UNKNOWN,
    UPPER,
    WHICH_LANGUAGE,
)
from words import ANIMALS, CITIES, COLOURS, FIRST_NAMES, FRUIT, JOBS, LAST_NAMES, OBJECTS, TECHNICAL

LANGUAGES = ("en", "it")
TECHNICAL_SHARE = 0.15
PLAIN_TECHNICAL = {
    language: [word for word in TECHNICAL[language] if word.isalpha() and word.islower()] for language in LANGUAGES
}
Messages = tuple[dict[str, Any], ...]
Sentences = dict[str, list[str]]


def ask(prompt: str, reply: str) -> Messages:
    return ({"role": "user", "content": prompt}, {"role": "assistant", "content": reply})


def place(rng: random.Random, instructions: dict[str, tuple[str, ...]], language: str, **values: object) -> str:
    """One of the instructions with its {placeholders} filled in."""
    return rng.choice(instructions[language]).format(**values)


def a_word(rng: random.Random, language: str) -> str:
    if rng.random() < TECHNICAL_SHARE:
        return rng.choice(PLAIN_TECHNICAL[language])
    return rng.choice(rng.choice((ANIMALS, FRUIT, OBJECTS, COLOURS, JOBS))[language])


def some_words(rng: random.Random, language: str, low: int, high: int) -> list[str]:
    """Different words, `low` to `high` of them."""
    count = rng.randint(low, high)
    words: list[str] = []
    while len(words) < count:
        word = a_word(rng, language)
        if word not in words:
            words.append(word)
    return words


def a_name(rng: random.Random, language: str) -> str:
    first = rng.choice(FIRST_NAMES[language])
    return first if rng.random() < 0.3 else f"{first} {rng.choice(LAST_NAMES[language])}"


def invented_word(rng: random.Random) -> str:
    """A pronounceable word that exists in neither language: copying it needs the letters, not memory."""
    syllables = (
        rng.choice("bcdfglmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s")) for _ in "xx"
    )
    return "".join(syllables) + rng.choice(("", "", "to", "na", "k", "x"))


def a_code(rng: random.Random) -> str:
    letters = "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(1, 3)))
    digits = "".join(rng.choices("0123456789", k=rng.randint(3, 6)))
    return letters + rng.choice(("-", "-", "", "/")) + digits


def an_email(rng: random.Random) -> str:
    first = rng.choice(FIRST_NAMES[rng.choice(LANGUAGES)]).lower()
    last = rng.choice(LAST_NAMES[rng.choice(LANGUAGES)]).lower()
    host = rng.choice(("mail", "post", "example", invented_word(rng)))
    return f"{first}{rng.choice(('.', '_', ''))}{last}@{host}.{rng.choice(('com', 'it', 'org'))}"


def a_number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 6)))


def echo_words(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 1, 6)
    for _ in range(rng.randint(0, 3)):
        words.append(rng.choice((invented_word(rng), rng.choice(TECHNICAL[language]), a_name(rng, language))))
    rng.shuffle(words)
    text = rng.choice((" ", " ", ", ")).join(words)
    return ask(place(rng, ECHO, language, text=text), text)


def echo_codes(rng: random.Random, language: str) -> Messages:
    kinds: tuple[Callable[[random.Random], str], ...] = (a_code, a_number, an_email, a_code)
    text = rng.choice((" ", ", ")).join(rng.choice(kinds)(rng) for _ in range(rng.randint(1, 3)))
    return ask(place(rng, ECHO, language, text=text), text)


def reverse_words(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 2, 7)
    return ask(place(rng, REVERSE_WORDS, language, text=" ".join(words)), " ".join(reversed(words)))


def reverse_digits(rng: random.Random, language: str) -> Messages:
    text = "".join(rng.choices("0123456789", k=rng.randint(2, 6)))
    return ask(place(rng, REVERSE_DIGITS, language, text=text), text[::-1])


def sort_words(rng: random.Random, language: str) -> Messages:
    words: dict[str, str] = {}
    for word in some_words(rng, language, 3, 9):
        words.setdefault(word[0], word)  # different first letters: the order is decided by the first one
    chosen = list(words.values())[:5]
    return ask(place(rng, SORT_WORDS, language, text=", ".join(chosen)), ", ".join(sorted(chosen)))


def sort_numbers(rng: random.Random, language: str) -> Messages:
    numbers = rng.sample(range(rng.choice((100, 100, 1000))), rng.randint(3, 6))
    text, reply = (", ".join(str(number) for number in sequence) for sequence in (numbers, sorted(numbers)))
    return ask(place(rng, SORT_NUMBERS, language, text=text), reply)


def add(rng: random.Random, language: str) -> Messages:
    a, b = (rng.randrange(rng.choice((10, 100, 100, 1000))) for _ in "ab")
    return ask(place(rng, CALCULATE, language, text=f"{a} + {b}"), str(a + b))


def subtract(rng: random.Random, language: str) -> Messages:
    b, a = sorted(rng.randrange(rng.choice((20, 100, 100, 1000))) for _ in "ab")
    return ask(place(rng, CALCULATE, language, text=f"{a} - {b}"), str(a - b))


def multiply(rng: random.Random, language: str) -> Messages:
    a, b = rng.randrange(13), rng.randrange(13)
    sign = rng.choice(("*", "x", "×"))
    return ask(place(rng, CALCULATE, language, text=f"{a} {sign} {b}"), str(a * b))


def compare(rng: random.Random, language: str) -> Messages:
    a, b = rng.sample(range(10 ** rng.randint(1, 3)), 2)
    return ask(place(rng, COMPARE, language, a=a, b=b), str(max(a, b)))


def count(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 1, 8)
    return ask(place(rng, COUNT, language, text=", ".join(words)), str(len(words)))


def upper(rng: random.Random, language: str) -> Messages:
    text = " ".join(some_words(rng, language, 1, 3))
    return ask(place(rng, UPPER, language, text=text), text.upper())


def repeat(rng: random.Random, language: str) -> Messages:
    word, n = a_word(rng, language), rng.randint(2, 6)
    return ask(place(rng, REPEAT, language, word=word, n=n), " ".join([word] * n))


def format_list(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 2, 5)
    kind = rng.randrange(3)
    if kind == 0:
        return ask(place(rng, BULLETS, language, text=", ".join(words)), "\n".join(f"- {word}" for word in words))
    if kind == 1:
        lines = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return ask(place(rng, NUMBERED, language, text=", ".join(words)), lines)
    return ask(place(rng, JOINED, language, text="\n".join(words)), ", ".join(words))


def pick(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 3, 6)
    position = rng.choice((0, 1, 2, -1))
    return ask(rng.choice(PICK[language][position]).format(text=" ".join(words)), words[position])


# A field: its key in each language, and how a value is made.
FIELDS: dict[str, tuple[dict[str, str], Callable[[random.Random, str], str]]] = {
    "name": ({"en": "name", "it": "nome"}, a_name),
    "city": ({"en": "city", "it": "città"}, lambda rng, language: rng.choice(CITIES[language])),
    "job": ({"en": "job", "it": "lavoro"}, lambda rng, language: rng.choice(JOBS[language])),
    "colour": ({"en": "colour", "it": "colore"}, lambda rng, language: rng.choice(COLOURS[language])),
    "animal": ({"en": "animal", "it": "animale"}, lambda rng, language: rng.choice(ANIMALS[language])),
    "item": ({"en": "item", "it": "oggetto"}, lambda rng, language: rng.choice(OBJECTS[language])),
    "code": ({"en": "code", "it": "codice"}, lambda rng, language: a_code(rng)),
    "order": ({"en": "order", "it": "ordine"}, lambda rng, language: a_code(rng)),
    "email": ({"en": "email", "it": "email"}, lambda rng, language: an_email(rng)),
    "age": ({"en": "age", "it": "età"}, lambda rng, language: str(rng.randint(3, 99))),
    "year": ({"en": "year", "it": "anno"}, lambda rng, language: str(rng.randint(1700, 2030))),
    "phone": (
        {"en": "phone", "it": "telefono"},
        lambda rng, language: "".join(rng.choices("0123456789", k=rng.randint(6, 9))),
    ),
}


def some_fields(rng: random.Random, language: str, low: int, high: int) -> dict[str, str]:
    """Field -> value, in random order."""
    return {field: FIELDS[field][1](rng, language) for field in rng.sample(list(FIELDS), rng.randint(low, high))}


def a_message(rng: random.Random, language: str, fields: dict[str, str]) -> str:
    """A natural message that states the fields, with a few sentences that state nothing."""
    sentences = [rng.choice(STATEMENTS[field][language]).format(v=value) for field, value in fields.items()]
    for _ in range(rng.randint(0, 2)):
        sentences.insert(rng.randint(0, len(sentences)), rng.choice(FILLERS[language]))
    return " ".join(sentences)


def extract(rng: random.Random, language: str) -> Messages:
    fields = some_fields(rng, language, 1, 4)
    wanted = rng.choice(list(fields))
    key = FIELDS[wanted][0][language]
    return ask(place(rng, QUESTION, language, message=a_message(rng, language, fields), key=key), fields[wanted])


def json_fields(rng: random.Random, language: str) -> Messages:
    fields = {FIELDS[field][0][language]: value for field, value in some_fields(rng, language, 1, 4).items()}
    if rng.random() < 0.3:  # any word can be a key
        fields = dict(zip(some_words(rng, language, len(fields), len(fields)), fields.values(), strict=True))
    separator, sign = rng.choice(((", ", " "), (", ", ": "), ("; ", " = "), ("\n", ": ")))
    text = separator.join(f"{key}{sign}{value}" for key, value in fields.items())
    return ask(place(rng, JSON_FIELDS, language, text=text), json.dumps(fields, ensure_ascii=False))


def json_message(rng: random.Random, language: str) -> Messages:
    fields = some_fields(rng, language, 2, 5)
    wanted = rng.sample(list(fields), rng.randint(1, len(fields)))
    keys = [FIELDS[field][0][language] for field in wanted]
    reply = {key: fields[field] for key, field in zip(keys, wanted, strict=True)}
    prompt = place(rng, JSON_MESSAGE, language, keys=", ".join(keys), message=a_message(rng, language, fields))
    return ask(prompt, json.dumps(reply, ensure_ascii=False))


def classify(rng: random.Random, language: str) -> Messages:
    table = rng.choice((TOPICS, TOPICS, MOODS))
    labels = rng.sample(list(table), min(len(table), rng.randint(2, 3)))
    label = rng.choice(labels)
    text = " ".join(rng.sample(table[label][language], rng.randint(1, 2)))
    return ask(place(rng, CLASSIFY, language, labels=OR[language].join(labels), text=text), label)


def which_language(rng: random.Random, language: str) -> Messages:
    other = rng.choice(LANGUAGES)
    text = a_message(rng, other, some_fields(rng, other, 1, 2)) if rng.random() < 0.7 else rng.choice(FILLERS[other])
    return ask(place(rng, WHICH_LANGUAGE, language, text=text), LANGUAGE_NAMES[language][other])


LOOKUPS: tuple[tuple[dict[str, str], dict[str, str], Callable[[random.Random, str], str]], ...] = (
    (
        {"en": "{n} lives in {v}.", "it": "{n} abita a {v}."},
        {"en": "Where does {n} live?", "it": "Dove abita {n}?"},
        lambda rng, language: rng.choice(CITIES[language]),
    ),
    (
        {"en": "{n} is a {v}.", "it": "{n} è {v}."},
        {"en": "What is {n}?", "it": "Che cosa è {n}?"},
        lambda rng, language: rng.choice(JOBS[language]),
    ),
    (
        {"en": "{n} has the number {v}.", "it": "{n} ha il numero {v}."},
        {"en": "Which number does {n} have?", "it": "Che numero ha {n}?"},
        lambda rng, language: a_number(rng),
    ),
    (
        {"en": "{n} likes {v}.", "it": "A {n} piace {v}."},
        {"en": "What does {n} like?", "it": "Che cosa piace a {n}?"},
        lambda rng, language: rng.choice(FRUIT[language]),
    ),
    (
        {"en": "{n} is {v} years old.", "it": "{n} ha {v} anni."},
        {"en": "How old is {n}?", "it": "Quanti anni ha {n}?"},
        lambda rng, language: str(rng.randint(3, 99)),
    ),
    (
        {"en": "The code of {n} is {v}.", "it": "Il codice di {n} è {v}."},
        {"en": "What is the code of {n}?", "it": "Qual è il codice di {n}?"},
        lambda rng, language: a_code(rng),
    ),
)


def lookup(rng: random.Random, language: str) -> Messages:
    names = rng.sample(FIRST_NAMES[language], rng.randint(2, 4))
    statement, question, value = rng.choice(LOOKUPS)
    values = [value(rng, language) for _ in names]
    lines = [statement[language].format(n=name, v=value) for name, value in zip(names, values, strict=True)]
    if rng.random() < 0.3:
        lines.insert(rng.randint(0, len(lines)), rng.choice(FILLERS[language]))
    wanted = rng.randrange(len(names))
    return ask(" ".join(lines) + rng.choice((" ", "\n")) + question[language].format(n=names[wanted]), values[wanted])


def facts(rng: random.Random, language: str) -> Messages:
    kind = rng.randrange(5)
    column = 0 if language == "en" else 2
    if kind == 0:
        row = rng.choice(CAPITALS)
        return ask(place(rng, CAPITAL, language, x=row[column]), row[column + 1])
    if kind == 1:
        pair = list(rng.choice(OPPOSITES)[column : column + 2])
        rng.shuffle(pair)
        return ask(place(rng, OPPOSITE, language, x=pair[0]), pair[1])
    if kind == 2:
        questions, answer = rng.choice(SINGLE_FACTS[language])
        return ask(rng.choice(questions), answer)
    sequence = rng.choice(SEQUENCES[language])
    index = rng.randrange(len(sequence) - 1)
    if kind == 3:
        return ask(place(rng, AFTER, language, x=sequence[index]), sequence[index + 1])
    return ask(place(rng, BEFORE, language, x=sequence[index + 1]), sequence[index])


def translate(rng: random.Random, language: str) -> Messages:
    table = rng.choice((ANIMALS, FRUIT, OBJECTS, COLOURS, JOBS))
    other = "it" if language == "en" else "en"
    index = rng.randrange(len(table["en"]))
    return ask(place(rng, TRANSLATE, language, x=table[language][index]), table[other][index])


def small_talk(rng: random.Random, language: str) -> Messages:
    prompts, reply = rng.choice(SMALL_TALK[language])
    return ask(rng.choice(prompts), reply)


def remember(rng: random.Random, language: str) -> Messages:
    statements, answers, questions, reply, kind = rng.choice(REMEMBER[language])
    value = {"name": rng.choice(FIRST_NAMES[language]), "number": a_number(rng), "city": rng.choice(CITIES[language])}[
        kind
    ]
    messages = ask(rng.choice(statements).format(v=value), rng.choice(answers).format(v=value))
    if rng.random() < 0.4:
        messages += small_talk(rng, language)
    return messages + ask(rng.choice(questions), reply.format(v=value))


def think(rng: random.Random, language: str) -> Messages:
    numbers = [rng.randrange(1, 40) for _ in range(rng.randint(3, 4))]
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    user, assistant = ask(place(rng, THINK, language, text=" + ".join(map(str, numbers))), str(total))
    return (user, {**assistant, "reasoning_content": "\n".join(steps)})


def _tool(name: str, description: str, parameter: str, kind: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {parameter: {"type": kind}}, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "get_weather": _tool("get_weather", "Weather of a city", "city", "string"),
    "find_order": _tool("find_order", "Status of an order", "code", "string"),
    "get_age": _tool("get_age", "Age of a person", "name", "string"),
}


def tool_call(rng: random.Random, language: str) -> Messages:
    name = rng.choice(list(TOOLS))
    argument, questions, answer = TOOL_USES[name]
    value = {"city": rng.choice(CITIES[language]), "code": a_code(rng), "name": a_name(rng, language)}[argument]
    result = str(rng.randint(3, 99)) if name == "get_age" else rng.choice(TOOL_RESULTS[language][name])
    call = {"type": "function", "function": {"name": name, "arguments": {argument: value}}}
    return (
        {"role": "user", "content": rng.choice(questions[language]).format(v=value)},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": json.dumps({"result": result}, ensure_ascii=False)},
        {"role": "assistant", "content": answer[language].format(v=value, r=result)},
    )


def unknown(rng: random.Random, language: str) -> Messages:
    thing = invented_word(rng) if rng.random() < 0.6 else rng.choice(TECHNICAL[language])
    name, word = a_name(rng, language), rng.choice(OBJECTS[language])
    return ask(place(rng, UNKNOWN, language, thing=thing, name=name, word=word), DO_NOT_KNOW[language])


Skill = Callable[[random.Random, str], Messages]
SKILLS: dict[str, tuple[Skill, float]] = {
    "echo_words": (echo_words, 8),
    "echo_codes": (echo_codes, 6),
    "reverse_words": (reverse_words, 4),
    "reverse_digits": (reverse_digits, 4),
    "sort_words": (sort_words, 5),
    "sort_numbers": (sort_numbers, 5),
    "add": (add, 6),
    "subtract": (subtract, 5),
    "multiply": (multiply, 3),
    "compare": (compare, 3),
    "count": (count, 3),
    "upper": (upper, 3),
    "repeat": (repeat, 2),
    "format_list": (format_list, 3),
    "pick": (pick, 3),
    "extract": (extract, 8),
    "json_fields": (json_fields, 6),
    "json_message": (json_message, 14),
    "classify": (classify, 3),
    "which_language": (which_language, 2),
    "lookup": (lookup, 5),
    "facts": (facts, 3),
    "translate": (translate, 3),
    "small_talk": (small_talk, 2),
    "unknown": (unknown, 2),
    "remember": (remember, 2),
    "think": (think, 3),
    "tool_call": (tool_call, 3),
}
"""Skill -> (generator, share of the mix)."""

SYSTEM_SHARE = 0.2
SECOND_TASK_SHARE = 0.15
SENTENCE_SHARE = 0.08


def new_example(rng: random.Random, skill: str, language: str) -> Example:
    """One conversation of one skill."""
    return Example(
        skill, language, SKILLS[skill][0](rng, language), tuple(_offered(rng)) if skill == "tool_call" else ()
    )


def _offered(rng: random.Random) -> list[dict[str, Any]]:
    return rng.sample(list(TOOLS.values()), len(TOOLS))


def examples(rng: random.Random, sentences: Sentences | None = None) -> Iterator[Example]:
    """Endless mix of all skills; some conversations get a system prompt or a second task.

    sentences: language -> sentences of the books, copied in a further echo task
    """
    names = list(SKILLS)
    shares = [SKILLS[name][1] for name in names]
    while True:
        language = rng.choice(LANGUAGES)
        if sentences and rng.random() < SENTENCE_SHARE:
            text = rng.choice(sentences[language])
            yield Example("echo_sentence", language, ask(place(rng, ECHO, language, text=text), text))
            continue
        example = new_example(rng, rng.choices(names, shares)[0], language)
        messages = example.messages
        if rng.random() < SECOND_TASK_SHARE:
            other = rng.choices(names, shares)[0]
            if other != "tool_call":
                messages += SKILLS[other][0](rng, rng.choice(LANGUAGES))
        if rng.random() < SYSTEM_SHARE:
            messages = ({"role": "system", "content": rng.choice(SYSTEM_PROMPTS[language])}, *messages)
        yield Example(example.skill, language, messages, example.tools)


def example_texts(*, seed: int, count: int) -> Iterator[str]:
    """The text of `count` rendered conversations, for the tokenizer."""
    stream = examples(random.Random(seed))
    for _ in range(count):
        yield "".join(segment.text for segment in render(next(stream)))
