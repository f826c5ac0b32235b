"""One clipped AdamW step over a flat buffer of parameters.

Legend: P parameters (every adapter matrix of the model, one after another), g gradient as accumulated, f its factor.

**Maths.** With ĝ = f · g, step t ≥ 1, learning rate η, decay λ, β₁, β₂, ε:

    θ ← θ (1 − η λ)                                   decoupled decay
    m ← m + (1 − β₁)(ĝ − m)
    v ← β₂ v + (1 − β₂) ĝ²
    θ ← θ − (η / (1 − β₁ᵗ)) · m / (√v / √(1 − β₂ᵗ) + ε)

Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, arXiv:1711.05101, algorithm 2, with the bias corrections
of Kingma and Ba, arXiv:1412.6980. Order and grouping of the operations are those of `torch.optim.AdamW`, whose bits the
specification (`_adamw_step`) gives; a CPU runs torch's fused kernel, ten times as fast, whose bits differ in the last
place. Corrections, 1 − η λ and η / (1 − β₁ᵗ) are computed in float64 on the host and rounded once.

**Clipping without waiting.** Gradients are accumulated under a loss scale S (1 in bfloat16). Their norm N = ‖g‖ and

    f = min(1, c / (N / S + 1e-6)) / S

stay on the device (`gradient_norm`, `clip_factor`): the host never waits to learn a norm, and the whole step can be
captured in a CUDA graph. The rule, 1e-6 included, is that of `torch.nn.utils.clip_grad_norm_`.

**A step that must not happen.** A NaN or infinite norm gives f = 0, and a factor that is 0 or not finite leaves
parameters and moments exactly as they are: the kernel tests the factor before it writes. The caller learns from
the norm, later and at no cost, that the step did not count. Since squares are summed in float32 a norm above 1.8e19
counts as infinite.

**Memory.** θ, m, v are read and written, g read: 28 bytes per parameter in one pass; a scaling of g and torch's fused
AdamW move 36. Everything is float32; offsets are 64 bits wide. There are no atomics: a norm is the sum of at most 1,024
partial sums, each over fixed blocks in a fixed order, so equal gradients give equal bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from affina.kernels.dispatch import use_triton

CLIP_EPSILON = 1e-6
"""Added to the norm before it divides, as torch.nn.utils.clip_grad_norm_ does."""
_NORM_BLOCK_CPU = 4096


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What AdamW is told about one step, and the numbers that follow from it, in float64.

    step counts from 1, as everywhere in AdamW.
    """

    step: int
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float

    def __post_init__(self) -> None:
        assert self.step >= 1, f"steps count from 1, got {self.step}"

    @property
    def keep(self) -> float:
        """1 − η λ: what the decay leaves of a parameter."""
        return 1 - self.learning_rate * self.weight_decay

    @property
    def new_first(self) -> float:
        """1 − β₁."""
        return 1 - self.betas[0]

    @property
    def keep_second(self) -> float:
        """β₂."""
        return self.betas[1]

    @property
    def new_second(self) -> float:
        """1 − β₂."""
        return 1 - self.betas[1]

    @property
    def step_size(self) -> float:
        """η / (1 − β₁ᵗ)."""
        return self.learning_rate / (1 - self.betas[0] ** self.step)

    @property
    def root_correction(self) -> float:
        """√(1 − β₂ᵗ)."""
        return math.sqrt(1 - self.betas[1] ** self.step)


@torch.no_grad()
def adamw_step(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    gradient_factor: float | Tensor = 1.0,
) -> None:
    """Updates parameters and moments in place.

    parameters, gradients, first_moment, second_moment: [P] fp32, contiguous; gradients are only read
    step:            number of this step, from 1
    gradient_factor: f, what gradients are multiplied by: inverse loss scale times clip factor. A float, or a float32
                     scalar on the device (`clip_factor`). 0, NaN and infinity mean that nothing is written at all
    """
    for tensor in (parameters, gradients, first_moment, second_moment):
        assert tensor.dtype == torch.float32, f"AdamW keeps float32, got {tensor.dtype}"
        assert tensor.shape == parameters.shape, "one gradient and two moments for each parameter"
        assert tensor.dim() == 1, "the buffer is flat"
        assert tensor.is_contiguous(), "the buffer is contiguous"
    if isinstance(gradient_factor, Tensor):
        assert gradient_factor.dtype == torch.float32, f"the factor is float32, not {gradient_factor.dtype}"
        assert gradient_factor.numel() == 1, "one factor for all gradients"
    coefficients = Coefficients(step, learning_rate, betas, epsilon, weight_decay)
    buffers = (parameters, gradients, first_moment, second_moment)
    if use_triton(parameters):
        from affina.kernels.triton import adamw as kernel

        kernel.adamw_step(*buffers, coefficients, gradient_factor)
    elif parameters.device.type == "cpu":
        _adamw_step_cpu(*buffers, coefficients, gradient_factor)
    else:
        _adamw_step(*buffers, coefficients, gradient_factor)


def _adamw_step_cpu(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    coefficients: Coefficients,
    gradient_factor: float | Tensor,
) -> None:
    """torch's own kernel, which makes one pass where the specification makes nine."""
    factor = float(gradient_factor)
    if not _counts(factor):
        return
    adamw(
        [parameters],
        [gradients if factor == 1.0 else gradients * factor],
        [first_moment],
        [second_moment],
        [],
        [torch.tensor(float(coefficients.step - 1))],
        fused=True,
        amsgrad=False,
        beta1=coefficients.betas[0],
        beta2=coefficients.betas[1],
        lr=coefficients.learning_rate,
        weight_decay=coefficients.weight_decay,
        eps=coefficients.epsilon,
        maximize=False,
    )


def _adamw_step(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    coefficients: Coefficients,
    gradient_factor: float | Tensor,
) -> None:
    """The specification. Waits for a factor that lies on a device."""
    factor = float(gradient_factor)
    if not _counts(factor):
        return
    scaled = gradients if factor == 1.0 else gradients * factor
    parameters.mul_(coefficients.keep)
    first_moment.lerp_(scaled, coefficients.new_first)
    second_moment.mul_(coefficients.keep_second).addcmul_(scaled, scaled, value=coefficients.new_second)
    denominator = second_moment.sqrt().div_(coefficients.root_correction).add_(coefficients.epsilon)
    parameters.addcdiv_(first_moment, denominator, value=-coefficients.step_size)


def _counts(factor: float) -> bool:
    """Whether a step with this factor happens."""
    return factor != 0.0 and math.isfinite(factor)


# The norm and what it allows
# ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def gradient_norm(gradients: Tensor) -> Tensor:
    """[] float32 Euclidean norm of `gradients` [P] fp32, on their device; the host does not wait.

    Sums are taken in a fixed order: equal gradients give equal bits, on a CPU with any number of threads. NaN and
    infinity in, NaN or infinity out.
    """
    assert gradients.dtype == torch.float32, f"gradients are float32, got {gradients.dtype}"
    assert gradients.dim() == 1, "the buffer is flat"
    assert gradients.is_contiguous(), "the buffer is contiguous"
    if not use_triton(gradients):
        return _gradient_norm(gradients)
    from affina.kernels.triton import adamw as kernel

    return kernel.gradient_norm(gradients)


def _gradient_norm(gradients: Tensor) -> Tensor:
    """The specification: norms of rows of fixed length, then their norm; threads share out rows, not sums."""
    whole = gradients.numel() // _NORM_BLOCK_CPU * _NORM_BLOCK_CPU
    rows = torch.linalg.vector_norm(gradients[:whole].view(-1, _NORM_BLOCK_CPU), dim=1)
    rest = torch.linalg.vector_norm(gradients[whole:])
    total: Tensor = torch.linalg.vector_norm(torch.cat([rows, rest.unsqueeze(0)]))
    return total


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float, loss_scale: float = 1.0) -> Tensor:
    """[] float32 factor f for `adamw_step`, on the device of `norm`; the host does not wait.

    norm:       [] float32, of the gradients as they are, loss scale included
    max_norm:   the largest norm of the gradients without the loss scale, above 0; infinity: never clip
    loss_scale: what the loss was multiplied by

    0 where the norm is NaN or infinite: the step must not happen.
    """
    assert max_norm > 0, f"a largest norm of {max_norm} allows no step"
    assert loss_scale > 0, f"a loss scale of {loss_scale} leaves no gradient"
    if not use_triton(norm):
        return _clip_factor(norm, max_norm, loss_scale)
    from affina.kernels.triton import adamw as kernel

    return kernel.clip_factor(norm, max_norm, loss_scale)


def _clip_factor(norm: Tensor, max_norm: float, loss_scale: float) -> Tensor:
    """The specification."""
    clip = (max_norm / (norm / loss_scale + CLIP_EPSILON)).clamp_(max=1.0)
    return torch.where(norm.isfinite(), clip / loss_scale, torch.zeros_like(norm))
