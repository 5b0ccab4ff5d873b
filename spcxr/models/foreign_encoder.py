"""An encoder made to the measure of weights of another library, and what these say of images.

`load_encoder_weights` fills an encoder that somebody has chosen. Here nobody has: width, depth and
patches are read off the tensors, heads and grey levels out of the files beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from spcxr.errors import SpcxrError
from spcxr.models.foreign import Weights, read_foreign, settings_beside
from spcxr.models.vit import VIT_SIZES, VisionTransformer
from spcxr.models.weights import PATCH_WEIGHT, POSITIONS, fill_encoder

# Of the images that timm, DINO and MAE train on (torchvision's numbers for ImageNet).
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FIRST_FC1 = "blocks.0.mlp.fc1.weight"


class ForeignEncoder(NamedTuple):
    """The encoder; mean and std of each channel, if the files say; what was assumed, in words."""

    vit: VisionTransformer
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None
    notes: tuple[str, ...]


def foreign_encoder(path: str | Path, heads: int | None = None) -> ForeignEncoder:
    """The encoder that a file or folder of another library holds, as large as it is there.

    Parameters
    ----------
    heads
        of attention: the tensors do not tell. None: what the config beside them says, or what
        ViTs of this width and depth have.

    Raises
    ------
    SpcxrError
        weights that cannot be read or computed, or whose heads nobody knows.

    >>> import tempfile
    >>> from spcxr.models.vit import build_vit
    >>> with tempfile.TemporaryDirectory() as place:
    ...     file = Path(place) / "dino.pth"
    ...     made = build_vit("vit_tiny", image_px=32, channels=3)
    ...     torch.save({"teacher": made.state_dict()}, file)
    ...     found = foreign_encoder(file)
    >>> found.vit.heads, found.vit.image_px, found.notes
    (3, (32, 32), ('heads: 3, as every vit_tiny has',))
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    found, config = read_foreign(path), settings_beside(folder)
    filters, fc1 = found.state.get(PATCH_WEIGHT), found.state.get(FIRST_FC1)
    positions = found.state.get(POSITIONS)
    if filters is None or fc1 is None or positions is None or filters.ndim != 4:
        raise SpcxrError(f"{path}: not a whole ViT (patches, positions and blocks); copy it again")
    width, channels, patch_px = filters.shape[:3]
    depth = len({k.split(".")[1] for k in found.state if k.startswith("blocks.")})
    number, note = _heads(found, config, (width, depth), heads, path)
    side = _side(positions.shape[1], path)
    with torch.device("meta"):
        vit = VisionTransformer(
            image_px=side * patch_px,
            patch_px=patch_px,
            channels=channels,
            width=width,
            depth=depth,
            heads=number,
            mlp_ratio=fc1.shape[0] / width,
        )
    report = fill_encoder(vit, found, path)
    notes = (*(f"weights: {one}" for one in report.converted), *note)
    return ForeignEncoder(vit.eval(), _statistics(config, folder, channels), notes)


def _heads(
    found: Weights,
    config: Mapping[str, Any],
    size: tuple[int, int],
    asked: int | None,
    path: Path,
) -> tuple[int, tuple[str, ...]]:
    """How many heads, and the note that they were assumed."""
    if asked is not None and asked < 1:
        raise SpcxrError(f"{path}: heads is {asked}; give 1 or more")
    said = found.heads or config.get("model_args", {}).get("num_heads")
    if number := asked or said:
        return int(number), ()
    for name, known in VIT_SIZES.items():
        if known[:2] == size:
            return known.heads, (f"heads: {known.heads}, as every {name} has",)
    raise SpcxrError(
        f"{path}: an encoder of width {size[0]} and depth {size[1]}, and no config.json that says "
        "how many heads attend; give heads"
    )


def _side(count: int, path: Path) -> int:
    """Patches a side of the square that ``count`` positions are, with or without the cls token."""
    for patches in (count - 1, count):
        side = math.isqrt(max(patches, 0))
        if side and side * side == patches:
            return side
    raise SpcxrError(f"{path}: {count} positions are no square grid; give a square ViT's weights")


def _statistics(
    config: Mapping[str, Any], folder: Path, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of each channel by timm's or Hugging Face's settings."""
    timm = config.get("pretrained_cfg", {})
    hf = settings_beside(folder, "preprocessor_config.json")
    for said, names in ((timm, ("mean", "std")), (hf, ("image_mean", "image_std"))):
        mean, std = (tuple(map(float, said.get(name, ()))) for name in names)
        if len(mean) == len(std) == channels:
            return mean, std
    return None
