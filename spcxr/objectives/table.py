"""The objectives by name: how each is built around an encoder, and which views it asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from spcxr.objectives.corruption import Corruption
from spcxr.objectives.gmml import build_gmml
from spcxr.objectives.mae import build_mae
from spcxr.objectives.mcssl import build_mcssl
from spcxr.objectives.objective import Objective
from spcxr.objectives.sit import build_sit


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


_TAUGHT = ("reconstruction_weight", "teacher_momentum")

OBJECTIVES = {
    "gmml": Entry(build_gmml),
    "sit": Entry(build_sit, options=_TAUGHT, corrupted=2, compares=True),
    "mcssl": Entry(
        build_mcssl,
        options=(*_TAUGHT, "teacher_temperature", "prototypes"),
        corrupted=2,
        local=True,
    ),
    "mae": Entry(build_mae, options=("normalise_patches",), hides=_whole_patches),
}
