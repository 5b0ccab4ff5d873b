"""The objectives by name: how each is built around an encoder, and what it hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.corruption import Corruption
from spcxr.objectives.gmml import GMML, build_gmml
from spcxr.objectives.mae import MAE, build_mae

Objective = GMML | MAE


class Entry(NamedTuple):
    """``build`` wraps an encoder; ``hides`` is the corruption, given the one that is asked for."""

    build: Callable[[VisionTransformer], Objective]
    hides: Callable[[Corruption], Corruption]


def _whole_patches(asked: Corruption) -> Corruption:
    """Nothing fills what is not encoded: zeros stand for it in pictures."""
    return replace(asked, alien_ratio=0.0, fills=("zeros",), align_patches=True)


OBJECTIVES = {
    "gmml": Entry(build_gmml, lambda asked: asked),
    "mae": Entry(build_mae, _whole_patches),
}
