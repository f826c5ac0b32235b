"""From the training section to the objective of a run."""

from __future__ import annotations

from affina.config.schema import TrainingConfig
from affina.training.objectives import Objective
from affina.training.objectives.preference import PairObjective
from affina.training.objectives.sft import TokenObjective, sft_objective


def build_objective(config: TrainingConfig) -> Objective:
    """What the config wants to be learnt."""
    if config.objective in ("sft", "cpt"):
        return TokenObjective(sft_objective)
    preference = config.preference
    assert preference.beta is not None, "derive.py fills it in"
    if config.objective in ("dpo", "orpo", "simpo"):
        kind = preference.loss if config.objective == "dpo" else config.objective
        return PairObjective(
            "dpo" if kind == "sigmoid" else kind,  # type: ignore[arg-type]
            beta=preference.beta,
            label_smoothing=preference.label_smoothing,
            margin=preference.margin,
        )
    raise AssertionError(config.objective)
