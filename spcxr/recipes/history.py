"""How a run learned, from its own log: figures by epoch, and the page section of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spcxr.errors import SpcxrError
from spcxr.evaluate import pages, plots
from spcxr.evaluate.report import Picture, Section
from spcxr.train.journal import read_records

LOG = "metrics.jsonl"
SAME_SCALE = 3  # figures in one plot
NO_SCORES = {"step", "kind", "loss", "epoch"}

Records = Sequence[dict[str, Any]]


def curve(folder: Path, kind: str, figure: str, name: str) -> plots.Curve:
    """One figure of a run over its epochs; training figures are the mean of each epoch."""
    return _curve(_records(folder), kind, figure, name)


def curves_section(folder: Path) -> Section | None:
    """Training loss and validation figures by epoch of a `classify` or `segment` run.

    A run that was stopped and gone on with has each step once in its log, so its curves are whole.

    Parameters
    ----------
    folder
        the run's folder, or ``model`` in it (`TrainedModel.folder`).

    Returns
    -------
    None where there is no log, as beside a model that was copied elsewhere, or nothing in it.

    Raises
    ------
    SpcxrError
        a log that is no JSON.

    >>> import tempfile
    >>> curves_section(Path(tempfile.gettempdir()) / "no such run") is None
    True
    """
    place = folder.parent if folder.name == "model" else folder
    if not (place / LOG).is_file():
        return None
    records = _records(place)
    losses = [
        _curve(records, kind, "loss", name)
        for kind, name in (("train", "training"), ("val", "validation"))
    ]
    figures = dict.fromkeys(
        key for r in records if r["kind"] == "val" for key in r if key not in NO_SCORES
    )
    scores = [_curve(records, "val", key, pages.TITLES.get(key, key)) for key in figures]
    pictures = _pictures([c for c in losses if len(c.x)], "loss", "Loss")
    scores = [c for c in scores if len(c.x)]
    for start in range(0, len(scores), SAME_SCALE):
        part = scores[start : start + SAME_SCALE]
        pictures += _pictures(part, "validation figure", "On the validation rows")
    if not pictures:
        return None
    text = f"The log of {place.name}: the mean of each epoch's steps, and each epoch's validation."
    return Section("Training", text=text, pictures=pictures)


def _pictures(curves: Sequence[plots.Curve], y_label: str, title: str) -> list[Picture]:
    """One plot of curves that share their scale; none of no curves."""
    if not curves:
        return []
    names = ", ".join(c.name for c in curves)
    said = "; ".join(
        f"{c.name} from {c.y[0]:.3f} to {c.y[-1]:.3f} over {len(c.x)} epochs" for c in curves
    )
    drawn = plots.loss_curves(curves, x_label="epoch", y_label=y_label)
    return [Picture(f"{title} by epoch: {names}.", f"{title} by epoch: {said}.", svg=drawn)]


def _records(folder: Path) -> Records:
    try:
        return [r for r in read_records(folder) if {"kind", "step"} <= r.keys()]
    except (ValueError, AttributeError) as error:
        raise SpcxrError(f"{folder / LOG}: a line is no record; remove the file") from error


def _curve(records: Records, kind: str, figure: str, name: str) -> plots.Curve:
    kept = [r for r in records if r["kind"] == kind and r.get(figure) is not None]
    steps = np.array([float(r["step"] or 0) for r in kept])
    values = np.array([float(r[figure]) for r in kept])
    # Validation ends an epoch: the first, unless its record says which.
    ends = [float(r["step"] or 0) / (r.get("epoch") or 1) for r in records if r["kind"] == "val"]
    each = min(ends, default=0.0) or max((float(r["step"] or 0) for r in records), default=1.0)
    epochs = np.ceil(steps / max(each, 1.0) - 1e-6).astype(int)
    found = np.unique(epochs)
    return plots.Curve(name, found, np.array([values[epochs == e].mean() for e in found]))
