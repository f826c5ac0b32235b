"""From a run to an artefact: the sections model and quantization as plain arguments."""

from __future__ import annotations

from pathlib import Path

from affina.config.schema import RunConfig
from affina.export.merge import MergeReport, merge
from affina.models.build import weight_format
from affina.models.device import choose_device
from affina.runs.directory import RunDirectory


def merge_run(run: RunDirectory, config: RunConfig, output: Path, *, dtype: str = "bfloat16") -> MergeReport:
    """Merges the adapter of `run` into the original base of its config; see `merge` for the errors."""
    report = merge(
        config.model.path,
        run.adapter,
        output,
        dtype=dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        device=choose_device(config.training.device),
        trained_weight_format=weight_format(config),
        trained_int8_vocabulary=config.engine.memory == "lowest",
    )
    run.log_event("merge", f"merged into {output}", **report.to_dict())
    return report
