"""What it costs to keep embedding and head in 8 or 4 bits: perplexity of a model on its own language.

    python bench/vocabulary_formats.py MODEL… [--documents 64] [--length 256] [--output FILE]

The text is sampled from the model itself (temperature 1), so that every model is measured on what it knows. Everything
else of the model stays as it is, in float32. KL is the mean divergence of the next-token distribution from the dense
model's, in nats per token; the 95% interval of the change in perplexity is over documents.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from affina.kernels.code_tables import NF4
from affina.kernels.four_bit import quantize
from affina.models.load import load_causal_lm
from affina.models.weights import quantize_vocabulary


def sampled(model: Any, documents: int, length: int, start: int) -> Tensor:
    """[documents, length] token ids drawn from the model."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((documents, 1), start)
    past = None
    while ids.shape[1] < length:
        output = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
        past = output.past_key_values
        chosen = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids


def log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def in_nf4(model: Any) -> None:
    """Rounds embedding and head to NF4 with double quantisation, in place."""
    weights = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in weights.values():
        weight.copy_(quantize(weight.data, NF4).dequantize(torch.float32))


def compare(path: str, ids: Tensor) -> dict[str, dict[str, float]]:
    """Perplexity and divergence of each format on the same tokens."""
    dense = log_probabilities(load_causal_lm(path, dtype=torch.float32, device="cpu"), ids)
    results = {}
    for name, change in {"dense": lambda model: None, "int8": quantize_vocabulary, "nf4": in_nf4}.items():
        model = load_causal_lm(path, dtype=torch.float32, device="cpu")
        change(model)
        found = log_probabilities(model, ids)
        losses = -found.gather(2, ids[:, 1:, None]).squeeze(2).mean(dim=1)
        change_of_loss = losses + dense.gather(2, ids[:, 1:, None]).squeeze(2).mean(dim=1)
        spread = 1.96 * float(change_of_loss.std()) / math.sqrt(len(losses))
        results[name] = {
            "perplexity": round(math.exp(float(losses.mean())), 4),
            "change_percent": round(100 * math.expm1(float(change_of_loss.mean())), 3),
            "change_interval_percent": round(100 * spread, 3),
            "kl": round(float((dense.exp() * (dense - found)).sum(-1).mean()), 6),
        }
    return results


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vocabulary_formats.json")
    arguments = parser.parse_args()
    records = []
    for path in arguments.models:
        model = load_causal_lm(path, dtype=torch.float32, device="cpu")
        ids = sampled(model, arguments.documents, arguments.length, model.config.bos_token_id or 0)
        records.append({"model": Path(path).name, "tokens": ids.numel(), **compare(path, ids)})
        print(json.dumps(records[-1], indent=1), flush=True)
    arguments.output.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
