"""The objectives as facts: which records each wants, what it needs, and its defaults with their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Records = Literal["replies", "pairs", "labels", "texts", "taught"]
"""What an objective learns from: conversations; chosen and rejected replies; replies with a label; plain text;
conversations with a teacher's log-probabilities."""


SFT_LEARNING_RATE = 2e-4
"""The general default, which the rates below are to be compared with."""


@dataclass(frozen=True, slots=True)
class ObjectiveFacts:
    """One objective.

    needs_reference: the base model's own log-probabilities, read with the adapter switched off
    runs_fast:       it is the supervised cross-entropy, which the fused decoder computes
    writes_replies:  what it trains can be asked for replies that are worth comparing
    learning_rate:   for an adapter on a model of billions of parameters; None: the general default
    """

    title: str
    records: Records
    needs_reference: bool = False
    runs_fast: bool = False
    writes_replies: bool = True
    beta: float | None = None
    beta_source: str = ""
    learning_rate: float | None = None
    rate_source: str = ""


OBJECTIVES: Mapping[str, ObjectiveFacts] = {
    "sft": ObjectiveFacts("supervised fine-tuning", "replies", runs_fast=True),
    "cpt": ObjectiveFacts("continued pre-training", "texts", runs_fast=True, writes_replies=False),
    "dpo": ObjectiveFacts(
        "direct preference optimisation",
        "pairs",
        needs_reference=True,
        beta=0.1,
        beta_source="Rafailov et al., arXiv:2305.18290",
        learning_rate=5e-6,
        rate_source="the QLoRA recipe of Zephyr (Tunstall et al., arXiv:2310.16944)",
    ),
    "orpo": ObjectiveFacts(
        "odds-ratio preference optimisation",
        "pairs",
        beta=0.1,
        beta_source="λ of Hong et al., arXiv:2403.07691",
        learning_rate=8e-5,
        rate_source="ten times the 8e-6 of Hong et al. (arXiv:2403.07691), who train all weights",
    ),
    "kto": ObjectiveFacts(
        "Kahneman-Tversky optimisation",
        "labels",
        needs_reference=True,
        beta=0.1,
        beta_source="Ethayarajh et al., arXiv:2402.01306",
        learning_rate=5e-6,
        rate_source="ten times the 5e-7 of Ethayarajh et al. (arXiv:2402.01306), who train all weights",
    ),
    "simpo": ObjectiveFacts(
        "simple preference optimisation",
        "pairs",
        beta=2.0,
        beta_source="Meng et al., arXiv:2405.14734",
        learning_rate=5e-6,
        rate_source="ten times the 5e-7 of Meng et al. (arXiv:2405.14734), who train all weights",
    ),
    "reward": ObjectiveFacts(
        "reward model",
        "pairs",
        writes_replies=False,
        learning_rate=1e-4,
        rate_source="ten times the 1e-5 that is usual when all weights train",
    ),
    "distill": ObjectiveFacts("distillation", "replies"),
}


def names_with(records: Records) -> str:
    """The objectives that learn from such records: "dpo, orpo, simpo or reward"."""
    names = [name for name, facts in OBJECTIVES.items() if facts.records == records]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
