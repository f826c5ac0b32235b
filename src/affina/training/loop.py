"""The training loop. There is one, and this is it.

    for each optimiser step:
        micro-batches of the step ──► objective ──► sum of losses / examples of the WHOLE step ──► backward
        clip ──► optimiser, with the learning rate of this step
        now and then: log, validate, save

Three decisions keep it short and exact.

* The objective returns sums and a count (of supervised tokens, of pairs). The sums of all micro-batches are divided by
  the step's total count before the backward pass, so gradients do not depend on how a step is cut into micro-batches or
  rows.
* Whatever changes from step to step is a pure function of the step number: which samples (`source`), the learning
  rate (`schedule`), the random numbers of dropout (`seed_step`). Hence a checkpoint is the adapter, the optimiser and
  a few counters, and a resumed run repeats bit for bit what an uninterrupted run would have done.
* Everything that talks to the outside is handed in as a callable: `validate`, `save`, `observers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from affina.errors import TrainingError
from affina.training.callbacks import Observers, StepMetrics, ValidationMetrics
from affina.training.loss_scale import LossScale
from affina.training.objectives import MetricSums, Objective
from affina.training.optim import LEARNING_RATE_FACTOR, FlatAdamW
from affina.training.state import TrainState


class BatchSource(Protocol):
    """Where the micro-batches of each step come from (data/batches.py and data/collate.py, joined in build.py)."""

    @property
    def steps_per_epoch(self) -> float: ...

    def step(self, step: int) -> Sequence[Any]:
        """The micro-batches of optimiser step `step`, on the training device."""
        ...

    def describe(self, step: int) -> str:
        """Which samples step `step` sees, for a message: `samples 12, 55 and 8 more`."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed source needs besides the step number; empty for data that is on disk."""
        ...


class MethodStep(Protocol):
    """What an adapter method adds to a step (AdaLoRA: training/adalora.py). Its state is the adapter's."""

    def regularization(self) -> Tensor | None:
        """A term of the step's mean loss that no sample causes; None: there is none. The reported loss is without
        it."""
        ...

    def after_update(self, step: int) -> None:
        """Called when the optimiser has made its step, while the gradients are still there."""
        ...


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Steps between the loop's side jobs, and its limits. None switches a job off."""

    num_steps: int
    max_grad_norm: float = 1.0
    log_every_steps: int = 1
    evaluate_every_steps: int | None = None
    save_every_steps: int | None = None
    save_best: bool = False
    early_stopping_patience: int | None = None
    max_skipped_steps: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Validation:
    """The objective's loss over the validation set, and what else it measures there."""

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    source: BatchSource,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float],
    *,
    settings: LoopSettings,
    state: TrainState,
    loss_scale: LossScale,
    validate: Callable[[], Validation] | None,
    save: Callable[[TrainState], None],
    observers: Observers,
    stop_requested: Callable[[], bool],
    memory_bytes: Callable[[], int],
    make_room: Callable[[], str | None] | None = None,
    method_step: MethodStep | None = None,
) -> TrainState:
    """Train `parameters`, with the gradients that `objective` on `model` gives them, from `state.step` on.

    make_room: called when memory runs out in a step or a validation; frees some and says how, or returns None

    Returns `state` with `stop_reason` set. The last step is validated and saved, also after a stop request.

    Raises TrainingError `loss-not-finite` when more than `max_skipped_steps` steps had NaN or infinite gradients.
    """
    model.train()
    while state.stop_reason is None:
        if state.step >= settings.num_steps:
            state.stop_reason = "completed"
            break
        started = time.perf_counter()
        batches = source.step(state.step)
        num_supervised = sum(batch.num_supervised for batch in batches)

        loss, metrics = accumulate(
            model,
            batches,
            objective,
            step=state.step,
            loss_scale=loss_scale.scale,
            begin=lambda: seed_step(settings.seed, state.step),
            make_room=lambda: make_room_for(make_room, optimizer, observers, state.step + 1, f"step {state.step + 1}"),
            regularization=method_step.regularization if method_step is not None else None,
        )
        learning_rate = schedule(state.step)
        grad_norm = apply_gradients(
            optimizer, parameters, learning_rate, max_norm=settings.max_grad_norm, loss_scale=loss_scale.scale
        )
        is_finite = math.isfinite(grad_norm)
        if not is_finite:
            _count_skip(state, loss_scale, float(loss), settings, observers, source.describe(state.step))
        elif method_step is not None:
            method_step.after_update(state.step)
        optimizer.zero_grad(set_to_none=True)
        loss_scale.update(is_finite=is_finite)

        state.step += 1
        state.num_tokens += (num_tokens := sum(batch.num_tokens for batch in batches))
        state.num_supervised += num_supervised
        state.last_loss = float(loss)  # waits for the device, so the time below is the step's own
        state.seconds += (seconds := time.perf_counter() - started)
        state.loss_scale, state.loss_scale_good_steps = loss_scale.scale, loss_scale.good_steps
        state.source_state = source.state()

        epoch = state.step / source.steps_per_epoch
        is_last = state.step == settings.num_steps or stop_requested()
        if is_last or state.step % settings.log_every_steps == 0:
            observers.step(
                StepMetrics(
                    step=state.step,
                    epoch=epoch,
                    loss=state.last_loss,
                    learning_rate=learning_rate,
                    grad_norm=grad_norm,
                    tokens_per_second=num_tokens / seconds,
                    num_tokens=state.num_tokens,
                    num_supervised=state.num_supervised,
                    seconds=state.seconds,
                    memory_bytes=memory_bytes(),
                    objective=metrics.means(),
                )
            )
        is_best = False
        if validate is not None and (is_last or _is_due(state.step, settings.evaluate_every_steps)):
            measured = _validate(
                model, validate, lambda: make_room_for(make_room, optimizer, observers, state.step, "the validation")
            )
            is_best = _judge(measured, state, epoch, settings, observers)
        if state.stop_reason is None and state.step < settings.num_steps and stop_requested():
            state.stop_reason = "interrupted"
        is_save_due = _is_due(state.step, settings.save_every_steps) or (settings.save_best and is_best)
        if state.stop_reason or is_last or is_save_due:
            save(state)
    return state


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from the run's seed and the step, so that dropout needs no saved state."""
    # The multiplier keeps (seed, step) and (seed + 1, step - 1) apart; the mask keeps the result a valid seed.
    torch.manual_seed((seed * 1_000_003 + step) & 0x7FFF_FFFF_FFFF_FFFF)


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    learning_rate: float,
    *,
    max_norm: float,
    loss_scale: float,
) -> float:
    """One clipped step of the optimiser; the gradients' norm. Nothing is changed when that is not finite."""
    if isinstance(optimizer, FlatAdamW):
        return optimizer.clip_and_step(learning_rate, max_norm, loss_scale)
    norm = clip_gradients(parameters, max_norm, loss_scale)
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get(LEARNING_RATE_FACTOR, 1.0)
        optimizer.step()
    return norm


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float, loss_scale: float) -> float:
    """Undo the loss scale, scale the gradients down to `max_norm` (0: leave them), and return their norm before.

    The norm is taken over all parameters together, in float32; NaN or inf when any gradient is.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    assert gradients, "no parameter received a gradient"
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
    )
    true_norm = float(norm) / loss_scale
    if not math.isfinite(true_norm):
        return true_norm
    factor = 1.0 / loss_scale
    if max_norm > 0 and true_norm > max_norm:
        factor *= max_norm / true_norm
    if factor != 1.0:
        torch._foreach_mul_(gradients, factor)
    return true_norm


def accumulate(
    model: nn.Module,
    batches: Sequence[Any],
    objective: Objective,
    *,
    step: int,
    loss_scale: float,
    begin: Callable[[], None],
    make_room: Callable[[], bool],
    regularization: Callable[[], Tensor | None] | None = None,
) -> tuple[Tensor, MetricSums]:
    """Σ losses / count of the step, [] float32, with its gradients, times `loss_scale`, in the parameters; and what the
    objective measured.

    begin:     called before the first batch; seeds the step
    make_room: called when memory runs out; drops the gradients that are there, and says whether a repetition will need
               less. Same batches, same seed, same optimiser state, hence the same step.
    regularization: a term of the mean loss whose gradients are added once, and which the returned loss leaves out
    """
    while True:
        begin()
        try:
            losses, metrics = [], MetricSums()
            prepared = objective.prepare(model, batches, step=step)
            for batch in prepared.batches:
                found = prepared.loss(model, batch)
                (found.loss * (loss_scale / prepared.count)).backward()  # type: ignore[no-untyped-call]
                losses.append(found.loss.detach() / prepared.count)
                metrics.add(found.metrics)
            term = regularization() if regularization is not None else None
            if term is not None:
                (term * loss_scale).backward()  # type: ignore[no-untyped-call]
            return torch.stack(losses).sum(), metrics
        except torch.OutOfMemoryError:
            if not make_room():
                raise
        torch.cuda.empty_cache()  # here, where the error no longer holds the failed step's tensors


def make_room_for(
    free_some: Callable[[], str | None] | None,
    optimizer: torch.optim.Optimizer,
    observers: Observers,
    step: int,
    what: str,
) -> bool:
    """Whether `what` ran out of memory and can be repeated with less; says how. Drops gradients."""
    optimizer.zero_grad(set_to_none=True)
    kept = free_some() if free_some is not None else None
    if kept is None:
        return False
    observers.event(
        "out-of-memory-recovered",
        f"{what} ran out of memory and is repeated with more recomputation: layers keep {kept}",
        step=step,
    )
    return True


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _count_skip(
    state: TrainState, loss_scale: LossScale, loss: float, settings: LoopSettings, observers: Observers, samples: str
) -> None:
    """Count a step whose gradients are not finite; raise when there were too many."""
    if math.isfinite(loss) and loss_scale.can_shrink:
        # Ordinary in float16: the scale was too large for this step and is about to be halved.
        state.num_overflows += 1
        observers.event("loss-scale-halved", f"step {state.step + 1}: float16 overflow", step=state.step + 1)
        return
    state.num_skipped += 1
    observers.event(
        "step-skipped",
        f"step {state.step + 1} skipped: loss {loss:.4g}, gradients not finite; it saw {samples}",
        step=state.step + 1,
        num_skipped=state.num_skipped,
    )
    if state.num_skipped > settings.max_skipped_steps:
        raise TrainingError(
            "loss-not-finite",
            f"{state.num_skipped} steps had NaN or infinite gradients, the last at step {state.step + 1} ({samples})",
            why=f"training.max_skipped_steps allows {settings.max_skipped_steps}; the run is not learning any more",
            fix="lower training.learning_rate (a third of it), or training.precision: bf16 instead of fp16; "
            "`--resume` continues from the last checkpoint",
        )


def _validate(model: nn.Module, validate: Callable[[], Validation], make_room: Callable[[], bool]) -> Validation:
    """The validation, repeated when memory ran out and `make_room` found some: captured rows hold theirs until then."""
    model.eval()
    while True:
        try:
            measured = validate()
            model.train()
            return measured
        except torch.OutOfMemoryError:
            if not make_room():
                raise
        torch.cuda.empty_cache()


def _judge(measured: Validation, state: TrainState, epoch: float, settings: LoopSettings, observers: Observers) -> bool:
    """Remember the best validation loss; stop early when it has not improved for too long.

    Returns whether this loss is the best so far.
    """
    loss = measured.loss
    is_best = math.isfinite(loss) and (state.best_validation_loss is None or loss < state.best_validation_loss)
    if is_best:
        state.best_validation_loss, state.best_step, state.num_validations_without_gain = loss, state.step, 0
    else:
        state.num_validations_without_gain += 1
    observers.validation(ValidationMetrics(state.step, epoch, loss, is_best, measured.metrics))
    patience = settings.early_stopping_patience
    if patience is not None and state.num_validations_without_gain >= patience and state.step < settings.num_steps:
        state.stop_reason = "early-stopping"
        observers.event(
            "early-stopping",
            f"stopped at step {state.step}: no better validation loss in {patience} validations; "
            f"the best, {state.best_validation_loss}, was at step {state.best_step}",
            step=state.step,
        )
    return is_best
