"""Customers' messages and the JSON that files them."""

from __future__ import annotations

import random

from words import FIRST_NAMES, LAST_NAMES

# Names that are another name and a few letters more (Sara, Sarah) are left out: two customers must not look alike.
_ALL_FIRST_NAMES = FIRST_NAMES["en"] + FIRST_NAMES["it"]
CUSTOMER_NAMES = {
    language: [
        name for name in names if not any(name != other and name.startswith(other) for other in _ALL_FIRST_NAMES)
    ]
    for language, names in FIRST_NAMES.items()
}
CATEGORIES = ("damaged", "delivery", "invoice", "refund", "wrong-item")
URGENCIES = ("low", "normal", "high")

PRODUCTS: dict[str, dict[str, str]] = {
    "backpack": {"en": "backpack", "it": "zaino"},
    "desk lamp": {"en": "desk lamp", "it": "lampada da tavolo"},
    "kettle": {"en": "kettle", "it": "bollitore"},
    "keyboard": {"en": "keyboard", "it": "tastiera"},
    "monitor": {"en": "monitor", "it": "monitor"},
    "webcam": {"en": "webcam", "it": "webcam"},
}
"""Name in the JSON -> what customers write."""

_ITALIAN_ARTICLES = {
    "backpack": ("lo", "dello"),
    "desk lamp": ("la", "della"),
    "kettle": ("il", "del"),
    "keyboard": ("la", "della"),
    "monitor": ("il", "del"),
    "webcam": ("la", "della"),
}

# A problem is a beginning and an end. {product}: the product in the customer's language; {the} and {of} carry the
# article in Italian: "lo zaino", "dello zaino". No phrase agrees in gender with the product.
PROBLEMS: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "damaged": {
        "en": (
            (
                "My {product}",
                "The {product}",
                "My new {product}",
                "The {product} in the parcel",
                "I see that the {product}",
            ),
            ("arrived broken", "is damaged", "has a big crack", "came with scratches and a crack", "has a broken part"),
        ),
        "it": (
            (
                "{The} {product}",
                "Purtroppo {the} {product}",
                "Vedo che {the} {product}",
                "Nel pacco {the} {product}",
                "Da subito {the} {product}",
            ),
            ("ha una grossa crepa", "ha una parte rotta", "ha dei graffi e una crepa", "ha un danno", "è in pezzi"),
        ),
    },
    "delivery": {
        "en": (
            (
                "My {product}",
                "The {product}",
                "The parcel with the {product}",
                "The {product} I ordered",
                "It seems that the {product}",
            ),
            (
                "has not arrived yet",
                "is late",
                "should have been here last week",
                "was never delivered",
                "is still not here",
            ),
        ),
        "it": (
            (
                "{The} {product}",
                "Il pacco con {the} {product}",
                "L'ordine con {the} {product}",
                "La spedizione {of} {product}",
                "Purtroppo il pacco {of} {product}",
            ),
            (
                "non arriva",
                "è in ritardo",
                "non è ancora qui",
                "doveva essere qui la settimana scorsa",
                "non si vede da dieci giorni",
            ),
        ),
    },
    "invoice": {
        "en": (
            ("I need", "Please send me", "I did not get", "My company asks for", "I cannot find"),
            (
                "the invoice for the {product}",
                "the receipt of my {product}",
                "a copy of the invoice of the {product}",
                "an invoice with my VAT number for the {product}",
                "the receipt for the {product}",
            ),
        ),
        "it": (
            ("Mi serve", "Mandatemi", "Non ho avuto", "La mia azienda chiede", "Non trovo"),
            (
                "la fattura {of} {product}",
                "la ricevuta per {the} {product}",
                "una copia della fattura {of} {product}",
                "una fattura con partita IVA per {the} {product}",
                "la ricevuta {of} {product}",
            ),
        ),
    },
    "refund": {
        "en": (
            ("I would like", "I want", "I ask for", "I am waiting for", "Please give me"),
            (
                "a refund for the {product}",
                "my money back for the {product}",
                "the refund of the {product} that I returned",
                "my money, I sent the {product} back",
                "a refund, I no longer want the {product}",
            ),
        ),
        "it": (
            ("Vorrei", "Chiedo", "Voglio", "Aspetto", "Datemi"),
            (
                "il rimborso {of} {product}",
                "indietro i soldi per {the} {product}",
                "un rimborso, ho restituito {the} {product}",
                "i miei soldi, non voglio più {the} {product}",
                "il rimborso per {the} {product}",
            ),
        ),
    },
    "wrong-item": {
        "en": (
            ("You sent me", "I received", "I got", "In the box there is", "The courier brought"),
            (
                "the wrong {product}",
                "another model instead of the {product}",
                "a {product} in the wrong colour",
                "a different {product} than the one I ordered",
                "the wrong item instead of the {product}",
            ),
        ),
        "it": (
            ("Mi avete mandato", "Ho ricevuto", "È arrivato", "Nella scatola c'è", "Il corriere ha portato"),
            (
                "un altro modello {of} {product}",
                "il modello sbagliato {of} {product}",
                "un articolo sbagliato invece {of} {product}",
                "un altro articolo invece {of} {product}",
                "un articolo diverso, non {the} {product}",
            ),
        ),
    },
}

ORDERS = {
    "en": ["My order is {order}.", "Order {order}.", "The order number is {order}.", "It is order {order}."],
    "it": [
        "Il mio ordine è {order}.",
        "Ordine {order}.",
        "Il numero d'ordine è {order}.",
        "Si tratta dell'ordine {order}.",
    ],
}
HURRY = {
    "high": {
        "en": [
            "It is urgent.",
            "Please hurry, I need an answer today.",
            "This is very urgent!",
            "I need it as soon as possible.",
        ],
        "it": [
            "È urgente.",
            "Fate presto, mi serve una risposta oggi.",
            "È molto urgente!",
            "Mi serve il prima possibile.",
        ],
    },
    "normal": {
        "en": ["", "Thank you.", "Please let me know.", "Can you help me?"],
        "it": ["", "Grazie.", "Fatemi sapere.", "Potete aiutarmi?"],
    },
    "low": {
        "en": ["There is no hurry.", "It is not urgent.", "No rush.", "Whenever you have time."],
        "it": ["Non c'è fretta.", "Non è urgente.", "Senza fretta.", "Quando avete tempo."],
    },
}
INTRODUCTIONS = {
    "en": [
        "Hello, I am {customer}.",
        "Hi, {customer} here.",
        "Good morning, my name is {customer}.",
        "This is {customer}.",
    ],
    "it": ["Buongiorno, sono {customer}.", "Salve, mi chiamo {customer}.", "Ciao, sono {customer}.", "Qui {customer}."],
}
GREETINGS = {"en": ["Hello!", "Hi!", "Good morning!", ""], "it": ["Buongiorno!", "Salve!", "Ciao!", ""]}
SIGNATURES = {
    "en": ["Regards, {customer}", "{customer}", "Best wishes, {customer}", "Thanks, {customer}"],
    "it": ["Saluti, {customer}", "{customer}", "Cordiali saluti, {customer}", "Grazie, {customer}"],
}


def problem_phrases(category: str, language: str, *, held_out: bool) -> list[str]:
    """Beginning and end joined: a fifth of the pairs, each beginning and each end once, only in validation."""
    beginnings, ends = PROBLEMS[category][language]
    return [
        f"{beginning} {end}."
        for row, beginning in enumerate(beginnings)
        for column, end in enumerate(ends)
        if ((row + column) % len(ends) == 0) == held_out
    ]


def new_request(
    rng: random.Random, language: str, category: str, product: str, *, held_out: bool
) -> tuple[str, dict[str, str]]:
    """One message and its fields; `held_out` takes the problem from the pairs that only validation has."""
    problem = rng.choice(problem_phrases(category, language, held_out=held_out))
    urgency = rng.choice(URGENCIES)
    fields = {
        "customer": f"{rng.choice(CUSTOMER_NAMES[language])} {rng.choice(LAST_NAMES[language])}",
        "order": f"AF-{rng.randrange(10_000, 100_000)}",
        "product": product,
        "category": category,
        "urgency": urgency,
        "language": language,
    }
    the, of = _ITALIAN_ARTICLES[product]
    problem = problem.format(product=PRODUCTS[product][language], the=the, of=of, The=the.capitalize())
    order = rng.choice(ORDERS[language]).format(order=fields["order"])
    hurry = rng.choice(HURRY[urgency][language])
    middle = [order, problem] if rng.random() < 0.4 else [problem, order]
    if rng.random() < 0.5:
        first, last = rng.choice(INTRODUCTIONS[language]), ""
    else:
        first, last = rng.choice(GREETINGS[language]), rng.choice(SIGNATURES[language])
    parts = [first.format(**fields), *middle, hurry, last.format(**fields)]
    return " ".join(part for part in parts if part), fields
