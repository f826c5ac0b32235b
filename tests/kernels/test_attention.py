"""Attention without autograd gives what autograd gives for the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from affina.kernels import attention as kernel
from affina.kernels.attention import Segments, attention, attention_backward, choose_backend, why_not
from affina.kernels.packed_attention import Documents, packed_attention
from tests.kernels.interpreter import run_in_interpreter

SCALE = 0.3


def segments_of(lengths, *, num_empty=0, max_seqlen=None):
    bounds = torch.tensor([0, *lengths, *[0] * num_empty]).cumsum(0).to(torch.int32)
    return Segments.from_cu_seqlens(bounds, max_seqlen=max_seqlen or max(lengths), lengths=tuple(lengths))


def inputs_of(tokens, heads=4, groups=2, width=16, dtype=torch.float32, seed=0):
    """q, k, a strided view v (as the projection of q, k and v in one product leaves it) and ∂loss/∂output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    packed = normal(tokens, (heads + 2 * groups) * width)
    v = packed[:, -groups * width :].unflatten(1, (groups, width))
    assert tokens == 1 or v.stride(0) > groups * width
    return normal(tokens, heads, width), normal(tokens, groups, width), v, normal(tokens, heads, width)


def definition(q, k, v, lengths, scale=SCALE, window=None):
    """[T, H, K] output and [T, H] log-sum-exp, score by score, differentiable, in the type of the inputs."""
    repeats = q.shape[1] // k.shape[1]
    outputs, logs = [], []
    for queries, keys, values in zip(*(tensor.split(list(lengths)) for tensor in (q, k, v)), strict=True):
        scores = scale * torch.einsum("thk,uhk->htu", queries, keys.repeat_interleave(repeats, 1))
        position = torch.arange(len(queries))
        distance = position[:, None] - position[None, :]
        visible = (distance >= 0) & (distance < (window or 10**9))
        scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(torch.einsum("htu,uhk->thk", scores.softmax(-1), values.repeat_interleave(repeats, 1)))
        logs.append(scores.logsumexp(-1).T)
    return torch.cat(outputs), torch.cat(logs)


def gradients_of_definition(q, k, v, grad_output, lengths, window=None):
    """Output, log-sum-exp and the three gradients of the definition, by autograd in float64."""
    leaves = [tensor.double().requires_grad_() for tensor in (q, k, v)]
    output, lse = definition(*leaves, lengths, window=window)
    return output.detach(), lse.detach(), torch.autograd.grad(output, leaves, grad_output.double())


def both_passes(q, k, v, grad_output, segments, window=None):
    result = attention(q, k, v, segments, scale=SCALE, window=window)
    return result, attention_backward(grad_output, q, k, v, result, segments, scale=SCALE, window=window)


def assert_close(found, expected, dtype):
    # float64: rounding of sums of at most 200 terms. float32: the same. bfloat16, float16: the kernel rounds weights
    # and the output to the type and uses the rounded output in D; errors are relative to the largest entry.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


LENGTHS = {
    "one document": [37],
    "one token": [1],
    "one-token documents": [1, 1, 1],
    "uniform": [9, 9, 9],
    "short ones in bins and long ones alone": [3, 70, 5, 8, 1, 66, 20, 24, 13, 129],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", LENGTHS)
def test_output_and_gradients_are_those_of_the_definition(name, groups, dtype):
    lengths = LENGTHS[name]
    q, k, v, grad_output = inputs_of(sum(lengths), groups=groups, dtype=dtype)
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths))
    output, lse, expected = gradients_of_definition(q, k, v, grad_output, lengths)
    assert_close(result.output, output, dtype)
    # ATen's 16-bit kernel approximates the exponential: 6e-5 seen.
    tolerance = 2e-4 if dtype.itemsize == 2 else 2e-6
    torch.testing.assert_close(result.lse.double(), lse, rtol=0, atol=tolerance)
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.is_contiguous()
        assert_close(found, wanted, dtype)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    groups=st.sampled_from([1, 2, 4]),
    window=st.sampled_from([None, 1, 2, 7, 39, 100]),
    seed=st.integers(0, 2**31),
)
def test_any_lengths_and_any_window_give_the_definition(lengths, groups, window, seed):
    q, k, v, grad_output = inputs_of(sum(lengths), groups=groups, width=8, dtype=torch.float64, seed=seed)
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths), window)
    output, lse, expected = gradients_of_definition(q, k, v, grad_output, lengths, window)
    assert_close(result.output, output, torch.float64)
    assert_close(result.lse, lse, torch.float64)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close(found, wanted, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_window_is_computed_in_blocks_of_rows_with_a_float32_softmax(window, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "_SCORE_BYTES_CPU", 4 * 4 * 150 * 20)  # blocks of 16 … 20 rows
    lengths = [150, 3]
    q, k, v, grad_output = inputs_of(sum(lengths), dtype=dtype)
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths), window)
    output, lse, expected = gradients_of_definition(q, k, v, grad_output, lengths, window)
    assert_close(result.output, output, dtype)
    assert result.lse.dtype == torch.float32
    torch.testing.assert_close(result.lse.double(), lse, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close(found, wanted, dtype)


def test_the_definition_in_blocks_equals_the_cpu_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "_SCORE_BYTES_CPU", 4 * 4 * 150 * 20)
    q, k, v, grad_output = inputs_of(150)
    result, gradients = both_passes(q, k, v, grad_output, segments_of([150]))
    output, lse = kernel._forward_by_definition(q, k, v, SCALE, None)
    parts = kernel._backward_by_definition(grad_output, q, k, v, output, lse, scale=SCALE, window=None)
    # Both are float32 sums of at most 150 terms of size one.
    torch.testing.assert_close(output, result.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, result.lse, rtol=1e-5, atol=1e-5)
    for part, gradient in zip(parts, gradients, strict=True):
        torch.testing.assert_close(part, gradient, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 6])
def test_it_equals_packed_attention(window):
    lengths = [30, 1, 12, 80, 9, 11]
    q, k, v, grad_output = inputs_of(sum(lengths))
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths), window)
    rows = [tensor.transpose(0, 1).unsqueeze(0).detach().requires_grad_() for tensor in (q, k, v)]
    documents = Documents(segments_of(lengths).cu_seqlens, tuple(lengths))
    expected = packed_attention(*rows, documents, scale=SCALE, window=window)
    expected.backward(grad_output.transpose(0, 1).unsqueeze(0))
    # The same float32 kernel on other blocks.
    torch.testing.assert_close(result.output, expected[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    for found, row in zip(gradients, rows, strict=True):
        torch.testing.assert_close(found, row.grad[0].transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_empty_documents_change_nothing():
    lengths = [12, 30, 5]
    q, k, v, grad_output = inputs_of(sum(lengths))
    result, gradients = both_passes(q, k, v, grad_output, segments_of(lengths))
    padded = segments_of(lengths, num_empty=5, max_seqlen=47)
    unknown = Segments.from_cu_seqlens(padded.cu_seqlens, max_seqlen=47)
    zeros = Segments.from_cu_seqlens(padded.cu_seqlens, max_seqlen=47, lengths=(*lengths, 0, 0, 0, 0, 0))
    for segments in (padded, unknown, zeros):
        assert segments.host_lengths() == tuple(lengths)
        again, same_gradients = both_passes(q, k, v, grad_output, segments)
        assert torch.equal(again.output, result.output)
        for found, wanted in zip(same_gradients, gradients, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("window", [None, 4])
def test_documents_do_not_see_each_other(window):
    lengths = [5, 7, 40, 6]
    q, k, v, grad_output = inputs_of(sum(lengths))
    segments = segments_of(lengths)
    result, gradients = both_passes(q, k, v, grad_output, segments, window)
    second = slice(5, 12)
    others = [tensor.clone() for tensor in (q, k, v, grad_output)]
    for tensor in others:
        tensor[:5], tensor[12:] = 100.0, -100.0
    changed, changed_gradients = both_passes(*others, segments, window)
    assert torch.equal(changed.output[second], result.output[second])
    for found, wanted in zip(changed_gradients, gradients, strict=True):
        assert torch.equal(found[second], wanted[second])


def test_tokens_behind_the_end_in_a_bin_have_no_influence():
    """A document of 1 and one of 8 tokens share a bin; the longer one's gradients are of its own tokens alone."""
    lengths = [1, 8, 3]
    q, k, v, grad_output = inputs_of(sum(lengths))
    grad_output = torch.zeros_like(grad_output)
    grad_output[0] = 1.0
    _, (grad_q, grad_k, grad_v) = both_passes(q, k, v, grad_output, segments_of(lengths))
    # One token: its weight is 1 whatever q and k are, so only v gets a gradient, R = 2 query heads' worth.
    assert torch.equal(grad_v[0], torch.full_like(grad_v[0], 2.0))
    assert max(grad_q[0].abs().max(), grad_k[0].abs().max()) < 1e-6  # g · v − g · y, each rounded
    for gradient in (grad_q, grad_k, grad_v):
        assert gradient[1:].abs().max() == 0


def test_large_scores_stay_finite():
    lengths = [40, 9, 12]
    q, k, v, grad_output = inputs_of(sum(lengths))
    for window in (None, 8):
        result, gradients = both_passes(q * 100, k * 100, v, grad_output, segments_of(lengths), window)
        assert all(torch.isfinite(tensor).all() for tensor in (result.output, result.lse, *gradients))


def test_the_same_inputs_give_the_same_bits():
    lengths = [40, 9, 12, 90]
    q, k, v, grad_output = inputs_of(sum(lengths))
    first, gradients = both_passes(q, k, v, grad_output, segments_of(lengths))
    second, same_gradients = both_passes(q, k, v, grad_output, segments_of(lengths))
    assert torch.equal(first.output, second.output)
    assert all(torch.equal(one, other) for one, other in zip(gradients, same_gradients, strict=True))


def test_no_autograd_graph_is_recorded():
    q, k, v, _ = inputs_of(20)
    for tensor in (q, k):
        tensor.requires_grad_()
    assert not attention(q, k, v, segments_of([20]), scale=SCALE).output.requires_grad


def test_documents_of_one_length_are_found():
    assert segments_of([4, 4, 4], num_empty=2).uniform_length == 4
    assert segments_of([4, 4, 5]).uniform_length is None
    assert Segments.from_cu_seqlens(torch.tensor([0, 4], dtype=torch.int32), max_seqlen=4).uniform_length is None


def test_wrong_segments_are_a_bug():
    bounds = torch.tensor([0, 5, 12], dtype=torch.int32)
    with pytest.raises(AssertionError, match="a document has 7 tokens, max_seqlen 6"):
        Segments.from_cu_seqlens(bounds, max_seqlen=6, lengths=(5, 7))
    with pytest.raises(AssertionError, match="int32"):
        Segments.from_cu_seqlens(bounds.long(), max_seqlen=7)
    with pytest.raises(AssertionError, match="3 lengths for 2 documents"):
        Segments.from_cu_seqlens(bounds, max_seqlen=7, lengths=(5, 6, 1))
    q, k, v, _ = inputs_of(11)
    with pytest.raises(AssertionError, match="in a row of 11"):
        attention(q, k, v, Segments.from_cu_seqlens(bounds, max_seqlen=7, lengths=(5, 7)), scale=SCALE)
    with pytest.raises(AssertionError, match="4 query heads over 3"):
        attention(q, k[:, :1].expand(-1, 3, -1), v[:, :1].expand(-1, 3, -1), segments_of([11]), scale=SCALE)


# The choice of a backend and the calls of CUDA operators, without a device.


class Card:
    """Makes tensors look as if they lay on a CUDA card."""

    def __init__(self, monkeypatch, capability):
        monkeypatch.setattr(kernel, "_capability", lambda device: capability)

    def tensor(self, *shape, dtype=torch.bfloat16):
        class OnCard(torch.Tensor):
            device = torch.device("cuda")

        return torch.empty(*shape, dtype=dtype).as_subclass(OnCard)


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "lengths", "window", "expected"),
    [
        ((9, 0), torch.bfloat16, 128, [2048, 2048], None, "cudnn"),
        ((9, 0), torch.float16, 64, [2048], None, "cudnn"),
        ((9, 0), torch.bfloat16, 128, [2048, 2048], 4096, "cudnn"),
        ((9, 0), torch.bfloat16, 128, [2048, 2048], 1024, "triton"),
        ((9, 0), torch.bfloat16, 128, [2048, 2000], None, "triton"),
        ((9, 0), torch.bfloat16, 128, [16, 16], None, "triton"),
        ((9, 0), torch.bfloat16, 256, [2048, 2048], None, "triton"),
        ((9, 0), torch.bfloat16, 100, [2048, 2048], None, "reference"),
        ((9, 0), torch.float32, 128, [2048, 2048], None, "reference"),
        ((8, 0), torch.bfloat16, 128, [2048, 2048], None, "flash"),
        ((7, 5), torch.float16, 128, [2048, 2048], None, "reference"),
    ],
)
def test_the_backend_follows_from_card_type_and_lengths(
    monkeypatch, capability, dtype, width, lengths, window, expected
):
    card = Card(monkeypatch, capability)
    q, v = card.tensor(sum(lengths), 2, width, dtype=dtype), card.tensor(sum(lengths), 1, width, dtype=dtype)
    assert choose_backend(q, v, segments_of(lengths), window) == expected


@pytest.mark.parametrize(
    ("capability", "dtype", "has_triton", "expected"),
    [
        ((9, 0), torch.bfloat16, True, "triton"),
        ((9, 0), torch.bfloat16, False, "flash"),
        ((8, 0), torch.float16, True, "triton"),
        ((9, 0), torch.float32, True, "reference"),
        ((7, 5), torch.float16, True, "reference"),
    ],
)
def test_deterministic_algorithms_run_on_triton_where_it_runs(monkeypatch, capability, dtype, has_triton, expected):
    q = Card(monkeypatch, capability).tensor(4096, 2, 128, dtype=dtype)
    monkeypatch.setattr(kernel, "use_triton", lambda tensor: has_triton)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert choose_backend(q, q, segments_of([2048, 2048])) == expected


def test_a_backend_says_why_not(monkeypatch):
    q, _, v, _ = inputs_of(8)
    assert "CUDA device" in why_not("flash", q, v, segments_of([8]))
    card = Card(monkeypatch, (7, 5))
    assert "8.0 (Ampere), the device has (7, 5)" in why_not("flash", card.tensor(8, 2, 64), v, segments_of([8]))
    card = Card(monkeypatch, (9, 0))
    q = card.tensor(8, 2, 64)
    assert "16 bits" in why_not("flash", q.float(), q, segments_of([8]))
    assert "head dim" in why_not("flash", card.tensor(8, 2, 257), q, segments_of([8]))
    assert "16 bytes" in why_not("flash", q, card.tensor(8, 129)[:, 1:].unflatten(1, (2, 64)), segments_of([8]))
    assert "window" in why_not("cudnn", q, q, segments_of([8]), 3)
    assert "single tokens" in why_not("cudnn", q, q, segments_of([1] * 8))
    assert "different lengths" in why_not("cudnn", q, q, segments_of([5, 3]))
    assert why_not("cudnn", q, q, segments_of([8]), 8) is None
    apart = card.tensor(8, 3, 64)[:, ::2]
    assert why_not("flash", apart, q, segments_of([8])) is None
    assert "side by side" in why_not("triton", apart, q, segments_of([8]))
    monkeypatch.setattr(kernel, "use_triton", lambda tensor: False)
    assert "not installed" in why_not("triton", q, q, segments_of([8]))
    with pytest.raises(AssertionError, match="unknown"):
        why_not("trident", q, q, segments_of([8]))


def test_the_triton_kernels_give_the_definition():
    run_in_interpreter("triton_attention.py")


@pytest.mark.parametrize(("window", "backend"), [(None, "flash"), (100, "flash"), (None, "cudnn")])
def test_the_calls_of_the_cuda_operators_fit_their_schemas(window, backend):
    """On the meta device: torch checks arguments and gives the shapes that the card would give."""
    lengths = [256, 256, 256]
    q, k, v, grad_output = (tensor.to("meta") for tensor in inputs_of(768, dtype=torch.bfloat16, width=64))
    v = torch.empty(768, 512, dtype=torch.bfloat16, device="meta")[:, -128:].unflatten(1, (2, 64))
    segments = segments_of(lengths, num_empty=3)
    segments = Segments(segments.cu_seqlens.to("meta"), 256, segments.lengths, segments.uniform_length)
    if backend == "flash":
        result = kernel._flash_forward(q, k, v, segments, SCALE, window)
        assert result.lse.shape == (4, 768)
    else:
        result = kernel._cudnn_forward(q, k, v, 256, SCALE)
        assert result.lse.shape == (3, 4, 256, 1)
    assert result.backend == backend
    assert result.output.shape == q.shape
    assert result.output.is_contiguous()
    assert len(result.saved) == 2
    gradients = attention_backward(grad_output, q, k, v, result, segments, scale=SCALE, window=window)
    for gradient, tensor in zip(gradients, (q, k, v), strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.is_contiguous()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("backend", "lengths", "window"),
    [
        ("flash", [5, 70, 1, 300], None),
        ("flash", [5, 70, 1, 300], 33),
        ("flash", [1, 1, 1], None),
        ("triton", [5, 70, 1, 300], None),
        ("triton", [5, 70, 1, 300], 33),
        ("triton", [1, 1, 1], None),
        ("cudnn", [256, 256], None),
        ("cudnn", [512], None),
        ("reference", [5, 70, 1, 300], None),
    ],
)
def test_each_backend_on_the_card_gives_the_definition(backend, lengths, window, width):
    assert_card_gives_definition(backend, lengths, window, width=width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("name", ["_HOPPER", "_AMPERE"])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 128, 192, 256])
def test_each_tile_on_the_card_gives_the_definition(monkeypatch, name, width, window):
    triton_kernel = pytest.importorskip("affina.kernels.triton.attention", reason="triton is not installed")
    if "HOPPER" in name and torch.cuda.get_device_capability()[0] not in (9, 10):
        pytest.skip("the card has no tensor memory accelerator")
    tiles = getattr(triton_kernel, name)
    tile = tiles[min(known for known in tiles if width <= known)]
    monkeypatch.setattr(triton_kernel, "tiles_for", lambda q: tile)
    assert_card_gives_definition("triton", [5, 130, 1, 300, 64], window, width=width)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (3, 1), (6, 1), (7, 1), (16, 1)])
def test_each_number_of_query_heads_to_a_key_head_on_the_card(heads, groups, width, window):
    assert_card_gives_definition("triton", [65, 64, 1, 130], window, width=width, heads=heads, groups=groups)


def assert_card_gives_definition(backend, lengths, window, width, heads=8, groups=2):
    q, k, v, grad_output = inputs_of(sum(lengths), heads=heads, groups=groups, width=width, dtype=torch.bfloat16)
    q, k = q * 0.5, k * 0.5  # scores of the size that trained models have
    segments = segments_of(lengths, num_empty=2)
    on_card = Segments(segments.cu_seqlens.cuda(), segments.max_seqlen, segments.lengths, segments.uniform_length)
    q_c, k_c, v_c, grad_c = (tensor.cuda() for tensor in (q, k, v, grad_output))
    v_c = torch.cat([k_c, v_c], dim=1)[:, v.shape[1] :]  # a strided view
    result = attention(q_c, k_c, v_c, on_card, scale=SCALE, window=window, backend=backend)
    gradients = attention_backward(grad_c, q_c, k_c, v_c, result, on_card, scale=SCALE, window=window)
    output, _, expected = gradients_of_definition(q, k, v, grad_output, lengths, window)
    assert_close(result.output.cpu(), output, torch.bfloat16)
    for found, wanted in zip(gradients, expected, strict=True):
        assert_close(found.cpu(), wanted, torch.bfloat16)
