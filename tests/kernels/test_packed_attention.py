"""Documents in one row get what each would get alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels.packed_attention import Documents, packed_attention


def definition(query, key, value, scale=None, window=None, softcap=None):
    """Causal attention of one document, score by score, in float64."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (tensor.double() for tensor in (query, key, value))
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (scale or query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position[None, :]
    visible = (distance >= 0) & (distance < (window or 10**9))
    return scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value


def row_of(lengths, heads=4, groups=2, width=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tensors = [torch.randn(1, n, count, width, generator=generator).to(dtype) for n in (heads, groups, groups)]
    return *tensors, Documents.of(bounds, lengths)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 3, 50]),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([None, 0.5]),
)
def test_each_document_attends_to_itself_alone(lengths, groups, window, softcap, scale):
    query, key, value, documents = row_of(lengths, groups=groups)
    found = packed_attention(query, key, value, documents, scale=scale, window=window, softcap=softcap)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        expected = definition(query[:, :, part], key[:, :, part], value[:, :, part], scale, window, softcap)
        # One float32 softmax and two products of at most 12 terms.
        torch.testing.assert_close(found[:, :, part].double(), expected, rtol=1e-5, atol=1e-5)
        start += length


def test_gradients_do_not_cross_documents():
    query, key, value, documents = row_of([5, 7])
    for tensor in (query, key, value):
        tensor.requires_grad_()
    packed_attention(query, key, value, documents)[:, :, :5].sum().backward()
    assert value.grad[:, :, :5].abs().sum() > 0
    for tensor in (query, key, value):
        assert torch.equal(tensor.grad[:, :, 5:], torch.zeros_like(tensor.grad[:, :, 5:]))


def test_empty_documents_are_dropped():
    documents = Documents.of(torch.tensor([0, 3, 3, 8], dtype=torch.int32), [3, 0, 5])
    assert documents.lengths == (3, 5)
    assert documents.cu_seqlens.tolist() == [0, 3, 8]
    assert documents.max_length == 5


def test_bounds_that_do_not_cover_the_row_are_a_bug():
    query, key, value, _ = row_of([5, 7])
    with pytest.raises(AssertionError, match="11 tokens, row of 12"):
        packed_attention(query, key, value, Documents.of(torch.tensor([0, 11]), [11]))


def test_dropout_drops_weights():
    query, key, value, documents = row_of([40])
    torch.manual_seed(0)
    kept = packed_attention(query, key, value, documents)
    dropped = packed_attention(query, key, value, documents, dropout=0.5)
    assert not torch.equal(kept, dropped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 3])
def test_the_variable_length_kernel_equals_the_split(window):
    query, key, value, documents = row_of([5, 70, 1, 30], width=64, dtype=torch.bfloat16)
    on_card = Documents(documents.cu_seqlens.cuda(), documents.lengths)
    found = packed_attention(query.cuda(), key.cuda(), value.cuda(), on_card, window=window).cpu()
    expected = packed_attention(query.float(), key.float(), value.float(), documents, window=window)
    assert (found.float() - expected).abs().max() < 2**-6  # bfloat16 values of about one
