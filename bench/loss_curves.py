"""Loss curves of the fast engine in every weight format beside the reference engine's, and whether they differ.

    python bench/carry_real_data.py DATA_FOLDER carried       # where the data are
    python bench/loss_curves.py --data carried [--seconds 150] [--variants …] [--seeds 5] [--steps 200]
                                [--output bench/results/loss_curves.json] [--tiny]

Chats of GSM8K and dolly through Qwen3's real tokenizer and template, packed into rows of 2,048 tokens; a Qwen3 of six
layers of width 1,024 (0.25 B parameters; the reference engine's thousand steps shall leave time for the others).
Released weights are not at hand: the base is a random model that was trained in full for `--base-steps` steps on all
tokens of the same data, a stand-in for a pre-trained one. Then each variant trains the same adapter for 200 steps of
one row, with affina's own loop: objective, schedule, clipping, AdamW. A seed decides the adapter's start and the order
of the rows, for all variants the same.

The test. L_s is the mean loss of the last 50 steps with seed s. For each variant the differences L_s − L_s(reference),
paired by seed, get a t interval; the variant is *equivalent* when the two one-sided tests (level 5%) put the mean
difference within ± the standard deviation of the reference's own L_s between seeds. `is_different` says whether the
mean difference is distinguishable from zero at all. `is_within_spread`: the smoothed curve, averaged over the seeds,
stays between the lowest and the highest of the reference's smoothed curves at every step.

`--tiny`: two layers, built-in tokenizer and data, float32, on a CPU.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import records  # noqa: E402
from equivalence import paired_test  # noqa: E402
from figures import Panel, figure  # noqa: E402
from systems.affina import be_deterministic, restart_adapter  # noqa: E402
from systems.common import DEVICE, TARGETS, device_name, new_model, synchronize  # noqa: E402

from affina.catalog.embedded import embedded_dataset_path  # noqa: E402
from affina.config import load_mapping  # noqa: E402
from affina.data.batches import BatchPlan  # noqa: E402
from affina.data.build import prepare_from_config  # noqa: E402
from affina.data.collate import Batch  # noqa: E402
from affina.data.samples import SampleStore  # noqa: E402
from affina.data.tokenizer import load_tokenizer  # noqa: E402
from affina.evaluation.charts import Series, smooth  # noqa: E402
from affina.models.adapters import attach_adapter  # noqa: E402
from affina.models.engines import engine_of, trainable_parameters  # noqa: E402
from affina.models.families import Unsupported  # noqa: E402
from affina.models.fast import attach_fast_engine  # noqa: E402
from affina.models.forward import supervised_loss  # noqa: E402
from affina.models.weights import Fp8Options, Nf4Options, WeightFormatOptions, quantize_linears  # noqa: E402
from affina.training.callbacks import BaseCallback, Observers, StepMetrics  # noqa: E402
from affina.training.loop import LoopSettings, train  # noqa: E402
from affina.training.loss_scale import LossScale  # noqa: E402
from affina.training.objectives.sft import TokenObjective, sft_objective  # noqa: E402
from affina.training.optim import OptimizerOptions, build_optimizer  # noqa: E402
from affina.training.schedule import Schedule  # noqa: E402
from affina.training.source import PlannedBatches  # noqa: E402
from affina.training.state import TrainState  # noqa: E402

SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
TINY_SHAPE = {
    **SHAPE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 8192,
}
MAX_LENGTH = 1024
ROWS_OF_MAX_LENGTH = 2
LAST_STEPS = 50
SMOOTHING_STEPS = 20
BASE_SEED = 1_000_000
BASELINE = "reference-bf16"


@dataclass(frozen=True)
class Variant:
    """is_fast: which engine; dtype: of the computation; weights: format of the frozen linear layers"""

    is_fast: bool
    dtype: torch.dtype
    weights: WeightFormatOptions | None = None


VARIANTS: dict[str, Variant] = {
    BASELINE: Variant(False, torch.bfloat16),
    "fast-bf16": Variant(True, torch.bfloat16),
    "fast-nf4": Variant(True, torch.bfloat16, Nf4Options()),
    "fast-fp8": Variant(True, torch.bfloat16, Fp8Options()),
    "reference-fp32": Variant(False, torch.float32),
    "reference-nf4": Variant(False, torch.bfloat16, Nf4Options()),
    "reference-fp8": Variant(False, torch.bfloat16, Fp8Options()),
}
DEFAULT_VARIANTS = (BASELINE, "fast-bf16", "fast-nf4", "fast-fp8", "reference-fp32")
EXTRA_VARIANTS = ("reference-fp32", "reference-nf4", "reference-fp8")
"""Run after all seeds of the others, while time is left."""
COLOURS = {
    BASELINE: "#888",
    "fast-bf16": "#1f77b4",
    "fast-nf4": "#d9822b",
    "fast-fp8": "#2a9d5c",
    "reference-fp32": "#b04aa0",
    "reference-nf4": "#a05a2c",
    "reference-fp8": "#5c8a3a",
}


# Data and base
# --------------------------------------------------------------------------------------------------------------


def read_samples(folder: Path | None, cache: Path) -> tuple[SampleStore, int, int]:
    """(prepared samples, id of the padding token, vocabulary of the model); folder None: what ships with affina."""
    if folder is None:
        sources, model = [str(embedded_dataset_path("affina/support"))], "affina/nano"
    else:
        sources = [str(folder / name) for name in ("gsm8k.jsonl.gz", "dolly.jsonl.gz")]
        model = str(folder / "tokenizer")
        if missing := [path for path in (*sources, model) if not Path(path).exists()]:
            raise SystemExit(f"not there: {', '.join(missing)} (bench/carry_real_data.py makes the folder)")
    config = load_mapping(
        {
            "model": {"path": model},
            "data": {
                "train": [{"path": path} for path in sources],
                "validation_fraction": 0.0,
                "max_length": MAX_LENGTH,
                "packing": True,
                "on_error": "skip",
                "cache_directory": str(cache),
            },
            "training": {"micro_batch_size": ROWS_OF_MAX_LENGTH},
            "evaluation": {"enabled": False},
        },
        with_rules=False,
    ).config
    tokenizer = load_tokenizer(model, local=True)
    data = prepare_from_config(config, tokenizer)
    return data.train, tokenizer.pad_id, 8192 if folder is None else int(SHAPE["vocab_size"])


def plan_of(store: SampleStore, seed: int, num_steps: int) -> BatchPlan:
    return BatchPlan(
        store.lengths,
        max_length=MAX_LENGTH,
        micro_batch_size=ROWS_OF_MAX_LENGTH,
        gradient_accumulation_steps=1,
        packing=True,
        seed=seed,
        epochs=1.0,  # `step` goes on beyond it
        max_steps=num_steps,
        num_supervised=store.num_supervised,
    )


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The variant's type, float32 on a CPU."""
    return dtype if DEVICE.type == "cuda" else torch.float32


def make_base(shape: dict[str, Any], source: PlannedBatches, num_steps: int) -> dict[str, torch.Tensor]:
    """Weights of a random model after `num_steps` full steps on all tokens, in bfloat16; float32 copies are trained."""
    model = new_model(Qwen3Config(**shape), computed_in(torch.bfloat16)).train()
    parameters = list(model.parameters())
    masters = [parameter.detach().float() for parameter in parameters]
    optimizer = torch.optim.AdamW(masters, lr=0.0, weight_decay=0.01, fused=True)
    schedule = Schedule("cosine", peak=1e-3, num_steps=num_steps, warmup_steps=max(1, num_steps // 20), min_ratio=0.1)
    for step in range(num_steps):
        (batch,) = source.step(step)
        loss, count = supervised_loss(model, with_all_labels(batch))
        gradients = torch.autograd.grad(loss / count, parameters)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        if step % 50 == 0 or step == num_steps - 1:
            print(f"base, step {step + 1}: loss {float(loss.detach()) / count:.3f}", flush=True)
    return {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def with_all_labels(batch: Batch) -> Batch:
    """Every token but a document's first supervised: what a base learns from."""
    labels = batch.input_ids.clone()
    labels[batch.cu_seqlens[:-1].long()] = -100
    labels[batch.num_tokens :] = -100
    has_padding = batch.num_tokens < labels.numel()
    return replace(batch, labels=labels, num_supervised=batch.num_tokens - len(batch.lengths) + int(has_padding))


# Variants
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Trainee:
    """A variant's model, reused by all seeds. notes: what the engine said about itself"""

    model: Any
    notes: list[str]


def make_trainee(variant: Variant, shape: dict[str, Any], base: dict[str, torch.Tensor]) -> Trainee:
    model = new_model(Qwen3Config(**shape), computed_in(variant.dtype)).eval().requires_grad_(False)
    model.load_state_dict(base)
    if variant.weights is not None:
        quantize_linears(model, variant.weights, exclude=[model.get_output_embeddings()])
    adapted = attach_adapter(model, rank=16, alpha=32.0, targets=TARGETS)
    notes: list[str] = []
    if variant.is_fast:
        engine = attach_fast_engine(adapted, row_tokens=MAX_LENGTH * ROWS_OF_MAX_LENGTH)
        if isinstance(engine, Unsupported):
            raise RuntimeError(f"the fast engine does not run: {engine.reason}")
        notes.append(f"layers keep {engine.policy.describe()}")
        if DEVICE.type == "cuda":
            engine.enable_graphs(notes.append)
    return Trainee(adapted, notes)


class Recorder(BaseCallback):
    """Keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.events: list[str] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)

    def on_event(self, kind: str, message: str, facts: dict[str, Any]) -> None:
        self.events.append(f"{kind}: {message}")


def train_once(trainee: Trainee, source: PlannedBatches, *, seed: int, num_steps: int, lr: float) -> dict[str, Any]:
    """One run of the loop; losses of every step, in nats per supervised token."""
    model = trainee.model
    restart_adapter(model, seed)
    parameters = trainable_parameters(model)
    recorder = Recorder()
    engine = engine_of(model)
    synchronize()
    started = time.perf_counter()
    train(
        model,
        parameters,
        source,
        TokenObjective(sft_objective),
        build_optimizer(parameters, OptimizerOptions("adamw")),
        Schedule("cosine", peak=lr, num_steps=num_steps, warmup_steps=max(1, round(0.03 * num_steps))),
        settings=LoopSettings(num_steps=num_steps, seed=seed),
        state=TrainState(),
        loss_scale=LossScale.for_precision(is_float16=False),
        validate=None,
        save=lambda _: None,
        observers=Observers([recorder]),
        stop_requested=lambda: False,
        memory_bytes=lambda: 0,
        make_room=engine.make_room if engine is not None else None,
    )
    return {
        "losses": [round(loss, 6) for loss in recorder.losses],
        "seconds": round(time.perf_counter() - started, 2),
        "events": recorder.events,
    }


# Judgement
# --------------------------------------------------------------------------------------------------------------


Curves = dict[str, dict[int, list[float]]]
"""variant → seed → loss of every step"""


def curves_of(runs: Sequence[dict[str, Any]]) -> Curves:
    curves: Curves = {}
    for run in runs:
        if "losses" in run:
            curves.setdefault(run["variant"], {})[run["seed"]] = run["losses"]
    return curves


def smoothed(losses: Sequence[float]) -> list[float]:
    return [value for value in smooth(losses, span=SMOOTHING_STEPS) if value is not None]


def judge(curves: Curves) -> dict[str, Any]:
    """For every variant beside the baseline: the paired test of the last steps, and the curve against the spread."""
    baseline = curves.get(BASELINE, {})
    if len(baseline) < 2:
        return {}
    last = {seed: mean(losses[-LAST_STEPS:]) for seed, losses in baseline.items()}
    margin = stdev(last.values())
    smooth_baseline = {seed: smoothed(losses) for seed, losses in baseline.items()}
    verdicts: dict[str, Any] = {
        BASELINE: {"loss": mean(last.values()), "standard_deviation_between_seeds": margin, "num_seeds": len(last)}
    }
    for name, by_seed in curves.items():
        seeds = sorted(set(by_seed) & set(baseline))
        if name == BASELINE or not seeds:
            continue
        differences = [mean(by_seed[seed][-LAST_STEPS:]) - last[seed] for seed in seeds]
        own = [smoothed(by_seed[seed]) for seed in seeds]
        inside, largest = [], 0.0
        for step, values in enumerate(zip(*own, strict=True)):
            spread = [curve[step] for curve in smooth_baseline.values()]
            paired = mean(smooth_baseline[seed][step] for seed in seeds)
            inside.append(min(spread) <= mean(values) <= max(spread))
            largest = max(largest, abs(mean(values) - paired))
        verdicts[name] = {
            "loss": mean(mean(by_seed[seed][-LAST_STEPS:]) for seed in seeds),
            "test": paired_test(differences, margin=margin),
            "largest_difference_of_smoothed_curves": largest,
            "share_of_steps_within_spread": mean(inside),
            "is_within_spread": all(inside),
        }
    return verdicts


def draw(curves: Curves) -> str:
    """The smoothed curves, and their differences from the baseline, averaged over seeds."""
    baseline = {seed: smoothed(losses) for seed, losses in curves.get(BASELINE, {}).items()}
    lines, differences = [], []
    for name, by_seed in curves.items():
        own = {seed: smoothed(losses) for seed, losses in by_seed.items()}
        steps = range(1, len(next(iter(own.values()))) + 1)
        lines += [Series("", steps, curve, f"{name}-thin") for curve in own.values()]
        lines.append(Series(name, steps, [mean(values) for values in zip(*own.values(), strict=True)], name))
        if name == BASELINE:
            center = [mean(values) for values in zip(*own.values(), strict=True)]
            differences += [
                Series("", steps, [a - b for a, b in zip(curve, center, strict=True)], f"{name}-thin")
                for curve in own.values()
            ]
        elif shared := sorted(set(own) & set(baseline)):
            gaps = [[a - b for a, b in zip(own[seed], baseline[seed], strict=True)] for seed in shared]
            differences.append(Series(name, steps, [mean(values) for values in zip(*gaps, strict=True)], name))
    return figure(
        [
            Panel("Loss (nats per supervised token)", "smoothed; bold: mean of the seeds, thin: each seed", lines),
            Panel(
                f"Difference from {BASELINE} with the same seed (grey: its seeds around their mean)",
                "smoothed, mean of the seeds",
                differences,
            ),
        ],
        colours={**COLOURS, **{f"{name}-thin": colour for name, colour in COLOURS.items()}},
        x_unit="step",
    )


# The whole
# --------------------------------------------------------------------------------------------------------------


def order_of(variants: Sequence[str], num_seeds: int) -> list[tuple[str, int]]:
    """Seed by seed, so that a call that is cut off leaves pairs; the extra ones at the end."""
    first = [name for name in variants if name not in EXTRA_VARIANTS]
    extra = [name for name in variants if name in EXTRA_VARIANTS]
    return [(name, seed) for names in (first, extra) for seed in range(num_seeds) for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k.jsonl.gz, dolly.jsonl.gz and tokenizer/")
    parser.add_argument("--variants", default=",".join(DEFAULT_VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--base-steps", type=int, default=150, help="full steps that make the base")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seconds", type=float, default=150.0, help="start no run that would end later")
    parser.add_argument("--output", type=Path, default=records.RESULTS / "loss_curves.json")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args(argv)
    deadline = records.Deadline(arguments.seconds)
    variants = arguments.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        raise SystemExit(f"unknown variants: {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    if arguments.data is None and not arguments.tiny:
        raise SystemExit("--data FOLDER is needed (bench/carry_real_data.py makes one), or --tiny")
    be_deterministic()
    with tempfile.TemporaryDirectory() as cache:
        store, pad, vocabulary = read_samples(arguments.data, Path(cache))
        shape = {**(TINY_SHAPE if arguments.tiny else SHAPE), "vocab_size": vocabulary}
        record: dict[str, Any] = {
            **records.environment(device_name()),
            "model": shape,
            "base": f"random weights (seed 0), {arguments.base_steps} full steps on all tokens of the same data",
            "adapter": "LoRA, rank 16, alpha 32, all linear layers",
            "data": "GSM8K and dolly, Qwen3's tokenizer and template" if arguments.data else "affina/support",
            "num_samples": len(store),
            "row_tokens": MAX_LENGTH * ROWS_OF_MAX_LENGTH,
            "steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "computed_in": "as named" if DEVICE.type == "cuda" else "float32, whatever the name says",
            "verdicts": {},
            "runs": [],
        }

        def source(seed: int) -> PlannedBatches:
            return PlannedBatches(store, plan_of(store, seed, arguments.steps), pad_token_id=pad, device=DEVICE)

        base = make_base(shape, source(BASE_SEED), arguments.base_steps)
        print(f"{len(store):,} samples; base made; {deadline.left:.0f} s left", flush=True)
        run_all(record, arguments, variants, shape, base, source, deadline)
    print(summary(record["verdicts"]), flush=True)


def run_all(
    record: dict[str, Any],
    arguments: argparse.Namespace,
    variants: Sequence[str],
    shape: dict[str, Any],
    base: dict[str, torch.Tensor],
    source: Any,
    deadline: records.Deadline,
) -> None:
    """Every variant with every seed, judged, written and drawn after each."""
    trainees: dict[str, Trainee | None] = {}
    slowest: dict[str, float] = {}
    for name, seed in order_of(variants, arguments.seeds):
        if deadline.left < 1.2 * slowest.get(name, 0.0):
            print(f"out of time: {name} with seed {seed} is left out", flush=True)
            continue
        started = time.perf_counter()
        run: dict[str, Any] = {"variant": name, "seed": seed}
        try:
            if name not in trainees:
                trainees[name] = None
                trainees[name] = make_trainee(VARIANTS[name], shape, base)
            trainee = trainees[name]
            if trainee is None:
                continue
            run |= train_once(trainee, source(seed), seed=seed, num_steps=arguments.steps, lr=arguments.learning_rate)
            run["notes"] = list(trainee.notes)
            print(f"{name}, seed {seed}: {mean(run['losses'][-LAST_STEPS:]):.4f} in {run['seconds']} s", flush=True)
        except Exception as error:  # noqa: BLE001 - the other variants are still worth their time
            run["error"] = f"{type(error).__name__}: {error}"
            print(f"{name}, seed {seed}: {run['error'][:300]}", flush=True)
        slowest[name] = max(slowest.get(name, 0.0), run.get("seconds", time.perf_counter() - started))
        record["runs"].append(run)
        curves = curves_of(record["runs"])
        record["verdicts"] = judge(curves)
        records.write(arguments.output, record)
        if curves:
            arguments.output.with_suffix(".svg").write_text(draw(curves), encoding="utf-8")


def summary(verdicts: dict[str, Any]) -> str:
    lines = []
    for name, verdict in verdicts.items():
        test = verdict.get("test", {})
        if "mean" not in test:
            lines.append(f"{name:16} loss {verdict['loss']:.4f}")
            continue
        lines.append(
            f"{name:16} loss {verdict['loss']:.4f}, difference {test['mean']:+.5f} "
            f"(90%: {test['interval_90'][0]:+.5f} … {test['interval_90'][1]:+.5f}), margin {test['margin']:.5f}: "
            f"{'equivalent' if test['is_equivalent'] else 'equivalence not shown'}; "
            f"{verdict['share_of_steps_within_spread']:.0%} of steps within the seeds' spread"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
