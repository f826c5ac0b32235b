"""What the reference engine (transformers' forward, PEFT's layers, autograd) holds in a training step, in bytes.

Per token and layer autograd keeps, in tensors of the activation's type unless said otherwise (n bytes each):

    x, h₁ = norm(x), x₂, h₂ = norm(x₂)    each norm's input in float32 and its output        D
    q, k with a norm of their own         that norm's input in float32                       Q, G
    q, k after rotation, v, o             for attention; o twice where its layout is changed  Q, G
    gate, up, silu(gate), their product                                                       I
    t = x Aᵀ of every adapter                                                                  R

With n = 2 and Qwen3-4B that is 158,216 bytes. The counts are those of the traced step (`trace`), which equals real
execution byte for byte; tests compare this file with it for several shapes. (PEFT as it comes keeps
174,472: it casts copies for the adapters.) On a GPU attention is FlashAttention's on variable lengths, which in
torch 2.11 wants keys and values repeated for every query head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from affina.catalog.fused_choice import RESERVE_SHARE, WORKSPACE_BYTES, StepDemand
from affina.catalog.fused_memory import chunk_bytes
from affina.catalog.method_memory import MethodMemory
from affina.catalog.save_policy import LayerRanks
from affina.catalog.shapes import ModelShape

Attention = Literal["cpu", "varlen", "efficient"]
"""SDPA by document on a CPU; FlashAttention on variable lengths; SDPA's memory-efficient kernel before Ampere."""


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """What the bytes of one micro-batch follow from.

    num_tokens, num_predicted: T, and how many of them predict a supervised one
    ranks:          of a layer's adapters            num_parameters: of the whole adapter
    dropped_inputs: Σ inputs of a layer's adapted linear layers where the adapter has dropout, else 0
    chunk_rows:     rows of logits at once
    longest:        tokens of the longest sample, which only a mask's size depends on
    expands:        weights are quantised, so that one at a time is expanded for its product
    method:         what another method than LoRA holds in place of its ranks and inputs; None: LoRA
    """

    shape: ModelShape
    num_tokens: int
    num_predicted: int
    itemsize: int
    attention: Attention
    ranks: LayerRanks
    num_parameters: int
    chunk_rows: int
    dropped_inputs: int = 0
    longest: int = 0
    expands: bool = False
    method: MethodMemory | None = None


@dataclass(frozen=True, slots=True)
class ReferencePeaks:
    """kept: by autograd between the passes; head, layer: the busiest moments of the step, `kept` included."""

    kept: int
    head: int
    layer: int

    @property
    def peak(self) -> int:
        return max(self.head, self.layer)


def kept_bytes_per_token(row: ReferenceRow) -> int:
    """Of one layer, without recomputation."""
    shape, n = row.shape, row.itemsize
    hidden, query, key_value = shape.hidden_size, shape.query_size, shape.key_value_size
    norms = 2 * 4 * hidden + 2 * 4
    qk_norms = (4 * (query + key_value) + 4 * (shape.num_heads + shape.num_kv_heads)) if shape.has_qk_norm else 0
    mlp = 3 * n * shape.intermediate_size
    adapter = n * row.ranks.total + _adapter_inputs(row) if row.method is None else row.method.token
    return norms + qk_norms + mlp + _attention_bytes(row) + adapter


def _passed_over_per_token(row: ReferenceRow) -> int:
    """Of the first layer, what is not kept because nothing below it is trained."""
    shape, n, part = row.shape, row.itemsize, row.method.passed_over if row.method is not None else None
    if part is None:
        return 0
    hidden, query, key_value = shape.hidden_size, shape.query_size, shape.key_value_size
    qk_norms = (4 * (query + key_value) + 4 * (shape.num_heads + shape.num_kv_heads)) if shape.has_qk_norm else 0
    attention = 4 * hidden + 4 + qk_norms + _attention_bytes(row)
    return attention + (4 * hidden + 4 + 3 * n * shape.intermediate_size if part == "mlp" else 0)


def _adapter_inputs(row: ReferenceRow) -> int:
    """What A is multiplied with: h₁, o where attention does not keep the same tensor, h₂, the activation; or, with
    dropout, each layer's own dropped copy and its mask, which a CPU keeps as numbers and a GPU in a byte."""
    shape, n, ranks = row.shape, row.itemsize, row.ranks
    if row.dropped_inputs:
        return row.dropped_inputs * (n + (n if row.attention == "cpu" else 1))
    hidden = (bool(ranks.qkv) + bool(ranks.gate_up)) * shape.hidden_size
    output = shape.query_size if ranks.output and row.attention != "varlen" else 0
    return n * (hidden + output + bool(ranks.down) * shape.intermediate_size)


def _attention_bytes(row: ReferenceRow) -> int:
    shape, n = row.shape, row.itemsize
    query, key_value = shape.query_size, shape.key_value_size
    log_sum_exp = 4 * shape.num_heads
    if row.attention == "cpu":
        return n * (2 * query + 2 * key_value) + log_sum_exp
    is_repeated = shape.num_heads != shape.num_kv_heads
    keys_and_values = 2 * query if is_repeated else 2 * key_value
    return n * (2 * query + keys_and_values) + log_sum_exp


def reference_peaks(row: ReferenceRow, *, recompute: bool, accumulates: bool = False) -> ReferencePeaks:
    """Activations and workspace of one micro-batch, beside weights, adapter, gradients and optimiser.

    accumulates: gradients of an earlier micro-batch are there, and counted elsewhere; new ones are added to them
    """
    shape, n, tokens = row.shape, row.itemsize, row.num_tokens
    hidden = shape.hidden_size
    method = row.method or _LORA
    layer = kept_bytes_per_token(row) * tokens + method.layer + method.pair * tokens * row.longest
    num_layers = shape.num_layers if method.num_layers is None else method.num_layers
    shared = tokens * (3 * 8 + 2 * n * shape.head_dim)  # ids, labels, positions; cosines and sines
    # 16-bit copies of the adapter, which autograd keeps; when recomputing, of one layer at a time
    copies = row.num_parameters * method.copies // (shape.num_layers if recompute else 1) if n == 2 else 0
    kept = num_layers * (n * hidden * tokens if recompute else layer) + shared + copies
    if not recompute:
        kept -= _passed_over_per_token(row) * tokens
    # In a layer's backward pass: the gradients of its output and of two tensors of the MLP
    working = tokens * n * (hidden + 2 * shape.intermediate_size) + expanded_bytes(row)
    working += method.working + method.working_token * tokens
    if recompute:
        working += layer
        if row.method is not None:
            working += 5 * n * hidden * tokens  # between a method's own layers; as much as was counted of any
    if n == 4:
        working -= tokens * n * hidden  # the layer's input is its own float32 copy
    head = kept + _head_bytes(row, recompute=recompute) + method.vocabulary
    if row.method is not None and n == 2:
        head += 4 * hidden * tokens  # the final norm's input in float32, which the last layer does not share
    # Where weights are trained their gradients pile up while what is kept goes: the last layer sees all of them.
    gradients = row.num_parameters * 4 + method.vocabulary if method.trains_weights and not accumulates else 0
    return ReferencePeaks(kept, head, max(kept, gradients) + working)


_LORA = MethodMemory()


def _head_bytes(row: ReferenceRow, *, recompute: bool) -> int:
    """The loss: the final norm and its result with a chunk of logits; or the scaling of their gradient."""
    hidden, n, count = row.shape.hidden_size, row.itemsize, row.num_predicted
    # The final norm's input in float32 is the last layer's too, unless that one is recomputed.
    body = row.num_tokens * hidden * (2 * n + (4 if recompute else 0))
    scaling = row.num_tokens * hidden * (4 + 2 * n) + count * hidden * (8 + 2 * n) if n == 2 else 0
    return max(body + logits_bytes(row, has_gradient=True), scaling)


def logits_bytes(row: ReferenceRow, *, has_gradient: bool) -> int:
    """Of a chunk of logits in float32, with its errors and those of the chunk before."""
    vocabulary = row.shape.vocabulary_size
    return chunk_bytes(row.num_predicted, row.chunk_rows, vocabulary, row.itemsize, has_gradient=has_gradient)


def expanded_bytes(row: ReferenceRow) -> int:
    """The largest quantised weight, expanded for one product."""
    if not row.expands:
        return 0
    return max(linear.out_features * linear.in_features for linear in row.shape.linears) * row.itemsize


def reference_evaluation_bytes(row: ReferenceRow) -> int:
    """Of a forward pass without gradients: one layer's MLP, or a chunk of logits."""
    shape, n, tokens = row.shape, row.itemsize, row.num_tokens
    layer = tokens * (n * (3 * shape.hidden_size + 3 * shape.intermediate_size) + 4 * shape.hidden_size)
    head = tokens * shape.hidden_size * (4 + 3 * n) + logits_bytes(row, has_gradient=False)
    return max(layer + expanded_bytes(row), head)


def reference_step_bytes(row: ReferenceRow, demand: StepDemand, *, recompute: bool, on_gpu: bool) -> int:
    """Bytes of a run's steps beside weights and adapter parameters, optimiser included.

    A micro-batch's own gradients appear while what is kept goes; those of an earlier one are there throughout.
    """
    gradient = row.num_parameters * 4
    step = reference_peaks(row, recompute=recompute, accumulates=demand.accumulates).peak + (
        gradient if demand.accumulates else 0
    )
    validation = reference_evaluation_bytes(row) if demand.validates else 0
    return max(step, gradient, validation) + demand.optimizer_bytes + (2 * WORKSPACE_BYTES if on_gpu else 0)


def wants_recomputation(row: ReferenceRow, demand: StepDemand, *, free_bytes: int, on_gpu: bool) -> bool:
    """Whether the step does not fit into what is free unless activations are recomputed."""
    needed = reference_step_bytes(row, demand, recompute=False, on_gpu=on_gpu)
    return needed > free_bytes * (1 - RESERVE_SHARE)
