"""A decoder layer in the least memory: whatever no other token sees is computed part by part.

Of a layer only attention looks across tokens. All else (norms, projections, rotation, the MLP, and their gradients) is
computed for `RowContext.part_tokens` tokens at once, so that its memory does not grow with the row. What grows, in
bytes per token of Qwen3-4B in 16 bits:

    forward     x 5,120; q, k, v rotated 12,288; o 8,192 + log-sum-exp 128; then x₃ instead of q, k, v; what the layer
                before sends to the host, its x and for long documents its o
    backward    ∂stream 5,248, x, q, k, v, o while the MLP's gradient is made; then, for attention's gradient, some
                heads at a time: their gradients of o, q, k, v and copies of their o, written back over q, k, v

The products of q, k, v are made a second time at the end of the backward pass (the norm's gradient needs what was
before it); between, only the rotated heads are there. That is 5% more arithmetic than `DecoderLayer.backward` on an
input, for two thirds of its memory: `catalog/lowest_memory.py` has the sums, and a test measures them.

Same legend and same functions as layer.py; results differ from its by the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from affina.catalog.lowest_memory import num_head_groups
from affina.kernels.attention import AttentionResult, attention, attention_backward
from affina.kernels.qk_rope import qk_rope, qk_rope_backward
from affina.kernels.rms_norm import add_rows
from affina.models.fast.layer import DecoderLayer, Pending, RowContext, Saved, joined
from affina.models.fast.linear import Operand
from affina.models.fast.parameters import FlatPart

Heads = tuple[Tensor, Tensor, Tensor]
"""Rotated q [T, H, K], k [T, G, K] and v [T, G, K]."""


def forward(layer: DecoderLayer, before: Pending, row: RowContext, *, keeps_attention: bool) -> tuple[Pending, Saved]:
    """x → (x₃, its last sum made; x, t of the down projection and, if wanted, what attention keeps)"""
    saved, h = layer.normed_input(before)
    before.settle(saved.x)
    heads = _rotated(layer, h, row)
    del h
    attended = attention(*heads, row.segments, scale=layer.spec.attention_scale, window=layer.window)
    del heads
    x3 = torch.empty_like(saved.x)
    ts = []
    for part in row.parts():
        x2, h, _, _ = _attention_added(layer, saved.x[part], attended, part, row)
        update, _, _, t = layer.mlp(h, row)
        add_rows(x2, update, lora=layer.row_update(layer.down, t, row), out=x3[part])
        ts.append(t)
    t_down = joined(ts)
    return Pending(x3), Saved(saved.x, t_down=t_down, attended=attended if keeps_attention else None)


def backward(
    layer: DecoderLayer,
    stream: Tensor,
    saved: Saved,
    row: RowContext,
    gradient: FlatPart,
    *,
    is_first: bool,
    before_tail: Callable[[], None],
) -> None:
    """∂x₃ → ∂x, written over it, as `DecoderLayer.backward`.

    before_tail: called when the layer's largest moment is over and the next input may be fetched
    """
    x = saved.x
    h, _ = layer.normed(x, layer.input_norm, layer.qkv)
    heads = _rotated(layer, h, row)
    del h
    attended = saved.attended
    if attended is None:
        attended = attention(*heads, row.segments, scale=layer.spec.attention_scale, window=layer.window)
    for part in row.parts():
        _mlp_backward(layer, stream[part], saved, attended, part, row, gradient)
    _attention_backward(layer, stream, heads, attended, row)
    saved.attended = attended = None
    before_tail()
    for part in row.parts():
        _projection_backward(layer, stream[part], x[part], heads, part, row, gradient, is_first=is_first)


def _rotated(layer: DecoderLayer, h: Operand, row: RowContext) -> Heads:
    """h₁ → q, k, v, norm and rotation done."""
    spec, values = layer.spec, h.values
    if values.shape[0] <= row.part_tokens:
        return _rotated_part(layer, h, slice(None), row)
    q = values.new_empty(values.shape[0], spec.num_heads, spec.head_dim)
    k, v = (values.new_empty(values.shape[0], spec.num_kv_heads, spec.head_dim) for _ in range(2))
    for part in row.parts():
        q[part], k[part], v[part] = _rotated_part(layer, h.part(part), part, row)
    return q, k, v


def _rotated_part(layer: DecoderLayer, h: Operand, part: slice, row: RowContext) -> Heads:
    """h₁ of some tokens → their q, k, v."""
    qkv, t = layer.qkv.forward(h, row.flat, is_wide=True, folds=layer.folds)
    products = qkv[:, : layer.qkv.num_outputs]
    cos, sin, update = row.cos[part], row.sin[part], layer.qkv_update(t, row)
    if update is not None:
        return qk_rope(products, cos, sin, **layer.rope_options(), lora=update)
    q, k = qk_rope(products, cos, sin, **layer.rope_options())
    values = products[:, layer.spec.query_size + layer.spec.key_value_size :]
    # Copied, so that the products need not be kept for them.
    return q, k, values.contiguous().view(-1, layer.spec.num_kv_heads, layer.spec.head_dim)


def _attention_added(
    layer: DecoderLayer, x: Tensor, attended: AttentionResult, part: slice, row: RowContext
) -> tuple[Tensor, Operand, Tensor, Tensor | None]:
    """x and o of some tokens → (x₂, its norm h₂, the norm's factors, t of the output projection)"""
    update, t = layer.output.forward(Operand(attended.output[part].flatten(1)), row.flat, folds=layer.folds)
    lora = layer.row_update(layer.output, t, row)
    x2, h, rstd = layer.normed_sum(x, update, lora, layer.mlp_norm, layer.gate_up)
    return x2, h, rstd, t


def _mlp_backward(
    layer: DecoderLayer,
    stream: Tensor,
    saved: Saved,
    attended: AttentionResult,
    part: slice,
    row: RowContext,
    gradient: FlatPart,
) -> None:
    """∂x₃ of some tokens → ∂x₂ in its place, with u of the output projection beside it."""
    accumulates = part.start > 0
    x2, h, rstd2, t_o = _attention_added(layer, saved.x[part], attended, part, row)
    t_down = saved.t_down[part] if saved.t_down is not None else None
    again = layer.mlp_again(x2, h, rstd2, t_down, row)
    del x2, h
    layer.mlp_backward(stream, again, row, gradient, accumulates=accumulates)
    output = layer.output
    u = output.rank_gradient(output.wide(stream), t_o, row.flat, gradient, accumulates=accumulates)
    output.a_gradient(u, attended.output[part].flatten(1), gradient, accumulates=accumulates)


def _attention_backward(
    layer: DecoderLayer, stream: Tensor, heads: Heads, attended: AttentionResult, row: RowContext
) -> None:
    """∂x₂ → gradients of the rotated q, k, v, written over them, group by group."""
    spec, output = layer.spec, layer.output
    wide = output.wide(stream)
    # Beside the stream already, but for formats without room for it.
    u = None if output.num_extra or output.merges else output.rank_gradient(wide, None, row.flat, None)
    count = num_head_groups(spec.num_kv_heads)
    num_queries, num_keys = spec.num_heads // count, spec.num_kv_heads // count
    for group in range(count):
        of_queries = slice(group * num_queries, (group + 1) * num_queries)
        of_keys = slice(group * num_keys, (group + 1) * num_keys)
        columns = slice(of_queries.start * spec.head_dim, of_queries.stop * spec.head_dim)
        own = (heads[0][:, of_queries], heads[1][:, of_keys], heads[2][:, of_keys])
        grad_heads = output.input_gradient(wide, u, row.flat, columns=columns).view(own[0].shape)
        _group_backward(layer, grad_heads, own, attended.of_heads(of_queries), row)
        del grad_heads


def _group_backward(
    layer: DecoderLayer, grad_heads: Tensor, heads: Heads, attended: AttentionResult, row: RowContext
) -> None:
    """∂o of some heads → gradients of their q, k, v, written over them."""
    gradients = attention_backward(
        grad_heads, *heads, attended, row.segments, scale=layer.spec.attention_scale, window=layer.window
    )
    for target, source in zip(heads, gradients, strict=True):
        target.copy_(source)


def _projection_backward(
    layer: DecoderLayer,
    stream: Tensor,
    x: Tensor,
    gradients: Heads,
    part: slice,
    row: RowContext,
    gradient: FlatPart,
    *,
    is_first: bool,
) -> None:
    """Gradients of the rotated q, k, v of some tokens and ∂x₂ → ∂x, in its place."""
    h, rstd = layer.normed(x, layer.input_norm, layer.qkv)
    qkv, t = layer.qkv.forward(h, row.flat, is_wide=True, folds=layer.folds)
    del h
    products = qkv[:, : layer.qkv.num_outputs]
    grad_q, grad_k, grad_v = (own[part] for own in gradients)
    qk_rope_backward(
        grad_q,
        grad_k,
        grad_v,
        products,
        row.cos[part],
        row.sin[part],
        **layer.rope_options(),
        out=products,
        lora=layer.qkv_update(t, row),
    )
    layer.input_backward(qkv, t, x, rstd, stream, row, gradient, is_first=is_first, accumulates=part.start > 0)
