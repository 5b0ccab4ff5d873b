"""Where to cut a probability: three operating points, chosen on validation rows and kept as JSON.

A threshold lies halfway between the last score that is called and the next one that is not, so that
the last bit of a probability, which differs between machines, calls no row of the validation set
otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import roc_curve
from spcxr.evaluate.report import write_json

Array = NDArray[Any]
Parsed = TypeVar("Parsed")

FILE = "thresholds.json"
RULES = {
    "youden": "the highest sensitivity + specificity",
    "specificity_90": "the highest sensitivity with a specificity of 0.9 or more",
    "sensitivity_90": "the highest specificity with a sensitivity of 0.9 or more",
}


def choose_thresholds(values: Array, scores: Array) -> dict[str, Array]:
    """The threshold of each label by each of `RULES`: a row is called where score >= threshold.

    Of several that serve a rule equally, the highest: it calls fewest.

    Parameters
    ----------
    values
        ``(n, K)`` 1, 0, NaN = unknown, left out of its label.
    scores
        ``(n, K)`` probabilities.

    Returns
    -------
    rule -> ``(K,)`` float64; NaN for a label without a positive or without a negative row.

    Raises
    ------
    SpcxrError
        shapes that differ, or scores that are NaN.

    >>> values = np.array([[0.0], [0.0], [1.0], [1.0]])
    >>> found = choose_thresholds(values, np.array([[0.1], [0.4], [0.35], [0.8]]))
    >>> {rule: chosen.round(3).tolist() for rule, chosen in found.items()}
    {'youden': [0.6], 'specificity_90': [0.6], 'sensitivity_90': [0.225]}
    """
    truth, score = np.asarray(values, np.float64), np.asarray(scores, np.float64)
    if truth.ndim != 2 or truth.shape != score.shape:
        raise SpcxrError(f"values {truth.shape} and scores {score.shape}; give two (n, K) arrays")
    chosen = [_of_one(t, s) for t, s in zip(truth.T, score.T, strict=True)]
    return {rule: np.array([found[rule] for found in chosen], np.float64) for rule in RULES}


def _of_one(truth: Array, score: Array) -> dict[str, float]:
    """The thresholds of one label ``(n,)``."""
    false, found = roc_curve(truth, score)
    if np.isnan(false[-1] + found[-1]):
        return dict.fromkeys(RULES, float("nan"))
    levels = np.unique(score[~np.isnan(truth)])[::-1]
    # above the highest score nothing is called; then one distinct score more with every cut
    over = np.nextafter(levels[0], np.inf)
    between = (levels[:-1] + levels[1:]) / 2
    # neighbours in floating point have nothing between them, and half may be the lower one
    between = np.where(between > levels[1:], between, levels[:-1])
    cuts = np.concatenate([[over], between, levels[-1:]])
    spared = 1 - false
    places = {
        "youden": np.argmax(found + spared),
        "specificity_90": np.argmax(np.where(spared >= 0.9, found, -1.0)),
        "sensitivity_90": np.argmax(np.where(found >= 0.9, spared, -1.0)),
    }
    return {rule: float(cuts[place]) for rule, place in places.items()}


def write_thresholds(
    folder: str | Path, names: Sequence[str], thresholds: Mapping[str, Array]
) -> Path:
    """Write ``thresholds.json``: what each rule means, then rule -> label -> threshold.

    A threshold that is NaN is written as null.
    """
    return write_json(
        Path(folder) / FILE,
        {
            "labels": list(names),
            "a row is called where": "its probability, tempered by calibration.json, is at least",
            "rules": {rule: RULES[rule] for rule in thresholds},
            "thresholds": {
                rule: dict(zip(names, chosen, strict=True)) for rule, chosen in thresholds.items()
            },
        },
    )


def read_thresholds(folder: str | Path, names: Sequence[str]) -> dict[str, Array] | None:
    """Rule -> thresholds ``(K,)`` in the order of ``names``; None without the file.

    Raises
    ------
    SpcxrError
        a file that is torn, or of other labels.
    """

    def parse(facts: Mapping[str, Any]) -> dict[str, Array]:
        return {
            rule: np.array([as_number(chosen[name]) for name in names])
            for rule, chosen in facts["thresholds"].items()
        }

    return read_kept(Path(folder) / FILE, names, parse)


def read_kept(
    path: Path, names: Sequence[str], parse: Callable[[Mapping[str, Any]], Parsed]
) -> Parsed | None:
    """What ``parse`` makes of a JSON file kept beside a model; None where there is no file.

    Raises
    ------
    SpcxrError
        a file of other labels, or one that cannot be read or parsed.
    """
    facts = read_facts(path, names)
    if facts is None:
        return None
    try:
        return parse(facts)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise torn(path) from error


def read_facts(path: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """The content of a JSON file kept beside a model, if it is there and of these labels."""
    try:
        facts = json.loads(path.read_text("utf-8"))
        labels = list(facts["labels"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise torn(path) from error
    if labels != list(names):
        raise SpcxrError(
            f"{path}: is of the labels {', '.join(map(str, labels))}, the model of "
            f"{', '.join(names)}; delete it, or put back the one that came with the model"
        )
    return facts


def torn(path: Path) -> SpcxrError:
    """What is said of a file that does not hold what it should."""
    return SpcxrError(f"{path}: cannot be read; delete it, or put back the model's own")


def as_number(value: float | None) -> float:
    """A number of a JSON file; null stands for NaN."""
    return float("nan") if value is None else float(value)
