"""Optimisers by name. Adapters are fp32, so every optimiser's state is exact unless it is 8-bit by choice."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from affina.errors import TrainingError
from affina.kernels.adamw import adamw_step, clip_factor, gradient_norm
from affina.runs.units import format_bytes

OptimizerKind = Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"]


@dataclass(frozen=True, slots=True)
class OptimizerOptions:
    """betas and epsilon are Adam's (arXiv 1412.6980); weight decay is decoupled (arXiv 1711.05101)."""

    kind: OptimizerKind
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0


_EIGHT_BIT_FROM = 4096
"""bitsandbytes keeps the moments of parameters with fewer elements in 32 bits."""
_EIGHT_BIT_BLOCK = 256
_EIGHT_BIT_MAPS_BYTES = 2 * 256 * 4
"""Two tables of 256 numbers, shared by all parameters."""
_WORTH_SAVING = 0.1
"""Share of the model's bytes below which a saving seldom decides whether a run fits."""


def moment_bytes(sizes: Iterable[int], kind: OptimizerKind) -> int:
    """Bytes of Adam's two moments for parameters with `sizes` elements.

    adamw:    4 + 4 per element
    8-bit:    1 + 1 per element and a float32 scale per 256 elements and moment, 2.03 in all; parameters of fewer than
              4,096 elements as in adamw. Dettmers et al., arXiv:2110.02861
    """
    assert kind != "adafactor", "Adafactor keeps no moments of this kind"
    if kind == "adamw":
        return 8 * sum(sizes)
    small = large = blocks = 0
    for size in sizes:
        if size < _EIGHT_BIT_FROM:
            small += size
        else:
            large += size
            blocks += -(-size // _EIGHT_BIT_BLOCK)
    return 8 * small + 2 * large + 8 * blocks + (_EIGHT_BIT_MAPS_BYTES if large else 0)


def describe_saving(sizes: Sequence[int], kind: OptimizerKind, *, model_bytes: int) -> str | None:
    """What an 8-bit optimiser saves in this run, as a sentence; None for the other optimisers.

    model_bytes: of base and adapter, which put the saving into proportion
    """
    if kind not in ("adamw_8bit", "paged_adamw_8bit"):
        return None
    full, kept = moment_bytes(sizes, "adamw"), moment_bytes(sizes, kind)
    advice = "; adamw is exact and as good here" if full - kept < _WORTH_SAVING * model_bytes else ""
    return (
        f"training.optimizer {kind} keeps {format_bytes(kept)} of moments where adamw would keep "
        f"{format_bytes(full)}: it saves {format_bytes(full - kept)} beside a model of "
        f"{format_bytes(model_bytes)}{advice}"
    )


LEARNING_RATE_FACTOR = "learning_rate_factor"
"""Key of a parameter group: its learning rate over the run's."""


def build_optimizer(
    parameters: Sequence[nn.Parameter],
    options: OptimizerOptions,
    *,
    faster: Sequence[nn.Parameter] = (),
    learning_rate_ratio: float = 1.0,
) -> torch.optim.Optimizer:
    """The optimiser over `parameters`; the loop sets the learning rate at every step.

    faster: those of them that learn `learning_rate_ratio` times as fast as the others (LoRA+, arXiv 2402.12354)

    Raises TrainingError `optimizer-unavailable` when an 8-bit kind is asked for and bitsandbytes is not installed.
    """
    groups = _groups(parameters, faster, learning_rate_ratio)
    shared: dict[str, Any] = {"lr": 0.0, "weight_decay": options.weight_decay}
    if options.kind == "adamw" and len(parameters) == 1 and _is_flat(parameters[0]):
        return FlatAdamW(parameters, betas=options.betas, eps=options.epsilon, fused=True, **shared)
    if options.kind == "adamw":
        # One launch for all parameters; 3x faster than foreach on CPU as well.
        fused = all(p.device.type in ("cpu", "cuda", "mps") and p.is_floating_point() for p in parameters)
        return torch.optim.AdamW(groups, betas=options.betas, eps=options.epsilon, fused=fused, **shared)
    if options.kind == "adafactor":
        # torch's Adafactor (arXiv 1804.04235) with the loop's learning rate as its upper bound on relative steps.
        return torch.optim.Adafactor(groups, **shared)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TrainingError(
            "optimizer-unavailable",
            f'training.optimizer "{options.kind}" needs bitsandbytes, which is not installed',
            fix='`pip install "affina[gpu]"`, or training.optimizer: adamw',
        )
    import bitsandbytes

    # Paging needs CUDA's managed memory; elsewhere bitsandbytes warns and does not page.
    pages = options.kind == "paged_adamw_8bit" and all(p.device.type == "cuda" for p in parameters)
    kind = bitsandbytes.optim.PagedAdamW8bit if pages else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, betas=options.betas, eps=options.epsilon, **shared)
    return optimizer


class FlatAdamW(torch.optim.AdamW):
    """AdamW over one flat float32 parameter, clipping included: two passes over the buffers, one wait for the device.

    State and its form on disk are those of torch's AdamW.
    """

    def clip_and_step(self, learning_rate: float, max_norm: float, loss_scale: float) -> float:
        """One step with the gradient scaled down to `max_norm` (0: as it is); returns its norm before.

        loss_scale: what the loss was multiplied by; the norm is that without it

        A norm that is not finite leaves parameter, moments and step count as they are.
        """
        (group,) = self.param_groups
        (parameter,) = group["params"]
        gradient: Tensor = parameter.grad
        state = self.state[parameter]
        if not state:
            # On the CPU, where reading it costs nothing; torch's fused kernel takes it on either side.
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        group["lr"] = learning_rate
        norm = gradient_norm(gradient)
        adamw_step(
            parameter.data,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=int(state["step"]) + 1,
            learning_rate=learning_rate,
            betas=group["betas"],
            epsilon=group["eps"],
            weight_decay=group["weight_decay"],
            gradient_factor=clip_factor(norm, max_norm if max_norm > 0 else math.inf, loss_scale),
        )
        true_norm = float(norm) / loss_scale
        if math.isfinite(true_norm):
            state["step"] += 1
        return true_norm

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = state["step"].cpu()


def _is_flat(parameter: nn.Parameter) -> bool:
    is_here = parameter.device.type in ("cpu", "cuda")
    return parameter.dim() == 1 and parameter.dtype == torch.float32 and is_here


def _groups(
    parameters: Sequence[nn.Parameter], faster: Sequence[nn.Parameter], ratio: float
) -> list[nn.Parameter] | list[dict[str, Any]]:
    if not faster:
        return list(parameters)
    chosen = {id(parameter) for parameter in faster}
    slow = [parameter for parameter in parameters if id(parameter) not in chosen]
    fast = [parameter for parameter in parameters if id(parameter) in chosen]
    assert fast, "the parameters that learn faster are not among those of the optimiser"
    return [{"params": slow, LEARNING_RATE_FACTOR: 1.0}, {"params": fast, LEARNING_RATE_FACTOR: ratio}]
