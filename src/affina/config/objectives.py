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
class Default:
    """A number, and whose it is."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class ObjectiveFacts:
    """One objective.

    beta:             None where there is none
    learning_rate:    for LoRA on a model of billions of parameters; None: the general default
    runs_fast:        it is the supervised cross-entropy, which the fused decoder computes
    can_write:        what it trains is a language model still
    compares_replies: replies to the data's questions show what was learnt
    """

    records: Records
    beta: Default | None = None
    learning_rate: Default | None = None
    runs_fast: bool = False
    can_write: bool = True
    compares_replies: bool = True


OBJECTIVES: Mapping[str, ObjectiveFacts] = {
    "sft": ObjectiveFacts("replies", runs_fast=True),
    "cpt": ObjectiveFacts("texts", runs_fast=True, compares_replies=False),
    "dpo": ObjectiveFacts(
        "pairs",
        beta=Default(0.1, "Rafailov et al., arXiv:2305.18290"),
        learning_rate=Default(
            5e-6, "the alignment handbook's QLoRA recipe for Zephyr, recipes/zephyr-7b-beta/dpo/config_qlora.yaml"
        ),
    ),
    "orpo": ObjectiveFacts(
        "pairs",
        beta=Default(0.1, "λ of Hong et al., arXiv:2403.07691"),
        learning_rate=Default(8e-5, "TRL's examples/scripts/orpo.py, with LoRA"),
    ),
    "kto": ObjectiveFacts(
        "labels",
        beta=Default(0.1, "Ethayarajh et al., arXiv:2402.01306"),
        learning_rate=Default(
            5e-6, "the authors' code, config/config.yaml of ContextualAI/HALOs; the most that TRL's guide recommends"
        ),
    ),
    "simpo": ObjectiveFacts(
        "pairs",
        beta=Default(2.0, "Meng et al., arXiv:2405.14734"),
        learning_rate=Default(
            5e-6, "our choice: ten times the middle of what Meng et al. (arXiv:2405.14734) try, who train all weights"
        ),
    ),
    "reward": ObjectiveFacts(
        "pairs",
        learning_rate=Default(1e-4, "TRL's examples/scripts/reward_modeling.py, with LoRA"),
        can_write=False,
        compares_replies=False,
    ),
    "distill": ObjectiveFacts("replies"),
}


def names_with(records: Records) -> str:
    """The objectives that learn from such records: "dpo, orpo, simpo or reward"."""
    names = [name for name, facts in OBJECTIVES.items() if facts.records == records]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
