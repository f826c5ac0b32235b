"""From a name that affina does not know to the one that was meant: typos, other sections, other tools."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from affina.catalog.renamed_settings import RENAMED_SETTINGS
from affina.config.fields import all_fields
from affina.config.schema import RunConfig

FOREIGN_KEYS: dict[str, str] = {
    # model
    "base_model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "model_id": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "checkpoint_dir": "model.path",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "bnb_4bit_compute_dtype": "model.dtype",
    # quantisation
    "quantization_method": "quantization.format",
    "quant_method": "quantization.format",
    "quant_type": "quantization.format",
    "bnb_4bit_use_double_quant": "quantization.double_quantization",
    "double_quant": "quantization.double_quantization",
    "double_quantization": "quantization.double_quantization",
    "llm_int8_skip_modules": "quantization.skip_modules",
    # adapter
    "peft_method": "adapter.method",
    "finetuning_type": "adapter.method",
    "r": "adapter.rank",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_target": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "lora_target_linear": "adapter.targets",
    "target_modules": "adapter.targets",
    "init_r": "adapter.initial_rank",
    "orth_reg_weight": "adapter.orthogonal_weight",
    "lora_plus_scale": "adapter.learning_rate_ratio",
    "oft_block_size": "adapter.block_size",
    "boft_block_size": "adapter.block_size",
    "decompose_factor": "adapter.kronecker_factor",
    "freeze_trainable_layers": "adapter.num_layers",
    "num_last_layers": "adapter.num_layers",
    # data
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "dataset_path": "data.train",
    "eval_dataset": "data.validation",
    "test_datasets": "data.validation",
    "validation_file": "data.validation",
    "val_set_size": "data.validation_fraction",
    "val_size": "data.validation_fraction",
    "test_size": "data.validation_fraction",
    "sequence_len": "data.max_length",
    "sequence_length": "data.max_length",
    "seq_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "model_max_length": "data.max_length",
    "sample_packing": "data.packing",
    "pack_sequences": "data.packing",
    "group_by_length": "data.packing",
    "excess_length_strategy": "data.truncation",
    "train_on_inputs": "data.mask",
    "train_on_prompt": "data.mask",
    "assistant_only_loss": "data.mask",
    "completion_only_loss": "data.mask",
    "roles_to_train": "data.mask",
    "mask_history": "data.mask",
    "enable_thinking": "data.thinking",
    "default_system": "data.system_prompt",
    "dataset_num_proc": "data.num_workers",
    "dataset_processes": "data.num_workers",
    "preprocessing_num_workers": "data.num_workers",
    "dataset_prepared_path": "data.cache_directory",
    "dataset_exact_deduplication": "data.deduplicate",
    "field_messages": "data.train[].columns.messages",
    # training
    "rl": "training.objective",
    "stage": "training.objective",
    "trainer_type": "training.objective",
    "dpo_beta": "training.preference.beta",
    "rl_beta": "training.preference.beta",
    "orpo_alpha": "training.preference.beta",
    "pref_beta": "training.preference.beta",
    "kto_beta": "training.preference.beta",
    "pref_loss": "training.preference.loss",
    "dpo_label_smoothing": "training.preference.label_smoothing",
    "simpo_gamma": "training.preference.margin",
    "kto_desirable_weight": "training.preference.desirable_weight",
    "kto_undesirable_weight": "training.preference.undesirable_weight",
    "kto_chosen_weight": "training.preference.desirable_weight",
    "kto_rejected_weight": "training.preference.undesirable_weight",
    "teacher_model": "training.distillation.teacher",
    "teacher_model_name_or_path": "training.distillation.teacher",
    "num_epochs": "training.epochs",
    "num_train_epochs": "training.epochs",
    "train_epochs": "training.epochs",
    "batch_size": "training.micro_batch_size",
    "per_device_train_batch_size": "training.micro_batch_size",
    "per_device_batch_size": "training.micro_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "gradient_accumulation": "training.gradient_accumulation_steps",
    "accumulation_steps": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "lr_scheduler_type": "training.schedule",
    "scheduler": "training.schedule",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
    "num_warmup_steps": "training.warmup_steps",
    "lr_warmup_steps": "training.warmup_steps",
    "min_lr": "training.min_learning_rate_ratio",
    "min_lr_ratio": "training.min_learning_rate_ratio",
    "cosine_min_lr_ratio": "training.min_learning_rate_ratio",
    "optim": "training.optimizer",
    "beta1": "training.adam_beta1",
    "beta2": "training.adam_beta2",
    "adam_eps": "training.adam_epsilon",
    "wd": "training.weight_decay",
    "gradient_clipping": "training.max_grad_norm",
    "grad_clip": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "tf32": "training.precision",
    "mixed_precision": "training.precision",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "device_map": "training.device",
    "random_state": "training.seed",
    "logging_steps": "training.log_every_steps",
    "log_interval": "training.log_every_steps",
    "eval_steps": "training.evaluate_every_steps",
    "evals_per_epoch": "training.evaluate_every_steps",
    "eval_interval": "training.evaluate_every_steps",
    "save_steps": "training.save_every_steps",
    "saves_per_epoch": "training.save_every_steps",
    "save_interval": "training.save_every_steps",
    "save_total_limit": "training.keep_last",
    "load_best_model_at_end": "training.keep_best",
    "patience": "training.early_stopping_patience",
    "early_stopping": "training.early_stopping_patience",
    # the rest
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_batch_size": "evaluation.batch_size",
    "generation_max_length": "evaluation.max_new_tokens",
    "report_to": "tracking.trackers",
    "logger": "tracking.trackers",
    "wandb_project": "tracking.project",
    "mlflow_experiment_name": "tracking.project",
    "output_dir": "output.directory",
    "out_dir": "output.directory",
    "save_dir": "output.directory",
    "run_name": "output.name",
    "wandb_name": "output.name",
    "experiment_name": "output.name",
    "preset": "extends",
    "base": "extends",
    "defaults": "extends",
    "inherit": "extends",
}
"""What other tools call a setting, and its path here."""

FOREIGN_ANSWERS: dict[str, str] = {
    "load_in_4bit": "write `quantization: nf4`",
    "bnb_4bit_quant_type": "write `quantization: nf4` or `quantization: fp4`",
    "quantization_bit": "write `quantization: nf4` for 4 bits, `quantization: int8` for 8",
    "load_in_8bit": "write `quantization: int8`",
    "use_rslora": "write `adapter: rslora`",
    "peft_use_rslora": "write `adapter: rslora`",
    "use_dora": "write `adapter: dora`",
    "peft_use_dora": "write `adapter: dora`",
    "init_lora_weights": "write `adapter: pissa`, olora, eva or loftq",
    "loraplus_lr_ratio": "write `adapter: loraplus` and adapter.learning_rate_ratio",
    "bias": "remove it: biases stay frozen, so that an adapter can be turned off",
    "chat_template": "remove it: the tokenizer's own chat template is the only one, so that training and serving agree",
    "flash_attention": "remove it: packed samples are isolated and the fastest attention of the device is chosen",
    "attn_implementation": "remove it: packed samples are isolated and the fastest attention of the device is chosen",
    "flash_attn": "remove it: packed samples are isolated and the fastest attention of the device is chosen",
    "pad_token": "remove it: padding is never the end-of-turn token and never trained",
    "special_tokens": "remove it: the tokenizer's own special tokens are used",
    "effective_batch_size": "write training.micro_batch_size and training.gradient_accumulation_steps; "
    "their product is the rows per step",
    "global_batch_size": "write training.micro_batch_size and training.gradient_accumulation_steps; "
    "their product is the rows per step",
    "resume_from_checkpoint": "remove it and run `affina train --resume`",
    "do_train": "remove it: `affina train` trains",
    "do_eval": "write evaluation.enabled",
    "save_strategy": "write training.save_every_steps",
    "eval_strategy": "write training.evaluate_every_steps",
    "evaluation_strategy": "write training.evaluate_every_steps",
    "logging_strategy": "write training.log_every_steps",
    "push_to_hub": "remove it: affina writes local files only",
    "hub_model_id": "remove it: affina writes local files only",
    "remove_unused_columns": "remove it: columns that a format does not need are ignored",
    "dataloader_num_workers": "remove it, or write data.num_workers for the preparation of the data",
}
"""Keys of other tools that are not one setting here, and what to do about them."""

FOREIGN_VALUES: dict[str, dict[str, str]] = {
    "quantization.format": {
        **dict.fromkeys(("4bit", "4-bit", "int4", "bnb", "bnb-4bit", "bitsandbytes", "qlora", "true"), "nf4"),
        **dict.fromkeys(("bnb-fp4", "bnb_fp4", "float4"), "fp4"),
        **dict.fromkeys(("8bit", "8-bit", "bnb-8bit", "llm_int8", "w8a16"), "int8"),
        **dict.fromkeys(("float8", "e4m3", "fp8_e4m3", "float8_e4m3fn"), "fp8"),
        **dict.fromkeys(("false", "no", "off", "16bit", "bf16", "fp16", "bfloat16", "float16"), "none"),
    },
    "adapter.method": {
        **dict.fromkeys(("rs-lora", "rs_lora"), "rslora"),
        **dict.fromkeys(("lora+", "lora-plus", "lora_plus"), "loraplus"),
        **dict.fromkeys(("(ia)3", "(ia)³", "ia³", "ia-3"), "ia3"),
        **dict.fromkeys(("prefix-tuning", "prefix_tuning"), "prefix"),
        **dict.fromkeys(("p-tuning", "p_tuning"), "ptuning"),
        **dict.fromkeys(("prompt-tuning", "prompt_tuning"), "prompt"),
        **dict.fromkeys(("bottleneck", "adapter", "adapters", "double_seq_bn"), "houlsby"),
        **dict.fromkeys(("seq_bn",), "pfeiffer"),
        **dict.fromkeys(("ln_tuning", "ln-tuning", "layer_norm", "norms"), "layernorm"),
        **dict.fromkeys(("bone",), "miss"),
        **dict.fromkeys(("none", "all", "sft", "full-finetuning", "fft"), "full"),
        **dict.fromkeys(("last-layers", "last_layers"), "freeze"),
    },
    "adapter.targets": dict.fromkeys(("all", "all_linear", "all linear", "linear", "all-linears"), "all-linear"),
    "model.dtype": {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"},
    "training.objective": {
        **dict.fromkeys(("pt", "pretrain", "pretraining", "clm", "raw"), "cpt"),
        **dict.fromkeys(("rm", "reward_model", "reward-model", "reward_trainer"), "reward"),
        **dict.fromkeys(("gkd", "kd", "distillation", "distil"), "distill"),
        **dict.fromkeys(("ipo", "preference", "rlhf"), "dpo"),
        **dict.fromkeys(("supervised", "instruct", "chat"), "sft"),
    },
    "training.preference.loss": {"dpo": "sigmoid", "logistic": "sigmoid"},
    "training.precision": {
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "16": "fp16",
        "float32": "fp32",
        "32": "fp32",
        "no": "fp32",
    },
    "training.optimizer": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adamw"), "adamw"),
        **dict.fromkeys(("adamw_bnb_8bit", "adam_8bit", "adamw8bit", "8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "paged_adamw8bit", "paged_adam_8bit"), "paged_adamw_8bit"),
    },
    "training.schedule": {
        **dict.fromkeys(("constant_with_warmup", "none", "flat"), "constant"),
        **dict.fromkeys(("cosine_with_min_lr", "cosine_annealing", "cosine_with_restarts"), "cosine"),
    },
    "training.device": {"gpu": "cuda", "cuda:0": "cuda", "metal": "mps"},
    "data.truncation": {"cut": "truncate", "error": "raise", "fail": "raise", "skip": "drop"},
    "data.mask": {"completion": "assistant", "none": "all", "last_turn": "last", "assistant_only": "assistant"},
    "data.train[].format": {
        **dict.fromkeys(("chatml", "openai", "chat", "chat_template", "conversation"), "messages"),
        **dict.fromkeys(("instruction", "instruct"), "alpaca"),
        **dict.fromkeys(("completion", "prompt-completion", "input_output"), "prompt_completion"),
        **dict.fromkeys(("pretrain", "plain", "raw", "txt"), "text"),
        **dict.fromkeys(("dpo", "pairs", "pairwise", "chosen_rejected"), "preference"),
        **dict.fromkeys(("kto", "unpaired"), "labelled"),
        **dict.fromkeys(("json", "jsonl", "csv", "parquet"), "auto"),
    },
    "evaluation.match": {"normalised": "normalized", "numeric": "number", "substring": "contains"},
    "tracking.trackers": {"tb": "tensorboard", "weights-and-biases": "wandb", "weights_and_biases": "wandb"},
}
"""Words that other tools use as a value, and ours."""

MINIMUM_SIMILARITY = 0.72
"""Of difflib's ratio. High enough that `rank` is not offered for `mask`, low enough for two slips in a long name."""


def closest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` most likely was meant to be, None when nothing is near."""
    matches = difflib.get_close_matches(
        _simple(word), known := {_simple(c): c for c in candidates}, 1, MINIMUM_SIMILARITY
    )
    return known[matches[0]] if matches else None


def suggest_key(key: str, section_path: str, siblings: Iterable[str]) -> str:
    """What to write instead of an unknown key: the `fix` of the error.

    section_path: dotted path of the section where the key was found, "" at the top
    siblings:     the names that this section knows
    """
    siblings = list(siblings)
    simple = _simple(key)
    if (now := RENAMED_SETTINGS.get(f"{section_path}.{key}")) is not None:
        return f"it is the former name of {now}, which is written too: keep one"
    if simple in FOREIGN_ANSWERS:
        return FOREIGN_ANSWERS[simple]
    if simple in siblings:
        return f"did you mean {simple}?"
    if "." in key and (path := _known_path(key)):
        section, name = path.split(".", 1)
        return f"write {name} inside the section {section}:, or give it as --set {path}=..."
    if simple in FOREIGN_KEYS:
        return f"affina calls it {FOREIGN_KEYS[simple]}"
    homes = [path for path in all_fields() if path.rsplit(".", 1)[-1] == simple]
    if not homes and simple in RunConfig.model_fields:
        return f"{simple} is a section of its own: move it to the left margin"
    if homes:
        return f"it belongs elsewhere: write {' or '.join(homes)}"
    if near := closest(key, siblings):
        return f"did you mean {near}?"
    if path := _closest_path(key):
        return f"did you mean {path}?"
    place = f"the section {section_path}" if section_path else "a config"
    return f"{place} knows {', '.join(siblings)}"


def suggest_value(path: str, value: object, words: Iterable[str]) -> str | None:
    """The word that a wrong value of the field at `path` stands for, None when nothing is near."""
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    translated = FOREIGN_VALUES.get(path.replace("data.validation[]", "data.train[]"), {}).get(shown.lower())
    return translated or closest(shown, words)


def _known_path(path: str) -> str | None:
    return path if path in all_fields() else None


def _closest_path(key: str) -> str | None:
    """The nearest field of the whole schema, by its last name or by what other tools call it."""
    names: dict[str, str] = {}
    for path in all_fields():
        names.setdefault(path.rsplit(".", 1)[-1], path)
    if near := closest(key, names):
        return names[near]
    if near := closest(key, FOREIGN_KEYS):
        return FOREIGN_KEYS[near]
    return None


def _simple(word: str) -> str:
    return word.strip().lower().replace("-", "_").replace(" ", "_")
