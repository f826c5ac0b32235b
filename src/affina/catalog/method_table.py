"""The methods side by side: what `affina methods` prints, and the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

from affina.catalog.known_models import shape_of_model
from affina.catalog.methods import METHODS, AdapterMethod, PeftName
from affina.catalog.shapes import ModelShape


@dataclass(frozen=True, slots=True)
class MethodSizes:
    """How large a method becomes on one model, with its default settings.

    num_trainable:  parameters
    share:          of the model's parameters
    file_bytes:     of the saved adapter, in float32
    training_bytes: beside the base and its activations, with AdamW
    """

    num_trainable: int
    share: float
    file_bytes: int
    training_bytes: int


@dataclass(frozen=True, slots=True)
class MethodRow:
    """One method; sizes are None without a model."""

    method: AdapterMethod
    settings: dict[str, Any]
    sizes: MethodSizes | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        method = self.method
        return {
            "name": method.name,
            "title": method.title,
            "paper": method.paper,
            "summary": method.summary,
            "settings": self.settings,
            "source": method.source,
            "trains_on": sorted(method.trains_on),
            "merges": method.merges,
            "checkpointing": method.checkpointing,
            "hot_swap": method.hot_swap,
            "mixed_batch": method.mixed_batch,
            "packs": method.packs,
            "vllm": method.vllm,
            "llama_cpp": method.llama_cpp,
            "fast_engine": method.fast_engine,
            "keeps_head": method.keeps_head,
            "learning_rate_factor": method.learning_rate_factor,
            "cost": method.cost,
            "sizes": asdict(self.sizes) if self.sizes is not None else None,
        }


@dataclass(frozen=True, slots=True)
class MethodTable:
    """Every verified method; `unverified` names PEFT's others."""

    model: str | None
    num_parameters: int | None
    rows: tuple[MethodRow, ...]
    unverified: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.model,
            "num_parameters": self.num_parameters,
            "methods": [row.to_dict() for row in self.rows],
            "unverified": list(self.unverified),
        }


def method_table(model: str | None = None) -> MethodTable:
    """The methods with their default settings; with their sizes on `model`. Raises ModelError[shape-unknown]."""
    shape = shape_of_model(model) if model is not None else None
    rows = tuple(_row(method, shape) for method in METHODS.values())
    return MethodTable(model, shape.num_parameters if shape is not None else None, rows, get_args(PeftName))


def _row(method: AdapterMethod, shape: ModelShape | None) -> MethodRow:
    settings = method.settings()
    values = {name: getattr(settings, name) for name in method.fields}
    shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if shape is None:
        return MethodRow(method, shown, None)
    count = method.num_parameters(shape, settings)
    sizes = MethodSizes(
        num_trainable=count,
        share=count / shape.num_parameters,
        file_bytes=4 * method.num_file_parameters(shape, settings),
        training_bytes=method.training_bytes(shape, settings),
    )
    return MethodRow(method, shown, sizes)


_INTRODUCTION = """\
# Adapter methods: `adapter.method`

*Written by `affina methods --markdown` from the registry that validation uses; a test keeps it up to date.*

```yaml
adapter: lora                # short for `adapter: {method: lora}`
```

`affina methods --model Qwen/Qwen3-4B` counts parameters, file and memory for a model, in well under a second and
without loading it. Every method in the tables is tested on dense weights and on NF4 where it trains there: gradients,
saving and loading, switching off and on, merging or its refusal, and a resumed run with the bits of one that was never
stopped.
Which to take: [choosing a method](../guides/choosing-a-method.md).
"""

_AFTER_TABLE = """\
*Trains on*: weight formats of the base, each compared with the dense weights that it stands for. *Merges*: into one
plain model, verified. *Shares rows*: several samples in one row (`data.packing`); else each is computed in a row of its
own. *Recomputes*: works with `training.gradient_checkpointing`. *Swap*, *mix*: PEFT exchanges a loaded adapter in
place, and uses several in one batch; for every other method of PEFT's than LoRA's, `adapter_names` applies the active
adapter to all rows without an error. *vLLM*, *llama.cpp*: read the saved file as it is, or after a conversion; a merged
model they always read. *Fast*: the fused decoder trains it; others train on transformers' own forward, and the run says
so. *Head*: trains a reward model's head beside it (`training.objective: reward`). *Rate*: a first learning rate over
LoRA's, which is applied to the default and to presets, never to a rate that you write.

Where this comes from. *Swap*, *mix*: PEFT 0.21 (`peft.utils.hotswap` knows LoRA only and refuses two configs that
differ in `use_rslora`, dropout or `use_dora`; its mixed batch refuses DoRA); tests hold it to that. *vLLM*: its
`vllm/lora/peft_helper.py` refuses DoRA, biases and `modules_to_save`, reads rsLoRA's scale, and takes ranks up to
`--max-lora-rank`, 16 unless you raise it: a PiSSA or OLoRA file of rank R has rank 2R for it. *llama.cpp*: its
`convert_lora_to_gguf.py` takes tensors named `lora_A` and `lora_B` only and stores `lora_alpha`; the scale is α / R,
whatever `use_rslora` says, so an rsLoRA file needs `lora_alpha` multiplied by √R first. LoftQ's file belongs to the NF4
base, which neither of the two loads as it was trained.
"""


def method_reference() -> str:
    """docs/reference/methods.md."""
    return (
        "\n".join([_INTRODUCTION, *_capabilities(), "", _AFTER_TABLE, *_sizes("Qwen/Qwen3-4B"), "", *_details()]) + "\n"
    )


_COLUMNS = (
    "method", "trains on", "merges", "shares rows", "recomputes", "swap", "mix", "vLLM", "llama.cpp", "fast", "head",
    "rate",
)  # fmt: skip


def _capabilities() -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for method in METHODS.values():
        cells = (
            f"`{method.name}`",
            ", ".join(sorted(method.trains_on)),
            method.merges,
            *map(_yes, (method.packs, method.checkpointing, method.hot_swap, method.mixed_batch)),
            method.vllm,
            method.llama_cpp,
            _yes(method.fast_engine),
            _yes(method.keeps_head),
            f"× {method.learning_rate_factor:g}",
        )
        yield f"| {' | '.join(cells)} |"


def _sizes(model: str) -> Iterator[str]:
    table = method_table(model)
    yield f"## Sizes on {model}"
    yield ""
    yield f"With default settings, of {table.num_parameters:,} parameters. The file is float32; memory is"
    yield "what comes beside the base and its activations with AdamW: parameter, gradient, two moments, and what a"
    yield "method holds besides."
    yield ""
    yield "| method | trained | share | file, MB | memory, GB |"
    yield "|---|---|---|---|---|"
    for row in table.rows:
        assert row.sizes is not None
        sizes = row.sizes
        yield (
            f"| `{row.method.name}` | {sizes.num_trainable:,} | {100 * sizes.share:.3g}% "
            f"| {sizes.file_bytes / 1e6:,.1f} | {sizes.training_bytes / 1e9:.2f} |"
        )


def _details() -> Iterator[str]:
    yield "## Each method"
    for row in method_table().rows:
        method = row.method
        settings = ", ".join(f"`{name}: {_value(value)}`" for name, value in row.settings.items())
        yield ""
        yield f"### `{method.name}`: {method.title}"
        yield ""
        yield f"{method.paper}. {_sentence(method.summary)}"
        yield ""
        yield f"- Settings and defaults: {settings or 'none'}"
        yield f"- Where they come from: {method.source}"
        yield f"- Cost: {method.cost}"
    yield ""
    yield "## Other methods of PEFT"
    yield ""
    yield f"{', '.join(f'`{name}`' for name in get_args(PeftName))}: by their PEFT names, with the fields of their"
    yield "config under `adapter.options`. They train as PEFT does it, on dense weights only, and are not merged:"
    yield "affina tests that they attach, train, save and load again, and no more. The run and `affina check` say so."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    return (
        f"[{', '.join(value)}]" if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
