"""A run's figures for MLflow and Weights & Biases, beside metrics.jsonl and TensorBoard.

Both are extras (``pip install 'spcxr[track]'``), imported when asked for. Both work without a
network: MLflow writes into ``RUN/mlruns`` unless ``MLFLOW_TRACKING_URI`` names a server, and W&B
waits for ``wandb sync`` under ``WANDB_MODE=offline``. A run that goes on goes on there too; its
steps since the last checkpoint then stand there twice.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from spcxr.errors import SpcxrError

logger = logging.getLogger("spcxr")

PROJECT = "spcxr"  # the experiment or project, unless the tracker's own variable names another
IDS = "trackers.json"  # in the run folder: which tracked run is this one's, by tracker
LONGEST_SETTING = 500  # characters that MLflow keeps at least


class Tracker(Protocol):
    """Who else is told of a run's figures; ``id`` is the tracked run's."""

    id: str

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by name (``train/loss``) after ``step`` steps."""

    def close(self) -> None:
        """The end of the run, or of this part of it."""


def open_trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names (``mlflow``, ``wandb``), open on the tracked run of ``folder``.

    Parameters
    ----------
    folder
        the run folder; ``trackers.json`` there keeps the ids of the tracked runs.
    settings
        the run's settings by name, told once. They hold paths as they were given.

    Raises
    ------
    SpcxrError
        an unknown name, a package that is not installed, or a tracker that cannot be opened.

    >>> open_trackers(["sacred"], Path("runs/a"), {})
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: no tracker 'sacred'; choose from: mlflow, wandb
    """
    for name in names:
        if name not in TRACKERS:
            raise SpcxrError(f"no tracker {name!r}; choose from: {', '.join(TRACKERS)}")
    ids = _read_ids(folder / IDS)
    opened: list[Tracker] = []
    try:
        for name in dict.fromkeys(names):
            opened.append(TRACKERS[name](folder, settings, ids.get(name)))
            ids[name] = opened[-1].id
            draft = folder / f".{IDS}.writing"
            draft.write_text(json.dumps(ids, indent=2) + "\n")
            os.replace(draft, folder / IDS)
    except BaseException:
        for tracker in opened:
            tracker.close()
        raise
    return opened


def _read_ids(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SpcxrError(
            f"{file}: not readable ({error}); remove it to begin new tracked runs"
        ) from error
    return dict(found)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SpcxrError(f"tracker {name}: {error}; pip install 'spcxr[track]'") from error


class MLflow:
    """A run of the experiment ``spcxr`` (or ``MLFLOW_EXPERIMENT_NAME``'s)."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> None:
        mlflow = _package("mlflow")
        self._entities, self._error = mlflow.entities, mlflow.exceptions.MlflowException
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            # MLflow 3 refuses its store of plain files, the one that needs no database, without.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            place = (folder.resolve() / "mlruns").as_uri()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=place)
            self.id = known or self._begin(folder, settings)
            self._client.update_run(self.id, status="RUNNING")
        except self._error as error:
            remedy = f"remove {folder / IDS} to begin a new one, or " if known else ""
            raise SpcxrError(
                f"{folder}: MLflow at {place} ({_first_line(error)}); {remedy}check "
                "MLFLOW_TRACKING_URI"
            ) from error
        self._lost = False

    def _begin(self, folder: Path, settings: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        made: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for key, value in settings.items():
            self._client.log_param(made, key, str(value)[:LONGEST_SETTING])
        return made

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Tell the server; one that fails is said once and not asked again: training goes on."""
        if self._lost:
            return
        now = int(time.time() * 1000)
        told = [self._entities.Metric(k, float(v), now, step) for k, v in values.items()]
        try:
            self._client.log_batch(self.id, metrics=told)
        except self._error as error:
            self._lose(error)

    def close(self) -> None:
        """Mark the tracked run as finished."""
        if self._lost:
            return
        try:
            self._client.set_terminated(self.id)
        except self._error as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self._lost = True
        logger.warning("MLflow is told no more (%s); metrics.jsonl has all", _first_line(error))


class WandB:
    """A run of the project ``spcxr`` (or ``WANDB_PROJECT``'s). Terminal and code stay here."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], known: str | None) -> None:
        wandb = _package("wandb")
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=known,
                resume="allow",
                dir=str(folder),
                config=dict(settings),
                settings=wandb.Settings(console="off", disable_git=True, save_code=False),
            )
        except wandb.Error as error:
            raise SpcxrError(
                f"{folder}: W&B ({_first_line(error)}); run `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self.id: str = self._run.id
        # W&B's own step may not go back, and ours does when a run goes on from a checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over to W&B's own process, which sends or stores."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Wait until all is sent or stored."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], str | None], Tracker]] = {
    "mlflow": MLflow,
    "wandb": WandB,
}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
