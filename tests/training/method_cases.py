"""Every method on a random Qwen3 of 22,000 parameters: attached, and trained by the one loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from affina.catalog.methods import method_named
from affina.models.adapters import attach_adapter, load_adapter, save_adapter
from affina.models.adapters.attach import fast_learning_parameters
from affina.models.adapters.eva import start_from_inputs
from affina.models.adapters.factors import start_from_quantization_error
from affina.models.adapters.restore import restore_adapter_weights, save_training_state
from affina.models.engines import trainable_parameters
from affina.models.forward import evaluation_mode, hidden_states
from affina.models.load import load_causal_lm
from affina.models.safetensors_file import checkpoint_tensors, read_tensor
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, WeightFormatOptions
from affina.training.adalora import adalora_of
from affina.training.callbacks import Observers
from affina.training.loop import LoopSettings, train
from affina.training.loss_scale import LossScale
from affina.training.objectives.sft import TokenObjective, sft_objective
from affina.training.optim import OptimizerOptions, build_optimizer
from affina.training.optimizer_state import OptimizerState
from affina.training.state import TrainState
from tests.models.tiny import TinyBatch, batch_of, qwen3_config, random_model, save

NUM_STEPS = 3
SMALL = {
    "rank": 4,
    "initial_rank": 6,
    "num_virtual_tokens": 3,
    "encoder_hidden_size": 8,
    "block_size": 4,
    "bottleneck_size": 4,
    "num_layers": 1,
    "calibration_samples": 2,
}
FORMATS: dict[str, WeightFormatOptions | None] = {
    "dense": None,
    "nf4": Nf4Options(),
    "fp4": Fp4Options(),
    "int8": Int8Options(),
    "fp8": Fp8Options(),
}


def small_options(method: str) -> dict[str, Any]:
    """Sizes for a tiny model. P-tuning's encoder is a setting of prefix tuning too, where none is the default."""
    fields = method_named(method).fields
    return {
        name: value
        for name, value in SMALL.items()
        if name in fields and (name, method) != ("encoder_hidden_size", "prefix")
    }


def make_base(folder: Path) -> Path:
    # Norms and biases are random as well, so that no two models agree anywhere.
    return save(
        random_model(qwen3_config(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1)),
        folder,
    )


def load_base(folder: Path, weight_format: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return deepcopy(_read_base(folder, weight_format, dtype))


@cache
def _read_base(folder: Path, weight_format: str, dtype: torch.dtype) -> nn.Module:
    return load_causal_lm(str(folder), dtype=dtype, device="cpu", weight_format=FORMATS[weight_format])


def attach(
    folder: Path, method: str, weight_format: str, *, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """A fresh adapter as a run attaches it, with what starts from weights and data."""
    model = attach_adapter(
        load_base(folder, weight_format, dtype), method=method, seed=5, options=small_options(method) | options
    )
    if method == "loftq":
        specs = checkpoint_tensors(folder)
        start_from_quantization_error(model, "default", lambda layer: read_tensor(specs[f"{layer}.weight"]))
    if method == "eva":
        start_from_inputs(model, [batch_of([9, 12], seed=1)])
    return model


def hidden_of(model: nn.Module) -> Tensor:
    """[T, D] float32 for a row of two samples, without dropout."""
    with torch.no_grad(), evaluation_mode(model):
        return hidden_states(model, batch_of([7, 9], seed=9)).float()


@dataclass
class Step:
    """A batch as the loop wants it."""

    batch: TinyBatch

    @property
    def num_supervised(self) -> int:
        return self.batch.num_supervised

    @property
    def num_tokens(self) -> int:
        return len(self.batch.input_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)


class Source:
    """Two micro-batches a step, a function of the step alone."""

    steps_per_epoch = float(NUM_STEPS)

    def step(self, step: int) -> list[Any]:
        return [Step(batch_of([11, 6], seed=2 * step)), Step(batch_of([8, 5], seed=2 * step + 1))]

    def describe(self, step: int) -> str:
        return f"step {step}"

    def state(self) -> dict[str, Any]:
        return {}


class MethodRun:
    """What run.py does with a model, without a config: optimiser, loop, checkpoints."""

    def __init__(
        self, model: nn.Module, folder: Path, *, learning_rate: float = 2e-2, num_steps: int = NUM_STEPS
    ) -> None:
        self.model, self.folder, self.num_steps = model, folder, num_steps
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        parameters = trainable_parameters(model)
        faster, ratio = fast_learning_parameters(model)
        self.optimizer = build_optimizer(
            parameters, OptimizerOptions("adamw"), faster=faster, learning_rate_ratio=ratio
        )
        order = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer_state = OptimizerState(self.optimizer, None, order)
        self.learning_rate = learning_rate
        self.parameters = parameters

    def train(self, *, until: int, state: TrainState | None = None) -> TrainState:
        reached = state or TrainState()
        return train(
            self.model,
            self.parameters,
            Source(),
            TokenObjective(sft_objective),
            self.optimizer,
            lambda step: self.learning_rate,
            settings=LoopSettings(num_steps=self.num_steps, seed=3),
            state=reached,
            loss_scale=LossScale.for_precision(is_float16=False),
            validate=None,
            save=self.save,
            observers=Observers([]),
            stop_requested=lambda: reached.step >= until,
            memory_bytes=lambda: 0,
            method_step=adalora_of(self.model, num_steps=self.num_steps),
        )

    def train_in_memory(self) -> None:
        """Three steps, without leaving files."""
        self.save = lambda state: None  # type: ignore[method-assign]
        self.train(until=NUM_STEPS)

    def save(self, state: TrainState) -> None:
        save_adapter(self.model, self.folder, contract={"fingerprint": "abc"})
        save_training_state(self.model, self.folder)
        torch.save(self.optimizer_state.to_dict(), self.folder / "optimizer.pt")

    def restore(self, folder: Path) -> None:
        restore_adapter_weights(self.model, folder)
        self.optimizer_state.load(torch.load(folder / "optimizer.pt", weights_only=True))


def reload(base: Path, adapter: Path, weight_format: str) -> nn.Module:
    return load_adapter(load_base(base, weight_format), adapter)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def no_global_randomness() -> Iterator[None]:
    """Fails when the block draws from torch's global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "the global random state has moved"
