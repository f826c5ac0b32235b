"""What the fused decoder holds at every moment of a step, in bytes, by arithmetic alone.

The fused decoder's passes are written by hand (models/fast/layer.py, decoder.py), so what is alive when is known, not
guessed. This file walks the same sequence with sizes instead of tensors. The engine takes its save policy from it and
the plan its forecast, hence the two agree; tests/catalog/test_fused_memory.py runs the engine's own code and compares
every byte.

Legend: T tokens of a row, N of them predict a supervised one, D hidden, I intermediate, H · K queries, G · K keys, R
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from affina.catalog.decoder import DecoderSpec
from affina.catalog.save_policy import PITCH, Keep, LayerRanks, SavePolicy, padded

BLOCK_BYTES = 512
"""Every allocation is rounded up to this by PyTorch's caching allocator (`kMinBlockSize`)."""
MLP_CHUNK_TOKENS = 4096
"""Tokens of an MLP that are computed at once where gate and up are not kept: enough to fill a large card."""
MAX_FOLDED_RANK = 64
"""Ranks up to which low-rank updates are added inside the kernels that read them: kernels/swiglu.py's. The kernels need
torch, so this number and the four below are stated twice; a test compares them."""
LOGITS_CHUNK_BYTES_CPU = 64 * 1024 * 1024
LOGITS_CHUNK_BYTES_ACCELERATOR = 160 * 1024 * 1024
LOGITS_ROW_MULTIPLE = 128
MIN_CHUNK_ROWS = 16
LONG_DOCUMENT = 2048
"""Tokens of a document from which the attention's output goes to the host rather than being computed twice."""
FP8_MULTIPLE = 16
"""Sizes of 8-bit products are multiples of this: kernels/fp8.py's."""
SWIGLU_CHUNKS = 16
"""Partial sums of the rank gradients that swiglu's backward kernel makes at most; how many depends on the card."""

Products = Literal["dense", "expanded", "fp8"]
"""How frozen weights are multiplied: as they are, expanded into a workspace, or in 8 bits."""


def logits_chunk_rows(vocabulary_size: int, *, is_cpu: bool) -> int:
    """How many rows of logits are computed at once."""
    if is_cpu:
        return max(MIN_CHUNK_ROWS, LOGITS_CHUNK_BYTES_CPU // (4 * vocabulary_size))
    rows = LOGITS_CHUNK_BYTES_ACCELERATOR // (4 * vocabulary_size)
    return max(MIN_CHUNK_ROWS, rows // LOGITS_ROW_MULTIPLE * LOGITS_ROW_MULTIPLE)


def chunk_bytes(num_rows: int, chunk_rows: int, vocabulary_size: int, itemsize: int, *, has_gradient: bool) -> int:
    """The most that chunks of logits take: one in float32, its errors, and those of the chunk before it, which a name
    still holds while the next one is made. In float32 the errors are written over the logits."""
    first = min(num_rows, chunk_rows) * vocabulary_size
    second = min(max(num_rows - chunk_rows, 0), chunk_rows) * vocabulary_size
    error = (0 if itemsize == 4 else itemsize) if has_gradient else 0
    before = allocated(first, itemsize) if has_gradient and second else 0
    alone = allocated(first, 4) + allocated(first, error)
    return max(alone, allocated(second, 4) + allocated(second, error) + before)


def allocated(num_elements: int, itemsize: int) -> int:
    """Bytes that a tensor takes from the allocator."""
    return -(-num_elements * itemsize // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class FusedRow:
    """What the bytes of one row follow from.

    num_tokens, num_predicted: T and N
    itemsize:   bytes of an activation
    products:   of the frozen weights
    num_parameters: of the flat adapter, padding included
    chunk_rows: rows of logits at once
    merges:     W + s B A instead of two products (float32)
    longest:    tokens of the longest document
    on_gpu:     what layers do not keep may wait in the host's memory
    tiles_head: the head is in int8 and expanded tile by tile
    """

    spec: DecoderSpec
    ranks: LayerRanks
    num_tokens: int
    num_predicted: int
    itemsize: int
    products: Products
    num_parameters: int
    chunk_rows: int
    merges: bool = False
    longest: int = 0
    on_gpu: bool = True
    tiles_head: bool = False

    def num_attention_on_host(self, policy: SavePolicy) -> int:
        """Layers, the first ones, whose attention's output goes to the host; as if the host had room for all."""
        # In parts, an output on its way is most of what a layer holds beside its own.
        shortest = 2 * LONG_DOCUMENT if Keep.PARTS in policy.layers else LONG_DOCUMENT
        return policy.num_without_attention if self.on_gpu and self.longest >= shortest else 0

    @property
    def folds(self) -> bool:
        """Whether low-rank updates are added by the operations that read them."""
        return not self.merges and self.ranks.largest <= MAX_FOLDED_RANK

    def extra(self, rank: int) -> int:
        """Columns beside an output's gradient, where the gradient of t is written."""
        return 0 if self.merges or self.products == "fp8" else rank

    def values(self, *columns: int, rows: int | None = None) -> int:
        """Bytes of matrices with a row for every token and so many columns each."""
        rows = self.num_tokens if rows is None else rows
        return sum(allocated(rows * width, self.itemsize) for width in columns)

    def scalars(self, columns: int = 1, *, rows: int | None = None) -> int:
        """Bytes of float32 numbers, so many for every token."""
        return allocated((self.num_tokens if rows is None else rows) * columns, 4)

    @property
    def stream_bytes(self) -> int:
        """The gradient of the residual stream, with room for the low-rank part of any layer's output beside it."""
        rank = max(self.ranks.output, self.ranks.down)
        return self.values(padded(self.spec.hidden_size + self.extra(rank)))

    @property
    def output_bytes(self) -> int:
        """Bytes of what a layer hands on: x₂ and what is added to it."""
        return self.values(self.spec.hidden_size, self.spec.hidden_size)


@dataclass(slots=True)
class Ledger:
    """Bytes that are alive, and the most that ever were."""

    alive: int = 0
    peak: int = 0

    def take(self, num_bytes: int) -> int:
        self.alive += num_bytes
        self.peak = max(self.peak, self.alive)
        return num_bytes

    def give(self, num_bytes: int) -> None:
        self.alive -= num_bytes

    @contextmanager
    def during(self, num_bytes: int) -> Iterator[None]:
        """Alive inside the block only."""
        self.take(num_bytes)
        yield
        self.give(num_bytes)


class _Layer:
    """One layer's passes with sizes instead of tensors. `held`: what is alive, by the names of `Saved`; `away`: what is
    in the host's memory.

    Lifetimes follow CPython: a tensor lives until the last name that is bound to it is bound anew or its function
    returns, callers' names included.
    """

    def __init__(self, row: FusedRow, ledger: Ledger) -> None:
        self.row = row
        self.ledger = ledger
        self.held: dict[str, int] = {}
        self.away: dict[str, int] = {}

    def take(self, name: str, num_bytes: int) -> None:
        """A new tensor under that name; one that has it goes afterwards."""
        before = self.held.get(name, 0)
        self.held[name] = self.ledger.take(num_bytes)
        self.ledger.give(before)

    def give(self, *names: str) -> None:
        for name in names:
            self.ledger.give(self.held.pop(name, 0))

    # Forward

    def forward(
        self, x_bytes: int, keep: Keep | None, settle: Callable[[], None], *, keeps_attention: bool = False
    ) -> None:
        """x, which the layer below has made, → x2 and update, and what `keep` says.

        settle: called when the layer below's terms of x are needed no more
        """
        row, width = self.row, self.row.spec.hidden_size
        self.held["x"] = x_bytes
        self._take_codes()
        self.take("h", row.values(width))
        self.take("rstd1", row.scalars())
        settle()
        self._project()
        self._attend()
        self._add_attention()
        self.held["h"], old = self.held.pop("h2"), self.held["h"]
        self.ledger.give(old)
        if keep is not None and keep >= Keep.PRODUCTS:
            self._mlp(row.num_tokens)
        else:
            self._mlp_in_parts()
        self.give("h", *_dropped(keep, keeps_attention=keeps_attention))

    def _project(self) -> None:
        row, spec = self.row, self.row.spec
        columns = spec.query_size + 2 * spec.key_value_size
        with self._product(spec.hidden_size, columns, has_codes=True):
            old = self.held.pop("t_qkv", 0)
            self.take("qkv", row.values(padded(columns + row.extra(row.ranks.qkv))))
            self.take("t_qkv", row.values(row.ranks.qkv))
        self.give("codes")
        self.ledger.give(old)

    def _attend(self) -> None:
        self._rotate()
        self.take("o", self.row.values(self.row.spec.query_size))
        self.take("lse", self.row.scalars(self.row.spec.num_heads))

    def _rotate(self) -> None:
        row, spec = self.row, self.row.spec
        self.take("q", row.values(spec.query_size))
        self.take("k", row.values(spec.key_value_size))
        if row.folds and row.ranks.qkv:
            self.take("v", row.values(spec.key_value_size))

    def _add_attention(self) -> None:
        row, spec = self.row, self.row.spec
        with self._product(spec.query_size, spec.hidden_size):
            self.take("x2", row.values(spec.hidden_size))
            self.take("t_o", row.values(row.ranks.output))
        self._take_codes()
        self.take("h2", row.values(spec.hidden_size))
        self.take("rstd2", row.scalars())

    def _gate_up(self, rows: int) -> None:
        row, spec = self.row, self.row.spec
        columns = 2 * spec.intermediate_size
        with self._product(spec.hidden_size, columns, rows, has_codes=True):
            self.take("gate_up", row.values(padded(columns + row.extra(row.ranks.gate_up)), rows=rows))
            self.take("t_gate_up", row.values(row.ranks.gate_up, rows=rows))
        self.give("codes")

    def _mlp(self, rows: int, update: str = "update", t_down: str = "t_down") -> None:
        row, spec = self.row, self.row.spec
        self._gate_up(rows)
        with (
            self.ledger.during(row.values(spec.intermediate_size, rows=rows)),
            self._product(spec.intermediate_size, spec.hidden_size, rows),
        ):
            self.take(update, row.values(spec.hidden_size, rows=rows))
            self.take(t_down, row.values(row.ranks.down, rows=rows))

    def _mlp_in_parts(self) -> None:
        row = self.row
        if row.num_tokens <= MLP_CHUNK_TOKENS:
            self._mlp(row.num_tokens)
            self.give("gate_up", "t_gate_up")
            return
        self.held["codes of all parts"] = self.held.pop("codes", 0)
        self.take("update", row.values(row.spec.hidden_size))
        parts = [f"t_down of part {index}" for index in range(len(_parts(row.num_tokens)))]
        for name, rows in zip(parts, _parts(row.num_tokens), strict=True):
            t_before = self.held.pop("t_gate_up", 0)
            self._mlp(rows, "update of a part", name)
            self.ledger.give(t_before)
            self.give("update of a part", "gate_up")
        self.take("t_down", row.values(row.ranks.down))
        self.give("t_gate_up", "codes of all parts", *parts)

    # Backward

    def backward(self, *, is_first: bool) -> None:
        """What is kept → nothing; the stream's gradient, which is the caller's, is written over."""
        row, spec = self.row, self.row.spec
        self._complete_attention()
        self._mlp_backward()
        self.give("x2")
        self._attention_backward()
        columns = spec.query_size + 2 * spec.key_value_size
        with self._rank_gradient(row.ranks.qkv):
            if not is_first:
                with self._gradient_product(spec.hidden_size, columns, row.ranks.qkv):
                    pass

    def _complete_attention(self) -> None:
        if "qkv" not in self.held:
            self._take_codes()
            self.take("h", self.row.values(self.row.spec.hidden_size))
            self.take("rstd1", self.row.scalars())
            self._project()
            self.give("h")
        if "o" not in self.held:
            self._attend()
        elif "q" not in self.held:
            self._rotate()
        if "x2" not in self.held:
            self._add_attention()
            self.give("h2", "codes")

    def _mlp_backward(self) -> None:
        if "gate_up" in self.held:
            self._mlp_part_backward(self.row.num_tokens, accumulates=False)
            self.give("gate_up")
            return
        row, names = self.row, ("rstd2 of a part", "gate_up", "t_gate_up")
        for index, rows in enumerate(_parts(row.num_tokens)):
            # What the part before needed has a name until this one's is made.
            before = sum(self.held.pop(name, 0) for name in names)
            self._take_codes(rows)
            self.take("h of a part", row.values(row.spec.hidden_size, rows=rows))
            self.take("rstd2 of a part", row.scalars(rows=rows))
            self._gate_up(rows)
            self.ledger.give(before)
            self.give("h of a part")
            self._mlp_part_backward(rows, accumulates=index > 0)
        self.give(*names)

    def _mlp_part_backward(self, rows: int, *, accumulates: bool) -> None:
        row, spec = self.row, self.row.spec
        with self._rank_gradient(row.ranks.down, rows):
            if accumulates:
                self._pass(allocated(spec.hidden_size * row.ranks.down, 4))
            with self._gradient_product(spec.intermediate_size, spec.hidden_size, row.ranks.down, rows):
                self._pass(self._swiglu_bytes(rows))
            with (
                self._rank_gradient(row.ranks.gate_up, rows),
                self._gradient_product(spec.hidden_size, 2 * spec.intermediate_size, row.ranks.gate_up, rows),
            ):
                if accumulates:
                    self._pass(allocated(spec.hidden_size * row.ranks.gate_up, 4))

    def _swiglu_bytes(self, rows: int) -> int:
        """Partial sums of the rank gradients; a chunk has 16 rows at least."""
        ranks = self.row.ranks
        if not self.row.folds:
            return 0
        chunks = min(SWIGLU_CHUNKS, -(-rows // 16))
        return allocated(chunks * self.row.spec.intermediate_size * (ranks.gate_up + ranks.down), 4)

    def _attention_backward(self) -> None:
        row, spec = self.row, self.row.spec
        gradients = row.values(spec.query_size, spec.key_value_size, spec.key_value_size)
        statistics = allocated(spec.num_heads * -(-row.num_tokens // 2) * 4, 4)
        with (
            self._rank_gradient(row.ranks.output),
            self._gradient_product(spec.query_size, spec.hidden_size, row.ranks.output),
        ):
            self._pass(gradients + statistics)

    # Parts of both

    def _pass(self, num_bytes: int) -> None:
        with self.ledger.during(num_bytes):
            pass

    def _take_codes(self, rows: int | None = None) -> None:
        """Of a norm's output, which its kernel writes for the 8-bit product that reads it."""
        if self.row.products == "fp8":
            rows = self.row.num_tokens if rows is None else rows
            self.take("codes", allocated(rows * self.row.spec.hidden_size, 1) + allocated(rows, 4))

    @contextmanager
    def _product(
        self, num_inputs: int, num_outputs: int, rows: int | None = None, *, has_codes: bool = False
    ) -> Iterator[None]:
        """What a frozen product needs besides its result: codes of its input in 8 bits, unless it has them."""
        yield
        if self.row.products == "fp8":
            rows = self.row.num_tokens if rows is None else rows
            # The library writes bfloat16 rows without gaps only; others are copied.
            copied = self.row.values(num_outputs, rows=rows) if num_outputs % PITCH else 0
            codes = 0 if has_codes else allocated(rows * num_inputs, 1) + allocated(rows, 4)
            self._pass(codes + copied)

    @contextmanager
    def _gradient_product(
        self, num_inputs: int, num_outputs: int, rank: int, rows: int | None = None
    ) -> Iterator[None]:
        """∂x of a frozen product, alive inside the block. In 8 bits the adapter's share is part of the codes."""
        rows = self.row.num_tokens if rows is None else rows
        result = self.row.values(num_inputs, rows=rows)
        if self.row.products == "fp8":
            width = -(-(num_outputs + rank) // FP8_MULTIPLE) * FP8_MULTIPLE
            codes = allocated(rows * width, 1) + allocated(rows, 4)
            transposed = allocated(num_inputs * width, 1)
            of_adapter = allocated(rank * num_inputs, 1) + allocated(rank, 4)
            self._pass(codes + transposed + (of_adapter if rank else 0) + result)
        with self.ledger.during(result):
            yield

    @contextmanager
    def _rank_gradient(self, rank: int, rows: int | None = None) -> Iterator[None]:
        """u, the gradient of t, where it does not lie beside the outputs' gradient."""
        own = rank if rank and not self.row.extra(rank) else 0
        with self.ledger.during(self.row.values(own, rows=rows)):
            yield


def _dropped(keep: Keep | None, *, keeps_attention: bool) -> list[str]:
    """The names that `_kept` of models/fast/layer.py drops; x, x2 and update are the caller's as well."""
    names: list[str] = []
    if keep is None or keep < Keep.PRODUCTS:
        names += ["gate_up", "t_gate_up"]
    if keep is None or keep < Keep.ALL:
        names += ["q", "k", "v"]
    if keep is None or keep < Keep.PROJECTIONS:
        names += ["qkv"]
    if keep is None or keep < Keep.ATTENTION:
        names += ["rstd1", "t_qkv", "t_o", "rstd2"] + ([] if keeps_attention else ["o", "lse"])
    return names if keep is not None else [*names, "t_down"]


def _parts(num_tokens: int) -> list[int]:
    return [min(MLP_CHUNK_TOKENS, num_tokens - start) for start in range(0, num_tokens, MLP_CHUNK_TOKENS)]


class _Decoder:
    """The passes over all layers."""

    def __init__(self, row: FusedRow) -> None:
        self.row = row
        self.ledger = Ledger()
        self.layers: list[tuple[_Layer, Keep | None]] = []
        self.leaving = 0
        """Of one layer, on its way to the host."""
        self.arriving = 0

    def forward(self, policy: SavePolicy | None) -> None:
        """The embedding's output and all layers; x2 and update of the last layer stay alive."""
        row, ledger = self.row, self.ledger
        x_bytes = ledger.take(row.values(row.spec.hidden_size))
        num_on_host = row.num_attention_on_host(policy) if policy is not None else 0
        for index in range(row.spec.num_layers):
            keep = policy.layers[index] if policy is not None else None
            on_host = keep is not None and keep < Keep.ATTENTION and index < num_on_host
            layer = _Layer(row, ledger)
            layer.forward(x_bytes, keep, self._release_below, keeps_attention=on_host)
            if keep is None:
                layer.give("x")
            self._send(layer, keep, on_host=on_host)
            x_bytes = layer.held.pop("update")
            self.layers.append((layer, keep))
        self.update = x_bytes

    def _release_below(self) -> None:
        """x₂ of the layer below goes when this one is done, unless that layer keeps it."""
        if self.layers and (self.layers[-1][1] is None or self.layers[-1][1] < Keep.ATTENTION):
            self.layers[-1][0].give("x2")

    def _send(self, layer: _Layer, keep: Keep | None, *, on_host: bool) -> None:
        """What goes to the host stays alive until the next layer's follows (models/fast/offload.py)."""
        names = (["x"] if keep == Keep.OFFLOADED else []) + (["o", "lse"] if on_host else [])
        if names:
            self.ledger.give(self.leaving)
            layer.away = {name: layer.held.pop(name) for name in names}
            self.leaving = sum(layer.away.values())

    def select_rows(self, *, holds_output: bool) -> int:
        """Bytes of the last layer's output where a token predicts a supervised one; the rest goes.

        holds_output: but for a captured row's, which stays where it is
        """
        row, ledger = self.row, self.ledger
        rows = ledger.take(row.values(row.spec.hidden_size, rows=row.num_predicted))
        # The update's and t's rows are added and gone.
        self._pass(rows + row.values(row.ranks.down, rows=row.num_predicted))
        if not holds_output:
            ledger.give(self.update)
            self._release_below()
        return rows

    def head(self, *, has_gradient: bool) -> int:
        """Logits by chunks; the bytes of what its backward pass needs beside the rows, which stay alive."""
        row, ledger = self.row, self.ledger
        count = row.num_predicted
        hidden = ledger.take(row.values(row.spec.hidden_size, rows=count))  # its gradient is written over it
        rstd = ledger.take(row.scalars(rows=count))
        losses = ledger.take(row.scalars(rows=count))
        chunk = chunk_bytes(count, row.chunk_rows, row.spec.vocabulary_size, row.itemsize, has_gradient=has_gradient)
        self._pass(chunk)
        ledger.give(losses)
        return hidden + rstd

    def backward(self) -> None:
        """From ∂last, which is the caller's, to the gradient of the flat adapter, which stays alive."""
        row, ledger = self.row, self.ledger
        self.gradient = ledger.take(allocated(row.num_parameters, 4))
        for index in range(len(self.layers) - 1, -1, -1):
            layer, _ = self.layers[index]
            self._fetch(layer)
            layer.held |= layer.away
            self.arriving = 0
            if index:
                self._fetch(self.layers[index - 1][0])
            layer.backward(is_first=index == 0)
            layer.give(*list(layer.held))

    def _fetch(self, layer: _Layer) -> None:
        """Bring back what a layer has away, once; what was still leaving has left by then."""
        if layer.away and not self.arriving:
            self.ledger.give(self.leaving)
            self.leaving = 0
            self.arriving = self.ledger.take(sum(layer.away.values()))

    def _pass(self, num_bytes: int) -> None:
        with self.ledger.during(num_bytes):
            pass


@dataclass(frozen=True, slots=True)
class FusedPeaks:
    """The most bytes that are alive at once, besides weights, adapter and optimiser.

    forward:  of the passes over the layers, what they keep included
    head:     while logits are computed; of a captured row with what is resident
    backward: with the gradient of the adapter
    captured: of both passes inside a captured row, which keeps that memory between steps; 0 where nothing is captured
    resident: of captured rows' inputs and outputs, which count as allocated between steps
    """

    forward: int
    head: int
    backward: int
    captured: int = 0
    resident: int = 0

    @property
    def allocated(self) -> int:
        """What the allocator's peak shows: a captured row's memory counts while it is captured, and then no more."""
        return max(self.forward, self.head, self.backward, self.captured)

    @property
    def needed(self) -> int:
        """What the device must have: a captured row's memory is never given back."""
        return self.captured + self.head - self.resident if self.captured else self.allocated


def row_inputs_bytes(row: FusedRow) -> int:
    """Token ids, labels, positions, cosines and sines of a row, and the positions that predict."""
    tokens = row.num_tokens
    angles = 2 * allocated(tokens * row.spec.head_dim // 2, 4)
    return 3 * allocated(tokens, 8) + 2 * allocated(row.num_predicted, 8) + angles


def training_peaks(row: FusedRow, policy: SavePolicy, *, is_captured: bool) -> FusedPeaks:
    """Forward, head and backward pass of one row under a save policy."""
    decoder = _Decoder(row)
    inputs = decoder.ledger.take(row_inputs_bytes(row))
    if is_captured:
        return _captured_peaks(decoder, policy, inputs)
    decoder.forward(policy)
    rows = decoder.select_rows(holds_output=False)
    forward = decoder.ledger.peak
    decoder.ledger.peak = decoder.ledger.alive
    tape = rows + decoder.head(has_gradient=True)
    decoder.ledger.take(row.stream_bytes)
    decoder.ledger.give(tape)
    head = decoder.ledger.peak
    decoder.ledger.peak = decoder.ledger.alive
    decoder.backward()
    return FusedPeaks(forward, head, decoder.ledger.peak)


def _captured_peaks(decoder: _Decoder, policy: SavePolicy, inputs: int) -> FusedPeaks:
    row = decoder.row
    decoder.forward(policy)
    forward = decoder.ledger.peak
    grad = decoder.ledger.take(row.stream_bytes)  # of the graph, for good
    decoder.backward()
    captured = decoder.ledger.peak + inputs  # a row's inputs, and the graph's copies of them
    resident = row.output_bytes + grad + decoder.gradient + row.values(row.ranks.down) + inputs
    head = _Decoder(row)
    head.ledger.take(resident + inputs)
    tape = head.select_rows(holds_output=True) + head.head(has_gradient=True)
    head.ledger.take(row.stream_bytes)
    head.ledger.give(tape)
    head.ledger.take(decoder.gradient)
    return FusedPeaks(forward, head.ledger.peak, 0, captured, resident)


def evaluation_peak(row: FusedRow) -> int:
    """Bytes of a forward pass that keeps nothing, and its loss."""
    decoder = _Decoder(row)
    decoder.ledger.take(row_inputs_bytes(row))
    decoder.forward(None)
    decoder.select_rows(holds_output=True)
    decoder.head(has_gradient=False)
    return decoder.ledger.peak
