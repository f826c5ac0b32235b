"""What generating replies takes: keys and values of a batch, and the prompts' passage through the layers."""

from __future__ import annotations

from affina.catalog.reference_memory import expanded_bytes
from affina.planning.setup import StepSetup, reference_row


def generation_bytes(setup: StepSetup, num_replies: int) -> int:
    """Keys and values of so many replies at once, a layer at work on their prompts, and logits of one token each."""
    if not num_replies:
        return 0
    shape, n = setup.shape, setup.itemsize
    tokens = num_replies * setup.generation[1]
    cache = tokens * 2 * shape.key_value_size * shape.num_layers * n
    prompt = tokens * (3 * shape.hidden_size + 3 * shape.intermediate_size) * n
    logits = num_replies * shape.vocabulary_size * (n + 4)
    return cache + prompt + logits + expanded_bytes(reference_row(setup))


def replies_at_once(setup: StepSetup, free_bytes: int | None) -> int:
    """How many replies of `setup.generation` are generated at once where so much is free for them.

    models/generate.py's rule: where a card's memory runs out, half as many are tried, down to one. A CPU does not tell.
    """
    count, _ = setup.generation
    if setup.gpu is None or free_bytes is None:
        return count
    while count > 1 and generation_bytes(setup, count) > free_bytes:
        count = (count + 1) // 2
    return count
