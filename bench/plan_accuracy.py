"""The plan against the card: peak memory and step time, predicted before, measured after.

    python bench/plan_accuracy.py [--seconds 500] [--output bench/results/plan_accuracy.json] [--random 8 --seed 1]
    python bench/plan_accuracy.py --only-random --random 12 --seed 2      # beside the fixed cases that the file has
    python bench/plan_accuracy.py --again          # no GPU: the measured cases planned with today's code; the figure
    python bench/plan_accuracy.py --dry-run        # no GPU: predictions alone, every case; --layers 2 makes tiny models

At least 24 configurations (formats × micro-batch × length × save policy × optimiser × packed or not × engine;
Qwen3-4B and two smaller shapes), random weights, few steps each, all in one process with the memory given back in
between. For each: the allocator's peak, what PyTorch reserved, what the device shows as used (nvidia-smi's number), the
median time of a step. `--random N` draws N more configurations by lot: those on which nothing was calibrated.

A case that fails is recorded with its reason; the rest goes on.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
from records import versions  # noqa: E402
from systems.common import TARGETS, config_of  # noqa: E402

from affina.catalog.gpus import Gpu, gpu_named, gpus  # noqa: E402
from affina.catalog.shapes import read_shape  # noqa: E402
from affina.planning.admission import Device  # noqa: E402
from affina.planning.coefficients import shipped_coefficients  # noqa: E402
from affina.planning.memory import MemoryPlan, plan_memory  # noqa: E402
from affina.planning.setup import Adapter, StepSetup  # noqa: E402
from affina.planning.time import plan_time  # noqa: E402

WARM_UP_STEPS = 2
TIMED_STEPS = 3
GIB = 2**30

Case = dict[str, Any]


def cases() -> list[Case]:
    """The fixed configurations. recompute: as training.gradient_checkpointing; gib: as engine.memory"""
    fast = [
        case("qwen3-4b", rows=8, length=2048),
        case("qwen3-4b", rows=1, length=2048),
        case("qwen3-4b", rows=4, length=1024, format="nf4"),
        case("qwen3-4b", rows=1, length=8192, format="nf4", recompute=True),
        case("qwen3-4b", rows=2, length=4096, format="fp8"),
        case("qwen3-4b", rows=2, length=2048, format="int8"),
        case("qwen3-4b", rows=4, length=2048, gib=12.0),
        case("qwen3-4b", rows=8, length=2048, format="nf4", gib=6.5),
        case("qwen3-4b", rows=1, length=4096, packed=True, accumulation=2),
        case("qwen3-4b", rows=1, length=4096, format="nf4", packed=True, gib=8.0),
        case("qwen3-4b", rows=2, length=2048, rank=64, optimizer="adamw_8bit"),
        case("qwen3-4b", rows=2, length=2048, rank=128, recompute=True),
        case("qwen3-4b", rows=4, length=512, format="nf4", captured=False, accumulation=2),
        case("llama-1b", rows=4, length=2048),
        case("llama-1b", rows=8, length=1024, format="nf4", recompute=True),
        case("llama-1b", rows=2, length=4096, format="fp8", rank=32),
        case("llama-1b", rows=1, length=8192, packed=True, captured=False),
        case("qwen3-0.6b", rows=8, length=2048),
        case("qwen3-0.6b", rows=4, length=4096, format="nf4", recompute=True, optimizer="adamw_8bit"),
        case("qwen3-0.6b", rows=2, length=2048, gib=2.5),
    ]
    reference = [
        case("qwen3-4b", engine="reference", rows=1, length=2048, recompute=True),
        case("qwen3-4b", engine="reference", rows=1, length=2048, recompute=False),
        case("qwen3-4b", engine="reference", rows=2, length=2048, format="nf4", recompute=True),
        case("qwen3-4b", engine="reference", rows=1, length=4096, format="int8", recompute=True, packed=True),
        case("llama-1b", engine="reference", rows=2, length=2048, recompute=False, dropout=0.05),
        case("llama-1b", engine="reference", rows=4, length=1024, format="nf4", recompute=True, accumulation=2),
        case("qwen3-0.6b", engine="reference", rows=4, length=2048, recompute=False),
        case("qwen3-0.6b", engine="reference", rows=8, length=1024, recompute=True, optimizer="adamw_8bit"),
    ]
    # Alternating, so that a call that is cut short has both engines in it.
    pairs = itertools.zip_longest(fast, [part for one in reference for part in (None, one)])
    return [one for pair in pairs for one in pair if one is not None]


def case(model: str, **settings: Any) -> Case:
    defaults: Case = {
        "engine": "fast",
        "format": "none",
        "rank": 16,
        "optimizer": "adamw",
        "recompute": "auto",
        "packed": False,
        "captured": True,
        "accumulation": 1,
        "dropout": 0.0,
        "gib": None,
        "set": "fixed",
    }
    return {"model": model, **defaults, **settings}


def random_cases(count: int, seed: int) -> list[Case]:
    """Configurations by lot, of up to 16,384 tokens."""
    draw = random.Random(seed)
    found = []
    while len(found) < count:
        rows, length = draw.choice([1, 2, 3, 4, 6, 8]), draw.choice([384, 640, 1024, 1536, 2048, 3072, 4096, 6144])
        if rows * length > 16_384:
            continue
        engine = draw.choice(["fast", "fast", "reference"])
        found.append(
            case(
                draw.choice(["qwen3-4b", "llama-1b", "qwen3-0.6b"]),
                engine=engine,
                rows=rows,
                length=length,
                format=draw.choice(["none", "nf4", "fp8", "int8"]),
                rank=draw.choice([8, 16, 32, 64]),
                recompute=draw.choice(["auto", True, False]) if rows * length <= 8192 else True,
                packed=draw.random() < 0.5,
                captured=draw.random() < 0.5,
                accumulation=draw.choice([1, 2]),
                set="random",
            )
        )
    return found


def document_lengths(spec: Case) -> tuple[int, ...]:
    """The documents of a row: all alike, or of seven unequal shares when packed. They fill the row."""
    total = spec["rows"] * spec["length"]
    if not spec["packed"]:
        return (spec["length"],) * spec["rows"]
    shares = [7, 5, 11, 3, 13, 2, 9]
    lengths = [total * share // sum(shares) for share in shares]
    return (*lengths[:-1], total - sum(lengths[:-1]))


def hf_config(spec: Case, layers: int | None) -> Any:
    """The transformers config of a case; layers: fewer than the model has, for a dry run."""
    if spec["model"] == "qwen3-4b":
        config = config_of({"model": "qwen3-4b", **({"layers": layers} if layers else {})})
    else:
        config = _smaller_config(spec["model"], layers)
    return config


def _smaller_config(name: str, layers: int | None) -> Any:
    from transformers import LlamaConfig, Qwen3Config

    shared = {"tie_word_embeddings": True, "max_position_embeddings": 40_960}
    if name == "llama-1b":
        return LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=layers or 16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128_256,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            **shared,
        )
    return Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers or 28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151_936,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        **shared,
    )


def setup_of(spec: Case, config: Any, card: Gpu) -> StepSetup:
    """The case as the plan sees it."""
    lengths = document_lengths(spec)
    tokens = sum(lengths)
    padded = -(-tokens // 128) * 128
    return StepSetup(
        shape=read_shape({**config.to_dict(), "model_type": config.model_type}),
        adapter=Adapter(spec["rank"], tuple(TARGETS), spec["dropout"]),
        precision="bf16",
        format=spec["format"],
        row_tokens=padded,
        gpu=card,
        lengths=lengths if padded == tokens else (*lengths, padded - tokens),
        num_predicted=tokens - len(lengths),
        micro_batches=spec["accumulation"],
        optimizer=spec["optimizer"],
        recompute=spec["recompute"],
        engine=spec["engine"],
        is_packed=spec["captured"],
        validates=False,
        memory_bytes=int(spec["gib"] * GIB) if spec["gib"] else None,
        longest_possible=spec["length"],
        row_shapes=1,  # every micro-batch has the same documents here
    )


def predict(setup: StepSetup) -> tuple[dict[str, Any], MemoryPlan]:
    """What the plan says, with the coefficients that ship: nothing that this machine has learned."""
    coefficients = shipped_coefficients()
    memory = plan_memory(setup, coefficients)
    step = plan_time(setup, memory, coefficients)
    return {
        "allocated_bytes": memory.allocated_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "total_bytes": memory.total_bytes,
        "step_seconds": step.step_seconds if step is not None else None,
        "engine": memory.engine,
        "keeps": memory.keeps,
    }, memory


def this_card() -> Gpu:
    """The card under test, with the memory that is free now."""
    free, total = torch.cuda.mem_get_info()
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    card = Device(name, capability, total, free).card()
    assert card is not None
    return card


# On the GPU
# --------------------------------------------------------------------------------------------------------------


def build(spec: Case, config: Any) -> tuple[Any, Any, Any]:
    """(model with adapter, optimiser, engine or None)"""
    from transformers import AutoModelForCausalLM

    from affina.catalog.fused_choice import OPTIMIZER_BYTES, StepDemand
    from affina.models.adapters import attach_adapter
    from affina.models.compat import enable_recomputation
    from affina.models.engines import trainable_parameters
    from affina.models.families import Unsupported
    from affina.models.fast import attach_fast_engine
    from affina.models.weights import Fp8Options, Int8Options, Nf4Options, quantize_linears
    from affina.training.optim import OptimizerOptions, build_optimizer

    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            base = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    base.eval().requires_grad_(False)
    options = {"nf4": Nf4Options, "fp8": Fp8Options, "int8": Int8Options}.get(spec["format"])
    if options is not None:
        quantize_linears(base, options(), exclude=[base.get_output_embeddings()])
    model = attach_adapter(base, rank=spec["rank"], alpha=2.0 * spec["rank"], dropout=spec["dropout"], targets=TARGETS)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    gc.collect()
    torch.cuda.empty_cache()
    engine = None
    if spec["engine"] == "fast":
        attached = attach_fast_engine(
            model,
            row_tokens=-(-spec["rows"] * spec["length"] // 128) * 128,
            budget_bytes=int(spec["gib"] * GIB) if spec["gib"] else None,
            recompute=spec["recompute"],
            is_flat=spec["optimizer"] == "adamw",
            may_capture=spec["captured"],
            longest=spec["length"],
            demand=StepDemand(
                int(OPTIMIZER_BYTES[spec["optimizer"]] * num_trainable),
                accumulates=spec["accumulation"] > 1,
                validates=False,
            ),
        )
        if isinstance(attached, Unsupported):
            raise RuntimeError(f"the fast engine does not run: {attached.reason}")
        engine = attached
        if spec["captured"]:
            engine.enable_graphs(print)
    elif spec["recompute"] is True or (spec["recompute"] == "auto" and spec.get("planned_recompute")):
        enable_recomputation(base)
    optimizer = build_optimizer(trainable_parameters(model), OptimizerOptions(spec["optimizer"]))
    model.train()
    return model, optimizer, engine


def batches_of(spec: Case, vocabulary: int) -> list[Any]:
    """One micro-batch per accumulation step: random tokens, all but each document's first supervised."""
    import numpy as np

    from affina.data.collate import collate
    from affina.data.samples import Sample

    generator = np.random.default_rng(1)
    batches = []
    for _ in range(spec["accumulation"]):
        samples = []
        for length in document_lengths(spec):
            ids = generator.integers(0, vocabulary - 1, length).astype(np.int32)
            samples.append(Sample(ids, ids))
        batches.append(collate(samples, num_tokens=None, pad_token_id=0).to("cuda"))
    return batches


def measure(spec: Case, config: Any) -> dict[str, Any]:
    """Peak memory and time of the training loop's own step."""
    from affina.models.engines import trainable_parameters
    from affina.training.loop import accumulate, apply_gradients
    from affina.training.objectives.sft import TokenObjective, sft_objective

    model, optimizer, engine = build(spec, config)
    batches = batches_of(spec, config.vocab_size)
    parameters = trainable_parameters(model)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(WARM_UP_STEPS + TIMED_STEPS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        accumulate(
            model,
            batches,
            TokenObjective(sft_objective),
            step=index,
            loss_scale=1.0,
            begin=lambda: None,
            make_room=lambda: False,
        )
        apply_gradients(optimizer, parameters, 1e-4, max_norm=1.0, loss_scale=1.0)
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if index >= WARM_UP_STEPS:
            seconds.append(time.perf_counter() - started)
    free, total = torch.cuda.mem_get_info()
    captured = len(engine.graphs.captured) if engine is not None and engine.graphs is not None else 0
    return {
        "allocated_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "device_bytes": total - free,
        "step_seconds": statistics.median(seconds),
        "keeps": engine.policy.describe() if engine is not None else None,
        "num_graphs": captured,
    }


def give_back() -> None:
    """All memory of the case before, compiled kernels aside."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


def run(spec: Case, layers: int | None) -> dict[str, Any]:
    """One case: predicted, then measured."""
    give_back()
    left = torch.cuda.memory_allocated()
    config = hf_config(spec, layers)
    predicted, memory = predict(setup_of(spec, config, this_card()))
    measured = measure({**spec, "planned_recompute": memory.recomputes}, config)
    measured["allocated_bytes"] -= left
    return {"predicted": predicted, "measured": measured, **errors(predicted, measured)}


def errors(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, float]:
    """(predicted − measured) / measured"""
    return {
        "memory_error": predicted["allocated_bytes"] / measured["allocated_bytes"] - 1,
        "reserved_error": predicted["reserved_bytes"] / measured["reserved_bytes"] - 1,
        "device_error": predicted["total_bytes"] / measured["device_bytes"] - 1,
        "time_error": predicted["step_seconds"] / measured["step_seconds"] - 1,
    }


def plan_again(path: Path) -> None:
    """Writes beside each measurement of the file what today's code and coefficients plan for it, and draws both.

    What was planned before the measurement stays: coefficients that were fitted to these measurements explain them, the
    others predicted them.
    """
    from plan_report import draw

    content = json.loads(path.read_text())
    card = gpu_named(content["device"])
    for record in content["records"]:
        if "measured" not in record:
            continue
        planned, _ = predict(setup_of(record["case"], hf_config(record["case"], None), card))
        record["today"] = {
            "allocated_bytes": planned["allocated_bytes"],
            "step_seconds": planned["step_seconds"],
            "memory_error": planned["allocated_bytes"] / record["measured"]["allocated_bytes"] - 1,
            "time_error": planned["step_seconds"] / record["measured"]["step_seconds"] - 1,
        }
    for kind, prefix in (("fixed", ""), ("random", "random_")):
        found = [r["today"] for r in content["records"] if "today" in r and r["case"]["set"] == kind]
        for name in ("memory", "time") if found else ():
            content[f"{prefix}{name}_error_median_today"] = statistics.median(abs(r[f"{name}_error"]) for r in found)
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(content["records"], path.with_suffix(".svg"))
    print(json.dumps({key: value for key, value in content.items() if "error" in key}, indent=1))


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and worst of each set of cases that ran."""
    result: dict[str, Any] = {}
    for kind in ("fixed", "random"):
        done = [record for record in records if "memory_error" in record and record["case"]["set"] == kind]
        if not done:
            continue
        memory = [record["memory_error"] for record in done]
        values = {
            "memory_error_median": statistics.median(abs(error) for error in memory),
            "memory_error_worst": max(abs(error) for error in memory),
            "memory_error_lowest": min(memory),
            "reserved_error_median": statistics.median(abs(record["reserved_error"]) for record in done),
            "device_error_median": statistics.median(abs(record["device_error"]) for record in done),
            "time_error_median": statistics.median(abs(record["time_error"]) for record in done),
            "num_cases": len(done),
        }
        result |= values if kind == "fixed" else {f"random_{name}": value for name, value in values.items()}
    return result


def name_of(spec: Case) -> str:
    default = case(spec["model"])
    changed = [f"{key} {value}" for key, value in spec.items() if key in default and value != default[key]]
    rest = ", ".join(part for part in changed if not part.startswith(("model", "set")))
    return f"{spec['model']:11} {spec['rows']} × {spec['length']:<5} {rest}"


def line(record: dict[str, Any]) -> str:
    head = f"{name_of(record['case']):80}"
    if "error" in record:
        return f"{head} failed: {record['error'].splitlines()[0][:150]}"
    predicted, measured = record["predicted"], record["measured"]
    return (
        f"{head} {measured['allocated_bytes'] / GIB:7.2f} GiB ({record['memory_error']:+.2%}), "
        f"reserved {measured['reserved_bytes'] / GIB:.2f} ({record['reserved_error']:+.1%}), "
        f"{measured['step_seconds'] * 1e3:8.1f} ms ({record['time_error']:+.1%})  "
        + ("" if measured["keeps"] is None or measured["keeps"] in predicted["keeps"] else f"keeps {measured['keeps']}")
    )


def dry_run(specs: list[Case], layers: int | None) -> Iterator[dict[str, Any]]:
    """The predictions on an H100, without any device."""
    for spec in specs:
        predicted, _ = predict(setup_of(spec, hf_config(spec, layers), gpus()["h100"]))
        yield {"case": spec, "predicted": predicted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=500.0, help="begin no case after this")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "plan_accuracy.json")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="draw so many more cases by lot")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="cases whose line holds this text")
    parser.add_argument("--only-random", action="store_true", help="leave the fixed cases as they were measured before")
    parser.add_argument("--layers", type=int, help="fewer layers than the models have")
    parser.add_argument("--again", action="store_true", help="plan the measured cases with today's code; no GPU needed")
    parser.add_argument("--dry-run", action="store_true", help="predict, measure nothing")
    arguments = parser.parse_args()
    if arguments.again:
        plan_again(arguments.output)
        return
    drawn = random_cases(arguments.random, arguments.seed)
    specs = drawn if arguments.only_random else [*cases(), *drawn]
    if arguments.only:
        specs = [spec for spec in specs if arguments.only in name_of(spec)]
    if arguments.dry_run:
        for record in dry_run(specs, arguments.layers):
            predicted = record["predicted"]
            print(
                f"{name_of(record['case']):80} {predicted['allocated_bytes'] / GIB:7.2f} GiB, "
                f"{predicted['step_seconds'] * 1e3:8.1f} ms  {predicted['engine']}: {predicted['keeps']}"
            )
        return
    torch.use_deterministic_algorithms(True, warn_only=True)  # what a run does by default
    torch.utils.deterministic.fill_uninitialized_memory = False
    begun = time.perf_counter()
    found = json.loads(arguments.output.read_text())["records"] if arguments.output.exists() else []
    # A drawing is a set of its own: records of another are not mixed in.
    records = [r for r in found if r["case"]["set"] == "fixed" and r["case"] not in specs]
    for index, spec in enumerate(specs):
        if time.perf_counter() - begun > arguments.seconds:
            print(f"out of time: {len(specs) - index} cases were not run")
            break
        record: dict[str, Any] = {"case": spec, "date": datetime.now(UTC).strftime("%Y-%m-%d")}
        started = time.perf_counter()
        try:
            record |= run(spec, arguments.layers)
        except Exception as error:  # noqa: BLE001 - one case must not cost the others
            record["error"] = f"{type(error).__name__}: {error}"
            record["trace"] = "".join(traceback.format_exception(error))[-2000:]
        record["wall_seconds"] = round(time.perf_counter() - started, 1)
        records.append(record)
        print(line(record), flush=True)
        result = {
            "records": records,
            **summary(records),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(summary(records), indent=1))


if __name__ == "__main__":
    main()
