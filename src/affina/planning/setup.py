"""What a plan is made for: model, formats, adapter, row and step, as plain numbers. No torch, no config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.decoder import DecoderSpec
from affina.catalog.fused_memory import FusedRow, Products, logits_chunk_rows
from affina.catalog.gpus import Gpu
from affina.catalog.method_memory import MethodMemory, method_memory
from affina.catalog.methods import AdapterMethod, method_named
from affina.catalog.reference_memory import Attention, ReferenceRow
from affina.catalog.save_policy import LayerRanks
from affina.catalog.shapes import LinearShape, ModelShape, matches

_GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
_ALIGNMENT = 64
"""Elements to which the fast engine's flat adapter rounds the place of every matrix."""
ROW_MULTIPLE = 128

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """rank on `targets` ("all-linear", or names or their last parts); dropout of the adapter's input.

    method: of the catalog; others: its settings besides, by name
    """

    rank: int
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    method: str = "lora"
    others: tuple[tuple[str, Any], ...] = ()

    @property
    def entry(self) -> AdapterMethod:
        return method_named(self.method)

    @property
    def settings(self) -> AdapterSettings:
        """Of the method, as the catalog counts with them."""
        given = {"rank": self.rank, "targets": self.targets, "dropout": self.dropout, **dict(self.others)}
        return self.entry.settings(**{name: value for name, value in given.items() if name in self.entry.fields})


@dataclass(frozen=True)
class StepSetup:
    """One training step.

    format:         of the frozen linear layers: none, nf4, fp4, fp8, int8; skipped: names that stay dense
    row_tokens:     T, of the longest micro-batch, padding included
    lengths:        of its documents; one of T when nothing is known
    num_predicted:  tokens of it that predict a supervised one
    micro_batches:  of an optimiser step
    recompute:      training.gradient_checkpointing
    engine:         the user's choice
    gpu:            None: a CPU
    memory_bytes:   for tensors, `engine.memory`; None: the card's own
    generation:     replies at once, and tokens of prompt and reply together; (0, 0): none is generated
    longest_possible: data.max_length, for which the engine chooses before it has seen the documents; None: row_tokens
    is_lowest:      engine.memory is lowest: embedding and head in int8, layers in parts, the adapter on the host
    has_two_rates:  A and B learn at different rates, so that the optimiser's state lies with each matrix
    row_shapes:     shapes of captured rows where they are known
    """

    shape: ModelShape
    adapter: Adapter
    precision: Precision
    format: str
    row_tokens: int
    gpu: Gpu | None
    double_quantization: bool = True
    skipped: tuple[str, ...] = ("lm_head",)
    lengths: tuple[int, ...] = ()
    num_predicted: int = 0
    micro_batches: int = 1
    optimizer: str = "adamw"
    recompute: bool | Literal["auto"] = "auto"
    engine: Literal["auto", "reference", "fast"] = "auto"
    is_packed: bool = True
    validates: bool = True
    is_deterministic: bool = True
    memory_bytes: int | None = None
    generation: tuple[int, int] = (0, 0)
    row_shapes: int | None = None
    is_lowest: bool = False
    longest_possible: int | None = None
    has_two_rates: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def documents(self) -> tuple[int, ...]:
        return self.lengths or (self.row_tokens,)

    @property
    def num_shapes(self) -> int:
        """Of captured rows, see `StepDemand`."""
        if self.row_shapes is not None:
            return self.row_shapes
        return 1 if len(self.documents) == self.row_tokens // max(self.documents) else 2

    @property
    def predicted(self) -> int:
        return self.num_predicted or self.row_tokens

    def with_(self, **changes: object) -> StepSetup:
        """The same setup with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    @cached_property
    def linears(self) -> tuple[tuple[LinearShape, str, bool], ...]:
        """(layer, its format, whether it is adapted) of every linear layer of the model but the head."""
        return tuple(self._linears())

    def _linears(self) -> Iterator[tuple[LinearShape, str, bool]]:
        for index in range(self.shape.num_layers):
            for linear in self.shape.linears:
                name = f"model.layers.{index}.{linear.path}"
                is_skipped = any(f".{skipped}." in f".{name}." for skipped in self.skipped)
                yield linear, "none" if is_skipped else self.format, matches(self.adapter.targets, name)

    @property
    def counts_by_method(self) -> bool:
        """Whether the method trains other things than LoRA's two matrices."""
        return not self.adapter.entry.fast_engine

    @property
    def trains_weights(self) -> bool:
        """Whether weights of the model itself are trained, in float32 in their own place."""
        return self.adapter.method in ("full", "freeze")

    @cached_property
    def num_frozen(self) -> int:
        """Float32 values that the method holds besides, not trained."""
        count = self.adapter.entry.num_frozen
        return count(self.shape, self.adapter.settings) if count is not None else 0

    @cached_property
    def method_memory(self) -> MethodMemory | None:
        """None: LoRA's."""
        return method_memory(self.adapter.entry, self.shape, self.adapter.settings, itemsize=self.itemsize)

    @cached_property
    def num_trainable(self) -> int:
        """Σ R · (out + in); of other methods than LoRA, what the catalog counts."""
        if self.counts_by_method:
            return self.adapter.entry.num_parameters(self.shape, self.adapter.settings)
        rank = self.adapter.rank
        return sum(
            rank * (linear.out_features + linear.in_features) * linear.count
            for linear, _, is_adapted in self.linears
            if is_adapted
        )

    @cached_property
    def ranks(self) -> LayerRanks:
        """Of the layer with the most adapters."""
        width = len(self.shape.linears)
        best = LayerRanks(0, 0, 0, 0)
        for start in range(0, len(self.linears), width):
            adapted = {linear.name for linear, _, is_adapted in self.linears[start : start + width] if is_adapted}
            qkv, output, gate_up, down = (
                self.adapter.rank * sum(name in adapted for name in group) for group in _GROUPS
            )
            layer = LayerRanks(qkv, output, gate_up, down, largest=self.adapter.rank if adapted else 0)
            best = max(best, layer, key=lambda ranks: ranks.total)
        return best

    @cached_property
    def flat_parameters(self) -> int:
        """Elements of the fast engine's flat adapter, padding included (models/fast/parameters.py)."""
        total, width = 0, len(self.shape.linears)
        for start in range(0, len(self.linears), width):
            layer = {linear.name: linear for linear, _, adapted in self.linears[start : start + width] if adapted}
            for group in _GROUPS:
                present = [layer[name] for name in group if name in layer]
                if present:
                    total = _aligned(total + self.adapter.rank * sum(linear.in_features for linear in present))
                for linear in present:
                    total = _aligned(total + self.adapter.rank * linear.out_features)
        return total

    @cached_property
    def fused(self) -> DecoderSpec | str:
        """The decoder that the fast engine runs here, or why it does not; the engine's own rules, as far as they can
        be known before loading."""
        spec = self.shape.fused
        if self.engine == "reference":
            return "engine.path is reference"
        if not isinstance(spec, DecoderSpec):
            return spec.reason
        if self.counts_by_method:
            return f"it computes plain LoRA, not {self.adapter.entry.title}"
        if self.gpu is None and self.precision != "fp32":
            return f"on a CPU it computes in float32, not {self.precision}"
        if self.gpu is not None and not self.gpu.runs_fused:
            major, minor = self.gpu.capability
            return f"its attention needs compute capability 8.0, the card has {major}.{minor}"
        if self.adapter.dropout > 0:
            return "the adapter has dropout"
        if any(len(formats) > 1 for formats in self._group_formats()):
            return "projections with a common input keep their weights in different formats"
        return spec

    def _group_formats(self) -> Iterator[set[str]]:
        width = len(self.shape.linears)
        for start in range(0, len(self.linears), width):
            formats = {linear.name: format for linear, format, _ in self.linears[start : start + width]}
            for group in _GROUPS:
                yield {formats[name] for name in group if name in formats}

    @property
    def products(self) -> Products:
        """How the fast engine multiplies frozen weights here."""
        if self.format == "none":
            return "dense"
        divides = all(n % 16 == 0 for linear in self.shape.linears for n in (linear.out_features, linear.in_features))
        if self.format == "fp8" and self.gpu is not None and self.gpu.multiplies_fp8 and divides:
            return "fp8"
        return "expanded"


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def reference_row(setup: StepSetup, *, num_predicted: int | None = None) -> ReferenceRow:
    """The micro-batch as the reference engine sees it. num_predicted: None: as the data has it"""
    is_cpu = setup.gpu is None
    attention: Attention = "efficient"
    if setup.gpu is None:
        attention = "cpu"
    elif setup.gpu.runs_fused and setup.itemsize == 2:
        attention = "varlen"
    layer = setup.linears[: len(setup.shape.linears)]
    dropped = sum(linear.in_features for linear, _, is_adapted in layer if is_adapted) if setup.adapter.dropout else 0
    method = setup.method_memory
    longest, tokens = max(setup.documents), setup.row_tokens
    if method is not None and not method.packs:
        # Each sample in a row of its own, behind its virtual tokens and padded to the longest.
        longest += method.virtual_tokens
        tokens = len(setup.documents) * longest
    return ReferenceRow(
        shape=setup.shape,
        num_tokens=tokens,
        num_predicted=setup.predicted if num_predicted is None else num_predicted,
        itemsize=setup.itemsize,
        attention=attention,
        ranks=setup.ranks,
        num_parameters=setup.num_trainable,
        chunk_rows=logits_chunk_rows(setup.shape.vocabulary_size, is_cpu=is_cpu),
        dropped_inputs=dropped,
        longest=longest,
        expands=setup.format != "none",
        method=method,
    )


def fused_row(setup: StepSetup, *, num_predicted: int | None = None) -> FusedRow:
    """The row as the fused decoder sees it. num_predicted: None: as the data has it"""
    spec = setup.fused
    assert isinstance(spec, DecoderSpec)
    return FusedRow(
        spec=spec,
        ranks=setup.ranks,
        num_tokens=setup.row_tokens,
        num_predicted=setup.predicted if num_predicted is None else num_predicted,
        itemsize=setup.itemsize,
        products=setup.products,
        num_parameters=setup.flat_parameters,
        chunk_rows=logits_chunk_rows(spec.vocabulary_size, is_cpu=setup.gpu is None),
        merges=setup.itemsize == 4,
        longest=max(setup.documents),
        on_gpu=setup.gpu is not None,
        tiles_head=setup.is_lowest,
    )
