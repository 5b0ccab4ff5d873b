"""Do the grey levels that a model is shown look like those it was trained on?

A wrong preset, a window that was burned in, a screenshot: the first cause of answers that make no
sense. Nothing is refused for it, but it is said.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.infer.normalise import Normalisation

UNLIKE = "grey levels unlike those of the training images"  # how such a note begins
# Ours: images of one site scatter by half of that; an image read wrongly lies beyond.
FARTHEST = 1.0  # an image's mean from the training images', in deviations of their pixels
FLATTEST, BROADEST = 0.3, 2.0  # an image's own deviation, in theirs


def unlike_training(square: NDArray[Any], trained: Normalisation) -> str | None:
    """A note on an image whose grey levels lie far from the training images'; None: they do not.

    Parameters
    ----------
    square
        ``(S, S)`` uint8 or uint16, as prepared for the model.
    trained
        mean and standard deviation of the training images' pixels in [0, 1].

    >>> level = Normalisation(0.5, 0.25)
    >>> unlike_training(np.array([[40, 90], [160, 210]], np.uint8), level)
    >>> unlike_training(np.array([[240, 241], [250, 255]], np.uint8), level)
    'grey levels unlike those of the training images (mean 0.97, deviation 0.02; there 0.50, 0.25)'
    """
    white = float(np.iinfo(square.dtype).max)
    mean, deviation = float(square.mean()) / white, float(square.std()) / white
    near = abs(mean - trained.mean) <= FARTHEST * trained.std
    if near and FLATTEST * trained.std <= deviation <= BROADEST * trained.std:
        return None
    return (
        f"{UNLIKE} (mean {mean:.2f}, deviation {deviation:.2f}; there {trained.mean:.2f}, "
        f"{trained.std:.2f})"
    )
