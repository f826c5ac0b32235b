"""AdaLoRA's part of a training step: its regularisation, and the ranks that it takes away.

Zhang et al., arXiv:2303.10512. An update is P Λ Q with P and Q kept near orthogonal by γ · mean ‖PᵀP − I‖; every few
steps the directions that matter least over the whole model are masked, until on average `rank` are left (section 3.3;
the budget falls as a cube). PEFT keeps importance and masks; nothing in PEFT calls them, and its loss adds the
regularisation only in a forward pass of its own. The loop does both, through `MethodStep`.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor, nn

from affina.models.adapters.attach import ADAPTER_NAME, settings_of

INITIAL_SHARE, FINAL_SHARE = 0.1, 0.3
"""Of a run's steps: before the first rank goes, and after the last has gone (PEFT's example; the paper tunes them)."""

MASKINGS_PER_RUN = 100


def adalora_of(model: nn.Module, *, num_steps: int) -> AdaLora | None:
    """AdaLoRA's part of the steps of a run of `num_steps`; None for other methods."""
    if settings_of(model).method != "adalora":
        return None
    assert isinstance(model, PeftModel)
    return AdaLora(model, num_steps=num_steps)


class AdaLora:
    """A `MethodStep` (loop.py). Its state is the importance in PEFT's allocator, which restore.py saves."""

    def __init__(self, model: PeftModel, *, num_steps: int) -> None:
        self._tuner = model.base_model
        self._config = config = model.peft_config[ADAPTER_NAME]
        config.total_step = num_steps
        config.tfinal = max(1, round(FINAL_SHARE * num_steps))
        # Before the last masking, which a run of one step has in step 0: PEFT takes nothing away up to `tinit`.
        config.tinit = min(round(INITIAL_SHARE * num_steps), num_steps - config.tfinal - 1)
        config.deltaT = max(1, num_steps // MASKINGS_PER_RUN)
        self._weight = float(config.orth_reg_weight)
        self._factors = [
            (parameter, ".lora_A." in name)
            for name, parameter in model.named_parameters()
            if ".lora_A." in name or ".lora_B." in name
        ]

    def regularization(self) -> Tensor | None:
        """γ times the mean distance of the factors from orthogonal ones, [] float32; None with γ = 0."""
        if self._weight == 0:
            return None
        distances = []
        for factor, is_right in self._factors:
            product = factor @ factor.t() if is_right else factor.t() @ factor
            distances.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return self._weight * torch.stack(distances).mean()

    def after_update(self, step: int) -> None:
        """Take ranks away, by the gradients that the parameters still have. step: from 0

        Steps that are skipped do not come here. The last masking is due at a step of its own; where that was skipped
        the next one makes it, and where no step before it was measured it measures itself.
        """
        allocator = self._tuner.rankallocator
        if allocator.init_bgt <= allocator.target_bgt:
            return
        last_masking = self._config.total_step - self._config.tfinal
        # PEFT forgets what it has measured after the last masking, and only then.
        is_masked_for_good = bool(self._config.rank_pattern) and not allocator.exp_avg_ipt
        if step >= last_masking and not is_masked_for_good:
            if not allocator.exp_avg_ipt:
                allocator.update_ipt(self._tuner.model)
            step = last_masking
        self._tuner.update_and_allocate(step)
