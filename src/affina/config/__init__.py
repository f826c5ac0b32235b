"""One YAML file: its schema, how it is read, what is computed, what is refused, and where each value comes from."""

from affina.config.load import load_config, load_mapping, load_stored_config
from affina.config.origins import Note, Origin
from affina.config.resolved import ResolvedConfig
from affina.config.schema import (
    AdapterConfig,
    ColumnsConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OutputConfig,
    QuantizationConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainingConfig,
)

__all__ = [
    "AdapterConfig",
    "ColumnsConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Note",
    "Origin",
    "OutputConfig",
    "QuantizationConfig",
    "ResolvedConfig",
    "RunConfig",
    "SourceConfig",
    "TrackingConfig",
    "TrainingConfig",
    "load_config",
    "load_mapping",
    "load_stored_config",
]
