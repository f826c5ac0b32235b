"""Where the config stops: the sections of `run.yaml` become plain arguments of this package."""

from __future__ import annotations

from pathlib import Path

from affina.config.objectives import OBJECTIVES, Records
from affina.config.schema import ModelConfig, RunConfig, SourceConfig
from affina.data.encoding import EncodeSettings
from affina.data.formats import Columns
from affina.data.prepare import PreparedData, PrepareSettings, Progress, prepare
from affina.data.streaming import StreamedData, stream
from affina.data.templates import ChatTemplate
from affina.data.tokenizer import LoadedTokenizer, load_tokenizer
from affina.data.validation import SourceSpec


def source_spec(source: SourceConfig) -> SourceSpec:
    """One source of the config as the reader takes it."""
    return SourceSpec(
        path=source.path,
        format=source.format,
        columns=Columns(**source.columns.model_dump()),
        split=source.split,
        subset=source.subset,
        max_records=source.max_records,
    )


def wanted_records(config: RunConfig) -> Records:
    """What the config's objective learns from."""
    training = config.training
    if training.objective == "distill" and training.distillation.teacher is None:
        return "taught"
    return OBJECTIVES[training.objective].records


def prepare_settings(config: RunConfig) -> PrepareSettings:
    """What of the config decides the prepared data."""
    data = config.data
    return PrepareSettings(
        encode=EncodeSettings(
            max_length=data.max_length,
            truncation=data.truncation,
            mask=data.mask,
            thinking=data.thinking,
            system_prompt=data.system_prompt,
        ),
        weights=tuple(source.weight for source in data.train),
        validation_fraction=data.validation_fraction,
        max_validation_records=data.max_validation_records,
        on_error=data.on_error,
        max_record_bytes=data.max_record_bytes,
        deduplicate=data.deduplicate,
        mask_pii=data.mask_pii,
        seed=data.seed,
        wanted=wanted_records(config),
    )


def tokenizer_from_config(model: ModelConfig) -> LoadedTokenizer:
    """The tokenizer of the configured model."""
    return load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def template_from_config(config: RunConfig, tokenizer: LoadedTokenizer | None = None) -> ChatTemplate:
    """The chat template with the thinking mode and system prompt of the config."""
    return ChatTemplate(
        tokenizer or tokenizer_from_config(config.model),
        thinking=config.data.thinking,
        system_prompt=config.data.system_prompt,
    )


def prepare_from_config(
    config: RunConfig, tokenizer: LoadedTokenizer | None = None, *, progress: Progress | None = None
) -> PreparedData:
    """Prepared data of a config; `prepare` with the config's values."""
    data = config.data
    return prepare(
        [source_spec(source) for source in data.train],
        tokenizer=tokenizer or tokenizer_from_config(config.model),
        settings=prepare_settings(config),
        validation=[source_spec(source) for source in data.validation],
        num_workers=data.num_workers,
        cache_directory=Path(data.cache_directory) if data.cache_directory else None,
        micro_batch_size=config.training.micro_batch_size,
        packing=data.packing,
        progress=progress,
    )


def stream_from_config(config: RunConfig, tokenizer: LoadedTokenizer | None = None) -> StreamedData:
    """The stream of a config with `data.streaming`; `stream` with the config's values."""
    data = config.data
    return stream(
        [source_spec(source) for source in data.train],
        tokenizer=tokenizer or tokenizer_from_config(config.model),
        settings=prepare_settings(config),
        validation=[source_spec(source) for source in data.validation],
    )
