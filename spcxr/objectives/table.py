"""The objectives by name: each entry builds one around an encoder."""

from __future__ import annotations

from collections.abc import Callable

from spcxr.models.vit import VisionTransformer
from spcxr.objectives.gmml import GMML, build_gmml

OBJECTIVES: dict[str, Callable[[VisionTransformer], GMML]] = {
    "gmml": build_gmml,
}
