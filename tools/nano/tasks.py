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


ECHO = {
    "en": (
        "Repeat exactly: {text}",
        "Repeat: {text}",
        "Copy this text: {text}",
        "Say exactly this: {text}",
        "Write this again:\n{text}",
    ),
    "it": (
        "Ripeti esattamente: {text}",
        "Ripeti: {text}",
        "Copia questo testo: {text}",
        "Di' esattamente questo: {text}",
        "Scrivi di nuovo:\n{text}",
    ),
}


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


REVERSE_WORDS = {
    "en": (
        "Write these words in reverse order: {text}",
        "Reverse the order of the words: {text}",
        "Say these words backwards, last word first: {text}",
    ),
    "it": (
        "Scrivi queste parole in ordine inverso: {text}",
        "Inverti l'ordine delle parole: {text}",
        "Di' queste parole al contrario, dall'ultima alla prima: {text}",
    ),
}


def reverse_words(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 2, 7)
    return ask(place(rng, REVERSE_WORDS, language, text=" ".join(words)), " ".join(reversed(words)))


REVERSE_DIGITS = {
    "en": ("Write the digits of {text} in reverse order.", "Reverse the number {text}.", "Write {text} backwards."),
    "it": ("Scrivi le cifre di {text} in ordine inverso.", "Inverti il numero {text}.", "Scrivi {text} al contrario."),
}


def reverse_digits(rng: random.Random, language: str) -> Messages:
    text = "".join(rng.choices("0123456789", k=rng.randint(2, 6)))
    return ask(place(rng, REVERSE_DIGITS, language, text=text), text[::-1])


SORT_WORDS = {
    "en": (
        "Sort these words alphabetically: {text}",
        "Put these words in alphabetical order: {text}",
        "Alphabetical order, please: {text}",
    ),
    "it": (
        "Metti queste parole in ordine alfabetico: {text}",
        "Ordina alfabeticamente queste parole: {text}",
        "In ordine alfabetico, per favore: {text}",
    ),
}


def sort_words(rng: random.Random, language: str) -> Messages:
    words: dict[str, str] = {}
    for word in some_words(rng, language, 3, 9):
        words.setdefault(word[0], word)  # different first letters: the order is decided by the first one
    chosen = list(words.values())[:5]
    return ask(place(rng, SORT_WORDS, language, text=", ".join(chosen)), ", ".join(sorted(chosen)))


SORT_NUMBERS = {
    "en": (
        "Sort these numbers from smallest to largest: {text}",
        "Put these numbers in ascending order: {text}",
        "Sort: {text}",
    ),
    "it": (
        "Ordina questi numeri dal più piccolo al più grande: {text}",
        "Metti questi numeri in ordine crescente: {text}",
        "Ordina: {text}",
    ),
}


def sort_numbers(rng: random.Random, language: str) -> Messages:
    numbers = rng.sample(range(rng.choice((100, 100, 1000))), rng.randint(3, 6))
    text, reply = (", ".join(str(number) for number in sequence) for sequence in (numbers, sorted(numbers)))
    return ask(place(rng, SORT_NUMBERS, language, text=text), reply)


CALCULATE = {
    "en": ("What is {text}?", "Compute {text}.", "{text} = ?", "How much is {text}?"),
    "it": ("Quanto fa {text}?", "Calcola {text}.", "{text} = ?", "Qual è il risultato di {text}?"),
}


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


COMPARE = {
    "en": (
        "Which number is larger, {a} or {b}?",
        "What is larger: {a} or {b}?",
        "Which is the greater number, {a} or {b}?",
    ),
    "it": (
        "Quale numero è più grande, {a} o {b}?",
        "Che cosa è maggiore: {a} o {b}?",
        "Qual è il numero maggiore, {a} o {b}?",
    ),
}


def compare(rng: random.Random, language: str) -> Messages:
    a, b = rng.sample(range(10 ** rng.randint(1, 3)), 2)
    return ask(place(rng, COMPARE, language, a=a, b=b), str(max(a, b)))


COUNT = {
    "en": (
        "How many words are there in this list: {text}?",
        "Count these words: {text}",
        "How many things are named here: {text}?",
    ),
    "it": (
        "Quante parole ci sono in questo elenco: {text}?",
        "Conta queste parole: {text}",
        "Quante cose sono nominate qui: {text}?",
    ),
}


def count(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 1, 8)
    return ask(place(rng, COUNT, language, text=", ".join(words)), str(len(words)))


UPPER = {
    "en": ("Write in capital letters: {text}", "Upper case, please: {text}", "Write this in upper case: {text}"),
    "it": (
        "Scrivi in maiuscolo: {text}",
        "In maiuscolo, per favore: {text}",
        "Scrivi questo in lettere maiuscole: {text}",
    ),
}


def upper(rng: random.Random, language: str) -> Messages:
    text = " ".join(some_words(rng, language, 1, 3))
    return ask(place(rng, UPPER, language, text=text), text.upper())


REPEAT = {
    "en": (
        "Write the word {word} {n} times.",
        "Say {word} {n} times.",
        "Repeat {word} {n} times, separated by spaces.",
    ),
    "it": (
        "Scrivi la parola {word} {n} volte.",
        "Di' {word} {n} volte.",
        "Ripeti {word} {n} volte, con uno spazio in mezzo.",
    ),
}


def repeat(rng: random.Random, language: str) -> Messages:
    word, n = a_word(rng, language), rng.randint(2, 6)
    return ask(place(rng, REPEAT, language, word=word, n=n), " ".join([word] * n))


BULLETS = {
    "en": ("Write as a bullet list: {text}", "Make a list with dashes: {text}", "Turn this into a bullet list: {text}"),
    "it": (
        "Scrivi come elenco puntato: {text}",
        "Fai un elenco con i trattini: {text}",
        "Trasforma in un elenco puntato: {text}",
    ),
}
NUMBERED = {
    "en": ("Write as a numbered list: {text}", "Number these things: {text}", "Make a numbered list: {text}"),
    "it": ("Scrivi come elenco numerato: {text}", "Numera queste cose: {text}", "Fai un elenco numerato: {text}"),
}
JOINED = {
    "en": ("Write on one line, separated by commas:\n{text}", "Join these lines with commas:\n{text}"),
    "it": ("Scrivi su una riga, con le virgole:\n{text}", "Unisci queste righe con le virgole:\n{text}"),
}


def format_list(rng: random.Random, language: str) -> Messages:
    words = some_words(rng, language, 2, 5)
    kind = rng.randrange(3)
    if kind == 0:
        return ask(place(rng, BULLETS, language, text=", ".join(words)), "\n".join(f"- {word}" for word in words))
    if kind == 1:
        lines = "\n".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return ask(place(rng, NUMBERED, language, text=", ".join(words)), lines)
    return ask(place(rng, JOINED, language, text="\n".join(words)), ", ".join(words))


PICK = {
    "en": {
        0: ("What is the first word of: {text}", "Write only the first word: {text}"),
        1: ("What is the second word of: {text}", "Write only the second word: {text}"),
        2: ("What is the third word of: {text}", "Write only the third word: {text}"),
        -1: ("What is the last word of: {text}", "Write only the last word: {text}"),
    },
    "it": {
        0: ("Qual è la prima parola di: {text}", "Scrivi solo la prima parola: {text}"),
        1: ("Qual è la seconda parola di: {text}", "Scrivi solo la seconda parola: {text}"),
        2: ("Qual è la terza parola di: {text}", "Scrivi solo la terza parola: {text}"),
        -1: ("Qual è l'ultima parola di: {text}", "Scrivi solo l'ultima parola: {text}"),
    },
}


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

# Sentences of a natural message that state one field.
STATEMENTS = {
    "name": {
        "en": ("My name is {v}.", "I am {v}.", "{v} here.", "This is {v}.", "Signed, {v}", "Best regards, {v}", "{v}"),
        "it": (
            "Mi chiamo {v}.",
            "Sono {v}.",
            "Qui {v}.",
            "Il mio nome è {v}.",
            "Firmato, {v}",
            "Cordiali saluti, {v}",
            "{v}",
        ),
    },
    "city": {
        "en": ("I live in {v}.", "I am writing from {v}.", "My city is {v}.", "We moved to {v} last year."),
        "it": ("Abito a {v}.", "Scrivo da {v}.", "La mia città è {v}.", "L'anno scorso ci siamo trasferiti a {v}."),
    },
    "job": {
        "en": ("I work as a {v}.", "I am a {v} by trade.", "My job: {v}."),
        "it": ("Lavoro come {v}.", "Di mestiere sono {v}.", "Il mio lavoro: {v}."),
    },
    "colour": {
        "en": ("I would like it in {v}.", "My favourite colour is {v}.", "The colour should be {v}."),
        "it": ("Lo vorrei {v}.", "Il mio colore preferito è il {v}.", "Il colore deve essere {v}."),
    },
    "animal": {
        "en": ("At home I have a {v}.", "My favourite animal is the {v}.", "Yesterday I saw a {v}."),
        "it": ("A casa c'è un animale: {v}.", "Il mio animale preferito: {v}.", "Ieri ho visto un animale, {v}."),
    },
    "item": {
        "en": ("I bought a {v}.", "It is about the {v}.", "I have a question about my {v}.", "The {v} came yesterday."),
        "it": (
            "Ho comprato un oggetto: {v}.",
            "Si tratta di {v}.",
            "Ho una domanda su un articolo, {v}.",
            "Ieri è arrivato un oggetto, {v}.",
        ),
    },
    "code": {
        "en": ("The code is {v}.", "My code: {v}.", "Use the code {v}."),
        "it": ("Il codice è {v}.", "Il mio codice: {v}.", "Usate il codice {v}."),
    },
    "order": {
        "en": ("My order is {v}.", "The order number is {v}.", "Order {v}.", "I placed the order {v}."),
        "it": ("Il mio ordine è {v}.", "Il numero d'ordine è {v}.", "Ordine {v}.", "Ho fatto l'ordine {v}."),
    },
    "email": {
        "en": ("Write to me at {v}.", "My email is {v}.", "You can reach me at {v}."),
        "it": ("Scrivetemi a {v}.", "La mia email è {v}.", "Mi trovate a {v}."),
    },
    "age": {
        "en": ("I am {v} years old.", "My age is {v}.", "I have just turned {v}."),
        "it": ("Ho {v} anni.", "La mia età è {v}.", "Ho appena compiuto {v} anni."),
    },
    "year": {
        "en": ("It was in {v}.", "I bought it in the year {v}.", "Since {v} I have been a customer."),
        "it": ("Era il {v}.", "L'ho comprato nell'anno {v}.", "Sono cliente dal {v}."),
    },
    "phone": {
        "en": ("Call me on {v}.", "My phone number is {v}.", "Phone: {v}."),
        "it": ("Chiamatemi al {v}.", "Il mio numero di telefono è {v}.", "Telefono: {v}."),
    },
}
FILLERS = {
    "en": (
        "Hello!",
        "Good morning.",
        "Thank you.",
        "It rained all day.",
        "I hope you are well.",
        "See you soon.",
        "The weather is fine today.",
        "I am in no hurry.",
        "Please answer soon.",
    ),
    "it": (
        "Buongiorno!",
        "Salve.",
        "Grazie.",
        "Ha piovuto tutto il giorno.",
        "Spero che stiate bene.",
        "A presto.",
        "Oggi il tempo è bello.",
        "Non ho fretta.",
        "Rispondete presto, per favore.",
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


QUESTION = {
    "en": (
        "{message}\n\nWhat is the {key}?",
        "Find the {key} in this message: {message}",
        "Extract the {key}: {message}",
        "Text: {message}\nWhich {key} is named?",
    ),
    "it": (
        "{message}\n\nQual è il campo {key}?",
        "Trova il campo {key} in questo messaggio: {message}",
        "Estrai il campo {key}: {message}",
        "Testo: {message}\nQuale {key} è indicato?",
    ),
}


def extract(rng: random.Random, language: str) -> Messages:
    fields = some_fields(rng, language, 1, 4)
    wanted = rng.choice(list(fields))
    key = FIELDS[wanted][0][language]
    return ask(place(rng, QUESTION, language, message=a_message(rng, language, fields), key=key), fields[wanted])


JSON_FIELDS = {
    "en": ("Write as JSON: {text}", "Make one JSON object: {text}", "Format as JSON: {text}"),
    "it": ("Scrivi in JSON: {text}", "Fai un oggetto JSON: {text}", "Formatta come JSON: {text}"),
}


def json_fields(rng: random.Random, language: str) -> Messages:
    fields = {FIELDS[field][0][language]: value for field, value in some_fields(rng, language, 1, 4).items()}
    if rng.random() < 0.3:  # any word can be a key
        fields = dict(zip(some_words(rng, language, len(fields), len(fields)), fields.values(), strict=True))
    separator, sign = rng.choice(((", ", " "), (", ", ": "), ("; ", " = "), ("\n", ": ")))
    text = separator.join(f"{key}{sign}{value}" for key, value in fields.items())
    return ask(place(rng, JSON_FIELDS, language, text=text), json.dumps(fields, ensure_ascii=False))


JSON_MESSAGE = {
    "en": (
        "Extract {keys} as JSON: {message}",
        "{message}\n\nGive {keys} as JSON.",
        "Write {keys} of this message as a JSON object: {message}",
    ),
    "it": (
        "Estrai {keys} in JSON: {message}",
        "{message}\n\nDammi {keys} in JSON.",
        "Scrivi {keys} di questo messaggio come oggetto JSON: {message}",
    ),
}


def json_message(rng: random.Random, language: str) -> Messages:
    fields = some_fields(rng, language, 2, 5)
    wanted = rng.sample(list(fields), rng.randint(1, len(fields)))
    keys = [FIELDS[field][0][language] for field in wanted]
    reply = {key: fields[field] for key, field in zip(keys, wanted, strict=True)}
    prompt = place(rng, JSON_MESSAGE, language, keys=", ".join(keys), message=a_message(rng, language, fields))
    return ask(prompt, json.dumps(reply, ensure_ascii=False))


# Sorting a message into one of the labels that the prompt offers.
TOPICS = {
    "weather": {
        "en": ("It rained all night.", "The sun is shining.", "There is a strong wind.", "Snow fell on the hills."),
        "it": (
            "Ha piovuto tutta la notte.",
            "Splende il sole.",
            "C'è un vento forte.",
            "È caduta la neve sulle colline.",
        ),
    },
    "food": {
        "en": (
            "The soup is too hot.",
            "I ate bread and cheese.",
            "She cooks fish on Friday.",
            "We had dinner with wine.",
        ),
        "it": (
            "La zuppa scotta.",
            "Ho mangiato pane e formaggio.",
            "Il venerdì cucina il pesce.",
            "Abbiamo cenato con del vino.",
        ),
    },
    "travel": {
        "en": (
            "The train leaves at nine.",
            "We took a boat to the island.",
            "My ticket is in the bag.",
            "They flew home yesterday.",
        ),
        "it": (
            "Il treno parte alle nove.",
            "Abbiamo preso la barca per l'isola.",
            "Il mio biglietto è nella borsa.",
            "Ieri sono tornati in aereo.",
        ),
    },
    "music": {
        "en": (
            "She plays the violin.",
            "The song was very loud.",
            "He sings in the evening.",
            "The piano needs a new string.",
        ),
        "it": (
            "Lei suona il violino.",
            "La canzone era molto forte.",
            "La sera lui canta.",
            "Il pianoforte vuole una corda nuova.",
        ),
    },
    "school": {
        "en": (
            "The teacher wrote on the board.",
            "I forgot my homework.",
            "The lesson was long.",
            "The pupils read a book.",
        ),
        "it": (
            "Il maestro scriveva alla lavagna.",
            "Ho dimenticato i compiti.",
            "La lezione era lunga.",
            "Gli alunni leggono un libro.",
        ),
    },
}
MOODS = {
    "positive": {
        "en": (
            "I love it.",
            "What a wonderful day!",
            "Excellent work, thank you.",
            "I am very happy with it.",
            "This is beautiful.",
            "Everything went well.",
        ),
        "it": (
            "Mi piace moltissimo.",
            "Che giornata meravigliosa!",
            "Ottimo lavoro, grazie.",
            "Ne sono molto contento.",
            "È bellissimo.",
            "È andato tutto bene.",
        ),
    },
    "negative": {
        "en": (
            "I hate it.",
            "What a terrible day!",
            "This is bad work.",
            "I am very disappointed.",
            "This is ugly.",
            "Everything went wrong.",
        ),
        "it": (
            "Lo odio.",
            "Che giornata terribile!",
            "È un pessimo lavoro.",
            "Sono molto deluso.",
            "È brutto.",
            "È andato tutto storto.",
        ),
    },
}
CLASSIFY = {
    "en": ("Classify as {labels}: {text}", "Which label fits, {labels}? {text}", "{text}\nIs this {labels}?"),
    "it": ("Classifica come {labels}: {text}", "Quale etichetta va bene, {labels}? {text}", "{text}\nÈ {labels}?"),
}
OR = {"en": " or ", "it": " o "}


def classify(rng: random.Random, language: str) -> Messages:
    table = rng.choice((TOPICS, TOPICS, MOODS))
    labels = rng.sample(list(table), min(len(table), rng.randint(2, 3)))
    label = rng.choice(labels)
    text = " ".join(rng.sample(table[label][language], rng.randint(1, 2)))
    return ask(place(rng, CLASSIFY, language, labels=OR[language].join(labels), text=text), label)


WHICH_LANGUAGE = {
    "en": ("Is this English or Italian? {text}", "Which language is this: {text}", "Name the language: {text}"),
    "it": ("È inglese o italiano? {text}", "Che lingua è questa: {text}", "Di' la lingua: {text}"),
}
LANGUAGE_NAMES = {"en": {"en": "English", "it": "Italian"}, "it": {"en": "inglese", "it": "italiano"}}


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


CAPITALS = (
    ("France", "Paris", "Francia", "Parigi"),
    ("Italy", "Rome", "Italia", "Roma"),
    ("Germany", "Berlin", "Germania", "Berlino"),
    ("Spain", "Madrid", "Spagna", "Madrid"),
    ("Portugal", "Lisbon", "Portogallo", "Lisbona"),
    ("Greece", "Athens", "Grecia", "Atene"),
    ("Austria", "Vienna", "Austria", "Vienna"),
    ("England", "London", "Inghilterra", "Londra"),
    ("Ireland", "Dublin", "Irlanda", "Dublino"),
    ("Norway", "Oslo", "Norvegia", "Oslo"),
    ("Poland", "Warsaw", "Polonia", "Varsavia"),
    ("Hungary", "Budapest", "Ungheria", "Budapest"),
    ("Russia", "Moscow", "Russia", "Mosca"),
    ("Japan", "Tokyo", "Giappone", "Tokyo"),
    ("China", "Beijing", "Cina", "Pechino"),
    ("Egypt", "Cairo", "Egitto", "Il Cairo"),
    ("Turkey", "Ankara", "Turchia", "Ankara"),
    ("Sweden", "Stockholm", "Svezia", "Stoccolma"),
)
CAPITAL = {
    "en": (
        "What is the capital of {x}?",
        "Which city is the capital of {x}?",
        "Name the capital of {x}.",
        "The capital of {x}?",
    ),
    "it": (
        "Qual è la capitale del paese {x}?",
        "Capitale di: {x}?",
        "Dimmi la capitale del paese {x}.",
        "Quale città è la capitale del paese {x}?",
    ),
}
OPPOSITES = (
    ("hot", "cold", "caldo", "freddo"),
    ("big", "small", "grande", "piccolo"),
    ("good", "bad", "buono", "cattivo"),
    ("high", "low", "alto", "basso"),
    ("old", "young", "vecchio", "giovane"),
    ("open", "closed", "aperto", "chiuso"),
    ("full", "empty", "pieno", "vuoto"),
    ("light", "dark", "chiaro", "scuro"),
    ("fast", "slow", "veloce", "lento"),
    ("rich", "poor", "ricco", "povero"),
    ("strong", "weak", "forte", "debole"),
    ("day", "night", "giorno", "notte"),
)
OPPOSITE = {
    "en": ("What is the opposite of {x}?", "The opposite of {x}?", "Name the opposite of the word {x}."),
    "it": ("Qual è il contrario di {x}?", "Il contrario di {x}?", "Dimmi il contrario della parola {x}."),
}
SEQUENCES = {
    "en": (
        ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
        [
            "January",
            "February",
            "March",
            "April",
            "May",
            "June",
            "July",
            "August",
            "September",
            "October",
            "November",
            "December",
        ],
    ),
    "it": (
        ["lunedì", "martedì", "mercoledì", "giovedì", "venerdì", "sabato", "domenica"],
        [
            "gennaio",
            "febbraio",
            "marzo",
            "aprile",
            "maggio",
            "giugno",
            "luglio",
            "agosto",
            "settembre",
            "ottobre",
            "novembre",
            "dicembre",
        ],
    ),
}
AFTER = {
    "en": ("What comes after {x}?", "What follows {x}?"),
    "it": ("Che cosa viene dopo {x}?", "Che cosa segue a {x}?"),
}
BEFORE = {
    "en": ("What comes before {x}?", "What is just before {x}?"),
    "it": ("Che cosa viene prima di {x}?", "Che cosa precede {x}?"),
}
SINGLE_FACTS = {
    "en": (
        (("How many days are there in a week?", "How many days has a week?"), "7"),
        (("How many months are there in a year?", "How many months has a year?"), "12"),
        (("How many legs has a dog?", "How many legs does a dog have?"), "4"),
        (("How many legs has a spider?", "How many legs does a spider have?"), "8"),
        (("What colour is the sky?", "Which colour has the sky?"), "blue"),
        (("What colour is snow?", "Which colour has snow?"), "white"),
        (("What colour is grass?", "Which colour has grass?"), "green"),
        (("Who wrote the Divine Comedy?", "Who is the author of the Divine Comedy?"), "Dante Alighieri"),
        (("Who wrote Hamlet?", "Who is the author of Hamlet?"), "William Shakespeare"),
        (("Who wrote The Betrothed?", "Who is the author of The Betrothed?"), "Alessandro Manzoni"),
        (("How many hours are there in a day?", "How many hours has a day?"), "24"),
        (("How many minutes are there in an hour?", "How many minutes has an hour?"), "60"),
    ),
    "it": (
        (("Quanti giorni ci sono in una settimana?", "Quanti giorni ha una settimana?"), "7"),
        (("Quanti mesi ci sono in un anno?", "Quanti mesi ha un anno?"), "12"),
        (("Quante zampe ha un cane?", "Un cane quante zampe ha?"), "4"),
        (("Quante zampe ha un ragno?", "Un ragno quante zampe ha?"), "8"),
        (("Di che colore è il cielo?", "Che colore ha il cielo?"), "blu"),
        (("Di che colore è la neve?", "Che colore ha la neve?"), "bianco"),
        (("Di che colore è l'erba?", "Che colore ha l'erba?"), "verde"),
        (("Chi ha scritto la Divina Commedia?", "Chi è l'autore della Divina Commedia?"), "Dante Alighieri"),
        (("Chi ha scritto l'Amleto?", "Chi è l'autore dell'Amleto?"), "William Shakespeare"),
        (("Chi ha scritto I promessi sposi?", "Chi è l'autore dei Promessi sposi?"), "Alessandro Manzoni"),
        (("Quante ore ci sono in un giorno?", "Quante ore ha un giorno?"), "24"),
        (("Quanti minuti ci sono in un'ora?", "Quanti minuti ha un'ora?"), "60"),
    ),
}


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


TRANSLATE = {
    "en": ("Translate into Italian: {x}", "What is the Italian word for {x}?", "How do you say {x} in Italian?"),
    "it": ("Traduci in inglese: {x}", "Qual è la parola inglese per {x}?", "Come si dice {x} in inglese?"),
}


def translate(rng: random.Random, language: str) -> Messages:
    table = rng.choice((ANIMALS, FRUIT, OBJECTS, COLOURS, JOBS))
    other = "it" if language == "en" else "en"
    index = rng.randrange(len(table["en"]))
    return ask(place(rng, TRANSLATE, language, x=table[language][index]), table[other][index])


SMALL_TALK: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "en": (
        (("Hello!", "Hello", "Hi!", "Hi", "Hi there!", "Good morning!", "Good evening!"), "Hello! How can I help you?"),
        (("How are you?", "How are you today?", "Are you well?"), "I am fine, thank you. How can I help you?"),
        (("Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much."), "You are welcome!"),
        (("Goodbye!", "Bye!", "See you soon!", "Good night!"), "Goodbye!"),
        (("What is your name?", "Do you have a name?", "What are you called?"), "My name is nano."),
        (
            ("What are you?", "Who are you?", "Tell me about yourself.", "Are you a person?", "Are you human?"),
            "I am nano, a very small language model.",
        ),
        (
            ("What can you do?", "How can you help me?", "What are you good at?"),
            "I can copy, sort, count, reverse and format short texts, in English and Italian.",
        ),
        (("Are you big?", "How big are you?", "How large are you?"), "I am very small: about six million parameters."),
        (
            ("Do you speak Italian?", "Can you speak Italian?", "Which languages do you speak?"),
            "I speak English and Italian.",
        ),
        (
            ("Do you know everything?", "Are you always right?", "Can I trust you?"),
            "No. I am a very small model and often wrong.",
        ),
    ),
    "it": (
        (
            ("Ciao!", "Ciao", "Buongiorno!", "Buongiorno", "Salve!", "Buonasera!", "Ehi, ciao!"),
            "Ciao! Come posso aiutarti?",
        ),
        (("Come stai?", "Come va?", "Stai bene?"), "Sto bene, grazie. Come posso aiutarti?"),
        (("Grazie!", "Grazie mille!", "Ti ringrazio.", "Molte grazie."), "Prego!"),
        (("Arrivederci!", "A presto!", "Buonanotte!", "Ci vediamo!"), "Arrivederci!"),
        (("Come ti chiami?", "Hai un nome?", "Qual è il tuo nome?"), "Mi chiamo nano."),
        (
            ("Che cosa sei?", "Chi sei?", "Parlami di te.", "Sei una persona?", "Sei umano?"),
            "Sono nano, un modello linguistico molto piccolo.",
        ),
        (
            ("Che cosa sai fare?", "Come puoi aiutarmi?", "In che cosa sei bravo?"),
            "So copiare, ordinare, contare, invertire e formattare testi brevi, in inglese e in italiano.",
        ),
        (
            ("Sei grande?", "Quanto sei grande?", "Che dimensioni hai?"),
            "Sono molto piccolo: circa sei milioni di parametri.",
        ),
        (("Parli inglese?", "Sai parlare inglese?", "Quali lingue parli?"), "Parlo inglese e italiano."),
        (
            ("Sai tutto?", "Hai sempre ragione?", "Posso fidarmi di te?"),
            "No. Sono un modello molto piccolo e sbaglio spesso.",
        ),
    ),
}


def small_talk(rng: random.Random, language: str) -> Messages:
    prompts, reply = rng.choice(SMALL_TALK[language])
    return ask(rng.choice(prompts), reply)


REMEMBER = {
    "en": (
        (
            ("My name is {v}.", "I am {v}.", "Call me {v}."),
            ("Nice to meet you, {v}!",),
            ("What is my name?", "Who am I?", "Do you remember my name?"),
            "Your name is {v}.",
            "name",
        ),
        (
            ("My number is {v}.", "Remember the number {v}."),
            ("I will remember {v}.",),
            ("What was the number?", "Which number was it?"),
            "The number is {v}.",
            "number",
        ),
        (
            ("My city is {v}.", "I live in {v}."),
            ("{v} is a nice place.",),
            ("Where do I live?", "What is my city?"),
            "You live in {v}.",
            "city",
        ),
    ),
    "it": (
        (
            ("Mi chiamo {v}.", "Sono {v}.", "Chiamami {v}."),
            ("Piacere, {v}!",),
            ("Come mi chiamo?", "Chi sono?", "Ricordi il mio nome?"),
            "Ti chiami {v}.",
            "name",
        ),
        (
            ("Il mio numero è {v}.", "Ricorda il numero {v}."),
            ("Ricorderò {v}.",),
            ("Qual era il numero?", "Che numero era?"),
            "Il numero è {v}.",
            "number",
        ),
        (
            ("La mia città è {v}.", "Abito a {v}."),
            ("{v} è un bel posto.",),
            ("Dove abito?", "Qual è la mia città?"),
            "Abiti a {v}.",
            "city",
        ),
    ),
}


def remember(rng: random.Random, language: str) -> Messages:
    statements, answers, questions, reply, kind = rng.choice(REMEMBER[language])
    value = {"name": rng.choice(FIRST_NAMES[language]), "number": a_number(rng), "city": rng.choice(CITIES[language])}[
        kind
    ]
    messages = ask(rng.choice(statements).format(v=value), rng.choice(answers).format(v=value))
    if rng.random() < 0.4:
        messages += small_talk(rng, language)
    return messages + ask(rng.choice(questions), reply.format(v=value))


THINK = {
    "en": ("Think first: how much is {text}?", "Think step by step. What is {text}?", "{text} = ? Think first."),
    "it": (
        "Prima ragiona: quanto fa {text}?",
        "Ragiona passo per passo. Quanto fa {text}?",
        "{text} = ? Prima ragiona.",
    ),
}


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
TOOL_USES = {
    "get_weather": (
        "city",
        {
            "en": ("What is the weather like in {v}?", "How is the weather in {v}?"),
            "it": ("Che tempo fa a {v}?", "Com'è il tempo a {v}?"),
        },
        {"en": "The weather in {v}: {r}.", "it": "Il tempo a {v}: {r}."},
    ),
    "find_order": (
        "code",
        {
            "en": ("Where is order {v}?", "What is the status of order {v}?"),
            "it": ("Dov'è l'ordine {v}?", "A che punto è l'ordine {v}?"),
        },
        {"en": "Order {v}: {r}.", "it": "Ordine {v}: {r}."},
    ),
    "get_age": (
        "name",
        {"en": ("How old is {v}?", "What is the age of {v}?"), "it": ("Quanti anni ha {v}?", "Che età ha {v}?")},
        {"en": "{v}: {r}.", "it": "{v}: {r}."},
    ),
}
TOOL_RESULTS = {
    "en": {
        "get_weather": ("sunny", "rain", "snow", "cloudy", "windy"),
        "find_order": ("sent", "delivered", "in preparation", "lost"),
    },
    "it": {
        "get_weather": ("sole", "pioggia", "neve", "nuvole", "vento"),
        "find_order": ("spedito", "consegnato", "in preparazione", "smarrito"),
    },
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


UNKNOWN = {
    "en": (
        "What is {thing}?",
        "Who is {name}?",
        "When was {name} born?",
        "What does {thing} mean?",
        "How does {thing} work?",
        "Where does {name} live?",
        "How much does the {word} cost?",
        "Explain {thing}.",
        "Where is the {word}?",
    ),
    "it": (
        "Che cos'è {thing}?",
        "Chi è {name}?",
        "Quando è nato {name}?",
        "Che cosa significa {thing}?",
        "Come funziona {thing}?",
        "Dove abita {name}?",
        "Quanto costa l'oggetto {word}?",
        "Spiegami {thing}.",
        "Dov'è l'oggetto {word}?",
    ),
}
DO_NOT_KNOW = {"en": "I do not know.", "it": "Non lo so."}


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

SYSTEM_PROMPTS = {
    "en": (
        "You are a helpful assistant.",
        "You are nano, a small language model.",
        "Answer briefly.",
        "Be precise.",
        "Help the user.",
    ),
    "it": (
        "Sei un assistente utile.",
        "Sei nano, un piccolo modello linguistico.",
        "Rispondi in breve.",
        "Sii preciso.",
        "Aiuta l'utente.",
    ),
}
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
