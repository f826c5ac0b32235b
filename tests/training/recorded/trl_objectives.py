"""Records what TRL's own trainers compute for fixed tensors: `trl_objectives.json`, which test_trl_parity.py reads.

    pip install trl==1.16.0
    python -m tests.training.recorded.trl_objectives

TRL's loss functions are methods of its trainers. They are called here as they are, on a stand-in that has the
attributes they read and on a stand-in for the model that returns fixed log-probabilities; nothing of them is copied.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).with_name("trl_objectives.json")
NUM_PAIRS, NUM_TOKENS, VOCABULARY = 4, 9, 11


def main() -> None:
    import trl
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    generator = torch.Generator().manual_seed(0)
    pairs = fixed_rows(2 * NUM_PAIRS, generator)
    reference = fixed_rows(2 * NUM_PAIRS, generator, like=pairs)
    mismatched = torch.randn(2 * NUM_PAIRS, generator=generator)
    mismatched_reference = mismatched - 0.3
    means = [row.sum() / count for row, count in zip(pairs.log_probs, pairs.counts, strict=True)]
    averages = torch.stack(means)

    cases: dict[str, Any] = {
        "log_probs": pairs.log_probs.tolist(),
        "reference": reference.log_probs.tolist(),
        "counts": pairs.counts.tolist(),
        "mismatched": mismatched.tolist(),
        "mismatched_reference": mismatched_reference.tolist(),
    }
    for name, loss_type, beta in (("dpo", "sigmoid", 0.1), ("ipo", "ipo", 0.1), ("dpo_steep", "sigmoid", 0.7)):
        trainer = stand_in(loss_types=[loss_type], loss_weights=[1.0], beta=beta)
        cases[name] = differentiate(pairs.log_probs, dpo_call(DPOTrainer, trainer, pairs, reference)) | {"beta": beta}

    # TRL smooths labels in its losses that sort a batch; a batch of one pair is sorted already, and that is DPO's.
    smoothed = stand_in(loss_types=["aot_unpaired"], loss_weights=[1.0], beta=0.1, label_smoothing=0.2)
    calls = [dpo_call(DPOTrainer, smoothed, one_pair(pairs, i), one_pair(reference, i)) for i in range(NUM_PAIRS)]
    cases["dpo_smoothed"] = differentiate(
        pairs.log_probs, lambda x: sum(call(x[[i, NUM_PAIRS + i]]) for i, call in enumerate(calls)) / NUM_PAIRS
    ) | {"beta": 0.1, "label_smoothing": 0.2}

    labels = torch.tensor([True, False, True, True, False, False, True, False])
    for name, weights in (("kto", (1.0, 1.0)), ("kto_weighted", (1.3, 0.7))):
        trainer = stand_in(loss_type="kto", beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1])
        call = kto_call(KTOTrainer, trainer, pairs, reference, mismatched, mismatched_reference, labels)
        cases[name] = differentiate(pairs.log_probs, call)
        cases[name] |= {
            "beta": 0.1,
            "weights": weights,
            "labels": labels.tolist(),
            "kl": trainer._metrics["train"]["kl"],
        }

    orpo = stand_in(beta=0.1)
    cases["orpo"] = differentiate(
        averages, lambda x: -ORPOTrainer.odds_ratio_loss(orpo, x[0::2], x[1::2])[0].mean()
    ) | {"beta": 0.1}
    simpo = stand_in(beta=2.0, simpo_gamma=1.0, label_smoothing=0.1, loss_type="simpo", alpha=0.0)
    cases["simpo"] = differentiate(averages, lambda x: CPOTrainer.cpo_loss(simpo, x[0::2], x[1::2])[0].mean()) | {
        "beta": 2.0,
        "margin": 1.0,
        "label_smoothing": 0.1,
    }

    scores = torch.randn(2 * NUM_PAIRS, 1, generator=generator)
    reward = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    cases["reward"] = differentiate(
        scores,
        lambda x: RewardTrainer.compute_loss(
            reward, lambda **_: SimpleNamespace(logits=x), {"attention_mask": torch.ones(2, 2)}
        ),
    ) | {"scores": scores[:, 0].tolist()}  # chosen first, then rejected

    student = torch.randn(1, 6, VOCABULARY, generator=generator)
    teacher = torch.randn(1, 6, VOCABULARY, generator=generator)
    cases["distill"] = {"student": student[0].tolist(), "teacher": teacher[0].tolist(), "cases": []}
    for beta in (0.0, 0.3, 1.0):
        for temperature in (1.0, 2.0):
            found = differentiate(
                student,
                lambda x, beta=beta, temperature=temperature: GKDTrainer.generalized_jsd_loss(
                    x, teacher, beta=beta, temperature=temperature, reduction="sum"
                ),
            )
            found["gradient"] = found["gradient"][0]
            cases["distill"]["cases"].append(found | {"divergence": beta, "temperature": temperature})

    head = FixedHead(torch.randn(VOCABULARY, 5, generator=generator))
    add_fused_lm_head(head, outputs=("log_probs", "entropy", "is_top1"))
    hidden = torch.randn(2, 8, 5, generator=generator)
    targets = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
    targets[0, :3] = targets[1, :5] = -100
    sft = stand_in(
        args=SimpleNamespace(loss_type="nll", average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )

    def sft_loss(x: Tensor) -> Tensor:
        head.hidden = x
        inputs = {"input_ids": targets, "labels": targets, "attention_mask": torch.ones_like(targets)}
        return SFTTrainer.compute_loss(sft, head, inputs)

    cases["sft"] = differentiate(hidden, sft_loss) | {
        "hidden": hidden.tolist(),
        "head": head.lm_head.weight.tolist(),
        "labels": targets.tolist(),
    }
    FILE.write_text(json.dumps({"trl": trl.__version__, "torch": torch.__version__, **cases}) + "\n")


def fixed_rows(num_rows: int, generator: torch.Generator, *, like: Any = None) -> Any:
    """Log-probabilities of NUM_TOKENS tokens in each row, 0 outside its completion. The order is all chosen, then all
    rejected, as TRL has it."""
    log_probs = -torch.rand(num_rows, NUM_TOKENS, generator=generator) * 3
    if like is None:
        starts = torch.randint(0, NUM_TOKENS - 3, (num_rows,), generator=generator)
        mask = torch.arange(NUM_TOKENS) >= starts.unsqueeze(1)
    else:
        mask = like.mask
    return SimpleNamespace(log_probs=log_probs * mask, mask=mask, counts=mask.sum(1))


def one_pair(rows: Any, index: int) -> Any:
    """The chosen and the rejected row of one pair."""
    both = [index, NUM_PAIRS + index]
    return SimpleNamespace(**{name: value[both] for name, value in vars(rows).items()})


class FixedHead(torch.nn.Module):
    """A language model whose body returns `hidden`, with the parts that TRL's head looks for."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)
        self.hidden = torch.empty(0)

    def base_model(self, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(self) -> None:
        raise AssertionError("TRL's head replaces it")


class Accelerator:
    device = torch.device("cpu")
    parallelism_config = None

    @staticmethod
    def gather_for_metrics(value: Tensor) -> Tensor:
        return value

    gather = gather_for_metrics


def stand_in(**attributes: Any) -> Any:
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        label_smoothing=attributes.pop("label_smoothing", 0.0),
        calculate_KL=True,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
        **attributes,
    )


def outputs_of(log_probs: Tensor) -> Any:
    zeros = torch.zeros_like(log_probs)
    return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def inputs_of(rows: Any) -> dict[str, Tensor]:
    mask = torch.nn.functional.pad(rows.mask, (1, 0)).long()
    return {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}


def dpo_call(trainer_class: Any, trainer: Any, pairs: Any, reference: Any) -> Any:
    chosen, rejected = reference.log_probs.sum(1).chunk(2)
    inputs = inputs_of(pairs) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return lambda x: trainer_class._compute_loss(trainer, lambda **_: outputs_of(x), dict(inputs), False)


def kto_call(
    trainer_class: Any,
    trainer: Any,
    pairs: Any,
    reference: Any,
    mismatched: Tensor,
    mismatched_reference: Tensor,
    labels: Tensor,
) -> Any:
    inputs = inputs_of(pairs) | {
        "label": labels,
        "ref_logps": reference.log_probs.sum(1),
        "ref_KL_logps": mismatched_reference,
    }
    trainer._compute_kl_logps = lambda model, batch: mismatched
    return lambda x: trainer_class._compute_loss(trainer, lambda **_: outputs_of(x), dict(inputs), False)


def differentiate(values: Tensor, loss: Any) -> dict[str, Any]:
    leaf = values.clone().requires_grad_()
    result = loss(leaf)
    (gradient,) = torch.autograd.grad(result, leaf)
    return {"loss": float(result.detach()), "gradient": gradient.squeeze(-1).tolist()}


if __name__ == "__main__":
    main()
