"""How the images of another library's weights are made: what was said, what lies beside them, what
is assumed. Our own weights say it themselves."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError
from spcxr.models.foreign import is_foreign, settings_beside
from spcxr.models.foreign_encoder import IMAGENET, foreign_encoder
from spcxr.models.vit import VisionTransformer
from spcxr.models.weight_files import SUFFIXES

Numbers = float | Sequence[float]
Channels = tuple[float, ...]


class Settled(NamedTuple):
    """A network; how its images are prepared; mean and std of each channel; what was assumed."""

    vit: VisionTransformer
    preprocess: Preprocess
    mean: Channels
    std: Channels
    notes: tuple[str, ...]


def of_another_library(path: Path) -> bool:
    """Whether ``path`` is weights of another library, not a run or a model folder of ours.

    Raises
    ------
    SpcxrError
        a file that holds no weights by its name.
    """
    if path.is_file() and path.suffix not in SUFFIXES:
        raise SpcxrError(
            f"{path}: is no weights file by its name; give a run, a model folder, or a file of: "
            f"{', '.join(SUFFIXES)}"
        )
    # The weights file of one of our folders: what is beside it belongs to it.
    beside = settings_beside(path.parent) if path.is_file() else {}
    ours = path.name == "model.safetensors" and "spcxr_version" in beside
    return is_foreign(path) and not ours


def settle(
    path: Path,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    mean: Numbers | None = None,
    std: Numbers | None = None,
    heads: int | None = None,
) -> Settled:
    """Another library's encoder and the numbers of its images; what nobody said is warned about.

    Raises
    ------
    SpcxrError
        weights that cannot be used; settings that cannot be theirs.
    """
    given = (_each(path, "mean", mean), _each(path, "std", std))
    found = foreign_encoder(path, heads)
    channels, side = found.vit.channels, found.vit.image_px[0]
    made, assumed = _preprocess(path, preprocess, side)
    statistics = found.statistics or (IMAGENET if channels == 3 else given)
    if found.statistics is None and None in given and channels == 3:
        assumed.append("mean and std: ImageNet's")
    said = (one if one is not None else known for one, known in zip(given, statistics, strict=True))
    both = [one * channels if one is not None and len(one) == 1 else one for one in said]
    if both[0] is None or both[1] is None:
        raise SpcxrError(f"{path}: nothing says the mean and std of its images; give mean and std")
    if not len(both[0]) == len(both[1]) == channels:
        raise SpcxrError(f"{path}: mean and std of another number of channels than its {channels}")
    _refuse_other_units(path, both[0], both[1])
    if assumed:
        warnings.warn(
            f"{path}: does not say how its images were made; assumed {'; '.join(assumed)}. Give "
            "preset, fit, mean and std if they are others",
            stacklevel=3,
        )
    notes = (*found.notes, *(f"assumed {one}" for one in assumed))
    return Settled(found.vit, made, both[0], both[1], notes)


def _preprocess(
    path: Path, given: Preprocess | Mapping[str, Any] | None, side: int
) -> tuple[Preprocess, list[str]]:
    """What was given, filled up; and in words what of it was assumed."""
    if isinstance(given, Preprocess):
        return given, []
    told = {} if given is None else given
    if not isinstance(told, Mapping) or set(told) - {"preset", "fit", "size_px", "dtype"}:
        raise SpcxrError(
            f"{path}: preprocess is {given!r}; give a Preprocess, or some of preset, fit, size_px "
            "and dtype by name"
        )
    made = Preprocess(**{"size_px": side, **told})
    if {"preset", "fit"} <= set(told):
        return made, []
    return made, [f"preprocess: {made.preset}, {made.fit}, {made.size_px} px"]


def _each(path: Path, name: str, value: Numbers | None) -> Channels | None:
    """Of each channel, or of all."""
    if value is None:
        return None
    try:
        return tuple(np.asarray(value, np.float64).reshape(-1).tolist())
    except (TypeError, ValueError) as error:
        raise SpcxrError(f"{path}: {name} is {value!r}; give a number, or one a channel") from error


def _refuse_other_units(path: Path, mean: Channels, std: Channels) -> None:
    """Of grey levels to 255, say: features would be wrong, and nothing would tell."""
    if all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std):
        return
    raise SpcxrError(
        f"{path}: mean {', '.join(f'{m:g}' for m in mean)} and std "
        f"{', '.join(f'{s:g}' for s in std)} are not of pixels in [0, 1]; give such (of levels to "
        "255, divide by 255)"
    )
