"""How much a frozen encoder knows: a k-NN and a linear probe on labelled images.

The features of a head (concat(cls, mean patch) after the final norm) of some training rows answer
for some held-out rows. Nothing of the encoder changes and no random number is drawn, so a run with
a probe is the run without it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.data.splits import is_training
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import auroc, by_class
from spcxr.infer.predict import Normalisation, predict_classes
from spcxr.models.heads import Features
from spcxr.models.neighbours import neighbour_shares
from spcxr.models.vit import VisionTransformer
from spcxr.recipes.linear import LinearProblem
from spcxr.recipes.targets import Matrix, Rows, keep_chosen, settle_uncertain
from spcxr.train.device import Compute

Array = NDArray[np.float64]

MOST, MOST_TESTED = 2000, 1000  # images: a figure to watch, not a study
NEIGHBOURS = 20  # DINO's (arXiv 2104.14294)
PENALTY = 0.01  # of the linear probe's squared weights, beside the mean loss; ours


class Probe:
    """Labels and rows, settled and checked once, to probe an encoder with as often as wished.

    Parameters
    ----------
    store
        labelled images. Rows of the splits that are learned from (`is_training`) answer for the
        rows of val*; where there are none, for those of test*.
    labels
        label columns; all if none is named. Uncertain (-1) and blank ones are left out, label by
        label.
    most, most_tested
        images used at most, spread evenly over the rows with a known label.

    Raises
    ------
    SpcxrError
        no label columns, no rows on either side, or no label with both values on both.
    """

    def __init__(
        self,
        store: Store,
        *,
        labels: Sequence[str] = (),
        most: int = MOST,
        most_tested: int = MOST_TESTED,
    ) -> None:
        self.store = store
        names = tuple(labels) or store.manifest.labels
        if not names:
            raise SpcxrError(
                f"{store.path}: no label columns to probe with; add one (1, 0, -1 or blank) to the "
                "manifest and prepare it again"
            )
        train, test = _sides(store)
        values = _known(store, names, np.concatenate([train, test]))
        train, test = (rows[~np.isnan(values[rows]).all(1)] for rows in (train, test))
        self.train, self.test = _spread(train, most), _spread(test, most_tested)
        kept = _both(values[self.train]) & _both(values[self.test])
        if not kept.any():
            raise SpcxrError(
                f"{store.path}: no label of {', '.join(names)} is both 1 and 0 among "
                f"{len(self.train)} training and among {len(self.test)} held-out rows; label more "
                "rows, or choose other labels to probe"
            )
        self.labels = tuple(n for n, k in zip(names, kept, strict=True) if k)
        self.values: Matrix = values[:, kept]

    def __call__(
        self, encoder: VisionTransformer, normalisation: Normalisation, compute: Compute
    ) -> dict[str, float]:
        """Features of both sides, then both probes.

        Parameters
        ----------
        encoder
            in whatever mode; each of its modules is left in the mode it was in.
        normalisation
            the mean and std that the encoder's input is normalised with.

        Returns
        -------
        ``knn_auroc`` and ``linear_auroc`` (macro over ``labels`` labels).

        Raises
        ------
        SpcxrError
            features that are not finite.
        """
        modes = {module: module.training for module in encoder.modules()}
        model = Features(encoder).eval()
        try:
            train, test = (
                predict_classes(model, self.store, rows, normalisation, compute)
                for rows in (self.train, self.test)
            )
        finally:
            for module, mode in modes.items():
                module.training = mode
        known, truth = self.values[self.train], self.values[self.test]
        return {
            "knn_auroc": _macro(truth, knn_scores(train, known, test)),
            "linear_auroc": _macro(truth, linear_scores(train, known, test)),
            "labels": len(self.labels),
        }


def probe(
    encoder: VisionTransformer,
    store: Store,
    compute: Compute,
    *,
    labels: Sequence[str] = (),
    normalisation: Normalisation | None = None,
) -> dict[str, float]:
    """One `Probe`, used once; normalised by the store's mean and std if nothing else is given."""
    return Probe(store, labels=labels)(
        encoder, normalisation or Normalisation(store.mean, store.std), compute
    )


# --- rows and labels ------------------------------------------------------------------------


def _sides(store: Store) -> tuple[Rows, Rows]:
    """Rows to learn from, and rows to answer for."""
    found = store.manifest.splits
    train = store.manifest.rows([s for s in found if is_training(s)])
    sides = [
        store.manifest.rows([s for s in found if s.lower().startswith(p)]) for p in ("val", "test")
    ]
    test = next((rows for rows in sides if len(rows)), train[:0])
    for rows, wanted in ((train, "train"), (test, "val or test")):
        if len(rows) == 0:
            raise SpcxrError(
                f"{store.path}: no rows of {wanted} to probe with (its splits: "
                f"{', '.join(s for s in found if s) or 'none'}); name them in the manifest's split"
            )
    return train, test


def _known(store: Store, names: Sequence[str], rows: Rows) -> Matrix:
    """``(n, K)`` 1, 0, NaN of the whole store; rows of classes not asked for are unknown."""
    values = settle_uncertain(store.manifest.label_matrix(names), "ignore")
    every = settle_uncertain(store.manifest.label_matrix(store.manifest.labels)[rows], "ignore")
    values[rows] = keep_chosen(values[rows], every)
    return values


def _spread(rows: Rows, most: int) -> Rows:
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]


def _both(values: Matrix) -> NDArray[np.bool_]:
    """``(K,)``: whether each label is 1 somewhere and 0 somewhere."""
    return (values == 1).any(0) & (values == 0).any(0)


def _macro(truth: Matrix, scores: Array) -> float:
    return float(by_class(auroc, truth, scores).mean())


# --- the two probes -------------------------------------------------------------------------


def knn_scores(train: Matrix, labels: Matrix, test: Matrix, k: int = NEIGHBOURS) -> Array:
    """`neighbour_shares` of arrays: DINO's weighted votes of the ``k`` nearest.

    Parameters
    ----------
    train, test
        features ``(n, F)`` and ``(m, F)`` float32.
    labels
        ``(n, K)`` 1, 0, NaN = unknown.

    Returns
    -------
    ``(m, K)`` float64 in [0, 1].

    >>> features = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    >>> votes = knn_scores(features, np.array([[1], [1], [0]], np.float32), features[[0, 2]], k=1)
    >>> votes.tolist()
    [[1.0], [0.0]]
    """
    queries, features, known = map(torch.from_numpy, (test, train, labels))
    return neighbour_shares(queries, features, known, [k])[0].numpy()


def linear_scores(train: Matrix, labels: Matrix, test: Matrix) -> Array:
    """Logits ``(m, K)`` of one logistic regression a label, on standardised features.

    Arguments as for `knn_scores`. The same as scikit-learn's ``LogisticRegression`` with ``C = 1 /
    (n * PENALTY)``, ``n`` the rows whose label is known.

    >>> features = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    >>> logits = linear_scores(features, np.array([[1], [1], [0]], np.float32), features)
    >>> (logits[:, 0] > 0).tolist()
    [True, True, False]
    """
    mean, deviation = train.mean(0, np.float64), train.std(0, np.float64)
    deviation = np.maximum(deviation, 0.1 * deviation.mean() + 1e-6)  # as the head standardises
    x, asked = (((f - mean) / deviation).astype(np.float32) for f in (train, test))
    weight, bias = LinearProblem(torch.from_numpy(x), labels, multilabel=True).fit(PENALTY)
    return (asked @ weight.numpy() + bias.numpy()).astype(np.float64)
