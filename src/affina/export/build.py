"""From a run to an artefact: the sections model and quantization as plain arguments."""

from __future__ import annotations

from pathlib import Path

from affina.config.schema import RunConfig
from affina.export.merge import MergeReport, merge
from affina.models.device import choose_device
from affina.models.weights import Nf4Options
from affina.runs.directory import RunDirectory


def merge_run(run: RunDirectory, config: RunConfig, output: Path, *, dtype: str = "bfloat16") -> MergeReport:
    """Merges the adapter of `run` into the original base of its config; see `merge` for the errors."""
    quantization = config.quantization
    trained_on = None
    if quantization.method == "nf4":
        trained_on = Nf4Options(
            double_quantization=quantization.double_quantization,
            scale_search=quantization.scale_search,
            skip_modules=quantization.skip_modules,
        )
    report = merge(
        config.model.path,
        run.adapter,
        output,
        dtype=dtype,
        revision=config.model.revision,
        trust_remote_code=config.model.trust_remote_code,
        device=choose_device(config.training.device),
        trained_weight_format=trained_on,
    )
    run.log_event("merge", f"merged into {output}", **report.to_dict())
    return report
