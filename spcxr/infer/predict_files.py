"""Files and folders through a trained classifier: a table of probabilities and calls.

The probabilities are tempered as the model's ``calibration.json`` says, and labels are called from
its ``thresholds.json`` on: the numbers are those of ``spcxr-train evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spcxr.data.presets import Preprocess
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.report import plain
from spcxr.infer.header_ids import IDS, header_ids
from spcxr.infer.input_range import unlike_training
from spcxr.infer.inputs import Input
from spcxr.infer.mask_scores import InMemory
from spcxr.infer.operating import RULE, operating_point
from spcxr.infer.predict import TrainedModel, load_trained, predict_classes
from spcxr.infer.reading import Ready, Refused, read_prepared
from spcxr.infer.regions import StoredLungs
from spcxr.infer.result_files import DIGITS, refuse_suffix, write_json, write_parquet
from spcxr.infer.result_parts import join_parts, open_parts
from spcxr.infer.result_table import Counts, Row, open_table
from spcxr.infer.stream import Work, refuse_nothing, version_of, work_through, writing_to
from spcxr.train.device import Compute

FORMATS = (".csv", ".json", ".parquet")
# Logits (K,) of a file, and the share of its patches that was read (None: the whole image).
Answer = tuple[NDArray[np.float32], float | None]


def predict_files(
    model: str | Path,
    given: Sequence[str | Path],
    out: str | Path,
    compute: Compute,
    *,
    rule: str = RULE,
    with_ids: bool = False,
) -> Counts:
    """Predict every file of ``given``; ``out`` has a row a file.

    Called again with the same ``out``, files that have a row are left as they are; a finished
    JSON or parquet file is not added to.

    Parameters
    ----------
    out
        ``.csv`` (its settings in ``.settings.json`` beside it), ``.json`` or ``.parquet`` (joined
        at the end from ``OUT.parts``).
    rule
        of `evaluate.thresholds.RULES`, by which several labels are called.
    with_ids
        add `header_ids.IDS` of DICOM headers.

    Returns
    -------
    how many files are done and rejected.

    Raises
    ------
    SpcxrError
        a model without labels, inputs that are not there, an ``out`` of another kind or settings.
    NothingDone
        every file was rejected.
    Interrupted
        Ctrl-C or SIGTERM; what has a row is kept.
    """
    out = Path(out)
    refuse_suffix(out, FORMATS)
    tool = Labeller(load_trained(model, compute.device), compute, rule=rule, with_ids=with_ids)
    work = Work("predict", tool.read, tool.answer, tool.row, compute.batch_size)
    opened = open_rows(out, tool.columns, tool.settings)
    with writing_to(out), opened as rows:
        work_through(work, given, rows, out)
        if out.suffix != ".csv":
            write = {".json": write_json, ".parquet": write_parquet}[out.suffix]
            join_parts(rows, out, partial(write, settings=tool.settings))
    refuse_nothing(rows, out)
    return rows


def open_rows(
    out: Path, columns: tuple[str, ...], settings: dict[str, Any]
) -> AbstractContextManager[Any]:
    """The table of a file ``out``: a CSV, or parts to be joined."""
    if out.suffix == ".csv":
        kept = out.with_suffix(".settings.json")
        return open_table(out, columns, settings, kept=kept, digits=DIGITS)
    return open_parts(out, pa.schema([(name, _type(name)) for name in columns]), settings)


def _type(column: str) -> Any:
    if column.startswith("call_"):
        return pa.int8()
    return pa.float64() if column.startswith(("p_", "patches_read")) else pa.string()


class Labeller:
    """A classifier and how its logits become probabilities and calls.

    Raises
    ------
    SpcxrError
        a model that has no labels, or finds the lungs by masks that files have not.
    """

    def __init__(
        self, trained: TrainedModel, compute: Compute, *, rule: str = RULE, with_ids: bool = False
    ) -> None:
        if trained.kind != "classify":
            raise SpcxrError(
                f"{trained.folder}: draws {', '.join(trained.names)} and has no labels; give a run "
                "of spcxr-train classify"
            )
        lungs = getattr(trained.model, "lungs", None)
        if isinstance(lungs, StoredLungs):
            raise SpcxrError(
                f"{trained.folder}: reads the lungs by masks, which files have not; train it with "
                "--lungs-from a segment run"
            )
        self.trained, self.compute, self.with_ids = trained, compute, with_ids
        self.in_part = lungs is not None
        self.version = version_of(trained.folder)  # reads all weights: once
        self.preprocess = Preprocess.from_dict(trained.config["preprocess"])
        self.point = operating_point(trained, None, rule)
        # (K,): NaN where the validation rows gave none
        self.thresholds = np.broadcast_to(self.point.threshold, (len(trained.names),))

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table: what is said of the file, probabilities, calls."""
        names = self.trained.names
        calls = [f"call_{name}" for name in names] if self.trained.multilabel else ["class"]
        return (
            *("path", "status", "reason", "notes"),
            *(IDS if self.with_ids else ()),
            *(f"p_{name}" for name in names),
            *calls,
            *(("patches_read",) if self.in_part else ()),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the numbers of the table mean, as plain values."""
        names, tempered = self.trained.names, self.point.temperatures
        said: dict[str, Any] = {
            "model": self.version,
            "labels": list(names),
            "probabilities": "sigmoid, one a label" if self.trained.multilabel else "softmax",
            "calibrated": tempered is not None,
            "temperatures": None if tempered is None else plain(tempered),
            "with_ids": self.with_ids,
        }
        if self.trained.multilabel:
            each = plain(self.thresholds)
            said["called_at"] = self.point.origin
            said["thresholds"] = dict(zip(names, each, strict=True))
        else:
            said["called_at"] = "the highest probability"
        return said

    def read(self, given: Input) -> Ready | Refused:
        """One file, prepared as the model's images were."""
        return read_prepared(given, self.preprocess)

    def answer(self, ready: list[Ready]) -> list[Answer]:
        """Logits of each file of a batch, and the share of its patches that was read."""
        squares = np.stack([one.prepared.pixels for one in ready])
        store = cast(Store, InMemory(squares, self.preprocess))
        shares: list[float | None] = [] if self.in_part else [None] * len(ready)

        def told(rows: NDArray[np.int64], visible: Any) -> None:
            shares.extend(visible.flatten(1).double().mean(1).tolist())

        rows = np.arange(len(ready))
        normalisation = self.trained.normalisation
        logits = predict_classes(
            self.trained.model, store, rows, normalisation, self.compute, told=told
        )
        return list(zip(logits, shares, strict=True))

    def row(self, ready: Ready, answer: Answer) -> Row:
        """The cells of a file's row."""
        names, (logits, share) = self.trained.names, answer
        scores = self.scores(logits)
        row: Row = {"notes": self.notes(ready, share)}
        row |= header_ids(ready.given.path) if self.with_ids else {}
        row |= {f"p_{n}": float(p) for n, p in zip(names, scores, strict=True)}
        row["patches_read"] = share
        if not self.trained.multilabel:
            return row | {"class": names[int(scores.argmax())]}
        each = zip(names, scores, self.thresholds, strict=True)
        return row | {f"call_{n}": None if np.isnan(t) else int(p >= t) for n, p, t in each}

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits ``(K,)`` -> probabilities ``(K,)``."""
        found = self.point.scores(logits[None], multilabel=self.trained.multilabel)
        return np.asarray(found[0], np.float64)

    def notes(self, ready: Ready, share: float | None) -> str:
        """What was odd about a file, in plain words."""
        odd = unlike_training(ready.prepared.pixels, self.trained.normalisation)
        whole = "no lung found: read whole" if share == 1.0 else None
        return "; ".join(n for n in (*ready.study.notes, odd, whole) if n)
