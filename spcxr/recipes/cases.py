"""The page section of single cases: a trained classifier's best and worst, with attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spcxr.evaluate.cases import case_pictures, pick_cases
from spcxr.evaluate.report import Section
from spcxr.infer.normalise import GREY, network_input
from spcxr.infer.predict import TrainedModel, as_read, patches_read
from spcxr.models.attention_maps import rollout
from spcxr.recipes.testset import TestSet

Array = NDArray[Any]
Rows = NDArray[np.int64]
# Grey images [B, 1, h, w] in [0, 1] and their rows -> the patches that are read [B, Gh, Gw] bool.
Visible = Callable[[Tensor, Rows], Tensor]

MOST_LABELS = 20  # a page of more is not looked through
EXPLAINED = (
    "Attention rollout (Abnar and Zuidema, 2020) tells which patches the encoder's summary of an "
    "image is made of. It is the same for every label and is no reason for a score."
)
PATIENTS = " These are patients' images: share this page as you would share them."


def cases_section(
    trained: TrainedModel,
    test_set: TestSet,
    labels: Array,
    scores: Array,
    *,
    n: int = 1,
    visible: Visible | None = None,
) -> Section:
    """The best and worst cases of each label, one a patient, with an attention overlay each.

    Parameters
    ----------
    trained
        a classifier.
    labels, scores
        ``(rows of the test set, K)``: 1, 0, NaN = unknown, and probabilities, as `measure` has
        them.
    n
        cases of a kind.
    visible
        which patches a classifier of the lungs alone is shown; None: those that it reads.

    Raises
    ------
    SpcxrError
        labels or scores of another size, or a score that is no number.
    """
    cases = pick_cases(labels, scores, test_set.patients, n)
    shown = [case for case in cases if case.label < MOST_LABELS]
    title = f"Cases of {test_set.name}"
    if not shown:
        return Section(title, text="No image has a known label, so there is no case to show.")
    rows = test_set.rows[[case.row for case in shown]]
    each = [rows[i : i + 1] for i in range(len(rows))]  # one at a time: attention takes memory
    images = np.concatenate([test_set.store.images(row) for row in each])
    heats = np.concatenate([_rollout(trained, test_set, row, visible) for row in each])
    pictures = case_pictures(shown, trained.names, images, heats)
    text = EXPLAINED if test_set.drawn else EXPLAINED + PATIENTS
    if len(trained.names) > MOST_LABELS:
        text += f" Shown are {MOST_LABELS} of {len(trained.names)} labels."
    return Section(title, text=text, pictures=pictures)


def _rollout(
    trained: TrainedModel, test_set: TestSet, rows: Rows, visible: Visible | None
) -> Array:
    """``(n, Gh, Gw)`` of these rows of the store."""
    encoder, normalisation = trained.model.encoder, trained.normalisation
    device = next(trained.model.parameters()).device
    pixels = test_set.store.images(rows)
    grey = network_input(pixels, encoder.image_px, GREY, device)
    with torch.inference_mode():
        if visible is None:
            seen = patches_read(trained.model, grey, rows, test_set.store)
        else:
            seen = visible(grey, rows)
    images = as_read(trained.model, grey, seen, normalisation)
    return rollout(encoder, images, seen).cpu().numpy()
