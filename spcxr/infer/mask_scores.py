"""Squares of grey -> scores of each class -> the mask on the file's own grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spcxr.data.presets import Box, Preprocess
from spcxr.data.store import Store
from spcxr.infer.predict import TrainedModel, at_side, forward_batches
from spcxr.train.device import Compute

Scores = NDArray[np.float32]


class InMemory:
    """Images that are in no store, as the prediction loop asks a store for them."""

    has_masks = False
    path = Path("the images given")

    def __init__(self, pixels: NDArray[Any], preprocess: Preprocess) -> None:
        self.pixels, self.preprocess = pixels, preprocess

    def images(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """``(b, S, S)`` of some of the rows."""
        return self.pixels[rows]

    def named(self, row: int) -> str:
        """The image in words, for messages."""
        return f"image {row + 1} of {len(self.pixels)}"


def scores_of(
    trained: TrainedModel, pixels: NDArray[Any], preprocess: Preprocess, compute: Compute,
    *, mirrored: bool = False,
) -> Scores:  # fmt: skip
    """Log-probabilities of each class, background first, at the store's size.

    Logits are resampled bilinearly, as `predict_masks` does it.

    Parameters
    ----------
    pixels
        ``(n, S, S)`` uint8 or uint16, prepared by ``preprocess``.
    mirrored
        show the model the mirrored images, and turn its answer back, left and right renamed.

    Returns
    -------
    ``(n, 1 + K, S, S)`` float32.
    """
    made, side = [], preprocess.size_px
    # The loop asks for images alone, of a model that finds what it reads by itself.
    store = cast(Store, InMemory(pixels, preprocess))
    change = (lambda images, rows: images.flip(-1)) if mirrored else None
    rows = np.arange(len(pixels))
    for _, logits in forward_batches(
        trained.model, store, rows, trained.normalisation, compute, change
    ):
        if mirrored:
            logits = logits.flip(-1)[:, swapped(trained.names)]
        made.append(at_side(logits, side).log_softmax(1).cpu())
    return cast(Scores, torch.cat(made).numpy())


def swapped(structures: tuple[str, ...]) -> list[int]:
    """Class numbers as they are after a mirror: left and right are the other ones.

    >>> swapped(("left lung", "right lung", "heart"))
    [0, 2, 1, 3]
    """
    other = {"left": "right", "right": "left"}
    low = [name.lower() for name in structures]
    order = [0]
    for number, name in enumerate(low, start=1):
        twin = " ".join(other.get(word, word) for word in name.split())
        order.append(low.index(twin) + 1 if twin in low else number)
    return order


def mean_of_two(plain: Scores, mirrored: Scores) -> Scores:
    """Log of the mean probability of two predictions."""
    both = torch.logaddexp(Tensor(plain), Tensor(mirrored)) - np.log(2)
    return cast(Scores, both.numpy())


def entropy(scores: Scores) -> Scores:
    """Of log-probabilities ``(1 + K, S, S)``: ``(S, S)`` in [0, 1]; 1 = all classes alike.

    >>> entropy(np.full((2, 1, 1), np.log(0.5), np.float32)).tolist()
    [[1.0]]
    """
    found = -(np.exp(scores) * scores).sum(0) / np.float32(np.log(len(scores)))
    return cast(Scores, found.clip(0, 1))


def to_original(
    scores: Scores, decided: NDArray[np.uint8], preprocess: Preprocess, shape: tuple[int, int],
    box: Box,
) -> NDArray[np.uint8]:  # fmt: skip
    """The mask on the file's grid, its borders as smooth as the scores are.

    How far each class lies before the background is interpolated, and the largest taken; what
    post-processing decided otherwise holds.

    Parameters
    ----------
    scores
        ``(1 + K, S, S)`` log-probabilities.
    decided
        ``(S, S)`` class numbers after post-processing.
    shape, box
        of the study, and its `Prepared.box`.

    Returns
    -------
    ``(H, W)`` uint8 class numbers; 0 where ``crop`` cut the study away.

    >>> scores = np.log(np.array([[[0.9, 0.1]] * 2, [[0.1, 0.9]] * 2], np.float32))
    >>> decided = np.array([[0, 1], [0, 1]], np.uint8)
    >>> to_original(scores, decided, Preprocess(size_px=2), (4, 4), (0, 0, 2, 2))[0].tolist()
    [0, 0, 1, 1]
    """
    changed = scores.argmax(0) != decided
    mask, best = np.zeros(shape, np.uint8), None
    for number in range(1, len(scores)):
        ahead = scores[number] - scores[0]
        ahead[changed] = np.where(decided[changed] == number, 1.0, -1.0)
        here = preprocess.to_original(ahead, shape, box)
        wins = here > (0 if best is None else best.clip(min=0))
        mask[wins] = number
        best = here if best is None else np.maximum(best, here, out=best)
    return mask
