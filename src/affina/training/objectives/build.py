"""From the config to the objective of a run."""

from __future__ import annotations

from affina.config.schema import RunConfig
from affina.data.tokenizer import LoadedTokenizer
from affina.models.build import LoadedModel
from affina.models.load import load_causal_lm
from affina.training.objectives import Objective
from affina.training.objectives.distill import DistillObjective, OnPolicy
from affina.training.objectives.kto import KtoObjective
from affina.training.objectives.preference import PairObjective
from affina.training.objectives.reward import RewardObjective
from affina.training.objectives.sft import TokenObjective, sft_objective


def build_objective(config: RunConfig, tokenizer: LoadedTokenizer, loaded: LoadedModel) -> Objective:
    """What the config wants to be learnt."""
    name, preference = config.training.objective, config.training.preference
    if name == "sft" or name == "cpt":
        return TokenObjective(sft_objective)
    if name == "reward":
        return RewardObjective()
    if name == "distill":
        return _distillation(config, tokenizer, loaded)
    assert preference.beta is not None, "derive.py fills it in"
    if name == "kto":
        return KtoObjective(
            beta=preference.beta,
            desirable_weight=preference.desirable_weight,
            undesirable_weight=preference.undesirable_weight,
        )
    is_ipo = name == "dpo" and preference.loss == "ipo"
    return PairObjective(
        "ipo" if is_ipo else name,
        beta=preference.beta,
        label_smoothing=preference.label_smoothing,
        margin=preference.margin,
    )


def _distillation(config: RunConfig, tokenizer: LoadedTokenizer, loaded: LoadedModel) -> DistillObjective:
    settings = config.training.distillation
    if settings.teacher is None:
        return DistillObjective()
    teacher = load_causal_lm(settings.teacher, dtype=loaded.compute_dtype, device=loaded.device)
    on_policy = OnPolicy(
        share=settings.on_policy,
        max_new_tokens=settings.max_new_tokens,
        stop_ids=tokenizer.end_of_turn_ids,
        seed=config.training.seed,
    )
    return DistillObjective(
        teacher,
        divergence=settings.divergence,
        temperature=settings.temperature,
        on_policy=on_policy if settings.on_policy > 0 else None,
    )
