"""The objectives by name: how each is built around an encoder, and which views it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from spcxr.objectives.corruption import Corruption
from spcxr.objectives.gmml import build_gmml
from spcxr.objectives.mae import build_mae
from spcxr.objectives.objective import Objective


class Entry(NamedTuple):
    """How an objective is built, and what it is shown.

    ``build(encoder, **options)`` wraps an encoder; ``options`` names the settings it takes.
    ``hides`` is the corruption, given the one that is asked for; ``corrupted`` views of an image
    are shown, and, where ``local``, small clean ones beside them. ``compares``: images of a batch
    are compared with each other, so a step depends on how it is divided into batches.
    """

    build: Callable[..., Objective]
    options: tuple[str, ...] = ()
    hides: Callable[[Corruption], Corruption] = lambda asked: asked
    corrupted: int = 1
    local: bool = False
    compares: bool = False


def _whole_patches(asked: Corruption) -> Corruption:
    """Nothing fills what is not encoded: zeros stand for it in pictures."""
    return replace(asked, alien_ratio=0.0, fills=("zeros",), align_patches=True)


OBJECTIVES = {
    "gmml": Entry(build_gmml),
    "mae": Entry(build_mae, options=("normalise_patches",), hides=_whole_patches),
}
