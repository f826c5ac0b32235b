"""From a method's settings to PEFT's config object: one function for each kind of PEFT method."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from affina.catalog.adapter_settings import AdapterSettings
from affina.catalog.methods import method_named
from affina.errors import ModelError
from affina.models.adapters.bottleneck import BottleneckConfig

UNKNOWN_STEPS = 1 << 40
"""AdaLoRA's config wants the number of steps, which is known when training starts (training/adalora.py)."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where an adapter goes.

    names:         of the layers, short where that is unambiguous; empty for methods without target layers
    inner_names:   of those whose input is the MLP's inner activation
    is_transposed: the layers store [in, out] (Conv1D)
    """

    names: tuple[str, ...]
    inner_names: tuple[str, ...] = ()
    is_transposed: bool = False


def peft_config(settings: AdapterSettings, site: Site) -> PeftConfig:
    """PEFT's config. Raises ModelError[adapter-option-wrong] for options that the method's config does not have."""
    method = method_named(settings.method)
    if not method.is_verified:
        return _other(settings, site)
    return _BUILDERS[settings.method](settings, site)


def _lora(settings: AdapterSettings, site: Site, **changes: Any) -> PeftConfig:
    return peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=settings.dropout,
        target_modules=list(site.names),
        use_rslora=method_named(settings.method).scales_by_root,
        use_dora=settings.method == "dora",
        bias="none",
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
        **changes,
    )


def _adalora(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.AdaLoraConfig(
        init_r=settings.initial_rank,
        target_r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        lora_dropout=settings.dropout,
        target_modules=list(site.names),
        orth_reg_weight=settings.orthogonal_weight,
        total_step=UNKNOWN_STEPS,
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
    )


def _loha(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.LoHaConfig(
        r=settings.rank,
        alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
    )


def _lokr(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.LoKrConfig(
        r=settings.rank,
        alpha=settings.alpha,  # type: ignore[arg-type, unused-ignore]
        decompose_factor=settings.kronecker_factor or -1,
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
    )


def _ia3(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.IA3Config(
        target_modules=list(site.names),
        feedforward_modules=list(site.inner_names),
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
    )


def _vera(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.VeraConfig(
        r=settings.rank,
        vera_dropout=settings.dropout,
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
    )


def _oft(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.OFTConfig(
        r=0,
        oft_block_size=settings.block_size,
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
    )


def _boft(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.BOFTConfig(
        boft_block_size=settings.block_size,
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
        fan_in_fan_out=site.is_transposed,
    )


def _miss(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.MissConfig(
        r=settings.rank, miss_dropout=settings.dropout, target_modules=list(site.names), task_type="CAUSAL_LM"
    )


def _layer_norms(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.LNTuningConfig(target_modules=list(site.names), task_type="CAUSAL_LM")


def _prefix(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.PrefixTuningConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        prefix_projection=settings.encoder_hidden_size is not None,
        encoder_hidden_size=settings.encoder_hidden_size,  # type: ignore[arg-type, unused-ignore]
        task_type="CAUSAL_LM",
    )


def _p_tuning(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.PromptEncoderConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        encoder_hidden_size=settings.encoder_hidden_size,  # type: ignore[arg-type, unused-ignore]
        task_type="CAUSAL_LM",
    )


def _prompt(settings: AdapterSettings, site: Site) -> PeftConfig:
    return peft.PromptTuningConfig(
        num_virtual_tokens=settings.num_virtual_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",
        task_type="CAUSAL_LM",
    )


def _bottleneck(settings: AdapterSettings, site: Site) -> PeftConfig:
    return BottleneckConfig(
        bottleneck_size=settings.bottleneck_size,
        dropout=settings.dropout,
        target_modules=list(site.names),
        task_type="CAUSAL_LM",
    )


_BUILDERS: Mapping[str, Callable[[AdapterSettings, Site], PeftConfig]] = {
    **dict.fromkeys(("lora", "rslora", "dora", "loraplus", "pissa", "olora", "eva", "loftq"), _lora),
    "adalora": _adalora,
    "loha": _loha,
    "lokr": _lokr,
    "ia3": _ia3,
    "vera": _vera,
    "oft": _oft,
    "boft": _boft,
    "miss": _miss,
    "layernorm": _layer_norms,
    "prefix": _prefix,
    "ptuning": _p_tuning,
    "prompt": _prompt,
    **dict.fromkeys(("houlsby", "pfeiffer"), _bottleneck),
}


def _other(settings: AdapterSettings, site: Site) -> PeftConfig:
    """The config of a PEFT method that affina does not verify, from `options` as they are."""
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[settings.method.upper()]]
    known: Sequence[str] = tuple(kind.__dataclass_fields__)
    for name in settings.options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ModelError(
                "adapter-option-wrong",
                f'adapter.options has "{name}", which {kind.__name__} does not have',
                why=f"its fields are {', '.join(sorted(known))}",
                fix=f"did you mean {near[0]}?" if near else f"remove {name}",
            )
    options: dict[str, Any] = {"target_modules": list(site.names), "task_type": "CAUSAL_LM"}
    options = {name: value for name, value in options.items() if name in known} | dict(settings.options)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**options)
    except (TypeError, ValueError) as error:
        raise option_refused(settings.method, error) from error


def option_refused(method: str, error: Exception) -> ModelError:
    """What PEFT says about options of a method that affina does not verify, as an error of the config."""
    return ModelError(
        "adapter-option-wrong",
        f"PEFT refuses adapter.method {method} with these adapter.options",
        why=" ".join(str(error).split())[:300],
        fix=f"change adapter.options: the fields are those of PEFT's config of {method}",
    )
