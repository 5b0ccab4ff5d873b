"""An encoder in which everything counts, and radiographs for it."""

from pathlib import Path

import numpy as np
import torch

from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw
from spcxr.data.presets import Preprocess
from spcxr.infer.encoder import Encoder
from spcxr.infer.normalise import Normalisation, network_input
from spcxr.models.vit import VisionTransformer

SIDE, PATCH, WIDTH, GRID = 64, 16, 48, (4, 4)


def vit_of(channels: int = 1, seed: int = 0) -> VisionTransformer:
    """No weight is as small as they are drawn: all patches and blocks show in the output."""
    torch.manual_seed(seed)
    vit = VisionTransformer(
        image_px=SIDE, patch_px=PATCH, channels=channels, width=WIDTH, depth=3, heads=3
    )
    with torch.no_grad():
        for weight in vit.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return vit


def made(dtype=torch.float32, channels=1, seed=0, **preprocess) -> Encoder:
    """Its images are prepared larger than the network reads them; channels differ."""
    settings = Preprocess(**{"size_px": 80, **preprocess})
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return Encoder(vit_of(channels, seed), settings, mean, std, dtype)


def grey(height=120, width=90, seed=0) -> np.ndarray:
    """``[H, W]`` uint8, smooth."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.sin(rows / rng.uniform(8, 20)) + np.cos(columns / rng.uniform(8, 20))
    return ((waves + 2) * 63.75).astype(np.uint8)


def normalised(encoder: Encoder, squares: np.ndarray) -> torch.Tensor:
    """What the network reads of prepared images, step by step."""
    unit = network_input(squares, encoder.vit.image_px, Normalisation(0.0, 1.0))
    return (unit - encoder.mean) / encoder.std


def phantom(file: Path, index: int = 0, **tags) -> Path:
    """A drawn chest as DICOM; ``tags`` change it, None removes one."""
    data = to_dataset(draw(index, size_px=64), str(index))
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    save(data, file)
    return file
