"""The flat adapter's views: made once where their memory stays, and always of the present values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from affina.models.fast.parameters import GROUPS_PER_LAYER, FlatAdapter, FlatPart, LoraPair

NUM_LAYERS = 3


def pair() -> LoraPair:
    # 24 and 40 numbers, which are no multiples of the alignment: there is padding.
    return LoraPair(nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(10, 4)), 2.0)


def adapter(*, on_host: bool, dtype: torch.dtype = torch.bfloat16) -> tuple[FlatAdapter, list[LoraPair]]:
    pairs = [pair() for _ in range(NUM_LAYERS * GROUPS_PER_LAYER)]
    return FlatAdapter([[member] for member in pairs], compute_dtype=dtype, on_host=on_host), pairs


def test_a_view_is_made_once() -> None:
    part = FlatPart(torch.arange(24.0), start=100)
    first = part.matrix(104, 2, 5)
    assert first.tolist() == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]
    assert part.matrix(104, 2, 5) is first
    assert part.matrix(104, 5, 2).shape == (5, 2)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_show_the_present_values_of_every_layer_step_after_step(on_host: bool, dtype: torch.dtype) -> None:
    flat, pairs = adapter(on_host=on_host, dtype=dtype)
    # Down and up, as a step goes: the place of a layer on its way from the host is another one each time.
    order = [*range(NUM_LAYERS), *reversed(range(NUM_LAYERS))]
    for step in range(3):
        computed = flat.computed()
        for index in order:
            part = flat.layer(index, computed)
            for group in range(index * GROUPS_PER_LAYER, (index + 1) * GROUPS_PER_LAYER):
                slices = flat.slices[group]
                assert slices is not None
                assert slices.pairs[0] is not None
                expected_a, expected_b = (m.data * flat.root_scale for m in (pairs[group].a, pairs[group].b))
                assert torch.equal(slices.a(part), expected_a.to(dtype))
                assert torch.equal(slices.pairs[0].b(part), expected_b.to(dtype))
        with torch.no_grad():
            flat.parameter += step + 1


@pytest.mark.parametrize("on_host", [False, True])
def test_after_the_first_step_no_view_of_the_16_bit_matrices_is_made(on_host: bool) -> None:
    flat, _ = adapter(on_host=on_host)
    slices = flat.slices[0]
    assert slices is not None
    found = []
    for _ in range(4):  # two places on the way from the host
        found.append(slices.a(flat.layer(0, flat.computed())))
    assert found[2] is found[0]
    assert found[3] is found[1]


def test_a_gradient_begins_with_zeros_between_the_matrices_every_time() -> None:
    flat, _ = adapter(on_host=True)
    assert flat.num_padding > 0
    gradient = flat.new_gradient()
    for _ in range(2):
        part = flat.layer_gradient(gradient, 1)
        assert not part.values.any()
        part.values.fill_(7.0)
