"""The sections of `run.yaml`: every field with its type, default, unit and one sentence of help.

All sections are frozen and refuse unknown keys. This file states only what a field *is*; how a file is
read is in load.py, computed values in derive.py, checks across fields in rules.py.

A field whose default is the literal "auto" or None is filled in by derive.py or decided on the machine that trains.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from affina.catalog.methods import MethodName, PeftName

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Option = bool | int | float | str | None
Options = dict[str, Option | list[Option]]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The base model. Its weights are frozen."""

    path: str = Field(
        default="affina/nano",
        description="Directory or hub id of a causal language model; affina/nano ships with affina.",
    )
    revision: str | None = Field(default=None, description="Hub branch, tag or commit; ignored for a directory.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description="Type of the weights that are not quantised, and of the computation. "
        "Not given: it follows training.precision.",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that the model's repository ships. Only for a repository that you have read; "
        "never needed for Qwen, Llama, Mistral, Gemma.",
    )


class QuantizationConfig(Section):
    """The format of the frozen weights. `quantization: nf4` with `adapter: lora` is QLoRA."""

    format: Literal["none", "nf4", "fp4", "int8", "fp8"] = Field(
        default="none",
        description="Weight format of the frozen linear layers; bytes per weight, and error as a share of the weights' "
        "spread: none 2 bytes (bf16, fp16; 4 in fp32) and no error, int8 1 and 0.8%, fp8 (e4m3) 1 and 2.6%, nf4 0.52 "
        "and 9.2%, fp4 0.52 and 12.2%. Take nf4 when memory is short.",
    )
    double_quantization: bool = Field(
        default=True, description="Of nf4 and fp4: quantise the block scales too: 4.127 instead of 4.5 bits per weight."
    )
    scale_search: bool = Field(
        default=False,
        description="Of nf4 and fp4: search each block's scale for the least squared error: same format, 7% less "
        "error, slower load. Turn it on when the tuned model falls short of a 16-bit one.",
    )
    skip_modules: tuple[str, ...] = Field(
        default=("lm_head",),
        description="Names of linear layers that stay unquantised. Embedding and head do in any case, unless "
        "engine.memory is lowest.",
    )


class AdapterConfig(Section):
    """What is trained. Which of these settings a method has, and what it can do: docs/reference/methods.md."""

    method: MethodName | PeftName = Field(
        default="lora",
        description="How the model is changed; `affina methods` compares them. Names from c3a on are PEFT's own: "
        "trained as PEFT does it, and not verified.",
    )
    rank: PositiveInt = Field(
        default=16,
        description="Width of the update. Raise it when the training loss falls too slowly on much data; "
        "one unit holds about 4 million supervised tokens of a 4B model. Methods unlike LoRA have their own default.",
    )
    alpha: Annotated[float, Field(gt=0)] = Field(
        default=32.0, description="Numerator of the update's scale. Tune the learning rate rather than this."
    )
    dropout: Fraction = Field(
        default=0.0,
        description="Share of the adapter's input that is dropped. Raise it to 0.05 when a small set overfits.",
    )
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description="Linear layers that get an adapter: all but the head, or a list of module names such as q_proj. "
        "Fewer targets save memory and lose quality; the MLP layers matter most.",
    )
    learning_rate_ratio: Annotated[float, Field(ge=1)] | None = Field(
        default=None, description="Of loraplus: learning rate of B over that of A; 16 where not given."
    )
    initial_rank: PositiveInt | None = Field(
        default=None, description="Of adalora: rank at the start, from which it comes down to `rank`; 1.5 times `rank`."
    )
    orthogonal_weight: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Of adalora: weight of the term that keeps its factors orthogonal; 0.5."
    )
    num_virtual_tokens: PositiveInt | None = Field(
        default=None,
        description="Of prefix, ptuning, prompt: trained tokens before every sample; 20. They cost context.",
    )
    encoder_hidden_size: PositiveInt | None = Field(
        default=None,
        description="Of ptuning: width of its encoder; 128. Of prefix: width of an encoder that only training "
        "uses; none where not given.",
    )
    block_size: PositiveInt | None = Field(
        default=None, description="Of oft and boft: inputs that are rotated together; 32 and 4."
    )
    kronecker_factor: PositiveInt | None = Field(
        default=None, description="Of lokr: size of the small factor; as square as possible where not given."
    )
    bottleneck_size: PositiveInt | None = Field(
        default=None, description="Of houlsby and pfeiffer: width of the bottleneck; 64."
    )
    num_layers: PositiveInt | None = Field(
        default=None, description="Of freeze: how many of the last decoder layers are trained; 2."
    )
    calibration_samples: PositiveInt | None = Field(
        default=None, description="Of eva: training samples whose activations give the first directions; 64."
    )
    options: Options = Field(
        default={},
        description="Of PEFT's own methods: fields of the method's PEFT config, such as `options: {r: 8}`.",
    )


class ColumnsConfig(Section):
    """Maps the columns of a file to the fields that a format expects. Only what differs needs to be named."""

    messages: str | None = Field(default=None, description="Column with the list of messages or turns.")
    role: str | None = Field(default=None, description="Key of the role inside a message.")
    content: str | None = Field(default=None, description="Key of the text inside a message.")
    system: str | None = Field(default=None, description="Column with the system prompt.")
    tools: str | None = Field(default=None, description="Column with the tool definitions.")
    prompt: str | None = Field(default=None, description="Column with the prompt or instruction.")
    input: str | None = Field(default=None, description="Column with additional input (Alpaca).")
    completion: str | None = Field(default=None, description="Column with the wanted reply.")
    history: str | None = Field(default=None, description="Column with earlier [prompt, reply] pairs (Alpaca).")
    text: str | None = Field(default=None, description="Column with plain text.")
    group: str | None = Field(
        default=None, description="Column that ties records together (document, customer): never split across sets."
    )
    chosen: str | None = Field(default=None, description="Column with the preferred reply or conversation.")
    rejected: str | None = Field(default=None, description="Column with the worse reply or conversation.")
    replies: str | None = Field(default=None, description="Column with a list of replies to one prompt.")
    ranks: str | None = Field(default=None, description="Column (or key of a reply) with ranks; the lowest is best.")
    scores: str | None = Field(default=None, description="Column (or key of a reply) with scores; the highest is best.")
    label: str | None = Field(default=None, description="Column that says whether the reply is wanted (KTO).")


class SourceConfig(Section):
    """One place that conversations come from. A path alone stands for a source."""

    path: str = Field(
        description="A file, a folder, a glob, a hub dataset id, or affina/support (the built-in data set)."
    )
    format: Literal[
        "auto",
        "messages",
        "sharegpt",
        "alpaca",
        "prompt_completion",
        "text",
        "preference",
        "ranking",
        "tree",
        "labelled",
    ] = Field(
        default="auto", description="What a record looks like; auto looks at the first records and says what it found."
    )
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    split: str | None = Field(default=None, description="Split of a hub dataset; train when not given.")
    subset: str | None = Field(default=None, description="Configuration name of a hub dataset.")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Share of this source in the mix, relative to the other sources' weights: 3 and 1 are 75% and 25%.",
    )
    max_records: PositiveInt | None = Field(default=None, description="Use at most this many records.")


class DataConfig(Section):
    """Which conversations are learned, and how they become tokens."""

    train: tuple[SourceConfig, ...] = Field(
        default=(SourceConfig(path="affina/support"),), description="Where the training conversations are."
    )
    validation: tuple[SourceConfig, ...] = Field(
        default=(), description="A separate validation set; empty: split one off the training data."
    )
    validation_fraction: Annotated[float, Field(ge=0.0, le=0.5)] = Field(
        default=0.1,
        description="Share of the training data held out when there is no validation set. Raise it for small sets.",
    )
    max_validation_records: PositiveInt = Field(
        default=1000,
        description="Upper limit of a split-off validation set, in records. Raise it for narrower intervals.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        default=2048,
        description="Longest sample, and length of a packed row, in tokens. `affina data` shows how many are longer.",
    )
    truncation: Literal["drop", "truncate", "split", "raise"] = Field(
        default="drop",
        description="What happens to a sample longer than max_length: left out, cut (and its end never learned), "
        "split into several, or an error.",
    )
    packing: bool = Field(
        default=True, description="Put several samples in one row, isolated from each other. Off: one row, one sample."
    )
    mask: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="Which tokens are trained: every reply, the last reply, or everything."
    )
    thinking: Literal["keep", "strip", "empty-masked"] = Field(
        default="keep", description="What becomes of <think> blocks; an empty block is never trained."
    )
    system_prompt: str | None = Field(
        default=None, description="System prompt for conversations that have none. Not given: none is added."
    )
    on_error: Literal["fail", "skip"] = Field(
        default="fail", description="A bad record stops the run, or is skipped, counted and listed."
    )
    max_record_bytes: PositiveInt = Field(
        default=4 * 1024 * 1024,
        description="A record with more bytes than this is an error: a broken file, most often.",
    )
    deduplicate: Literal["none", "exact", "near"] = Field(
        default="none", description="Remove repeated records before the split: equal ones, or nearly equal ones too."
    )
    mask_pii: bool = Field(
        default=False, description="Replace e-mail addresses, card numbers, IBANs, phone numbers by placeholders."
    )
    streaming: bool = Field(
        default=False,
        description="Read while training, for data larger than the disk; needs training.max_steps and no split.",
    )
    num_workers: NonNegativeInt | None = Field(
        default=None,
        description="Processes that prepare data; 0 and 1 are none besides the main one. "
        "Not given: one per core, 1 for small sets.",
    )
    cache_directory: str | None = Field(
        default=None, description="Where prepared data is kept. Not given: ~/.cache/affina (or AFFINA_CACHE)."
    )
    seed: int = Field(default=0, description="Seed of the split and the mix.")


class PreferenceConfig(Section):
    """Constants of the objectives that learn from preferences. What an objective does not use has no effect."""

    loss: Literal["sigmoid", "ipo"] = Field(
        default="sigmoid",
        description="Of dpo: sigmoid is the paper's; ipo has a bounded target and overfits less on pairs that all "
        "agree.",
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Strength of the pull towards the reference (dpo, kto), of the odds ratio (orpo), or of the "
        "reward (simpo). Raise it for dpo and kto when replies become worse while the margin grows. "
        "Not given: 0.1, for simpo 2.",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        default=0.0,
        description="Of dpo with the sigmoid loss, and simpo: share of pairs that may be labelled the wrong way round.",
    )
    margin: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0, description="Of simpo: how far the chosen reply's reward shall be above the rejected one's."
    )
    desirable_weight: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Of kto: weight of wanted replies. Raise it when they are few."
    )
    undesirable_weight: Annotated[float, Field(gt=0.0)] = Field(
        default=1.0, description="Of kto: weight of unwanted replies. Raise it when they are few."
    )


class DistillationConfig(Section):
    """Where a teacher's distributions come from (training.objective: distill)."""

    teacher: str | None = Field(
        default=None,
        description="Directory or hub id of a model with the same tokenizer; not given: the records carry the "
        "teacher's top-k log-probabilities.",
    )
    on_policy: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="Share of the steps that learn on the student's own replies instead of the data's. "
        "Needs a teacher model; generating takes most of the time.",
    )
    divergence: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0,
        description="0: KL of the teacher to the student (cover all that the teacher would say), 1: the reverse "
        "(avoid what it would not), between: the generalised Jensen-Shannon divergence.",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Divides the logits of both. Raise it to 2 when the teacher is nearly always certain."
    )
    max_new_tokens: PositiveInt = Field(default=128, description="Of on-policy replies: the longest, in tokens.")


class TrainingConfig(Section):
    """How the adapter learns."""

    objective: Literal["sft", "dpo", "orpo", "kto", "simpo", "cpt", "reward", "distill"] = Field(
        default="sft",
        description="What is learnt. sft: the replies. dpo, orpo, simpo: to prefer chosen to rejected replies. "
        "kto: from labels wanted and unwanted. cpt: raw text. reward: a score for replies. distill: a teacher's "
        "distributions.",
    )
    epochs: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Passes over the training data; 1 to 3 are usual."
    )
    max_steps: PositiveInt | None = Field(
        default=None, description="Stop after this many optimiser steps, even if epochs are left."
    )
    micro_batch_size: PositiveInt = Field(
        default=1, description="Rows of max_length tokens computed at once. Raise it while memory allows."
    )
    gradient_accumulation_steps: PositiveInt = Field(
        default=4,
        description="Micro-batches per optimiser step; 8 to 32 rows per step are usual. "
        "Raise it when the loss is noisy. The gradient's scale does not depend on it.",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=2e-4,
        description="Peak learning rate. Raise it when the loss falls slowly, lower it when the loss jumps; "
        "LoRA wants about ten times that of full training.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Course of the learning rate after warm-up."
    )
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="Steps of linear warm-up. Not given: 3% of the run, at least 1."
    )
    min_learning_rate_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.0, description="Share of the peak that remains at the end of a cosine or linear schedule."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor"] = Field(
        default="adamw",
        description="8-bit and paged variants save 6 bytes per adapter parameter (0.2 GB at rank 16 on Qwen3-4B) "
        "and need the gpu extra; paged ones move to main memory when the card is full.",
    )
    adam_beta1: Fraction = Field(default=0.9, description="Memory of the gradient's running mean.")
    adam_beta2: Fraction = Field(
        default=0.999, description="Memory of the gradient's running square. Lower it to 0.99 for short, noisy runs."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="Added to the root of the running square, so that it never divides by zero."
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=0.0, description="Decoupled weight decay. Raise it to 0.01 when a small set overfits."
    )
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(
        default=1.0,
        description="Gradients are scaled down to this norm; 0 turns clipping off. Lower it to 0.3 when losses jump.",
    )
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="Arithmetic of the forward and backward pass; adapters are always kept in fp32. "
        "auto: bf16 where the card has it, fp16 on older CUDA cards, fp32 on CPU.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Recompute activations in the backward pass: a fraction of the memory for 45% more arithmetic. "
        "auto: when memory would not do otherwise.",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = Field(default="auto", description="Where to train.")
    deterministic: bool = Field(
        default=True, description="Same seed, same bits, on the same device; off allows faster kernels."
    )
    seed: int = Field(default=0, description="Seed of adapter initialisation, data order and dropout.")
    log_every_steps: PositiveInt = Field(default=1, description="Optimiser steps between two lines of metrics.jsonl.")
    evaluate_every_steps: PositiveInt | None = Field(
        default=None, description="Steps between validation losses. Not given: about ten times per run."
    )
    save_every_steps: PositiveInt | None = Field(
        default=None, description="Steps between checkpoints. Not given: with every validation."
    )
    keep_last: PositiveInt = Field(default=2, description="Checkpoints kept, newest first; the best is kept as well.")
    keep_best: bool = Field(
        default=True, description="Finish with the adapter of the lowest validation loss instead of the last one."
    )
    early_stopping_patience: PositiveInt | None = Field(
        default=None, description="Stop after this many validations without a better loss."
    )
    max_skipped_steps: NonNegativeInt = Field(
        default=10, description="Steps with NaN or infinite gradients are skipped; more than this many end the run."
    )
    preference: PreferenceConfig = Field(default_factory=PreferenceConfig)
    distillation: DistillationConfig = Field(default_factory=DistillationConfig)


class EvaluationConfig(Section):
    """How the tuned model is compared with its base."""

    enabled: bool = Field(default=True, description="Compare base and tuned model at the end of training.")
    max_records: PositiveInt = Field(
        default=200, description="Validation records whose perplexity is measured. Raise it for narrower intervals."
    )
    max_generations: NonNegativeInt = Field(
        default=100, description="Validation records for which a reply is generated and compared. 0: none."
    )
    max_new_tokens: PositiveInt = Field(default=256, description="Longest generated reply, in tokens.")
    match: Literal["auto", "exact", "normalized", "json", "number", "contains"] = Field(
        default="auto",
        description="When a reply counts as right; auto compares JSON as JSON and text without case and space.",
    )
    batch_size: PositiveInt = Field(default=16, description="Replies generated at once. Lower it when memory is short.")
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = Field(default=0.95, description="Level of the intervals.")
    bootstrap_resamples: Annotated[int, Field(ge=100)] = Field(
        default=2000, description="Resamples behind each interval. Raise it for the third digit."
    )
    num_samples: NonNegativeInt = Field(default=3, description="Replies shown side by side.")
    seed: int = Field(default=0, description="Seed of the choice of records and of the resampling.")


class TrackingConfig(Section):
    """Where metrics go besides the run's own files."""

    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field(
        default=(), description="Besides metrics.jsonl, which is always written. Each needs its own package."
    )
    project: str = Field(default="affina", description="Project or experiment name in the trackers.")


class OutputConfig(Section):
    """Where runs are kept."""

    directory: str = Field(
        default="runs", description="Folder that holds the run directories, relative to where the command runs."
    )
    name: str | None = Field(
        default=None, description="Name of this run's directory. Not given: the YAML file's name and the date."
    )


class EngineConfig(Section):
    """How forward and backward are computed."""

    path: Literal["auto", "reference", "fast"] = Field(
        default="auto",
        description="reference: transformers' own forward. fast: the fused decoder, an error where it cannot run the "
        "model. auto: fast where it can, and the run says why where it cannot.",
    )
    memory: Literal["auto", "lowest"] | Annotated[float, Field(gt=0)] = Field(
        default="auto",
        description="GiB of device memory that the fast engine may use; it keeps as many activations as fit and "
        "recomputes the rest. auto: what is free; a micro-batch that does not fit is cut, at the same "
        "effective batch. Lower it to leave room for other programs. lowest: as little as can "
        "be, and slower: embedding and head in 8 bits on either engine; on the fast one all layers recomputed, and the "
        "adapter with its gradients and optimiser state in main memory.",
    )


class RunConfig(Section):
    """The whole of one `run.yaml`, complete and valid."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    quantization: QuantizationConfig = Field(default_factory=QuantizationConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
