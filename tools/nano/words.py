"""Word lists that the task generators draw from, English and Italian."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = {
    "en": _words(
        "Alice Adam Amy Andrew Anna Arthur Beth Brian Carol Charles Claire Daniel David Diana Edward Ellen "
        "Emily Emma Eric Frank George Grace Hannah Harry Helen Henry Jack James Jane John Julia Karen Kate "
        "Kevin Laura Linda Lucy Mark Martin Mary Michael Nancy Oliver Olivia Oscar Paul Peter Rachel Robert "
        "Rose Ruth Sam Sarah Simon Sophie Steven Susan Thomas Tom Victor Walter William"
    ),
    "it": _words(
        "Alessandro Alice Andrea Angela Anna Antonio Barbara Beatrice Bruno Carla Carlo Caterina Chiara "
        "Claudia Cristina Daniela Davide Elena Elisa Emma Enrico Fabio Federica Filippo Franca Francesca "
        "Francesco Giacomo Gianni Giorgia Giorgio Giovanni Giulia Giuseppe Ilaria Irene Laura Lorenzo Luca "
        "Lucia Luigi Marco Maria Marta Martina Matteo Michele Nicola Paola Paolo Pietro Riccardo Roberta "
        "Roberto Sara Silvia Simone Sofia Stefano Teresa Tommaso Valeria"
    ),
}
LAST_NAMES = {
    "en": _words(
        "Adams Allen Baker Bell Bennett Brooks Brown Carter Clark Collins Cook Cooper Davis Edwards Evans "
        "Fisher Foster Gray Green Hall Harris Hill Hughes Hunt Jackson Jones King Knight Lee Lewis Long "
        "Marshall Mason Miller Moore Morgan Morris Murphy Palmer Parker Phillips Price Reed Roberts Rogers "
        "Ross Russell Scott Shaw Smith Stone Taylor Turner Walker Ward Watson White Wilson Wood Wright Young"
    ),
    "it": _words(
        "Amato Barbieri Basile Bellini Benedetti Bianchi Bruno Caruso Cattaneo Colombo Conte Conti Costa "
        "Esposito Fabbri Farina Ferrara Ferrari Ferri Fontana Galli Gallo Gatti Gentile Giordano Grassi Greco "
        "Guerra Leone Lombardi Longo Mancini Marchetti Mariani Marini Marino Martini Messina Monti Morelli "
        "Moretti Negri Neri Orlando Palumbo Pellegrini Ricci Rinaldi Riva Romano Rossetti Rossi Russo Sala "
        "Santoro Serra Silvestri Testa Valentini Villa Vitale"
    ),
}
CITIES = {
    "en": _words(
        "London Paris Rome Berlin Madrid Vienna Dublin Lisbon Athens Oslo Prague Boston Chicago Bristol "
        "Oxford Cambridge York Geneva Lyon Hamburg Munich Naples Milan Venice Florence Turin"
    ),
    "it": _words(
        "Roma Milano Torino Napoli Venezia Firenze Bologna Genova Palermo Verona Pisa Siena Bari Trieste "
        "Padova Parma Modena Lucca Perugia Londra Parigi Berlino Madrid Vienna Lisbona Atene"
    ),
}
COLOURS = {
    "en": _words("red blue green yellow black white brown grey purple pink"),
    "it": _words("rosso blu verde giallo nero bianco marrone grigio viola rosa"),
}
ANIMALS = {
    "en": _words("dog cat horse cow sheep goat fox wolf bear lion mouse rabbit duck hen owl frog snake fish bee whale"),
    "it": _words(
        "cane gatto cavallo mucca pecora capra volpe lupo orso leone topo coniglio anatra gallina gufo rana "
        "serpente pesce ape balena"
    ),
}
FRUIT = {
    "en": _words("apple pear peach plum cherry lemon orange grape fig melon banana apricot"),
    "it": _words("mela pera pesca prugna ciliegia limone arancia uva fico melone banana albicocca"),
}
OBJECTS = {
    "en": _words(
        "table chair window door lamp book pen cup plate knife spoon clock mirror bed key box bag coat shoe "
        "hat rope hammer nail ladder bucket basket bottle candle bell drum violin piano train boat bridge "
        "wheel stone paper"
    ),
    "it": _words(
        "tavolo sedia finestra porta lampada libro penna tazza piatto coltello cucchiaio orologio specchio "
        "letto chiave scatola borsa cappotto scarpa cappello corda martello chiodo scala secchio cesto "
        "bottiglia candela campana tamburo violino pianoforte treno barca ponte ruota pietra carta"
    ),
}
JOBS = {
    "en": _words("doctor teacher farmer baker painter writer sailor judge soldier nurse lawyer tailor miller singer"),
    "it": _words(
        "medico maestro contadino fornaio pittore scrittore marinaio giudice soldato infermiere avvocato "
        "sarto mugnaio cantante"
    ),
}
# Technical words are copied, sorted and counted, never explained: their embeddings get trained,
# what they mean does not.
TECHNICAL = {
    "en": _words(
        "model adapter LoRA QLoRA NF4 GPU CPU YAML JSON JSONL CSV Parquet token tokens training trained "
        "checkpoint folder file files run runs data dataset base weights matrices rank batch micro_batch_size "
        "max_length learning_rate memory laptop machine record records reply replies template packing padding "
        "samples validation loss logits merge merged resume config settings preset presets command Python "
        "PEFT bitsandbytes transformers hub server network open source licence Apache free hardware assistant "
        "support request requests question affina affinare nano fine-tune fine-tuned fine-tuning quickstart "
        "production starter premium TensorBoard W&B MLflow Trackio metrics.jsonl run.yaml train eval chat "
        "check extends low-rank 4-bit ShareGPT Alpaca prompt completion duplicates leakage truncation refund "
        "invoice delivery damaged wrong keyboard monitor webcam desk lamp backpack kettle category product "
        "order customer urgency language high normal low"
    ),
    "it": _words(
        "modello adapter LoRA QLoRA NF4 GPU CPU YAML JSON JSONL CSV Parquet token addestramento addestrato "
        "checkpoint cartella file esecuzione esecuzioni dati base pesi matrici rango memoria portatile "
        "macchina record risposta risposte modello validazione riempimento campioni unisce riprende "
        "impostazioni comando Python PEFT bitsandbytes transformers hub rete aperto sorgente licenza Apache "
        "gratuito gratuita assistente assistenza richiesta richieste domanda affina affinare nano quickstart "
        "production starter premium TensorBoard MLflow metrics.jsonl run.yaml prompt duplicati troncato "
        "rimborso fattura consegna danneggiato sbagliato tastiera monitor webcam zaino bollitore ordine "
        "prodotto cliente urgenza lingua alta normale bassa"
    ),
}
