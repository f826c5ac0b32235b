"""How long a step takes: operations over the card's dense peaks and bytes over its bandwidth, at measured shares.

    base products   4 · weights · tokens FLOP (forward and input gradient; weights are frozen), more where recomputed
    attention       2 · H K · Σ L² forward for documents of L tokens (causal), 2.5 times as much backward
    adapter         6 · parameters · tokens FLOP in thin products
    head            4 · V · D · supervised tokens
    the rest        bytes that norms, rotations, activations and adapters move
    host            what it needs to launch operations one by one, where they are not captured; the longer one counts

The shares are in assets/coefficients.json, each with the measurement that it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from affina.catalog.formats import weight_bytes
from affina.catalog.fused_memory import MLP_CHUNK_TOKENS
from affina.catalog.gpus import Gpu
from affina.catalog.lowest_memory import tokens_per_part
from affina.catalog.save_policy import Keep
from affina.planning.coefficients import Coefficients
from affina.planning.memory import MemoryPlan
from affina.planning.setup import StepSetup, fused_row


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one optimiser step by part; `micro_seconds` of one micro-batch."""

    products: float
    attention: float
    head: float
    adapter: float
    traffic: float
    expansion: float
    host: float
    micro_seconds: float
    step_seconds: float
    tokens_per_second: float


def plan_time(setup: StepSetup, memory: MemoryPlan, coefficients: Coefficients) -> StepTime | None:
    """The time of a step on the setup's card; None on a CPU, whose speed no catalog knows."""
    gpu = setup.gpu
    if gpu is None:
        return None
    c = coefficients
    tokens = setup.row_tokens
    is_fast = memory.engine == "fast"
    rates = _Rates(gpu, setup, c, is_fast=is_fast)
    again = _recomputed(setup, memory)
    weights = setup.shape.linear_weights
    products = (_factor(setup) * weights + 2 * weights * again.products) * tokens / rates.gemm(tokens)
    square = sum(length * length for length in setup.documents)
    forward = 2 * setup.shape.query_size * square * setup.shape.num_layers
    attention = forward * (3.5 + again.attention) / rates.attention
    beside = 0 if setup.trains_weights else setup.num_trainable
    adapter = 6 * beside * (1 + again.share / 3) * tokens / rates.adapter
    head = 4 * setup.shape.embedding_parameters * setup.predicted / rates.head
    head += 10 * setup.shape.vocabulary_size * setup.predicted / rates.traffic
    traffic = _bytes_moved(setup) * (1 + again.share / 3) * tokens / rates.traffic
    traffic *= 1 if is_fast else c.reference_traffic
    passes = 2 + again.share
    expansion = 0.0 if setup.products != "expanded" and is_fast else _expansion_bytes(setup) * passes / rates.traffic
    host = _host_seconds(setup, memory, c)
    busy = (products + attention + adapter + head + traffic + expansion) * c.overhead
    micro = max(busy, host) * c.time_factor
    step = micro * setup.micro_batches
    return StepTime(
        products,
        attention,
        head,
        adapter,
        traffic,
        expansion,
        host,
        micro,
        step,
        tokens / micro,
    )


def _factor(setup: StepSetup) -> float:
    """FLOP of the base's products per weight and token: 2 forward, 2 for the input's gradient, 2 for the weight's."""
    if not setup.trains_weights:
        return 4.0
    memory = setup.method_memory
    assert memory is not None
    share = 1.0 if memory.num_layers is None else memory.num_layers / setup.shape.num_layers
    return 2.0 + 4.0 * share


@dataclass(frozen=True, slots=True)
class _Again:
    """What is computed a second time: shares of the forward products, of attention, of all layers."""

    products: float
    attention: float
    share: float


def _recomputed(setup: StepSetup, memory: MemoryPlan) -> _Again:
    if memory.choice is None:
        return _Again(1.0, 1.0, 1.0) if memory.recomputes else _Again(0.0, 0.0, 0.0)
    weights = {linear.name: linear.num_weights for linear in setup.shape.linears}
    total = sum(weights.values())
    qkv = weights["q_proj"] + weights["k_proj"] + weights["v_proj"]
    gate_up = weights["gate_proj"] + weights["up_proj"]
    of_level = {
        Keep.PARTS: total,
        Keep.OFFLOADED: total - weights["down_proj"],
        Keep.INPUT: total - weights["down_proj"],
        Keep.ATTENTION: qkv + gate_up,
        Keep.PROJECTIONS: gate_up,
        Keep.PRODUCTS: 0,
        Keep.ALL: 0,
    }
    layers = memory.choice.policy.layers
    on_host = fused_row(setup).num_attention_on_host(memory.choice.policy)
    attended = max(sum(keep <= Keep.INPUT for keep in layers) - on_host, 0) / len(layers)
    products = sum(of_level[keep] for keep in layers) / (total * len(layers))
    return _Again(products, attended, products)


def _host_seconds(setup: StepSetup, memory: MemoryPlan, c: Coefficients) -> float:
    """Of the host, to launch a micro-batch operation by operation; 0 where rows are captured.

    In units of a layer's two passes with everything kept. A layer that is computed again from its input launches its
    forward pass twice and its MLP for every `MLP_CHUNK_TOKENS`; one in parts everything for every part, the
    projections of q, k, v a third time.
    """
    if memory.choice is None:
        return c.layer_seconds_reference * (2 if memory.recomputes else 1) * setup.shape.num_layers
    if memory.choice.is_captured:
        return 0.0
    chunks = math.ceil(setup.row_tokens / MLP_CHUNK_TOKENS)
    parts = math.ceil(setup.row_tokens / tokens_per_part(setup.row_tokens))
    units = {Keep.PARTS: 1 + 1.5 * parts, Keep.OFFLOADED: 0.8 + 0.5 * chunks, Keep.INPUT: 0.8 + 0.5 * chunks}
    return c.layer_seconds_fast * sum(units.get(keep, 1.0) for keep in memory.choice.policy.layers)


class _Rates:
    """FLOP and bytes per second that the card reaches."""

    def __init__(self, gpu: Gpu, setup: StepSetup, c: Coefficients, *, is_fast: bool) -> None:
        clock = 1.0 if gpu.tdp_watts >= 300 else c.small_card_share
        peak = {"bf16": gpu.tflops_bf16 or gpu.tflops_fp16, "fp16": gpu.tflops_fp16}.get(setup.precision)
        # float32 runs on the ordinary units, at about an eighth of the 16-bit matrix units
        sixteen = (peak if peak is not None else gpu.tflops_fp16 / 8) * 1e12 * clock
        self._half = c.gemm_half_tokens
        self._gemm = sixteen * (c.gemm_share if is_fast else c.reference_gemm_share)
        if is_fast and setup.products == "fp8" and gpu.tflops_fp8 is not None:
            self._gemm = gpu.tflops_fp8 * 1e12 * clock * c.gemm_share_fp8
        self.attention = sixteen * c.attention_share
        self.adapter = sixteen * c.adapter_share
        self.head = sixteen * c.head_share
        self.traffic = gpu.bandwidth_gb_s * 1e9 * c.traffic_share

    def gemm(self, tokens: int) -> float:
        """Small rows leave the matrix units waiting."""
        return self._gemm * tokens / (tokens + self._half)


def _bytes_moved(setup: StepSetup) -> float:
    """Of one token through all layers, both passes, beside products: norms and residuals, the activation, adapters."""
    shape = setup.shape
    rows = (30 * shape.hidden_size + 12 * shape.intermediate_size) * setup.itemsize
    method = setup.method_memory
    if method is not None:
        return (rows + 2 * method.token) * shape.num_layers
    adapters = 2 * setup.itemsize * setup.num_trainable / max(setup.adapter.rank, 1) / shape.num_layers
    return (rows + adapters) * shape.num_layers


def _expansion_bytes(setup: StepSetup) -> int:
    """Read and written when every quantised weight is expanded once."""
    return sum(
        weight_bytes(
            format,
            linear.out_features,
            linear.in_features,
            itemsize=setup.itemsize,
            double_quantization=setup.double_quantization,
        )
        * linear.count
        + linear.num_weights * setup.itemsize
        for linear, format, _ in setup.linears
        if format != "none"
    )
