"""TensorBoard, W&B, MLflow, Trackio: optional observers behind one interface. metrics.jsonl is written anyway."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from affina.errors import TrainingError
from affina.training.callbacks import BaseCallback, Callback, RunFacts, StepMetrics, ValidationMetrics

TrackerKind = Literal["tensorboard", "wandb", "mlflow", "trackio"]

_MODULES: dict[TrackerKind, tuple[str, str]] = {
    "tensorboard": ("tensorboard", 'pip install "affina[tensorboard]"'),
    "wandb": ("wandb", 'pip install "affina[wandb]"'),
    "mlflow": ("mlflow", 'pip install "affina[mlflow]"'),
    "trackio": ("trackio", 'pip install "affina[trackio]"'),
}


class _ScalarTracker(BaseCallback):
    """Reduces every tracker to two things: settings at the start, named numbers at a step."""

    def log_settings(self, settings: dict[str, Any]) -> None:
        raise NotImplementedError

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def on_start(self, facts: RunFacts) -> None:
        self.log_settings({key: value for key, value in asdict(facts).items() if key != "notes"})

    def on_step(self, metrics: StepMetrics) -> None:
        names = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch", "num_tokens", "memory_bytes")
        scalars = {name: float(getattr(metrics, name)) for name in names} | dict(metrics.objective)
        self.log_scalars({f"train/{name}": value for name, value in scalars.items()}, metrics.step)

    def on_validation(self, metrics: ValidationMetrics) -> None:
        scalars = {"loss": metrics.validation_loss, **metrics.objective}
        self.log_scalars({f"validation/{name}": value for name, value in scalars.items()}, metrics.step)

    def on_end(self, summary: dict[str, Any]) -> None:
        self.close()


class TensorBoardTracker(_ScalarTracker):
    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer_type: Any = SummaryWriter
        self._directory = directory / "tensorboard"
        self._writer: Any = None

    def on_start(self, facts: RunFacts) -> None:
        # A run that goes on, or begins again, takes steps that an earlier process may have logged: those are hidden.
        self._writer = self._writer_type(str(self._directory), purge_step=facts.first_step + 1)
        super().on_start(facts)

    def log_settings(self, settings: dict[str, Any]) -> None:
        rows = "\n".join(f"    {key}: {value}" for key, value in settings.items())
        self._writer.add_text("run", rows)

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _RunModuleTracker(_ScalarTracker):
    """W&B and Trackio share the calls init, log and finish."""

    def __init__(self, module: str, directory: Path, project: str, name: str) -> None:
        self._module: Any = importlib.import_module(module)
        arguments: dict[str, Any] = {"project": project, "name": name}
        if module == "wandb":
            arguments["dir"] = str(directory)
        self._run: Any = self._module.init(**arguments)

    def log_settings(self, settings: dict[str, Any]) -> None:
        config: Any = getattr(self._run, "config", None)
        if hasattr(config, "update"):
            config.update(settings)

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        self._module.log(scalars, step=step)

    def close(self) -> None:
        self._module.finish()


class MlflowTracker(_ScalarTracker):
    def __init__(self, project: str, name: str) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)

    def log_settings(self, settings: dict[str, Any]) -> None:
        self._mlflow.log_params(settings)

    def log_scalars(self, scalars: dict[str, float], step: int) -> None:
        # MLflow's metric names allow slashes; its interface groups by them.
        self._mlflow.log_metrics(scalars, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def build_tracker(kind: TrackerKind, *, directory: Path, project: str, name: str) -> Callback:
    """The tracker of that name. Raises TrainingError `tracker-unavailable` when its package is not installed."""
    module, install = _MODULES[kind]
    if importlib.util.find_spec(module) is None:
        raise TrainingError(
            "tracker-unavailable",
            f'tracking.trackers "{kind}" needs the package {module}, which is not installed',
            fix=f"`{install}`, or take it out of tracking.trackers",
        )
    if kind == "tensorboard":
        return TensorBoardTracker(directory)
    if kind == "mlflow":
        return MlflowTracker(project, name)
    return _RunModuleTracker(module, directory, project, name)
