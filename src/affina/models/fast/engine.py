"""The fast engine: a decoder, its save policy, and how it meets autograd and the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from affina.catalog.fused_choice import OPTIMIZER_BYTES, StepChoice, StepDemand
from affina.catalog.fused_memory import MLP_CHUNK_TOKENS
from affina.catalog.lowest_memory import tokens_per_part
from affina.catalog.save_policy import Keep, SavePolicy
from affina.kernels.attention import Segments
from affina.models.engines import engine_of, set_engine, trainable_parameters
from affina.models.families import Unsupported
from affina.models.fast.build import build_decoder
from affina.models.fast.decoder import Decoder, HeadTape
from affina.models.fast.fp8 import Fp8Stack
from affina.models.fast.graphs import GraphedRow, RowGraphs
from affina.models.fast.layer import RowContext, Saved
from affina.models.fast.memory import attention_on_host, choose_for_device
from affina.models.fast.parameters import FlatAdapter
from affina.models.fast.probe import ATTENTION_LIMIT, attention_difference
from affina.models.fast.support import decoder_of
from affina.models.forward import Batch, predicting_positions, probe_batch, supervised_loss
from affina.models.structure import base_model_of, body_of


@dataclass(slots=True)
class Tape:
    """What a forward pass leaves for its backward pass. `graphed` replays it, else `saved` has it.

    head: None once it is used up
    """

    row: RowContext
    head: HeadTape | None
    saved: list[Saved | None]
    graphed: GraphedRow | None = None
    ticket: int = 0


class FastEngine:
    """Computes losses and adapter gradients of one model by the fused decoder.

    policy: what layers keep for the backward pass; changed between steps by `set_policy`
    graphs: captured rows (CUDA); None: every operation is launched by itself
    parameters: the flat adapter as one parameter, or PEFT's own for optimisers that look at matrices
    """

    def __init__(
        self,
        model: PeftModel,
        decoder: Decoder,
        policy: SavePolicy,
        *,
        is_flat: bool = True,
        has_room_for_graphs: bool = True,
    ) -> None:
        body = body_of(base_model_of(model))
        assert body is not None
        self._rotary = body.get_submodule("rotary_emb")
        self._adapted = next(module for module in body.modules() if isinstance(module, LoraLayer))
        self.decoder = decoder
        self.policy = policy
        self.graphs: RowGraphs | None = None
        self.is_flat = is_flat
        self._has_room_for_graphs = has_room_for_graphs
        adapter = decoder.adapter
        self.parameters: list[nn.Parameter] = [adapter.parameter] if is_flat else list(adapter.layout)

    def enable_graphs(self, note: Callable[[str], None]) -> None:
        """Capture rows as CUDA graphs from now on; `note` is told once why something is not captured."""
        if not self._has_room_for_graphs:
            note("no CUDA graphs (memory is short): every operation is launched by itself")
            return
        self.graphs = RowGraphs(self.decoder, note)

    def set_policy(self, policy: SavePolicy) -> None:
        """Keep other things from the next forward pass on; captured rows are captured anew."""
        self.policy = policy
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def is_active(self) -> bool:
        return not self._adapted.disable_adapters

    def make_room(self) -> str | None:
        """Keep less from the next forward pass on, after memory ran out; what is kept now, None: nothing is left."""
        leaner = self.policy.leaner()
        if leaner is None:
            return None
        self.set_policy(leaner)
        return leaner.describe()

    def supervised_loss(self, batch: Batch) -> Tensor:
        """The sum of the cross-entropies of the supervised tokens, float32."""
        if torch.is_grad_enabled() and batch.num_supervised:
            loss: Tensor = _FusedLoss.apply(self, batch, *self.parameters)  # type: ignore[no-untyped-call]
            return loss
        with torch.no_grad():
            evaluated = self._evaluate(batch)
        if not torch.is_grad_enabled():
            return evaluated
        # Without a supervised token the loss is a constant; the graph keeps a loop's backward call valid.
        return evaluated + sum(parameter.flatten()[:1].sum() * 0 for parameter in self.parameters)

    def forward(self, batch: Batch) -> tuple[Tensor, Tape]:
        """The loss, and what its backward pass needs."""
        row = self._row(batch)
        graphed = None
        if self.graphs is not None and row.num_attention_on_host == 0:
            graphed = self.graphs.row(self.policy, batch.input_ids, row)
        saved: list[Saved | None] = []
        ticket = 0
        if graphed is not None:
            last, ticket = graphed.forward(batch.input_ids, row)
        else:
            last, saved = self.decoder.forward(batch.input_ids, row, self.policy)
        positions = predicting_positions(batch)
        rows, num_tokens = last.rows(positions), batch.input_ids.shape[0]
        del last
        loss, head = self.decoder.loss_and_gradient(rows, positions, batch.labels[positions + 1], num_tokens=num_tokens)
        return loss, Tape(row, head, saved, graphed, ticket)

    def backward(self, tape: Tape, factor: Tensor) -> Tensor:
        """[P] float32 gradient of `factor` · loss for the flat adapter."""
        if tape.head is None:
            raise RuntimeError("the fused decoder's backward pass uses up what the forward pass kept: it runs once")
        head, tape.head = tape.head, None
        stream = self.decoder.gradient_of_last(head, factor)
        del head
        if tape.graphed is not None:
            return tape.graphed.backward(stream, tape.ticket)
        return self.decoder.backward(stream, tape.saved, tape.row)

    def _evaluate(self, batch: Batch) -> Tensor:
        row = self._row(batch)
        last, _ = self.decoder.forward(batch.input_ids, row, None)
        positions = predicting_positions(batch)
        return self.decoder.loss(last, positions, batch.labels[positions + 1])

    def _row(self, batch: Batch) -> RowContext:
        segments = Segments.from_cu_seqlens(batch.cu_seqlens, max_seqlen=max(batch.lengths), lengths=batch.lengths)
        probe = torch.empty(0, dtype=torch.float32, device=batch.input_ids.device)
        cos, sin = self._rotary(probe, batch.position_ids.unsqueeze(0))
        half = cos.shape[-1] // 2
        in_parts = Keep.PARTS in self.policy.layers
        return RowContext(
            segments,
            cos[0, :, :half].contiguous(),
            sin[0, :, :half].contiguous(),
            self.decoder.adapter.computed(),
            attention_on_host(
                self.decoder.spec,
                self.policy,
                num_tokens=batch.input_ids.shape[0],
                longest=segments.max_seqlen,
                itemsize=self.decoder.final_norm.dtype.itemsize,
                device=batch.input_ids.device,
            ),
            part_tokens=tokens_per_part(batch.input_ids.shape[0]) if in_parts else MLP_CHUNK_TOKENS,
            in_parts=in_parts,
        )


class _FusedLoss(torch.autograd.Function):
    """The loss as a function of the engine's parameters, for the loop's `loss.backward()`."""

    @staticmethod
    def forward(ctx: Any, engine: FastEngine, batch: Batch, *parameters: Tensor) -> Tensor:
        loss, ctx.tape = engine.forward(batch)
        ctx.engine = engine
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        engine: FastEngine = ctx.engine
        gradient = engine.backward(ctx.tape, grad_outputs[0])
        if engine.is_flat:
            return None, None, gradient
        return None, None, *engine.decoder.adapter.gradients_of(gradient).values()


def attach_fast_engine(
    model: nn.Module,
    *,
    row_tokens: int,
    budget_bytes: int | None = None,
    recompute: bool | Literal["auto"] = "auto",
    is_flat: bool = True,
    is_lean: bool = False,
    may_capture: bool = True,
    longest: int | None = None,
    demand: StepDemand | None = None,
) -> FastEngine | Unsupported:
    """Run `model`'s losses through the fused decoder from now on, or say why it cannot.

    row_tokens:   T, the longest row that it will see
    budget_bytes: of device memory for the whole process; None: what is free
    recompute:    True keeps only the layers' inputs, False keeps all, "auto" keeps what the memory allows
    is_flat:      the optimiser sees one flat parameter (elementwise optimisers), or PEFT's matrices
    is_lean:      take the least memory of the device, whatever is free: nothing kept, layers in parts, and a flat
                  adapter in the host's memory, where PEFT's matrices then are too until `detach_fast_engine`
    may_capture:  rows have one shape, so that they will be captured if there is room
    longest:      tokens of the longest document; None: row_tokens
    demand:       what a step needs besides; None: AdamW, accumulation and validation

    The result is compared with the reference on a small batch before it is trusted.
    """
    spec = decoder_of(model)
    if isinstance(spec, Unsupported):
        return spec
    assert isinstance(model, PeftModel)
    base = base_model_of(model)
    of_attention = attention_difference(spec, base.dtype, base.device)
    if not of_attention <= ATTENTION_LIMIT:
        return Unsupported(f"its attention differs by {of_attention:.1%} from the definition on this card")
    expected = _loss_and_gradients(model)
    on_device = base.device.type != "cpu"
    decoder = build_decoder(model, spec, is_lean=is_lean, adapter_on_host=is_lean and is_flat and on_device)
    if is_lean:
        choice = StepChoice(SavePolicy.uniform(spec.num_layers, Keep.PARTS if on_device else Keep.INPUT), False)
    else:
        choice = choose_for_device(
            decoder,
            row_tokens,
            demand or StepDemand(optimizer_bytes=int(OPTIMIZER_BYTES["adamw"] * decoder.adapter.parameter.numel())),
            budget_bytes=budget_bytes,
            recompute=recompute,
            may_capture=may_capture,
            longest=longest,
        )
    # On a CPU nothing is captured, and nothing has to be refused.
    has_room = choice.is_captured or not on_device
    engine = FastEngine(model, decoder, choice.policy, is_flat=is_flat, has_room_for_graphs=has_room)
    set_engine(model, engine)
    difference = _difference(expected, _loss_and_gradients(model))
    limit = _tolerance(model, decoder)
    if not difference <= limit:
        detach_fast_engine(model)
        return Unsupported(f"its gradients differ by {difference:.1%} from the reference's on a probe")
    if is_lean and on_device:
        torch.cuda.empty_cache()  # of loading and of the probe
    return engine


def detach_fast_engine(model: PeftModel) -> None:
    """Back to transformers' own forward. Parameters keep their present values, in memory of their own."""
    engine = fast_engine_of(model)
    if engine is not None:
        engine.decoder.adapter.release()
        set_engine(model, None)


def fast_engine_of(model: nn.Module) -> FastEngine | None:
    """The fast engine attached to `model`, if one is."""
    engine = engine_of(model)
    return engine if isinstance(engine, FastEngine) else None


def flat_adapter_of(model: nn.Module) -> FlatAdapter | None:
    """The flat adapter that an optimiser of `model` trains, if it trains one."""
    engine = fast_engine_of(model)
    return engine.decoder.adapter if engine is not None and engine.is_flat else None


def _loss_and_gradients(model: PeftModel) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a small batch, in PEFT's order of parameters, on the CPU; leaves no gradients."""
    parameters = trainable_parameters(model)
    with _nonzero_adapter(model), torch.enable_grad():
        loss, _ = supervised_loss(model, probe_batch(model))
        gradients = torch.autograd.grad(loss, parameters)
    engine = fast_engine_of(model)
    if engine is None:
        return loss.detach(), [gradient.cpu() for gradient in gradients]
    by_parameter = (
        engine.decoder.adapter.gradients_of(gradients[0])
        if engine.is_flat
        else dict(zip(engine.parameters, gradients, strict=True))
    )
    return loss.detach(), [by_parameter[p].cpu() for p in model.parameters() if p.requires_grad]


@contextmanager
def _nonzero_adapter(model: PeftModel) -> Iterator[None]:
    """Every adapter matrix nonzero for a while: with B = 0, as adapters start, no gradient reaches A."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(parameter.device))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


def _tolerance(model: PeftModel, decoder: Decoder) -> float:
    """How far the probe may be from the reference: what rounding explains; a mistake makes a difference of the order of
    one.

    Measured on an H200: 2% in bfloat16 on four layers, below 10% on a random Qwen3-4B; with 8-bit products, whose every
    factor is off by 2.6%, 12% and 30%, against a reference that multiplies the same weights in 16 bits.
    """
    if any(isinstance(linear.stack, Fp8Stack) for layer in decoder.layers for linear in layer.linears):
        return 0.6
    return 1e-4 if base_model_of(model).dtype == torch.float32 else 0.1


def _difference(expected: tuple[Tensor, list[Tensor]], found: tuple[Tensor, list[Tensor]]) -> float:
    """The larger of the relative differences of the loss and of all gradients together."""
    of_loss = abs(float(found[0] - expected[0])) / max(abs(float(expected[0])), 1e-12)
    squared = sum(float((f - e).double().square().sum()) for e, f in zip(expected[1], found[1], strict=True))
    norm = sum(float(e.double().square().sum()) for e in expected[1])
    of_gradients = math.sqrt(squared / max(norm, 1e-30))
    return max(of_loss, of_gradients)
