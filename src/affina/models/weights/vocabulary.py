"""Embedding and head in 8-bit integers, one scale to a token: what `engine.memory: lowest` does to them.

They are the largest matrices of a model, [V, D] each, and no row of them is used more than another matrix's. In 16 bits
those of Qwen3-4B, one for both, take 778 MB; so 390. Looking tokens up expands their rows and no others; the head's
product is made tile by tile. Where a model ties its head to its embedding, one quantised copy serves both.

int8 (error 0.8% of a row's spread) and not NF4 (9.2%): see docs/concepts/engines.md for what each costs in perplexity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.kernels import int8
from affina.kernels.logits import head_product
from affina.models.weights.int8 import Int8Linear
from affina.models.weights.quantized import keeping_types, replace_module
from affina.models.weights.row_scaled import RowScaledWeight, quantize_weight

FINGERPRINT_ROWS = 256


def fingerprint_rows(weight: Tensor) -> Tensor:
    """Evenly spaced rows of an embedding, by which a base model is recognised."""
    step = max(1, weight.shape[0] // FINGERPRINT_ROWS)
    return weight.detach()[::step]


class Int8Embedding(nn.Embedding):
    """`nn.Embedding` with a frozen int8 weight: weight [V, D] int8, scale [V] fp32 buffer.

    fingerprint: `fingerprint_rows` of the weight before it was quantised, on the CPU
    """

    scale: Tensor

    def __init__(self, quantized: RowScaledWeight, fingerprint: Tensor, padding_idx: int | None = None) -> None:
        nn.Module.__init__(self)  # nn.Embedding's own would allocate the dense weight
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.fingerprint = fingerprint
        # Follows the casts of the model, and so says in which type looked-up rows are to come. A parameter, and the
        # first one: transformers takes the type of a model from its first floating parameter.
        like = torch.empty(0, 0, dtype=quantized.dtype, device=quantized.device)
        self.like = nn.Parameter(like, requires_grad=False)
        self.weight = nn.Parameter(quantized.codes, requires_grad=False)
        self.register_buffer("scale", quantized.scale)

    @property
    def quantized(self) -> RowScaledWeight:
        """Codes and scales; shares the module's memory."""
        return RowScaledWeight(self.weight.data, self.scale, self.like.dtype)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """Names of the weight's tensors in the state dict, relative to the module."""
        return "weight", "scale", "like"

    def forward(self, input: Tensor) -> Tensor:
        """[…] token ids → […, D] their rows."""
        return self.quantized.rows(input, self.like.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(keeping_types(fn, (self.weight, self.scale)), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, int8, one scale per row"


class Int8Head(Int8Linear):
    """A head in int8. Without a gradient, as in generation, its product is made tile by tile."""

    def forward(self, input: Tensor) -> Tensor:
        """[…, D] → […, V] in the type of `input`, or autocast's."""
        if self.keeps_dense_weight or (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            input = input.to(torch.get_autocast_dtype(device_type))
        logits = head_product(input.reshape(-1, input.shape[-1]), self.quantized)
        if self.bias is not None:
            logits += self.bias.to(logits.dtype)
        return logits.view(*input.shape[:-1], self.out_features)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The modules of a model that have one row for each token.

    names:   of the embedding, and of the head (None: there is none, or it cannot be quantised)
    is_tied: they have one weight
    why_not: what keeps the embedding in 16 bits, in words, or None
    """

    embedding: str
    head: str | None
    is_tied: bool
    why_not: str | None

    @property
    def weights(self) -> frozenset[str]:
        """Names of the weights that can be quantised, one where they are tied."""
        embedding = f"{self.embedding}.weight" if self.why_not is None else None
        head = f"{self.head}.weight" if self.head is not None and not self.is_tied else None
        return frozenset(name for name in (embedding, head) if name is not None)


def vocabulary_of(model: PreTrainedModel) -> Vocabulary:
    """Embedding and head of `model` as far as they can be quantised."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    why_not = None
    if type(embedding) is not nn.Embedding:
        why_not = f"its embedding is a {type(embedding).__name__}"
    elif embedding.max_norm is not None:
        why_not = "its embedding has a largest norm"
    elif is_tied and type(head) is not nn.Linear:
        why_not = f"its head is a {type(head).__name__}"
    has_head = type(head) is nn.Linear and not (is_tied and why_not)
    return Vocabulary(names[id(embedding)], names[id(head)] if has_head else None, is_tied, why_not)


def place_embedding(
    model: PreTrainedModel, vocabulary: Vocabulary, weight: Tensor, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put an int8 embedding, made of `weight` [V, D], into `model`, and into its head where that is tied.

    Raises ModelError[weights-not-finite].
    """
    dense = model.get_submodule(vocabulary.embedding)
    assert isinstance(dense, nn.Embedding)
    fingerprint = fingerprint_rows(weight).to(dtype).to("cpu", copy=True)
    embedding = Int8Embedding(_quantized(weight, dtype, device), fingerprint, dense.padding_idx)
    replace_module(model, vocabulary.embedding, embedding)
    if vocabulary.is_tied and vocabulary.head is not None:
        head = _head(model, vocabulary.head, embedding.quantized)
        head.weight, head.scale = embedding.weight, embedding.scale
        replace_module(model, vocabulary.head, head)


def place_head(
    model: PreTrainedModel, vocabulary: Vocabulary, weight: Tensor, *, dtype: torch.dtype, device: torch.device
) -> None:
    """Put an int8 head of its own, made of `weight` [V, D], into `model`. Raises ModelError[weights-not-finite]."""
    assert vocabulary.head is not None
    replace_module(model, vocabulary.head, _head(model, vocabulary.head, _quantized(weight, dtype, device)))


def quantize_vocabulary(model: PreTrainedModel) -> Vocabulary:
    """Quantises embedding and head of a loaded model on the instance; says what was found.

    Raises ModelError[weights-not-finite].
    """
    vocabulary = vocabulary_of(model)
    if vocabulary.why_not is None:
        weight = model.get_submodule(vocabulary.embedding).weight
        assert isinstance(weight, Tensor)
        place_embedding(model, vocabulary, weight, dtype=weight.dtype, device=weight.device)
    if vocabulary.head is not None and not vocabulary.is_tied:
        weight = model.get_submodule(vocabulary.head).weight
        assert isinstance(weight, Tensor)
        place_head(model, vocabulary, weight, dtype=weight.dtype, device=weight.device)
    return vocabulary


def _quantized(weight: Tensor, dtype: torch.dtype, device: torch.device) -> RowScaledWeight:
    return quantize_weight(weight, int8.quantize_rows, torch.int8, dtype=dtype, device=device)


def _head(model: PreTrainedModel, name: str, quantized: RowScaledWeight) -> Int8Head:
    dense = model.get_submodule(name)
    assert isinstance(dense, nn.Linear)
    return Int8Head(quantized, dense.bias)
