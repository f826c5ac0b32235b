"""The wordings of the generated tasks, English and Italian; {placeholders} are filled in by tasks.py."""

from __future__ import annotations

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
REVERSE_DIGITS = {
    "en": ("Write the digits of {text} in reverse order.", "Reverse the number {text}.", "Write {text} backwards."),
    "it": ("Scrivi le cifre di {text} in ordine inverso.", "Inverti il numero {text}.", "Scrivi {text} al contrario."),
}
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
CALCULATE = {
    "en": ("What is {text}?", "Compute {text}.", "{text} = ?", "How much is {text}?"),
    "it": ("Quanto fa {text}?", "Calcola {text}.", "{text} = ?", "Qual è il risultato di {text}?"),
}
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
UPPER = {
    "en": ("Write in capital letters: {text}", "Upper case, please: {text}", "Write this in upper case: {text}"),
    "it": (
        "Scrivi in maiuscolo: {text}",
        "In maiuscolo, per favore: {text}",
        "Scrivi questo in lettere maiuscole: {text}",
    ),
}
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
JSON_FIELDS = {
    "en": ("Write as JSON: {text}", "Make one JSON object: {text}", "Format as JSON: {text}"),
    "it": ("Scrivi in JSON: {text}", "Fai un oggetto JSON: {text}", "Formatta come JSON: {text}"),
}
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
WHICH_LANGUAGE = {
    "en": ("Is this English or Italian? {text}", "Which language is this: {text}", "Name the language: {text}"),
    "it": ("È inglese o italiano? {text}", "Che lingua è questa: {text}", "Di' la lingua: {text}"),
}
LANGUAGE_NAMES = {"en": {"en": "English", "it": "Italian"}, "it": {"en": "inglese", "it": "italiano"}}
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
TRANSLATE = {
    "en": ("Translate into Italian: {x}", "What is the Italian word for {x}?", "How do you say {x} in Italian?"),
    "it": ("Traduci in inglese: {x}", "Qual è la parola inglese per {x}?", "Come si dice {x} in inglese?"),
}
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
THINK = {
    "en": ("Think first: how much is {text}?", "Think step by step. What is {text}?", "{text} = ? Think first."),
    "it": (
        "Prima ragiona: quanto fa {text}?",
        "Ragiona passo per passo. Quanto fa {text}?",
        "{text} = ? Prima ragiona.",
    ),
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
