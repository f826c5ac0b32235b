"""Small samples for objectives: pairs, labelled replies, taught replies."""

from __future__ import annotations

import numpy as np

from affina.data.samples import IGNORED_LABEL, Sample, TeacherTokens, join_documents


def document(generator: np.random.Generator, prompt: np.ndarray, num_reply: int, num_after: int = 1) -> Sample:
    """Prompt, a trained reply, and a few tokens that templates write after a turn."""
    reply = generator.integers(10, 8000, num_reply)
    ids = np.concatenate([prompt, reply, np.full(num_after, 11)]).astype(np.int32)
    labels = np.full(len(ids), IGNORED_LABEL, dtype=np.int32)
    labels[len(prompt) : len(prompt) + num_reply] = ids[len(prompt) : len(prompt) + num_reply]
    return Sample(ids, labels)


def make_pairs(seed: int = 0) -> list[Sample]:
    """Five pairs of odd lengths that share their prompts."""
    generator = np.random.default_rng(seed)
    pairs = []
    for num_prompt, num_chosen, num_rejected in ((3, 5, 9), (12, 1, 4), (1, 20, 2), (7, 7, 7), (30, 3, 11)):
        prompt = generator.integers(10, 8000, num_prompt)
        pairs.append(
            join_documents([document(generator, prompt, num_chosen), document(generator, prompt, num_rejected)])
        )
    return pairs


def make_labelled(seed: int = 0) -> list[Sample]:
    """Five replies, wanted and unwanted."""
    generator = np.random.default_rng(seed)
    samples = []
    for number, (num_prompt, num_reply) in enumerate(((3, 5), (12, 1), (1, 20), (7, 7), (30, 3))):
        sample = document(generator, generator.integers(10, 8000, num_prompt), num_reply)
        samples.append(Sample(sample.input_ids, sample.labels, desirable=number % 3 == 0))
    return samples


def make_taught(seed: int = 0) -> list[Sample]:
    """Replies with a teacher's three likeliest tokens; one record has two."""
    generator = np.random.default_rng(seed)
    samples = []
    for sample in make_labelled(seed):
        count, width = sample.num_supervised, 2 if sample.num_supervised == 7 else 3
        ids = np.stack([generator.choice(8000, width, replace=False) for _ in range(count)]).astype(np.int32)
        log_probabilities = np.log(generator.dirichlet(np.ones(width + 1), count)[:, :width]).astype(np.float32)
        samples.append(Sample(sample.input_ids, sample.labels, teacher=TeacherTokens(ids, log_probabilities)))
    return samples
