"""A batch is samples laid end to end, isolated from each other, in a row of fixed length."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affina.data.collate import Batch, collate
from affina.data.samples import IGNORED_LABEL, Sample

PAD = 999


def sample(ids: list[int], *, trained_from: int = 1) -> Sample:
    values = np.array(ids, dtype=np.int32)
    labels = values.copy()
    labels[:trained_from] = IGNORED_LABEL
    return Sample(values, labels)


def test_an_example_on_paper() -> None:
    batch = collate([sample([1, 2, 3]), sample([4, 5], trained_from=2)], num_tokens=8, pad_token_id=PAD)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert batch.labels.tolist() == [-100, 2, 3, -100, -100, -100, -100, -100]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (batch.max_seqlen, batch.num_tokens, batch.num_supervised) == (3, 5, 2)


def test_types_are_those_of_the_contract() -> None:
    batch = collate([sample([1, 2])], num_tokens=None, pad_token_id=PAD)
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert len(batch.input_ids) == 128


def test_a_full_row_has_no_padding_sample() -> None:
    batch = collate([sample([1] * 100), sample([2] * 28)], num_tokens=128, pad_token_id=PAD)
    assert batch.cu_seqlens.tolist() == [0, 100, 128]
    assert PAD not in batch.input_ids.tolist()


samples = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=20).map(sample), min_size=1, max_size=6)


@given(items=samples, extra=st.integers(0, 30))
def test_shifting_the_whole_row_never_predicts_one_sample_from_another(items: list[Sample], extra: int) -> None:
    used = sum(map(len, items))
    batch = collate(items, num_tokens=used + extra, pad_token_id=PAD)
    starts = batch.cu_seqlens[:-1].long()
    assert (batch.labels[starts] == IGNORED_LABEL).all()
    assert (batch.position_ids[starts] == 0).all()
    assert (batch.labels[used:] == IGNORED_LABEL).all()
    assert batch.num_supervised == sum(int((item.labels[1:] != IGNORED_LABEL).sum()) for item in items)
    assert int(batch.cu_seqlens[-1]) == used + extra
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    for item, start in zip(items, starts.tolist(), strict=False):
        assert batch.input_ids[start : start + len(item)].tolist() == item.input_ids.tolist()
        assert batch.position_ids[start : start + len(item)].tolist() == list(range(len(item)))


def test_a_first_label_that_slipped_through_is_ignored_all_the_same() -> None:
    ids = np.array([1, 2], dtype=np.int32)
    batch = collate([Sample(ids, ids)], num_tokens=4, pad_token_id=PAD)
    assert batch.labels.tolist() == [-100, 2, -100, -100]


def test_a_padding_id_that_equals_the_end_of_turn_hides_no_label() -> None:
    # Regression: collators that look for the padding id ignore the end of every reply.
    batch = collate([sample([1, 2, PAD])], num_tokens=5, pad_token_id=PAD)
    assert batch.labels.tolist() == [-100, 2, PAD, -100, -100]


def test_moving_keeps_everything() -> None:
    batch = collate([sample([1, 2, 3])], num_tokens=4, pad_token_id=PAD)
    moved = batch.to("cpu")
    assert isinstance(moved, Batch)
    assert moved.input_ids.tolist() == batch.input_ids.tolist()
    assert (moved.max_seqlen, moved.num_tokens, moved.num_supervised) == (3, 3, 2)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fit into a row of 2"):
        collate([sample([1, 2, 3])], num_tokens=2, pad_token_id=PAD)
    with pytest.raises(ValueError, match="at least one sample"):
        collate([], num_tokens=2, pad_token_id=PAD)
