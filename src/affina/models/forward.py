"""From a batch to a loss: body, then the head only where a token is supervised.

Two layouts give the same loss. *Packed* runs the row [1, T] as it is; attention is told where documents end. *Rows*
unpacks the documents into [S, L] with padding on the right and a mask; it is slower, and it is right for every
architecture, state-space models included, because nothing crosses from one row to another. `isolation_of(model)` finds
out, on two short documents, which one a model can do.

    hidden = body(input_ids, position_ids, documents)                 [T, D]
    rows   = positions t whose next label is supervised               labels[t+1] ≠ −100
    loss   = Σ cross-entropy(head(hidden[rows]), labels[rows + 1])    float32

Labels are shifted over the whole row; the first label of every document is ignored by contract, hence no document
predicts the next one's first token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from affina.errors import ModelError
from affina.kernels.linear_cross_entropy import linear_token_losses
from affina.kernels.linear_row_losses import RowLosses, linear_logits, linear_row_losses
from affina.kernels.logits import ExpandableRows
from affina.kernels.packed_attention import Documents
from affina.models.adapters.trained_weights import trained_weights_of
from affina.models.attention import PACKED_ATTENTION, use_packed_attention, without_masks
from affina.models.engines import engine_of
from affina.models.structure import Head, base_model_of, body_of, head_of, text_config
from affina.models.virtual_tokens import VirtualTokens, virtual_tokens_of

IGNORED_LABEL = -100
Layout = Literal["packed", "rows"]


class Batch(Protocol):
    """What `affina.data.collate` makes: one row of documents laid end to end.

    input_ids, labels, position_ids: [T] int64     cu_seqlens: [S+1] int32, from 0 to T
    lengths:        differences of cu_seqlens as Python numbers, so that nobody waits for a GPU to know them
    num_supervised: number of labels that are not -100
    """

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def position_ids(self) -> Tensor: ...
    @property
    def cu_seqlens(self) -> Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def num_supervised(self) -> int: ...


class ScoredBatch(Batch, Protocol):
    """A batch that knows how many tokens of each document are supervised: [S]."""

    @property
    def supervised_lengths(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Isolation:
    """How documents of one row are kept apart in a model, and why.

    layout:     "packed", or "rows" for models whose documents would see each other
    reason:     one sentence for the user
    difference: of hidden states between documents in one row and apart, RMS in units of their spread
    """

    layout: Layout
    reason: str
    difference: float


def supervised_loss(model: nn.Module, batch: Batch, *, layout: Layout | None = None) -> tuple[Tensor, int]:
    """(sum of the cross-entropies as a float32 scalar, number of supervised tokens) of one batch.

    Gradients reach whatever in `model` requires them, or the parameters of the engine that is attached to it
    (models/engines.py). `layout` defaults to what `isolation_of(model)` found; naming one asks for the reference.
    """
    engine = engine_of(model) if layout is None else None
    if engine is not None and engine.is_active:
        return engine.supervised_loss(batch), batch.num_supervised
    return supervised_losses(model, batch, layout=layout).sum(), batch.num_supervised


def document_log_probabilities(model: nn.Module, batch: ScoredBatch, *, layout: Layout | None = None) -> Tensor:
    """[S] float32: Σ log p(supervised token | what is before it), of every document of the row; 0 where none is.

    By the reference path, with gradients for whatever in `model` requires them. The logits of a chunk of tokens exist
    at a time, never those of the row.
    """
    losses = supervised_losses(model, batch, layout=layout)
    # Added up document by document and not by index, so that a GPU adds in the same order every time.
    parts = torch.split(losses, list(batch.supervised_lengths))
    return -torch.stack([part.sum() for part in parts])


def supervised_losses(model: nn.Module, batch: Batch, *, layout: Layout | None = None) -> Tensor:
    """[N] float32: cross-entropy of each supervised token, in the order of the row, with gradients."""
    return _losses_of(model, _selected_hidden(model, batch, layout))


def supervised_row_losses(
    model: nn.Module, batch: Batch, row_losses: RowLosses, *, layout: Layout | None = None
) -> Tensor:
    """[N] float32: `row_losses` of the logits that predict each supervised token, with gradients.

    row_losses: gets the logits of a chunk of these tokens and says which they are; see kernels/linear_row_losses.py
    """
    selected = _selected_hidden(model, batch, layout)
    head = verified_head(model)
    if head is None:
        logits = _logits_by_module(model, selected.hidden)
        return row_losses(logits, slice(0, logits.shape[0]))
    hidden, weight = _at_head(model, selected.hidden, head)
    return linear_row_losses(hidden, weight, row_losses, **head.options)


@torch.no_grad()
def supervised_logits_reader(
    model: nn.Module, batch: Batch, *, layout: Layout | None = None
) -> Callable[[slice], Tensor]:
    """A function that computes the float32 logits that predict the supervised tokens of a slice; no gradient."""
    selected = _selected_hidden(model, batch, layout)
    head = verified_head(model)

    @torch.no_grad()
    def read(part: slice) -> Tensor:
        if head is None:
            return _logits_by_module(model, selected.hidden[part])
        hidden, weight = _at_head(model, selected.hidden[part], head)
        return linear_logits(hidden, weight, **head.options)

    return read


def last_hidden_states(model: nn.Module, batch: Batch, *, layout: Layout | None = None) -> Tensor:
    """[S, D] the body's output for the last token of every document of the row."""
    ends = batch.cu_seqlens[1:].long() - 1
    return hidden_states(model, batch, layout=layout).index_select(0, ends)


@torch.no_grad()
def supervised_token_losses(model: nn.Module, batch: Batch, *, layout: Layout | None = None) -> Tensor:
    """[T] float32: cross-entropy of each supervised token at its own position, 0 elsewhere; no gradient."""
    selected = _selected_hidden(model, batch, layout)
    losses = _losses_of(model, selected)
    result = torch.zeros(batch.labels.shape[0], dtype=torch.float32, device=losses.device)
    result[selected.positions + 1] = losses
    return result


def hidden_states(model: nn.Module, batch: Batch, *, layout: Layout | None = None) -> Tensor:
    """[T, D] the body's output for every token of the row, each document seeing only itself."""
    layout = layout or isolation_of(model).layout
    base = base_model_of(model)
    if layout == "packed":
        return _packed_hidden(model, base, batch)
    rows = _to_rows(batch, range(len(batch.lengths)))
    hidden = _rows_hidden(model, base, rows)
    return hidden.reshape(-1, hidden.shape[-1])[rows.flat_index]


def compute_context(model: nn.Module) -> torch.autocast | nullcontext[None]:
    """Autocast to the base model's 16-bit type where float32 adapters meet it, nothing otherwise.

    Adapters are float32 masters. PEFT would cast, and keep, a float32 copy of every layer's input for them: 226
    instead of 151 KiB per token and layer on Qwen3-4B. Under autocast it is the small matrices that are cast.
    """
    dtype = compute_dtype_of(model)
    if dtype not in (torch.float16, torch.bfloat16) or not _has_float32_parameters(model):
        return nullcontext()
    return torch.autocast(base_model_of(model).device.type, dtype=dtype)


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """The type of the forward pass: the base's, or, where the base's own weights are trained in float32, what it
    was."""
    trained = trained_weights_of(model)
    dtype: torch.dtype = trained.compute_dtype if trained is not None else base_model_of(model).dtype
    return dtype


# Packed rows
# -----------------------------------------------------------------------------------------------------------


def _packed_hidden(model: nn.Module, base: PreTrainedModel, batch: Batch) -> Tensor:
    body = body_of(base)
    assert body is not None, "a packed row needs a body"
    if base.config._attn_implementation != PACKED_ATTENTION:
        use_packed_attention(base)
    documents = Documents.of(batch.cu_seqlens, batch.lengths)
    with compute_context(model), without_masks():
        output = body(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            documents=documents,
        )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


# Padded rows
# -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Rows:
    """Documents below each other.

    input_ids, attention_mask, position_ids: [S, L], padded on the right
    flat_index: [T'] position of each of their tokens in the flattened [S · L]
    row_index:  [T'] its position in the packed row
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    flat_index: Tensor
    row_index: Tensor


def _to_rows(batch: Batch, which: range | list[int]) -> _Rows:
    bounds = [0, *accumulate(batch.lengths)]
    chosen = [(bounds[index], bounds[index + 1]) for index in which if batch.lengths[index] > 0]
    device = batch.input_ids.device
    width = max((end - start for start, end in chosen), default=1)
    lengths = torch.tensor([end - start for start, end in chosen], device=device)
    starts = torch.tensor([start for start, _ in chosen], device=device)
    column = torch.arange(width, device=device)
    is_token = column < lengths.unsqueeze(1)
    source = (starts.unsqueeze(1) + column).clamp(max=batch.input_ids.shape[0] - 1)
    return _Rows(
        input_ids=torch.where(is_token, batch.input_ids[source], 0),
        attention_mask=is_token.long(),
        position_ids=column.expand(len(chosen), -1),
        flat_index=is_token.reshape(-1).nonzero().squeeze(1),
        row_index=source[is_token],
    )


def _rows_hidden(model: nn.Module, base: PreTrainedModel, rows: _Rows) -> Tensor:
    """[S, L, D]"""
    body = body_of(base)
    virtual = virtual_tokens_of(model)
    options = {"position_ids": rows.position_ids} if _takes(body or base, "position_ids") else {}
    with compute_context(model):
        if virtual is not None:
            return _rows_after_virtual_tokens(virtual, base, body, rows)
        if body is not None:
            output = body(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False, **options)
            hidden: Tensor = output.last_hidden_state
            return hidden
        output = base(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            use_cache=False,
            output_hidden_states=True,
            **options,
        )
        last: Tensor = output.hidden_states[-1]
        return last


def _rows_after_virtual_tokens(
    virtual: VirtualTokens, base: PreTrainedModel, body: nn.Module | None, rows: _Rows
) -> Tensor:
    """[S, L, D] of the samples' own tokens, each row with the virtual tokens before them."""
    if body is None:
        raise ModelError(
            "adapter-unsupported",
            f"virtual tokens cannot be put before the samples of {type(base).__name__}",
            why="its body cannot be told from its head",
            fix="write `adapter: lora`",
        )
    count, size = virtual.count, rows.input_ids.shape[0]
    mask = torch.cat([rows.attention_mask.new_ones(size, count), rows.attention_mask], dim=1)
    positions = torch.arange(count + rows.input_ids.shape[1], device=mask.device).expand(size, -1)
    if virtual.is_prefix:
        output = body(
            input_ids=rows.input_ids,
            attention_mask=mask,
            position_ids=positions[:, count:],
            past_key_values=virtual.cache(size),
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden
    output = body(
        inputs_embeds=virtual.embeddings(rows.input_ids), attention_mask=mask, position_ids=positions, use_cache=False
    )
    after: Tensor = output.last_hidden_state[:, count:]
    return after


# The head, where it is needed
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Selected:
    """hidden: [N, D] of the tokens that predict a supervised one; targets: [N] those labels; positions: [N] in the
    row."""

    hidden: Tensor
    targets: Tensor
    positions: Tensor


def _selected_hidden(model: nn.Module, batch: Batch, layout: Layout | None) -> _Selected:
    layout = layout or isolation_of(model).layout
    positions = predicting_positions(batch)
    targets = batch.labels[positions + 1]
    if layout == "packed":
        hidden = hidden_states(model, batch, layout=layout)
        return _Selected(hidden.index_select(0, positions), targets, positions)
    base = base_model_of(model)
    supervised = batch.labels != IGNORED_LABEL
    bounds = [0, *accumulate(batch.lengths)]
    which = [i for i in range(len(bounds) - 1) if bool(supervised[bounds[i] : bounds[i + 1]].any())]
    if not which:
        which = [0]
    rows = _to_rows(batch, which)
    hidden = _rows_hidden(model, base, rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    place = torch.zeros_like(batch.labels)
    place[rows.row_index] = rows.flat_index
    return _Selected(flat.index_select(0, place[positions]), targets, positions)


def predicting_positions(batch: Batch) -> Tensor:
    """[N] int64 positions t with a supervised label at t + 1. N is known, so a GPU is not waited for."""
    supervised = batch.labels[1:] != IGNORED_LABEL
    return torch.nonzero_static(supervised, size=batch.num_supervised).squeeze(1)


def _losses_of(model: nn.Module, selected: _Selected) -> Tensor:
    """[N] float32"""
    head = verified_head(model)
    if head is None:
        logits = _logits_by_module(model, selected.hidden)
        return nn.functional.cross_entropy(logits, selected.targets, reduction="none")
    hidden, weight = _at_head(model, selected.hidden, head)
    return linear_token_losses(hidden, weight, selected.targets, **head.options)


def _at_head(model: nn.Module, hidden: Tensor, head: Head) -> tuple[Tensor, Tensor | ExpandableRows]:
    """What the kernels multiply: a norm that is trained in float32 hands its type on, and the head of a 16-bit model
    would be copied into it whole."""
    dtype = head.weight.dtype if isinstance(head.weight, Tensor) else compute_dtype_of(model)
    return hidden.to(dtype), head.weight


def _logits_by_module(model: nn.Module, hidden: Tensor) -> Tensor:
    """[N, V] float32 by the head module itself, for heads that `head_of` cannot describe (quantised, adapted)."""
    base = base_model_of(model)
    layer = base.get_output_embeddings()
    assert layer is not None
    with compute_context(model):
        logits: Tensor = layer(hidden)
    config = text_config(base)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (softcap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.float()


# What was found out about a model, once
# --------------------------------------------------------------------------------

_HEADS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
_ISOLATIONS: WeakKeyDictionary[nn.Module, Isolation] = WeakKeyDictionary()
_PROBE_LENGTH = 9


def verified_head(model: nn.Module) -> Head | None:
    """The head for `linear_cross_entropy`, or None for a head that is no plain linear layer.

    The first call compares it with the model's own logits. Raises ModelError when body and head do not reproduce them,
    rather than train on a wrong loss.
    """
    base = base_model_of(model)
    head = head_of(base)
    if base not in _HEADS:
        _verify_head(model, base, head)
        _HEADS[base] = True
    return head


@torch.no_grad()
def _verify_head(model: nn.Module, base: PreTrainedModel, head: Head | None) -> None:
    batch = _probe_batch(base, documents=1)
    with evaluation_mode(model), compute_context(model):
        expected = base(input_ids=batch.input_ids.unsqueeze(0), use_cache=False).logits[0].float()
        # Without virtual tokens: the question is what the head does.
        hidden = _rows_hidden(base, base, _to_rows(batch, range(1)))[0]
        if head is None:
            found = _logits_by_module(model, hidden)
        else:
            found = linear_logits(*_at_head(model, hidden, head), **head.options)
    difference = _relative_difference(found, expected)
    # Rounding alone: 1e-6 in float32, 2^-8 per operation in bfloat16, on numbers of the logits' spread.
    tolerance = 1e-3 if compute_dtype_of(model) == torch.float32 else 0.05
    if difference > tolerance:
        raise ModelError(
            "head-unknown",
            f"{type(base).__name__} turns hidden states into logits in a way that affina does not know",
            why=f"its logits differ by {difference:.1%} from head(body(tokens)); the loss would be wrong",
            fix="report the architecture; affina reads logit scales and soft caps from the config",
        )


def isolation_of(model: nn.Module) -> Isolation:
    """Which layout keeps documents apart in this model: measured once per model, on two short documents.

    Switches the model's attention to `affina_packed` when that works.
    """
    if virtual_tokens_of(model) is not None:
        return Isolation("rows", "each sample begins with the virtual tokens: one row per document", 0.0)
    base = base_model_of(model)
    if base not in _ISOLATIONS:
        _ISOLATIONS[base] = _probe_isolation(model, base)
    return _ISOLATIONS[base]


def assume_packed(model: nn.Module) -> None:
    """Take for granted what is measured elsewhere: packed rows, and a head as the config describes it.

    For a model without values (on fake tensors), where nothing can be measured; any other model would go unchecked.
    Raises ModelError[packing-unsupported] when the architecture does not take its attention by name.
    """
    base = base_model_of(model)
    if body_of(base) is None or not use_packed_attention(base):
        raise ModelError(
            "packing-unsupported",
            f"{type(base).__name__} does not take its attention by name",
            fix="data.packing: false",
        )
    _ISOLATIONS[base] = Isolation("packed", "assumed", 0.0)
    _HEADS[base] = True


def isolates_documents(model: nn.Module) -> bool:
    """Whether documents can share a row of this model without seeing each other."""
    return isolation_of(model).layout == "packed"


@torch.no_grad()
def _probe_isolation(model: nn.Module, base: PreTrainedModel) -> Isolation:
    before = base.config._attn_implementation
    name = type(base).__name__
    if body_of(base) is None or not use_packed_attention(base):
        return Isolation("rows", f"{name} does not take its attention by name: one row per document", float("nan"))
    batch = _probe_batch(base, documents=2)
    # The same row with another first document: the second must not notice.
    other_ids = batch.input_ids.clone()
    other_ids[:_PROBE_LENGTH] = (other_ids[:_PROBE_LENGTH] + 1) % text_config(base).vocab_size
    try:
        with evaluation_mode(model):
            packed = hidden_states(model, batch, layout="packed").float()
            with_other = hidden_states(model, replace(batch, input_ids=other_ids), layout="packed").float()
            apart = hidden_states(model, batch, layout="rows").float()
    except (ModelError, TypeError, ValueError, RuntimeError) as error:
        base.set_attn_implementation(before)
        cause = error.what if isinstance(error, ModelError) else str(error).splitlines()[0]
        return Isolation("rows", f"{name} cannot run packed rows ({cause}): one row per document", float("nan"))
    leak = _relative_difference(packed[_PROBE_LENGTH:], with_other[_PROBE_LENGTH:])
    difference = max(leak, _relative_difference(packed, apart))
    # The same kernels on the same shapes: a leak is anything but zero. Apart, other kernels may round differently:
    # 1e-6 in float32; 2^-8 an operation in bfloat16, some per cent after dozens of layers.
    is_exact = compute_dtype_of(model) == torch.float32
    if not (leak <= (1e-5 if is_exact else 1e-2) and difference <= (1e-3 if is_exact else 0.1)):
        base.set_attn_implementation(before)
        what = "documents see each other" if leak > 1e-5 else "documents are computed differently when they share a row"
        return Isolation("rows", f"{what} in {name} ({difference:.1%}): one row per document", difference)
    return Isolation("packed", "documents share rows and do not see each other (measured)", difference)


@dataclass(frozen=True, slots=True)
class _ProbeBatch:
    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    num_supervised: int


def probe_batch(model: nn.Module) -> Batch:
    """A row of two short documents with every token supervised, to try something on: fixed, on the model's device."""
    return _probe_batch(base_model_of(model), documents=2)


def _probe_batch(base: PreTrainedModel, *, documents: int) -> _ProbeBatch:
    vocabulary = text_config(base).vocab_size
    count = documents * _PROBE_LENGTH
    # Distinct, spread token ids; the same for every call, whatever the state of the random generators.
    ids = (torch.arange(count) * 7919 + 13) % vocabulary
    position_ids = torch.arange(_PROBE_LENGTH).repeat(documents)
    cu_seqlens = torch.arange(0, count + 1, _PROBE_LENGTH, dtype=torch.int32)
    device = base.device
    return _ProbeBatch(
        ids.to(device),
        ids.to(device),
        position_ids.to(device),
        cu_seqlens.to(device),
        (_PROBE_LENGTH,) * documents,
        count - documents,
    )


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """RMS of the difference, in units of the expected values' standard deviation."""
    return float((found - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off, and every module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _takes(module: nn.Module, argument: str) -> bool:
    import inspect

    return argument in inspect.signature(module.forward).parameters


def _has_float32_parameters(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.float32 for parameter in model.parameters())
