"""Text from prompts: batched with a cache, or one token at a time as a stream.

Prompts are padded on the left, so that all of a batch continue at the same place. What a prompt gets does not depend on
its neighbours: greedy decoding looks at its own logits alone, and sampling draws from a generator that belongs to the
prompt (seed and index), not to the batch. Rows that are done leave the batch, and prompts of similar length go
together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from affina.errors import ModelError
from affina.models.forward import compute_context, evaluation_mode
from affina.models.structure import base_model_of, text_config
from affina.models.virtual_tokens import virtual_tokens_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 takes the most likely token; otherwise one is drawn among the likeliest that hold `top_p`
    together."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class _Sequence:
    """One prompt while it is being continued."""

    index: int
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator | None = None


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[list[int]]:
    """The continuation of each prompt, in the prompts' order, without the stop token.

    max_new_tokens: at most this many, fewer where the model's context ends
    stop_ids:       generation of a prompt ends at any of these
    batch_size:     so many at once; fewer, with the same results, where the device's memory does not hold them
    Raises ModelError[prompt-empty] for a prompt without tokens and [prompt-too-long] for one that fills the context.
    """
    _check_prompts(model, prompts)
    sampling = Sampling(temperature, top_p, seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model), compute_context(model):
        while order:
            chosen = order[:batch_size]
            sequences = [_Sequence(index, generator=_generator(sampling, index)) for index in chosen]
            work = partial(
                _continue_batch,
                model,
                [prompts[index] for index in chosen],
                sequences,
                max_new_tokens,
                stop_ids,
                sampling,
            )
            if not _fits(work, len(chosen)):
                batch_size = (len(chosen) + 1) // 2
                continue
            for sequence in sequences:
                results[sequence.index] = sequence.tokens
            order = order[len(chosen) :]
    return results


def _fits(work: Callable[[], None], num_sequences: int) -> bool:
    """Whether `work` ended; False when memory ran out and fewer sequences than these may need less."""
    try:
        work()
        return True
    except torch.OutOfMemoryError:
        if num_sequences == 1:
            raise
    torch.cuda.empty_cache()  # here, where the error no longer holds what did not fit
    return False


def stream(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens of one continuation as they come, without the stop token; equal to `generate`'s.

    Closing the iterator stops the work. Modes and gradients of the caller are untouched between tokens.
    """
    _check_prompts(model, [prompt_ids])
    sampling = Sampling(temperature, top_p, seed)
    generator = _generator(sampling, 0)
    stops = set(stop_ids)
    decoder = _Decoder(model, [prompt_ids])
    for _ in range(_room(model, len(prompt_ids), max_new_tokens)):
        with torch.no_grad(), evaluation_mode(model), compute_context(model):
            token = _choose(decoder.logits[0], sampling, generator)
            if token in stops:
                return
            decoder.advance([token])
        yield token


def _continue_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sequences: list[_Sequence],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    sampling: Sampling,
) -> None:
    stops = set(stop_ids)
    decoder = _Decoder(model, prompts)
    rooms = [_room(model, len(prompt), max_new_tokens) for prompt in prompts]
    active = list(range(len(sequences)))
    while True:
        tokens = _choose_all(decoder.logits, [sequences[i] for i in active], sampling)
        keep = []
        for place, (i, token) in enumerate(zip(active, tokens, strict=True)):
            if token in stops or len(sequences[i].tokens) >= rooms[i]:
                continue
            sequences[i].tokens.append(token)
            if len(sequences[i].tokens) < rooms[i]:
                keep.append(place)
        if not keep:
            return
        if len(keep) < len(active):
            decoder.keep(keep)
        active = [active[place] for place in keep]
        decoder.advance([tokens[place] for place in keep])


class _Decoder:
    """A batch of prompts and the model's cache for them; `logits` [B, V] predict the next token of each."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        base = base_model_of(model)
        device = base.device
        width = max(len(prompt) for prompt in prompts)
        self.input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        self.mask = torch.zeros(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            self.input_ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
            self.mask[row, width - len(prompt) :] = 1
        self.virtual = virtual_tokens_of(model)
        if self.virtual is not None:
            self.mask = torch.cat([self.mask.new_ones(len(prompts), self.virtual.count), self.mask], dim=1)
        self.input_ids, self.mask = self.input_ids.to(device), self.mask.to(device)
        self.lengths = self.mask.sum(dim=1)
        self.positions_are_taken = takes_argument(base, "position_ids")
        self.cache: Cache | None = None if base._is_stateful else DynamicCache(config=base.config)
        if self.virtual is not None and self.virtual.is_prefix:
            with torch.no_grad(), evaluation_mode(model), compute_context(model):
                self.cache = self.virtual.cache(len(prompts))
        with torch.no_grad(), evaluation_mode(model), compute_context(model):
            self.logits = self._forward(self.input_ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0), is_first=True)

    def advance(self, tokens: list[int]) -> None:
        """Appends one token to every row."""
        column = torch.tensor(tokens, dtype=torch.int64, device=self.mask.device).unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)
        if self.cache is None:
            self.input_ids = torch.cat([self.input_ids, column], dim=1)
            self.logits = self._forward(self.input_ids, (self.mask.cumsum(dim=1) - 1).clamp(min=0), is_first=True)
        else:
            self.logits = self._forward(column, self.lengths.unsqueeze(1))
        self.lengths = self.lengths + 1

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows only, and drops columns that are padding in all of them."""
        index = torch.tensor(rows, device=self.mask.device)
        self.mask, self.lengths, self.input_ids = self.mask[index], self.lengths[index], self.input_ids[index]
        if self.cache is not None:
            self.cache.batch_select_indices(index)

    def _forward(self, input_ids: Tensor, position_ids: Tensor, *, is_first: bool = False) -> Tensor:
        """is_first: `input_ids` are whole sequences, before which the virtual tokens belong."""
        options: dict[str, Any] = {"input_ids": input_ids}
        if self.virtual is not None and is_first:
            if self.virtual.is_prefix:
                position_ids = position_ids[:, self.virtual.count :]
            else:
                options = {"inputs_embeds": self.virtual.embeddings(input_ids)}
        if self.positions_are_taken:
            options["position_ids"] = position_ids
        if self.cache is not None:
            options["past_key_values"] = self.cache
        base = base_model_of(self.model)
        # Without padding there is nothing to mask, and attention takes its fastest path.
        is_padded = not bool(self.mask.all())
        output = base(
            attention_mask=self.mask if is_padded else None,
            use_cache=self.cache is not None,
            logits_to_keep=1,
            **options,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of `model` has an argument called `name`."""
    import inspect

    return name in inspect.signature(model.forward).parameters


def _choose_all(logits: Tensor, sequences: list[_Sequence], sampling: Sampling) -> list[int]:
    if sampling.temperature <= 0:
        return [int(token) for token in logits.argmax(dim=-1).tolist()]
    return [_choose(row, sampling, sequence.generator) for row, sequence in zip(logits, sequences, strict=True)]


def _choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One token from [V] float32 logits."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.cpu() / sampling.temperature, dim=-1).sort(descending=True)
    cumulative = probabilities.cumsum(dim=0)
    # The smallest set whose probabilities reach top_p; the first token is always in it.
    size = int((cumulative - probabilities < sampling.top_p).sum())
    cumulative = cumulative[:size]
    point = torch.rand((), generator=generator) * cumulative[-1]
    return int(order[min(int(torch.searchsorted(cumulative, point)), size - 1)])


def _generator(sampling: Sampling, index: int) -> torch.Generator | None:
    """A random source for one prompt: the same wherever in whichever batch it is."""
    if sampling.temperature <= 0:
        return None
    digest = hashlib.sha256(f"{sampling.seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _context_length(model: nn.Module) -> int | None:
    """Tokens that prompt and reply have together; virtual tokens take theirs."""
    length = getattr(text_config(base_model_of(model)), "max_position_embeddings", None)
    if not length:
        return None
    virtual = virtual_tokens_of(model)
    return int(length) - (virtual.count if virtual is not None else 0)


def _room(model: nn.Module, prompt_length: int, max_new_tokens: int) -> int:
    context = _context_length(model)
    return max_new_tokens if context is None else min(max_new_tokens, context - prompt_length)


def _check_prompts(model: nn.Module, prompts: Sequence[Sequence[int]]) -> None:
    context = _context_length(model)
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ModelError("prompt-empty", f"prompt {index} has no tokens", fix="give at least one token")
        if context is not None and len(prompt) >= context:
            raise ModelError(
                "prompt-too-long",
                f"prompt {index} has {len(prompt):,} tokens; the model's context is {context:,}",
                why="there is no room for a reply",
                fix="shorten the conversation",
            )
