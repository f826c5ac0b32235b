"""What preference objectives compare: log-probabilities of documents under the policy and under the reference."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from affina.data.collate import Batch
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
    a resumed run, which remembers nothing, shall have the same bits.

    Rows of a stream never come again, and without packing every epoch makes new ones; nobody knows here. So only the
    first rows are remembered, in main memory, where each costs about a quarter of a kilobyte and 4 bytes a document.
    """

    MAX_ROWS = 100_000

    def __init__(self) -> None:
        self._known: dict[bytes, NDArray[np.float32]] = {}

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """[S] float32, as `reference_log_probabilities`."""
        digest = hashlib.sha256(repr(batch.lengths).encode())
        for tensor in (batch.input_ids, batch.labels):
            digest.update(tensor.cpu().numpy().tobytes())
        key = digest.digest()
        if (known := self._known.get(key)) is not None:
            return torch.from_numpy(known).to(batch.input_ids.device)
        found = reference_log_probabilities(model, batch)
        if len(self._known) < self.MAX_ROWS:
            # A copy: an array that shares a tensor's memory keeps the tensor, four times the bytes.
            self._known[key] = found.cpu().numpy().copy()
        return found

    def pairs(self, model: nn.Module, batch: Batch) -> PairScores:
        """The reference's scores of the pairs in a row."""
        return _as_pairs(self(model, batch), batch)


@torch.no_grad()
def reference_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[S] float32 log-probabilities of the documents under the base model."""
    assert has_adapter(model), "the reference is the base with its adapter off, and there is none to switch off"
    # In the types of the policy: what it has not learnt yet shall be a margin of exactly 0.
    with evaluation_mode(model), adapter_disabled(model, as_trained=True):
        return document_log_probabilities(model, batch)


def _as_pairs(log_probabilities: Tensor, batch: Batch) -> PairScores:
    num_documents = 2 * batch.num_examples
    pairs = log_probabilities[:num_documents].view(-1, 2)
    counts = torch.tensor(batch.supervised_lengths[:num_documents], dtype=torch.float32).view(-1, 2).to(pairs.device)
    return PairScores(pairs[:, 0], pairs[:, 1], counts[:, 0], counts[:, 1])
