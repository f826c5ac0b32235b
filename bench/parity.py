"""The fast engine's loss and gradients on a GPU, in 16 bits, against a float32 reference.

    python bench/parity.py [--output bench/results/parity.json]

For every family × weight format × type × row layout: the error of the reference engine in 16 bits and that of the fast
engine in 16 bits, both against the reference in float32 on the same (16-bit) weights. The fast engine is right when its
error is not larger than the reference's own. Also: equal bits when a step is repeated, with and without CUDA graphs.
Families and formats that are not named keep the records that the file has.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from affina.catalog.save_policy import Keep, SavePolicy
from affina.data.collate import Batch, collate
from affina.data.samples import Sample
from affina.models.adapters import attach_adapter
from affina.models.engines import trainable_parameters
from affina.models.families import Unsupported
from affina.models.fast import attach_fast_engine, detach_fast_engine, fast_engine_of
from affina.models.forward import supervised_loss
from affina.models.weights import Fp4Options, Fp8Options, Int8Options, Nf4Options, quantize_linears

SHAPE: dict[str, Any] = {
    "vocab_size": 5003,
    "hidden_size": 512,
    "intermediate_size": 1216,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE, head_dim=128),
    "qwen2": Qwen2Config(**SHAPE),
    "llama": LlamaConfig(**SHAPE, head_dim=64),
    "mistral": MistralConfig(**SHAPE, sliding_window=100, head_dim=96),
}
LAYOUTS: dict[str, list[int]] = {
    "packed": [300, 1, 77, 512, 33, 100, 1],
    "full rows": [256, 256, 256, 256],
    "one document": [1000],
}


def batch_of(lengths: list[int], *, capacity: int = 1024, seed: int = 0) -> Batch:
    """Random documents, two thirds of their tokens supervised."""
    import numpy as np

    generator = np.random.default_rng([seed, len(lengths)])
    samples = []
    for length in lengths:
        ids = generator.integers(0, SHAPE["vocab_size"], length).astype(np.int32)
        labels = np.where(generator.random(length) < 0.67, ids, -100).astype(np.int32)
        samples.append(Sample(ids, labels))
    return collate(samples, num_tokens=capacity, pad_token_id=0).to("cuda")


def gradient_of(model: Any, batch: Batch) -> tuple[float, torch.Tensor]:
    """Loss per token, and all adapter gradients in PEFT's order in one float64 vector."""
    parameters = trainable_parameters(model)
    loss, count = supervised_loss(model, batch)
    gradients = torch.autograd.grad(loss / count, parameters)
    engine = fast_engine_of(model)
    if engine is not None:
        views = engine.decoder.adapter.gradients_of(gradients[0])
        gradients = tuple(views[p] for p in model.parameters() if p.requires_grad)
    return float(loss.detach()) / count, torch.cat([g.double().flatten() for g in gradients])


WEIGHTS = {"dense": None, "nf4": Nf4Options(), "fp4": Fp4Options(), "int8": Int8Options(), "fp8": Fp8Options()}


def model_of(config: PretrainedConfig, dtype: torch.dtype, *, weights: str) -> Any:
    """A random model whose 16-bit weights are the same in every type of computation."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for name, parameter in base.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.1)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.03)
    base.to(torch.bfloat16).float().eval().requires_grad_(False)
    options = WEIGHTS[weights]
    if options is not None:
        quantize_linears(base, options, exclude=[base.get_output_embeddings()])
    model = attach_adapter(base.to(dtype), rank=16, alpha=32.0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.add_(noise.to("cuda"))
    return model.train()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(name: str, config: PretrainedConfig, dtype: torch.dtype, *, weights: str) -> list[dict[str, Any]]:
    exact, rounded = model_of(config, torch.float32, weights=weights), model_of(config, dtype, weights=weights)
    records = []
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    for layout, lengths in LAYOUTS.items():
        batch = batch_of(lengths)
        expected_loss, expected = gradient_of(exact, batch)
        reference_loss, reference = gradient_of(rounded, batch)
        engine = attach_fast_engine(rounded, row_tokens=1024, recompute=False)
        if isinstance(engine, Unsupported):
            raise SystemExit(f"{name}: {engine.reason}")
        engine.graphs = None
        loss, fast = gradient_of(rounded, batch)
        _, again = gradient_of(rounded, batch)
        kept = {}
        for keep in Keep:
            engine.set_policy(SavePolicy.uniform(engine.decoder.spec.num_layers, keep))
            kept[keep.name.lower()] = relative(gradient_of(rounded, batch)[1], fast)
        engine.set_policy(SavePolicy.uniform(engine.decoder.spec.num_layers, Keep.ALL))
        if dtype != torch.float32:
            engine.enable_graphs(lambda message: print(f"  note: {message}"))
        gradient_of(rounded, batch_of(lengths[::-1], seed=1))  # captured on another row, replayed on this one
        _, graphed = gradient_of(rounded, batch)
        detach_fast_engine(rounded)
        record = {
            "family": name,
            "format": weights,
            "dtype": str(dtype).removeprefix("torch."),
            "layout": layout,
            "loss_error_reference": abs(reference_loss - expected_loss) / expected_loss,
            "loss_error_fast": abs(loss - expected_loss) / expected_loss,
            "gradient_error_reference": relative(reference, expected),
            "gradient_error_fast": relative(fast, expected),
            "is_repeatable": bool(torch.equal(fast, again)),
            "graphed_difference": relative(graphed, fast),
            "largest_difference_of_policies": max(kept.values()),
        }
        records.append(record)
        print(
            f"{name:8} {record['format']:6} {record['dtype']:9} {layout:13} "
            f"loss {record['loss_error_reference']:.1e} → {record['loss_error_fast']:.1e}  "
            f"gradient {record['gradient_error_reference']:.2e} → {record['gradient_error_fast']:.2e}  "
            f"repeat {record['is_repeatable']}  graph {record['graphed_difference']:.1e}  "
            f"policies {record['largest_difference_of_policies']:.1e}",
            flush=True,
        )
    return records


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "parity.json")
    parser.add_argument("--families", default=",".join(CONFIGS))
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    arguments = parser.parse_args()
    header = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    wanted = {(name, weights) for name in arguments.families.split(",") for weights in arguments.weights.split(",")}
    found = json.loads(arguments.output.read_text())["records"] if arguments.output.exists() else []
    records = [record for record in found if (record["family"], record["format"]) not in wanted]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.families.split(","):
        for weights in arguments.weights.split(","):
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                records += compare(name, CONFIGS[name], dtype, weights=weights)
                arguments.output.write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    rounded = [record for record in records if record["dtype"] != "float32"]
    worst = max(record["gradient_error_fast"] / record["gradient_error_reference"] for record in rounded)
    exact = max((record["gradient_error_fast"] for record in records if record["dtype"] == "float32"), default=0.0)
    print(
        f"{len(records)} comparisons; 16 bits: fast error / reference error at most {worst:.2f}; "
        f"float32: fast against reference at most {exact:.1e}"
    )


if __name__ == "__main__":
    main()
