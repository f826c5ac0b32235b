"""The arithmetic of the fused decoder's memory equals what its own code allocates, byte for byte."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_memory import FusedRow, Products, evaluation_peak, row_inputs_bytes, training_peaks
from affina.catalog.save_policy import Keep, LayerRanks, SavePolicy
from affina.kernels import fp8 as fp8_kernels
from affina.kernels.attention import AttentionResult, Segments
from affina.kernels.fp8 import E4M3, QuantizedRows
from affina.models.families import read_decoder
from affina.models.fast import decoder as decoder_module
from affina.models.fast import fp8 as fp8_module
from affina.models.fast import layer as layer_module
from affina.models.fast import linear as linear_module
from affina.models.fast import weights as weights_module
from affina.models.fast.build import build_decoder, largest_ranks
from affina.models.fast.decoder import Decoder
from affina.models.fast.layer import RowContext
from affina.planning.allocations import AllocationCounter
from tests.models.fast.families import adapted_model
from tests.models.tiny import qwen3_config

CHUNK_TOKENS = 256
LOSS = torch.ones(())


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins that allocate what the Triton kernels allocate, and compute nothing."""

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float, **_: Any) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)

    def add_rms_norm(x: Tensor, update: Tensor, *_: Any, sum_out: Tensor, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        return sum_out, x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)

    def qk_rope(qkv: Tensor, *_: Any, num_heads: int, num_kv_heads: int, lora: Any = None, **__: Any) -> Any:
        width = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
        counts = (num_heads, num_kv_heads) if lora is None else (num_heads, num_kv_heads, num_kv_heads)
        return tuple(qkv.new_empty(qkv.shape[0], count, width) for count in counts)

    def attention(q: Tensor, *_: Any, **__: Any) -> AttentionResult:
        return AttentionResult(q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32), (), "triton")

    def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
        statistics = q.new_empty(q.shape[1] * -(-q.shape[0] // 2) * 4, dtype=torch.float32)
        grads = q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)
        del statistics
        return grads

    def swiglu(gate_up: Tensor, *, lora: Any) -> Tensor:
        return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)

    def swiglu_backward(grad: Tensor, gate_up: Tensor, *, lora: Any, u_down: Tensor | None, **_: Any) -> None:
        if lora is None:
            return
        ranks = sum(lora.ranks) + (0 if u_down is None else u_down.shape[1])
        chunks = min(16, -(-grad.shape[0] // 16))
        grad.new_empty(chunks * grad.shape[1] * ranks, dtype=torch.float32)

    def product_into(left: Tensor, right: Tensor, out: Tensor, *, accumulates: bool = False, **_: Any) -> None:
        if accumulates:
            torch.empty_like(out)

    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, *, gradient_out: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        error = None
        for part in torch.split(hidden, CHUNK_TOKENS):
            logits = hidden.new_empty(part.shape[0], weight.shape[0], dtype=torch.float32)
            new_error = torch.empty_like(logits, dtype=hidden.dtype)
            del logits
            error = new_error
            del new_error
        del error, losses
        return LOSS, gradient_out

    def quantize_rows(
        x: Tensor, *, beside: Any = None, out: Any = None, scale_out: Any = None, **_: Any
    ) -> QuantizedRows:
        assert beside is None or out is not None
        codes = torch.empty(x.shape, dtype=E4M3) if out is None else out
        return QuantizedRows(codes, torch.empty(x.shape[0]) if scale_out is None else scale_out.fill_(1.0))

    def fp8_linear(
        x8: Tensor, x_scale: Tensor, w8: Tensor, *_: Any, out_dtype: torch.dtype, out: Tensor | None = None, **__: Any
    ) -> Tensor:
        if out is not None and out.is_contiguous():
            return out
        product = torch.empty(x8.shape[0], w8.shape[0], dtype=out_dtype)
        return product if out is None else out

    nothing = lambda *_, **__: None  # noqa: E731
    for name, stand_in in {
        "rms_norm": rms_norm,
        "add_rms_norm": add_rms_norm,
        "rms_norm_backward": nothing,
        "qk_rope": qk_rope,
        "qk_rope_backward": nothing,
        "attention": attention,
        "attention_backward": attention_backward,
        "swiglu": swiglu,
        "swiglu_backward_with_ranks": swiglu_backward,
        "add_rows": lambda x, update, lora, out: out,
    }.items():
        monkeypatch.setattr(layer_module, name, stand_in)
    monkeypatch.setattr(linear_module, "product_into", product_into)
    for module in (fp8_kernels, fp8_module):
        monkeypatch.setattr(module, "quantize_rows", quantize_rows)
        monkeypatch.setattr(module, "fp8_linear", fp8_linear)
    monkeypatch.setattr(fp8_kernels, "transpose_codes", lambda *_, **__: None)
    monkeypatch.setattr(weights_module, "can_multiply_fp8", lambda _: True)
    monkeypatch.setattr(decoder_module, "rms_norm", rms_norm)
    monkeypatch.setattr(decoder_module, "rms_norm_backward", lambda grad, *_, out, **__: out)
    monkeypatch.setattr(decoder_module, "linear_cross_entropy_and_gradient", loss)
    monkeypatch.setattr("affina.catalog.fused_memory.MLP_CHUNK_TOKENS", CHUNK_TOKENS)


def build(rank: int, weights: str, targets: Any) -> tuple[Decoder, LayerRanks]:
    model = adapted_model(
        qwen3_config(num_hidden_layers=4, hidden_size=64, intermediate_size=160, vocab_size=512),
        rank=rank,
        weights=weights,
        targets=targets,
        dtype=torch.bfloat16,
    )
    spec = read_decoder(model.get_base_model().config)
    assert isinstance(spec, DecoderSpec)
    decoder = build_decoder(model, spec)
    layers = [dataclasses.replace(layer, folds=rank <= 64) for layer in decoder.layers]
    return dataclasses.replace(decoder, layers=layers), largest_ranks(decoder)


def measure(decoder: Decoder, policy: SavePolicy | None, num_tokens: int) -> int:
    """The peak of forward, head and backward pass of the engine's own code."""
    input_ids = torch.zeros(num_tokens, dtype=torch.long)
    angles = torch.zeros(num_tokens, decoder.spec.head_dim // 2)
    segments = Segments(torch.tensor([0, num_tokens], dtype=torch.int32), num_tokens, (num_tokens,), num_tokens)
    row = RowContext(segments, angles, angles, decoder.adapter.computed(), part_tokens=CHUNK_TOKENS)
    positions = torch.arange(num_tokens)
    with AllocationCounter() as counter, torch.no_grad():
        # As FastEngine.forward and backward hold them.
        last, saved = decoder.forward(input_ids, row, policy)
        rows = last.rows(positions)
        del last
        _, head = decoder.loss_and_gradient(rows, positions, input_ids, num_tokens=num_tokens)
        del rows
        stream = decoder.gradient_of_last(head, torch.ones(()))
        del head
        decoder.backward(stream, saved, row)
        return counter.peak_bytes


@pytest.mark.parametrize("weights", ["dense", "nf4", "fp8"])
@pytest.mark.parametrize("num_tokens", [CHUNK_TOKENS, 700])
@pytest.mark.parametrize("keep", [keep for keep in Keep if keep > Keep.OFFLOADED])
def test_the_peak_of_a_step_equals_the_engines_own_allocations(keep: Keep, num_tokens: int, weights: str) -> None:
    decoder, ranks = build(8, weights, "all-linear")
    policy = SavePolicy.uniform(4, keep)
    found = forecast(decoder, ranks, policy, num_tokens, "fp8" if weights == "fp8" else "dense")
    assert found == measure(decoder, policy, num_tokens)


@pytest.mark.parametrize(
    ("rank", "targets"), [(8, ["q_proj", "v_proj"]), (8, ["down_proj"]), (31, "all-linear"), (3, ["o_proj", "up_proj"])]
)
@pytest.mark.parametrize("keep", [Keep.ALL, Keep.ATTENTION, Keep.INPUT])
def test_any_targets_and_ranks_are_counted(keep: Keep, rank: int, targets: Any) -> None:
    decoder, ranks = build(rank, "dense", targets)
    policy = SavePolicy.uniform(4, keep)
    assert forecast(decoder, ranks, policy, 640) == measure(decoder, policy, 640)


def test_mixed_levels_are_counted_layer_by_layer() -> None:
    decoder, ranks = build(8, "dense", "all-linear")
    policy = SavePolicy((Keep.INPUT, Keep.ATTENTION, Keep.PRODUCTS, Keep.ALL))
    assert forecast(decoder, ranks, policy, 512) == measure(decoder, policy, 512)


def test_a_validation_pass_is_counted() -> None:
    decoder, ranks = build(8, "dense", "all-linear")
    row = row_of(decoder, ranks, 600)
    assert evaluation_peak(row) < training_peaks(row, SavePolicy.uniform(4, Keep.INPUT), is_captured=False).allocated


def test_inputs_that_wait_in_host_memory_take_none_on_the_device() -> None:
    decoder, ranks = build(8, "dense", "all-linear")
    row = row_of(decoder, ranks, 4096)
    away, here = (
        training_peaks(row, SavePolicy.uniform(4, keep), is_captured=False).backward
        for keep in (Keep.OFFLOADED, Keep.INPUT)
    )
    # Four inputs at the last layer, against its own and the one that is on its way.
    assert here - away == 2 * row.values(row.spec.hidden_size)


def test_a_captured_row_needs_the_memory_of_both_passes_for_good() -> None:
    decoder, ranks = build(8, "dense", "all-linear")
    row, policy = row_of(decoder, ranks, 600), SavePolicy.uniform(4, Keep.ALL)
    captured = training_peaks(row, policy, is_captured=True)
    assert captured.needed > captured.allocated >= captured.captured
    assert captured.needed > training_peaks(row, policy, is_captured=False).needed


def row_of(
    decoder: Decoder, ranks: LayerRanks, num_tokens: int, longest: int = 0, products: Products = "dense"
) -> FusedRow:
    return FusedRow(
        spec=decoder.spec,
        ranks=ranks,
        num_tokens=num_tokens,
        num_predicted=num_tokens,
        itemsize=2,
        products=products,
        num_parameters=decoder.adapter.parameter.numel(),
        chunk_rows=CHUNK_TOKENS,
        longest=longest,
    )


def forecast(
    decoder: Decoder, ranks: LayerRanks, policy: SavePolicy, num_tokens: int, products: Products = "dense"
) -> int:
    row = row_of(decoder, ranks, num_tokens, products=products)
    # The row's inputs exist before the counting here.
    return training_peaks(row, policy, is_captured=False).allocated - row_inputs_bytes(row)


def test_the_catalog_states_the_kernels_numbers() -> None:
    from affina.catalog import fused_memory, lowest_memory
    from affina.kernels import linear_cross_entropy, swiglu, tiled_cross_entropy

    assert fused_memory.MAX_FOLDED_RANK == swiglu.MAX_FOLDED_RANK
    for shape in ((151_936, 2560), (128_256, 4096), (300, 64)):
        for itemsize in (2, 4):
            workspace = tiled_cross_entropy.workspace_bytes(shape, itemsize)
            assert lowest_memory.head_workspace_bytes(shape, itemsize) == workspace
    for vocabulary in (100, 32_000, 151_936, 10**9):
        for device in ("cpu", "meta"):
            rows = linear_cross_entropy.default_chunk_rows(vocabulary, torch.device(device))
            assert fused_memory.logits_chunk_rows(vocabulary, is_cpu=device == "cpu") == rows


def test_long_documents_send_their_attention_to_the_host_and_get_it_back_one_layer_ahead() -> None:
    decoder, ranks = build(8, "dense", "all-linear")
    policy = SavePolicy.uniform(4, Keep.INPUT)
    short = row_of(decoder, ranks, 4096)
    long = row_of(decoder, ranks, 4096, longest=4096)
    assert (short.num_attention_on_host(policy), long.num_attention_on_host(policy)) == (0, 4)
    of_attention = long.values(long.spec.query_size) + long.scalars(long.spec.num_heads)
    peaks = [training_peaks(row, policy, is_captured=False).backward for row in (short, long)]
    # The next layer's output of attention is on its way while a layer, which makes its own again or has it, works.
    assert peaks[1] - peaks[0] == of_attention
    assert long.num_attention_on_host(SavePolicy.uniform(4, Keep.ALL)) == 0
