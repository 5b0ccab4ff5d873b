"""Logistic regression on frozen features: all labels in one product, by L-BFGS.

For 10^5 rows of 768 features and 14 labels a fit is a dozen products of matrices. Features are
turned to their principal axes first, and every coordinate is scaled by its curvature there: the
minimum stays where it is, and L-BFGS finds it in a tenth of the iterations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

Matrix = NDArray[np.float32]
MOST_ITERATIONS = 200


class LinearProblem:
    """Rows and labels, made ready once, to be fitted with one penalty after the other.

    The loss is the mean over the known rows (one of many: cross-entropy; several labels: a binary
    cross-entropy for each, summed) plus ``penalty / 2`` times the squared weights, without the
    biases: scikit-learn's ``LogisticRegression`` with ``C = 1 / (n * penalty)``. Products are
    float32, the rest float64.

    Parameters
    ----------
    features
        ``[n, F]`` float32, standardised. Kept rotated: as much memory again.
    values
        ``(n, K)`` 1, 0, NaN = unknown; of one of many one-hot.
    multilabel
        a regression for each label, or one of many.
    weights
        ``(K,)`` of classes, as `targets.class_weights` makes them: of several labels, what a
        positive counts.

    >>> x = torch.tensor([[1.0, 0.0], [0.5, 0.1], [-1.5, -0.1]])
    >>> problem = LinearProblem(x, np.array([[1], [1], [0]], np.float32), multilabel=True)
    >>> weight, bias = problem.fit(0.01)
    >>> weight.shape, bias.shape, (x @ weight + bias > 0).flatten().tolist()
    (torch.Size([2, 1]), torch.Size([1]), [True, True, False])
    """

    def __init__(
        self,
        features: Tensor,
        values: Matrix,
        *,
        multilabel: bool,
        weights: Matrix | None = None,
    ) -> None:
        self.multilabel = multilabel
        self.share = torch.from_numpy(_shares(values, weights, multilabel=multilabel))
        self.truth = torch.from_numpy(np.nan_to_num(values))
        covariance = (features.T @ features / max(len(features), 1)).double()
        curvature, self.axes = torch.linalg.eigh(covariance)
        self.rotated = features @ self.axes.float()
        total = self.share.sum(0).clamp(min=1e-12)
        rate = ((self.share * self.truth).sum(0) / total).clamp(1e-3, 1 - 1e-3)
        # Of a label's loss along each axis, at its base rate; the bias comes last.
        bend = torch.cat([curvature.clamp(min=0.0), torch.ones(1)]).double()
        self.bend = bend[:, None] * (rate * (1 - rate) * total).double()

    def fit(self, penalty: float, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights ``[F, K]`` and biases ``[K]``, float32, of least loss.

        ``start`` is what `solution` was after another penalty: a nearer place to begin.
        """
        decay = torch.full((len(self.bend), 1), penalty, dtype=torch.float64)
        decay[-1] = 0.0
        scale = (self.bend + decay).clamp(min=1e-12).rsqrt()

        def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            weight = torch.from_numpy(flat).view_as(scale) * scale
            value, gradient = self._loss(weight.float())
            value += float(0.5 * (decay * weight**2).sum())
            return value, ((gradient.double() + decay * weight) * scale).flatten().numpy()

        begin = torch.zeros_like(scale) if start is None else start / scale
        options: dict[str, Any] = {"maxiter": MOST_ITERATIONS, "ftol": 1e-8}
        found = minimize(loss, begin.flatten().numpy(), jac=True, method="L-BFGS-B",
                         options=options).x  # fmt: skip
        self.solution = torch.from_numpy(found).view_as(scale) * scale
        weight = self.axes @ self.solution[:-1]
        return weight.float(), self.solution[-1].float()

    def _loss(self, weight: Tensor) -> tuple[float, Tensor]:
        """Loss without the penalty, and its gradient ``[F + 1, K]``."""
        logits = torch.addmm(weight[-1:], self.rotated, weight[:-1])
        if self.multilabel:
            losses = torch.nn.functional.softplus(logits) - self.truth * logits
            slope = self.share * (logits.sigmoid() - self.truth)
        else:
            losses = logits.logsumexp(1, keepdim=True) - (self.truth * logits).sum(1, keepdim=True)
            slope = self.share * (logits.softmax(1) - self.truth)
        part = self.share if self.multilabel else self.share[:, :1]
        value = float((part * losses).sum(dtype=torch.float64))
        return value, torch.cat([self.rotated.T @ slope, slope.sum(0, keepdim=True)])


def _shares(values: Matrix, weights: Matrix | None, *, multilabel: bool) -> Matrix:
    """``(n, K)``: what each entry counts in its label's mean; unknown ones 0."""
    known = ~np.isnan(values)
    if multilabel:
        made = known / np.maximum(known.sum(0), 1)
        if weights is not None:
            made = np.where(values == 1, made * weights, made)
        return made.astype(np.float32)
    row = known.all(1) * (1.0 if weights is None else np.nan_to_num(values) @ weights)
    return np.repeat((row / row.sum())[:, None], values.shape[1], 1).astype(np.float32)
