"""The adapter methods: one entry each. Validation, documentation, `affina methods` and the test matrix are made from
it.

Loads neither torch nor PEFT. What a method does is in models/adapters/; here stands what it is, what it can do, and how
large it becomes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from affina.catalog import method_parameters as count
from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.shapes import ModelShape
from affina.errors import ModelError

MethodName = Literal[
    "lora", "rslora", "dora", "loraplus", "pissa", "olora", "eva", "loftq", "adalora", "loha", "lokr", "ia3", "vera",
    "oft", "boft", "miss", "layernorm", "prefix", "ptuning", "prompt", "houlsby", "pfeiffer", "full", "freeze",
]  # fmt: skip
"""What affina knows and tests."""

PeftName = Literal[
    "c3a", "deft", "delora", "fourierft", "glora", "gralora", "hira", "hra", "osf", "peanut", "psoft", "pvera",
    "randlora", "road", "supertuning", "tinylora", "unilora", "vblora", "waveft",
]  # fmt: skip
"""Other methods of PEFT, by their PEFT names: trained as PEFT does it, and marked unverified. Left out is what PEFT
0.21 loads back as another model (lily), what fails or warns on a decoder without biases (beft, frod, shadow, shira),
needs another package (adamss) or other adapters (xlora, poly), and its other prompt methods."""

Merging = Literal["exact", "dequantised base", "no"]
Serving = Literal["yes", "converted", "no"]
Kind = Literal["low-rank", "rotation", "scaling", "virtual tokens", "bottleneck", "weights", "unverified"]
Counter = Callable[[ModelShape, AdapterSettings], int]

LOW_RANK_FIELDS = ("rank", "alpha", "dropout", "targets")
EVERY_FORMAT = frozenset({"dense", "nf4", "fp4", "fp8", "int8"})
DENSE_ONLY = frozenset({"dense"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterMethod:
    """One method: what it is called, what can be set, what it can do, what it costs.

    fields:               settings of the section `adapter` that it reads, besides `method`
    defaults:             of those settings, where they differ from `AdapterSettings`'
    source:               where the defaults come from
    trains_on:            weight formats of the base on which its gradients are right (tested against the dense weights)
    merges:               into a plain model: "exact" up to rounding; only into the dequantised base; or not at all
    checkpointing:        whether activations may be recomputed in the backward pass
    hot_swap:             whether PEFT exchanges a loaded adapter in place
    mixed_batch:          whether one batch may use several adapters (PEFT's `adapter_names`)
    packs:                whether samples share a row; else each is computed in a row of its own
    vllm, llama_cpp:      whether the saved file is served: as it is, after a conversion, or not (a merged model
                          always is)
    fast_engine:          whether the fused decoder trains it
    keeps_head:           whether a reward model's head is trained beside it and saved in its file
    trains_vocabulary:    whether embedding and head are among what it trains, and so cannot be kept as codes
    learning_rate_factor: a good first learning rate, over LoRA's on the same model
    count, count_file:    parameters that are trained, and that are in the file
    num_frozen:           what it holds besides, in parameters, not trained
    cost:                 one sentence about time and memory
    """

    name: str
    title: str
    paper: str
    kind: Kind
    summary: str
    fields: tuple[str, ...]
    source: str
    cost: str
    count: Counter
    defaults: Mapping[str, Any] = field(default_factory=dict)
    trains_on: frozenset[str] = EVERY_FORMAT
    merges: Merging = "exact"
    checkpointing: bool = True
    hot_swap: bool = False
    mixed_batch: bool = False
    packs: bool = True
    vllm: Serving = "no"
    llama_cpp: Serving = "no"
    fast_engine: bool = False
    keeps_head: bool = True
    trains_vocabulary: bool = False
    learning_rate_factor: float = 1.0
    count_file: Counter | None = None
    num_frozen: Counter | None = None
    scales_by_root: bool = False
    is_verified: bool = True

    def scale(self, rank: int, alpha: float) -> float:
        """s, the factor on a low-rank update: α / R, for rsLoRA α / √R."""
        return alpha / math.sqrt(rank) if self.scales_by_root else alpha / rank

    def settings(self, **values: Any) -> AdapterSettings:
        """The method's settings: its defaults, changed by `values`."""
        return AdapterSettings(**{"method": self.name, **self.defaults, **values})

    def num_parameters(self, shape: ModelShape, settings: AdapterSettings) -> int:
        """Trained parameters."""
        return self.count(shape, settings)

    def num_file_parameters(self, shape: ModelShape, settings: AdapterSettings) -> int:
        """Parameters in the saved file, each a float32."""
        return (self.count_file or self.count)(shape, settings)

    def training_bytes(self, shape: ModelShape, settings: AdapterSettings) -> int:
        """Memory beside the base and its activations: float32 parameter, gradient and two moments, and what is
        frozen."""
        frozen = self.num_frozen(shape, settings) if self.num_frozen is not None else 0
        return 16 * self.count(shape, settings) + 4 * frozen


def _low_rank(name: str, title: str, paper: str, summary: str, **changes: Any) -> AdapterMethod:
    """LoRA and its relatives, which PEFT keeps in the same layers and files."""
    settings: dict[str, Any] = {
        "kind": "low-rank",
        "fields": LOW_RANK_FIELDS,
        "source": "rank 16, α = 2R: QLoRA's all-linear recipe (arXiv:2305.14314)",
        "cost": "a few per cent of the time of a step",
        "count": count.low_rank,
        "hot_swap": True,
        "mixed_batch": True,
        "vllm": "yes",
        "llama_cpp": "yes",
        "fast_engine": True,
    }
    return AdapterMethod(name=name, title=title, paper=paper, summary=summary, **(settings | changes))


def _tuner(name: str, title: str, paper: str, summary: str, **settings: Any) -> AdapterMethod:
    return AdapterMethod(name=name, title=title, paper=paper, summary=summary, **settings)


def _virtual_tokens(name: str, title: str, paper: str, summary: str, **settings: Any) -> AdapterMethod:
    shared: dict[str, Any] = {"kind": "virtual tokens", "merges": "no", "packs": False, "keeps_head": False}
    return AdapterMethod(name=name, title=title, paper=paper, summary=summary, **(shared | settings))


_TWICE_THE_RANK: dict[str, Any] = {
    "trains_on": DENSE_ONLY,
    "fast_engine": False,
    "keeps_head": False,
    "count_file": count.twice_low_rank,
    "num_frozen": count.low_rank,
    "cost": "the initial factors are kept beside the trained ones, and saved with them: a LoRA file of rank 2R",
}

METHODS: Mapping[str, AdapterMethod] = {
    method.name: method
    for method in (
        _low_rank(
            "lora",
            "LoRA",
            "arXiv:2106.09685",
            "adds a product of two thin matrices to a frozen weight: y = x Wᵀ + (α/R) (x Aᵀ) Bᵀ",
        ),
        _low_rank(
            "rslora",
            "rank-stabilised LoRA",
            "arXiv:2312.03732",
            "LoRA scaled by α/√R, so that raising the rank does not shrink the update; for ranks from 64 up",
            scales_by_root=True,
            llama_cpp="converted",
        ),
        _low_rank(
            "dora",
            "DoRA",
            "arXiv:2402.09353",
            "LoRA for the direction of each output's weights, and one trained magnitude for each",
            count=count.dora,
            hot_swap=False,
            mixed_batch=False,
            vllm="no",
            llama_cpp="no",
            fast_engine=False,
            cost="every forward pass forms W + s B A to take its norms, so a step is much slower than LoRA's",
        ),
        _low_rank(
            "loraplus",
            "LoRA+",
            "arXiv:2402.12354",
            "LoRA whose B learns faster than A, by learning_rate_ratio",
            fields=(*LOW_RANK_FIELDS, "learning_rate_ratio"),
            source="ratio 2⁴: LoRA+ (arXiv:2402.12354); A's rate is a quarter of LoRA's: the mean of both stays",
            learning_rate_factor=0.25,
        ),
        _low_rank(
            "pissa",
            "PiSSA",
            "arXiv:2404.02948",
            "LoRA that starts as the weight's largest singular directions instead of zero",
            **_TWICE_THE_RANK,
        ),
        _low_rank(
            "olora",
            "OLoRA",
            "arXiv:2406.01775",
            "LoRA that starts as the first columns of the weight's QR factors",
            **_TWICE_THE_RANK,
        ),
        _low_rank(
            "eva",
            "EVA",
            "arXiv:2410.07170",
            "LoRA whose A starts as the main directions of each layer's inputs on the training data",
            fields=(*LOW_RANK_FIELDS, "calibration_samples"),
            source="EVA (arXiv:2410.07170), without its sharing out of ranks: every layer keeps `rank`",
            cost="one pass over calibration_samples before the first step; then LoRA's",
        ),
        _low_rank(
            "loftq",
            "LoftQ",
            "arXiv:2310.08659",
            "LoRA that starts as what NF4 loses of the weight: B A ≈ W − Ŵ",
            trains_on=frozenset({"nf4"}),
            merges="dequantised base",
            vllm="no",
            llama_cpp="no",
            source="one iteration, so that the base stays the plain NF4 one (arXiv:2310.08659, algorithm 1, T = 1)",
            cost="reads the original weights once more and factors each layer's error; then LoRA's",
        ),
        _tuner(
            "adalora",
            "AdaLoRA",
            "arXiv:2303.10512",
            "starts above the wanted rank and takes ranks away where they matter least",
            kind="low-rank",
            fields=(*LOW_RANK_FIELDS, "initial_rank", "orthogonal_weight"),
            source="initial rank 1.5 R, γ = 0.5, β = 0.85: AdaLoRA (arXiv:2303.10512); budget from 10 to 70%",
            cost="keeps three float32 copies of its parameters for their importance",
            count=count.adalora,
            count_file=count.adalora_file,
            num_frozen=lambda shape, settings: 3 * count.adalora(shape, settings),
        ),
        _tuner(
            "loha",
            "LoHa",
            "arXiv:2108.06098",
            "the elementwise product of two low-rank matrices: rank up to R² from two factors of rank R",
            kind="low-rank",
            fields=("rank", "alpha", "targets"),
            defaults={"rank": 8, "alpha": 16.0},
            source="LyCORIS (arXiv:2309.14859), PEFT's defaults with α = 2R",
            cost="forms the whole update [o, i] of every layer, twice a step: slow, and a dense weight a layer",
            count=count.twice_low_rank,
        ),
        _tuner(
            "lokr",
            "LoKr",
            "arXiv:2309.14859",
            "a Kronecker product of a small matrix and a low-rank one",
            kind="low-rank",
            fields=("rank", "alpha", "targets", "kronecker_factor"),
            defaults={"rank": 8, "alpha": 16.0},
            source="LyCORIS (arXiv:2309.14859), PEFT's defaults with α = 2R",
            cost="forms the whole update of every layer, twice a step",
            count=count.lokr,
        ),
        _tuner(
            "ia3",
            "(IA)³",
            "arXiv:2205.05638",
            "one trained factor for each key, value and inner activation of the MLP",
            kind="scaling",
            fields=("targets",),
            defaults={"targets": ("k_proj", "v_proj", "down_proj")},
            source="keys, values, MLP, learning rate 3e-3: T-Few (arXiv:2205.05638)",
            learning_rate_factor=15.0,
            cost="almost nothing; too few parameters to learn much",
            count=count.ia3,
        ),
        _tuner(
            "vera",
            "VeRA",
            "arXiv:2310.11454",
            "two trained vectors a layer around random matrices that all layers share",
            kind="scaling",
            fields=("rank", "dropout", "targets"),
            defaults={"rank": 256},
            source="rank 256 and ten times LoRA's learning rate: VeRA (arXiv:2310.11454)",
            learning_rate_factor=10.0,
            cost="computes like LoRA of rank 256, saves hardly anything but the shared matrices",
            count=count.vera,
            count_file=count.vera_file,
            num_frozen=lambda shape, settings: count.vera_file(shape, settings) - count.vera(shape, settings),
        ),
        _tuner(
            "oft",
            "OFT",
            "arXiv:2306.07280",
            "rotates each layer's input by blocks of orthogonal matrices",
            kind="rotation",
            fields=("block_size", "targets"),
            source="PEFT's OFTv2 (arXiv:2506.19847), blocks of 32",
            cost="one block-diagonal product for each layer's input",
            count=count.oft,
        ),
        _tuner(
            "boft",
            "BOFT",
            "arXiv:2311.06243",
            "rotates each weight by blocks of orthogonal matrices, and scales its outputs",
            kind="rotation",
            fields=("block_size", "targets"),
            defaults={"block_size": 4},
            source="PEFT's defaults, one butterfly factor (arXiv:2311.06243)",
            cost="forms and multiplies a dense i × i rotation in every layer, beside a permutation of that size",
            count=count.boft,
            num_frozen=count.boft_permutations,
        ),
        _tuner(
            "miss",
            "MiSS",
            "arXiv:2409.15371",
            "one matrix a layer, applied to sums of R shards of the input",
            kind="low-rank",
            fields=("rank", "dropout", "targets"),
            defaults={"rank": 64},
            source="rank 64: MiSS, formerly Bone (arXiv:2409.15371), PEFT's default",
            cost="half of LoRA's parameters at the same rank, and one product less",
            count=count.miss,
        ),
        _tuner(
            "layernorm",
            "LayerNorm tuning",
            "arXiv:2312.11420",
            "trains the weights of the norms alone",
            kind="weights",
            fields=(),
            source="all norms of the residual stream (arXiv:2312.11420)",
            learning_rate_factor=10.0,
            cost="almost nothing; too few parameters to learn much",
            count=count.layer_norms,
        ),
        _virtual_tokens(
            "prefix",
            "prefix tuning",
            "arXiv:2101.00190",
            "trained keys and values before every sample, in every layer",
            fields=("num_virtual_tokens", "encoder_hidden_size"),
            source="20 tokens without reparametrisation: between the 10 and 200 of prefix tuning (arXiv:2101.00190)",
            checkpointing=False,
            learning_rate_factor=10.0,
            cost="takes num_virtual_tokens of every context; samples do not share rows",
            count=count.prefix,
            count_file=count.prefix_file,
        ),
        _virtual_tokens(
            "ptuning",
            "P-tuning",
            "arXiv:2103.10385",
            "trained embeddings before every sample, through a small MLP",
            fields=("num_virtual_tokens", "encoder_hidden_size"),
            defaults={"encoder_hidden_size": 128},
            source="an MLP encoder of width 128 (arXiv:2103.10385; PEFT's examples)",
            learning_rate_factor=5.0,
            cost="takes num_virtual_tokens of every context; samples do not share rows",
            count=count.p_tuning,
            count_file=count.prompt,
        ),
        _virtual_tokens(
            "prompt",
            "prompt tuning",
            "arXiv:2104.08691",
            "trained embeddings before every sample",
            fields=("num_virtual_tokens",),
            source="20 tokens, started from embeddings of the vocabulary (arXiv:2104.08691)",
            learning_rate_factor=10.0,
            cost="takes num_virtual_tokens of every context; samples do not share rows",
            count=count.prompt,
        ),
        _tuner(
            "houlsby",
            "bottleneck adapters (Houlsby)",
            "arXiv:1902.00751",
            "a small MLP after attention and after the MLP of every layer: h + U relu(D h)",
            kind="bottleneck",
            fields=("bottleneck_size", "dropout", "targets"),
            defaults={"targets": ("o_proj", "down_proj")},
            source="width 64: the best single size of arXiv:1902.00751",
            merges="no",
            cost="two more products in sequence for each target; stays in the served model",
            count=count.bottleneck,
        ),
        _tuner(
            "pfeiffer",
            "bottleneck adapters (Pfeiffer)",
            "arXiv:2005.00247",
            "a small MLP after the MLP of every layer: h + U relu(D h)",
            kind="bottleneck",
            fields=("bottleneck_size", "dropout", "targets"),
            defaults={"targets": ("down_proj",)},
            source="width 64; one adapter a layer, after the MLP (arXiv:2005.00247)",
            merges="no",
            cost="two more products in sequence a layer; stays in the served model",
            count=count.bottleneck,
        ),
        _tuner(
            "full",
            "full fine-tuning",
            "–",
            "trains every weight of the model",
            kind="weights",
            fields=(),
            source="a tenth of LoRA's learning rate (Schulman et al. 2025, LoRA without regret)",
            trains_on=DENSE_ONLY,
            learning_rate_factor=0.1,
            keeps_head=False,
            trains_vocabulary=True,
            cost="16 bytes a parameter in place of the base's 2, and a copy of the base in main memory to compare with",
            count=count.all_weights,
        ),
        _tuner(
            "freeze",
            "last-layer tuning",
            "–",
            "trains all weights of the last decoder layers",
            kind="weights",
            fields=("num_layers",),
            source="two layers; a tenth of LoRA's learning rate, as for full fine-tuning",
            trains_on=DENSE_ONLY,
            learning_rate_factor=0.1,
            keeps_head=False,
            cost="16 bytes a trained parameter, but no backward pass below the trained layers",
            count=count.last_layers,
        ),
    )
}


def _unverified(name: str) -> AdapterMethod:
    return AdapterMethod(
        name=name,
        title=f"{name} of PEFT",
        paper="PEFT",
        kind="unverified",
        summary=f"PEFT's {name.upper()} with the fields of its PEFT config under `options`",
        fields=("targets", "options"),
        source="PEFT's own",
        cost="unknown",
        count=lambda shape, settings: 0,
        trains_on=DENSE_ONLY,
        merges="no",
        keeps_head=False,
        is_verified=False,
    )


UNVERIFIED: Mapping[str, AdapterMethod] = {name: _unverified(name) for name in get_args(PeftName)}
FIELDS: tuple[str, ...] = tuple(entry.name for entry in fields(AdapterSettings) if entry.name != "method")
"""Every setting that some method has."""


def method_named(name: str) -> AdapterMethod:
    """The method called `name`. Raises ModelError[adapter-method-unknown] with the nearest name."""
    known = {**METHODS, **UNVERIFIED}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    raise ModelError(
        "adapter-method-unknown",
        f'adapter.method "{name}" is not one of {", ".join(METHODS)}',
        fix=f"did you mean {near[0]}?" if near else f"use one of {', '.join(METHODS)}",
    )


def methods_that_train_on(weight_format: str) -> tuple[str, ...]:
    """Names of the methods whose gradients are right on that weight format."""
    return tuple(name for name, method in METHODS.items() if weight_format in method.trains_on)
