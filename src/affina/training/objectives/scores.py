"""What preference objectives compare: log-probabilities of documents under the policy and under the reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from affina.data.collate import Batch
from affina.errors import TrainingError
from affina.models.adapters import adapter_disabled, has_adapter
from affina.models.forward import document_log_probabilities, evaluation_mode


@dataclass(frozen=True, slots=True)
class PairScores:
    """chosen, rejected: [P] float32 log-probabilities of the replies of P pairs, summed over their tokens

    num_chosen, num_rejected: [P] float32 tokens of each
    """

    chosen: Tensor
    rejected: Tensor
    num_chosen: Tensor
    num_rejected: Tensor

    def per_token(self) -> PairScores:
        """The same as means over tokens."""
        ones = torch.ones_like(self.num_chosen)
        return PairScores(self.chosen / self.num_chosen, self.rejected / self.num_rejected, ones, ones)


def pair_scores(model: nn.Module, batch: Batch) -> PairScores:
    """The policy's scores of the pairs in a row, with gradients. Documents 2i and 2i + 1 are pair i's."""
    return _as_pairs(document_log_probabilities(model, batch), batch)


class ReferenceScores:
    """The reference's log-probabilities of documents, each row computed once.

    The base is frozen, so a row that comes again has the same numbers: packed rows do in every epoch, validation rows
    in every validation. Whole rows are remembered, because the same documents in another row round differently:
    a resumed run, which remembers nothing, shall have the same bits. A row costs a few dozen bytes.
    """

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S] float32, as `reference_log_probabilities`."""
        digest = hashlib.sha256(repr(batch.lengths).encode())
        for tensor in (batch.input_ids, batch.labels):
            digest.update(tensor.cpu().numpy().tobytes())
        key = digest.digest()
        if key not in self._known:
            self._known[key] = reference_log_probabilities(model, batch)
        return self._known[key]

    def pairs(self, model: nn.Module, batch: Batch) -> PairScores:
        """The reference's scores of the pairs in a row."""
        return _as_pairs(self(model, batch), batch)


@torch.no_grad()
def reference_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[S] float32 log-probabilities of the documents under the base model."""
    if not has_adapter(model):
        raise TrainingError(
            "reference-missing",
            "this objective compares with the model as it was, and nothing of it is left",
            why="the reference is the base with its adapter switched off; here the weights themselves train",
            fix="train an adapter, or write training.objective: orpo or simpo, which need no reference",
        )
    with evaluation_mode(model), adapter_disabled(model):
        return document_log_probabilities(model, batch)


def _as_pairs(log_probabilities: Tensor, batch: Batch) -> PairScores:
    num_documents = 2 * batch.num_examples
    pairs = log_probabilities[:num_documents].view(-1, 2)
    counts = torch.tensor(batch.supervised_lengths[:num_documents], dtype=torch.float32).view(-1, 2).to(pairs.device)
    return PairScores(pairs[:, 0], pairs[:, 1], counts[:, 0], counts[:, 1])
