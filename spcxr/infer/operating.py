"""A model's own calibration and thresholds, as its validation rows settled them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate.calibration import apply_temperature, read_calibration
from spcxr.evaluate.thresholds import read_thresholds
from spcxr.infer.predict import TrainedModel, probabilities

Array = NDArray[Any]

RULE = "youden"  # of the model's thresholds, where none is given
HALF = 0.5


@dataclass(frozen=True)
class OperatingPoint:
    """How logits become probabilities, and from which one a label is called.

    ``temperatures`` ``(1,)`` or ``(K,)``, NaN = not fitted; None where the model has none.
    ``threshold`` of all labels, or ``(K,)``; ``origin`` says where it is from.
    """

    temperatures: Array | None
    threshold: float | Array
    origin: str

    def scores(self, logits: Array, *, multilabel: bool) -> Array:
        """Logits ``(n, K)`` -> probabilities, tempered where the model knows how.

        >>> point = OperatingPoint(np.array([2.0]), 0.5, "given")
        >>> point.scores(np.array([[2.0]]), multilabel=True).round(3).tolist()
        [[0.731]]
        """
        if self.temperatures is None:
            return probabilities(logits, multilabel=multilabel)
        return probabilities(apply_temperature(logits, self.temperatures), multilabel=multilabel)

    @property
    def said(self) -> str:
        """A sentence for the report; nothing where probabilities stay as the model gives them."""
        if self.temperatures is None:
            return ""
        shown = ", ".join("none" if np.isnan(t) else f"{t:.3g}" for t in self.temperatures)
        return f"Probabilities are tempered as the validation rows asked for (temperature {shown})."


def operating_point(
    trained: TrainedModel, threshold: float | None, rule: str = RULE
) -> OperatingPoint:
    """What stands beside the model's weights; a given ``threshold`` goes before it.

    Parameters
    ----------
    trained
        of classes.
    threshold
        from which every label is called; None for the model's own (``thresholds.json``, by
        ``rule``), or a half where it has none.
    rule
        a key of `evaluate.thresholds.RULES`.

    Raises
    ------
    SpcxrError
        a ``calibration.json`` or ``thresholds.json`` that is torn, of other labels, or without
        the rule; a rule other than `RULE` where there are no thresholds that it could choose of.
    """
    temperatures = read_calibration(trained.folder, trained.names)
    if threshold is not None:
        return OperatingPoint(temperatures, threshold, "the threshold given")
    own = read_thresholds(trained.folder, trained.names) if trained.multilabel else None
    if own is None and rule != RULE:
        lacks = "has no thresholds.json" if trained.multilabel else "calls the likeliest class"
        raise SpcxrError(f"{trained.folder}: {lacks}, by no rule; leave {rule!r} out")
    if own is None:
        return OperatingPoint(temperatures, HALF, "a probability of a half")
    if rule not in own:
        raise SpcxrError(
            f"{trained.folder}: thresholds.json has no rule {rule!r}; choose of {', '.join(own)}"
        )
    return OperatingPoint(temperatures, own[rule], f"the model's thresholds.json, rule {rule}")
