"""A model that draws without having learned, and a model folder that knows nothing."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from spcxr.data.presets import Preprocess
from spcxr.infer import segment_files as module
from spcxr.infer.predict import Normalisation, TrainedModel
from spcxr.models.decoder import UNETRDecoder
from spcxr.models.heads import ClassificationHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.train.device import Compute

SIDE = 64
COMPUTE = Compute(4, torch.device("cpu"), "fp32")


class Halves(nn.Module):
    """As a model of left and right lung answers: the patient's right is on the image's left."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(image_px=(SIDE, SIDE), channels=1, patch_px=16)

    def forward(self, images):
        bright = 60 * (images - 0.5)
        left_half = torch.linspace(30, -30, SIDE).expand_as(images)
        return torch.cat([-bright, bright - left_half, bright + left_half], 1)


class Levels(nn.Module):
    """Class k is where the grey level is near k of K + 1 steps from black to white."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.encoder = SimpleNamespace(image_px=(SIDE, SIDE), channels=1, patch_px=16)
        self.steps = torch.linspace(0, 1, classes)[None, :, None, None]

    def forward(self, images):
        return -30 * (images - self.steps).abs()


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """``drawing("lung", ...)``: a model that finds structures by their grey level."""

    def make(*structures: str, fit: str = "pad", model: nn.Module | None = None) -> Path:
        folder = tmp_path / "drawing"
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "head.safetensors"):
            (folder / name).write_bytes(" ".join(structures).encode())
        config = {"preprocess": Preprocess(size_px=SIDE, fit=fit).to_dict()}
        trained = TrainedModel(
            model or Levels(1 + len(structures)),
            "segment",
            structures,
            False,
            Normalisation(0.0, 1.0),
            config,
            folder,
        )
        monkeypatch.setattr(module, "load_trained", lambda path, device: trained)
        return folder

    return make


@pytest.fixture
def halves() -> nn.Module:
    """`Halves`."""
    return Halves()


@pytest.fixture
def untrained(tmp_path: Path) -> Callable[..., Path]:
    """``untrained("lung", ...)``: a run whose model knows nothing; no structures: of labels."""

    def make(*structures: str, name: str = "untrained") -> Path:
        torch.manual_seed(0)
        encoder = VisionTransformer(image_px=32, patch_px=8, width=24, depth=4, heads=3)
        task = {"kind": "segment", "structures": list(structures), "base_channels": 4}
        head: nn.Module = UNETRDecoder(
            width=24, patch_px=8, out_channels=1 + len(structures), base_channels=4
        )
        if not structures:
            task = {"kind": "classify", "labels": ["covid"], "multilabel": True}
            head = ClassificationHead(width=24, classes=1)
        save_model_folder(
            tmp_path / name / "model",
            encoder,
            preprocess=Preprocess(size_px=32).to_dict(),
            mean=0.25,
            std=0.25,
            task=task,
            head=head,
            provenance={},
        )
        return tmp_path / name

    return make


def two_lungs(height: int = 90, width: int = 140) -> np.ndarray:
    """``(H, W)`` bool: a larger lung on the image's left and a smaller one on its right."""
    mask = np.zeros((height, width), bool)
    mask[20:75, 20:60] = True
    mask[20:75, 90:118] = True
    return mask


def radiograph(mask: np.ndarray, dtype=np.uint8, seed: int = 0) -> np.ndarray:
    """Grey 0 to a tenth of the range outside, the last tenth inside."""
    top = np.iinfo(dtype).max
    noise = np.random.default_rng(seed).random(mask.shape)
    return (top * (0.9 * mask + 0.1 * noise)).astype(dtype)


@pytest.fixture
def png(tmp_path: Path) -> Callable[..., Path]:
    """``png("a.png", mask)``: a radiograph of these lungs in ``in/``."""

    def make(name: str, mask: np.ndarray | None = None, dtype=np.uint8, **settings) -> Path:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = radiograph(two_lungs() if mask is None else mask, dtype)
        Image.fromarray(pixels).save(file, **settings)
        return file

    return make


@pytest.fixture
def compute() -> Compute:
    """Four images at a time, on the CPU, in full precision."""
    return COMPUTE


@pytest.fixture
def lungs() -> Callable[..., np.ndarray]:
    """`two_lungs`."""
    return two_lungs


@pytest.fixture
def grey() -> Callable[..., np.ndarray]:
    """`radiograph`."""
    return radiograph
