"""Which rows one captured graph serves. (Capturing itself needs a GPU: bench/parity.py.)"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from affina.kernels.attention import Segments
from affina.models.fast.graphs import RowShape


def shape_of(lengths: list[int]) -> RowShape:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    segments = Segments.from_cu_seqlens(bounds, max_seqlen=max(lengths), lengths=tuple(lengths))
    return RowShape.of(segments, sum(lengths))


@given(st.lists(st.integers(1, 2048), min_size=2, max_size=200))
def test_a_shape_has_room_for_its_row(lengths: list[int]) -> None:
    shape = shape_of(lengths)
    assert shape.num_bounds >= len(lengths) + 1
    assert shape.max_seqlen >= max(lengths)
    assert shape.max_seqlen <= max(sum(lengths), max(lengths))


def test_packed_rows_of_real_lengths_share_one_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(50):
        lengths: list[int] = []
        while True:
            length = int((torch.randn((), generator=generator) * 0.75 + 5.7).exp().clamp(16, 2048))
            if sum(lengths) + length >= 16_384:
                break
            lengths.append(length)
        lengths.append(16_384 - sum(lengths))
        shapes.add(shape_of(lengths))
    assert len(shapes) == 1


@pytest.mark.parametrize("lengths", [[256] * 8, [512] * 8])
def test_full_rows_have_a_shape_of_their_own(lengths: list[int]) -> None:
    shape = shape_of(lengths)
    assert (shape.uniform_length, shape.num_bounds) == (lengths[0], 9)
    assert shape != shape_of([*lengths[:-1], lengths[-1] - 1, 1])
