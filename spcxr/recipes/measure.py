"""One test set through one trained model: predictions, metrics with intervals, page sections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.data.labels import LABEL_VALUES
from spcxr.errors import SpcxrError
from spcxr.evaluate import pages
from spcxr.evaluate.calibration import calibration_error, top_label
from spcxr.evaluate.intervals import Interval, bootstrap_all
from spcxr.evaluate.report import Section
from spcxr.evaluate.summary import ClassSummary, summarise_classes, usable_rows
from spcxr.infer.operating import OperatingPoint, operating_point
from spcxr.infer.predict import Change, TrainedModel, predict_classes, probabilities
from spcxr.recipes import measure_masks
from spcxr.recipes.attend import SharesRead, told_shares
from spcxr.recipes.testset import (
    Answers,
    Result,
    Rows,
    Settings,
    TestSet,
    by_group,
    group_tables,
    in_batches,
    number,
)

Array = NDArray[Any]


def measure(trained: TrainedModel, test_set: TestSet, settings: Settings) -> Result:
    """Predict the set's rows and compare with what is known of them.

    Raises
    ------
    SpcxrError
        nothing to compare with: no label of the model's, or no mask.
    """
    return judge(trained, test_set, predict(trained, test_set, settings), settings)


def rows_to_measure(trained: TrainedModel, test_set: TestSet) -> Rows:
    """The rows that are predicted: all, or for masks those that have one.

    Raises
    ------
    SpcxrError
        there is nothing to compare a prediction with.
    """
    if trained.kind == "segment":
        return measure_masks.masked_rows(test_set)
    labels = true_labels(test_set, trained)
    if not usable_rows(labels, multilabel=trained.multilabel).any():
        raise SpcxrError(
            f"{test_set.store.path}: no row of {test_set.name} has a known label among "
            f"{', '.join(trained.names)}; choose other --splits"
        )
    return test_set.rows


def predict(
    trained: TrainedModel,
    test_set: TestSet,
    settings: Settings,
    change: Change | None = None,
    name: str | None = None,
) -> Array:
    """What the model says of `rows_to_measure`, on every process: ``(n, K)`` float64 logits.

    A model that reads the lungs alone adds a last column, the share of each image that it read,
    where nothing is changed.
    For masks the figures of `measure_masks.overlaps_of`, so that no mask need be kept. ``change``
    is done to the images first; ``name`` (the set's, if not given) is shown with the progress,
    ``""`` shows none.
    """
    rows = rows_to_measure(trained, test_set)
    name = test_set.name if name is None else name
    if trained.kind == "segment":
        return measure_masks.overlaps_of(trained, test_set, rows, settings, change, name)
    model, store, normalisation = trained.model, test_set.store, trained.normalisation

    def work(batch: Rows) -> Array:
        read = SharesRead()
        logits = predict_classes(model, store, batch, normalisation, settings, change, read)
        shares = read.shares if in_part else None
        return logits if shares is None else np.column_stack([logits, shares])

    in_part = change is None and getattr(model, "lungs", None) is not None
    return in_batches(rows, settings, name, work, len(trained.names) + in_part)


def judge(trained: TrainedModel, test_set: TestSet, predicted: Array, settings: Settings) -> Result:
    """Compare what was predicted (by `predict`) with what is known."""
    task = _judge_classes if trained.kind == "classify" else measure_masks.judge_masks
    return task(trained, test_set, predicted, settings)


def true_labels(test_set: TestSet, trained: TrainedModel) -> Array:
    """``(n, K)`` 1, 0, NaN in the order of the model's names; uncertain (-1) becomes unknown.

    A label column that the data lack is unknown; for one class of many it is 0, since a class
    that a set does not name is a class that none of its rows has.

    Raises
    ------
    SpcxrError
        the data have none of the model's labels, or a column of that name whose cells are none.
    """
    manifest = test_set.store.manifest
    refuse_odd_columns(test_set, [name for name in trained.names if name not in manifest.labels])
    there = [name for name in trained.names if name in manifest.labels]
    if not there:
        raise SpcxrError(
            f"{test_set.store.path}: has none of the model's labels {', '.join(trained.names)} "
            f"(it has {', '.join(manifest.labels) or 'none'}); rename its label columns"
        )
    known = manifest.label_matrix(there)[test_set.rows].astype(np.float64)
    absent = np.nan if trained.multilabel else 0.0
    labels = np.full((len(known), len(trained.names)), absent)
    labels[:, [trained.names.index(name) for name in there]] = known
    if not trained.multilabel:
        labels[np.isnan(known).any(1)] = np.nan
    return np.where(labels == -1, np.nan, labels)


def refuse_odd_columns(test_set: TestSet, names: Sequence[str]) -> None:
    """Refuse a column that has a label's name and was not taken as one for what is in its cells.

    To take such a label as unknown, or as absent from all rows, would be to guess.

    Raises
    ------
    SpcxrError
        the first such column; the line names the image and the cell.
    """
    manifest = test_set.store.manifest
    for name in names:
        if name not in manifest.columns.column_names:
            continue
        cells = manifest.columns.column(name).to_pylist()
        odd = [row for row, cell in enumerate(cells) if str(cell or "0") not in LABEL_VALUES]
        if odd:
            raise SpcxrError(
                f"{test_set.store.path}: column {name!r} holds {str(cells[odd[0]])[:20]!r} for "
                f"{manifest.column('path')[odd[0]]}; a label is 1, 0, -1 (uncertain) or blank "
                "(unknown): mend its cells and prepare the images anew"
            )


def why_undefined(test_set: TestSet, summary: ClassSummary) -> dict[str, str]:
    """Class -> why it has no AUROC on this set."""
    why = {}
    for name in summary.left_out:
        positive, known = summary.positives[name]
        if name not in test_set.store.manifest.labels:
            why[name] = "the data have no such label column"
        elif not known:
            why[name] = "no measured row has a known value"
        else:
            why[name] = f"all {known} known values are {int(positive > 0)}"
    return why


def _judge_classes(
    trained: TrainedModel, test_set: TestSet, predicted: Array, settings: Settings
) -> Result:
    logits, read = np.split(predicted, [len(trained.names)], axis=1)
    labels, patients = true_labels(test_set, trained), test_set.patients
    point = operating_point(trained, settings.threshold)
    scores = point.scores(logits, multilabel=trained.multilabel)

    def summarise(rows: Array) -> ClassSummary:
        return summarise_classes(
            labels[rows],
            scores[rows],
            patients[rows],
            trained.names,
            multilabel=trained.multilabel,
            n=settings.n_bootstrap,
            seed=settings.seed,
            threshold=point.threshold,
        )

    usable = usable_rows(labels, multilabel=trained.multilabel)
    summary = summarise(np.arange(len(labels)))
    groups = by_group(test_set, usable, lambda rows: summarise(rows).overall)
    before = untempered(trained, point, labels[usable], logits[usable], patients[usable], settings)
    undefined = why_undefined(test_set, summary)
    pictures = pages.class_plots(summary, labels, scores, patients, seed=settings.seed)
    pictures += pages.reliability_pictures(summary, labels, scores)
    return Result(
        test_set=test_set,
        n_rows=summary.n_rows,
        n_patients=summary.n_patients,
        overall=summary.overall,
        statistics=summary.statistics,
        patients=summary.patients,
        details={
            "by_class": summary.by_class,
            "delong": summary.delong,
            "positive_and_known_rows": summary.positives,
            "confusion": summary.confusion,
            "left_out_of_the_means": summary.left_out,
            "undefined": undefined,
            "threshold": summary.threshold,
            "threshold_from": point.origin if trained.multilabel else "the highest probability",
            "temperatures": point.temperatures,
            "calibration_error_before_tempering": before,
            "subgroups": groups,
        },
        section=Section(
            test_set.name,
            text=" ".join(_sentences(summary, len(labels), undefined, point, before, read)),
            tables=[
                *pages.class_tables(summary, _tempered(trained, point, before)),
                *group_tables(groups, test_set, usable),
            ],
            pictures=pictures,
        ),
        rows=test_set.rows,
        predictions=_cells(trained.names, labels, scores, read),
        measured=test_set.rows[usable],
        answers=Answers(trained.names, trained.multilabel, labels[usable], scores[usable]),
    )


def _sentences(
    summary: ClassSummary,
    n_rows: int,
    undefined: Mapping[str, str],
    point: OperatingPoint,
    before: Mapping[str, Interval],
    read: Array,
) -> Iterator[str]:
    """What stands above the tables of a set of ``n_rows``; ``read`` as in `_cells`."""
    yield f"{summary.n_rows} labelled images of {summary.n_patients} patients."
    if left_out := n_rows - summary.n_rows:
        yield f"{left_out} images without a usable label are left out."
    if undefined:
        yield f"Without AUROC: {'; '.join(f'{n}: {why}' for n, why in undefined.items())}."
    if summary.threshold is not None:
        yield f"Calls are made at {point.origin}."
    if before and summary.multilabel:
        yield "Probabilities are tempered as the validation rows asked for (By class)."
    elif before:
        said = "; ".join(f"{name} {error}" for name, error in before.items())
        yield f"{point.said} Calibration error before: {said}."
    if summary.n_patients == 1:
        yield "All are of one patient, so there are no intervals."
    if read.size:
        yield f"Read of each: the lungs' patches, {told_shares(read[:, 0])}."


def untempered(
    trained: TrainedModel,
    point: OperatingPoint,
    labels: Array,
    logits: Array,
    patients: Array,
    settings: Settings,
) -> dict[str, Interval]:
    """The calibration error of the probabilities as the model gives them; nothing if untempered.

    Of each label, or of the highest probability of one of many.
    """
    if point.temperatures is None:
        return {}
    raw = probabilities(logits, multilabel=trained.multilabel)
    pairs = {"the highest probability": top_label(labels, raw)}
    if trained.multilabel:
        pairs = dict(zip(trained.names, zip(labels.T, raw.T, strict=True), strict=True))
    return bootstrap_all(
        patients,
        {name: partial(calibration_error, *pair) for name, pair in pairs.items()},
        n=settings.n_bootstrap,
        seed=settings.seed,
    )


def _tempered(
    trained: TrainedModel, point: OperatingPoint, before: Mapping[str, Interval]
) -> dict[str, tuple[Interval, float]]:
    """Label -> its calibration error untempered, its temperature; nothing for one of many."""
    if point.temperatures is None or not trained.multilabel:
        return {}
    each = zip(trained.names, point.temperatures.tolist(), strict=True)
    return {name: (before[name], temperature) for name, temperature in each}


def _cells(
    names: tuple[str, ...], labels: Array, scores: Array, read: Array
) -> list[dict[str, str]]:
    """The cells of ``predictions.csv``, one mapping an image. ``read (n, 1)`` is the share of each
    that was read; ``(n, 0)`` of a model that reads whole images."""
    return [
        {f"true {name}": number(t) for name, t in zip(names, true, strict=True)}
        # 9 digits hold a float32: rounded to fewer, near scores tie and give another AUROC.
        | {f"p {name}": f"{s:.9g}" for name, s in zip(names, score, strict=True)}
        | ({"patches read": f"{shares[0]:.4g}"} if len(shares) else {})
        for true, score, shares in zip(labels, scores, read, strict=True)
    ]
