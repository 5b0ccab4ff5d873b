"""Tiny stores and a tiny encoder, so that whole recipes run in a second or two."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lung_runs import write_store

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.models.decoder import UNETRDecoder
from spcxr.models.heads import ClassificationHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes import segment

SIDE = 32
SPLITS = ("train", "train", "val", "test")


def draw_squares(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise with a bright square in half of the images: ``images, masks (n, S, S)``, ``there``."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (count, SIDE, SIDE)).astype(np.uint8)
    masks = np.zeros_like(images)
    there = np.arange(count) // len(SPLITS) % 2 == 0
    for i in np.flatnonzero(there):
        top, left = rng.integers(2, SIDE - 14, 2)
        images[i, top : top + 12, left : left + 12] = rng.integers(200, 255, (12, 12))
        masks[i, top : top + 12, left : left + 12] = 1
    return images, masks, there


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """``make_store(columns, masks=...)``: a store of bright squares, splits in turn.

    ``columns`` is a mapping of label columns (lists of text), or a function of ``there``.
    """

    def make(
        columns=None, *, masked=False, count=64, name="store", splits=None, prefix="p"
    ) -> Store:
        images, masks, there = draw_squares(count)
        labels = columns(there) if callable(columns) else dict(columns or {})
        text = {
            "path": [f"{i:03d}.png" for i in range(count)],
            "patient_id": [f"{prefix}{i:03d}" for i in range(count)],
            "split": splits or [SPLITS[i % len(SPLITS)] for i in range(count)],
            **labels,
        }
        if masked:
            text["mask_path"] = [f"m{i:03d}.png" for i in range(count)]
        writer = StoreWriter(tmp_path / name, Preprocess(size_px=SIDE))
        with writer:
            for image, mask in zip(images, masks, strict=True):
                writer.add(image, mask if masked else None)
            manifest = Manifest.from_columns(text, root=tmp_path)
            return writer.finish(manifest)

    return make


def untrained(folder: Path) -> Path:
    """A model folder of an untrained encoder: width 24, 4 blocks, patches of 8 in 32 px."""
    torch.manual_seed(0)
    return save_model_folder(
        folder,
        VisionTransformer(image_px=SIDE, patch_px=8, width=24, depth=4, heads=3),
        preprocess=Preprocess(size_px=SIDE).to_dict(),
        mean=0.25,
        std=0.25,
        task=None,
        head=None,
        provenance={},
    )


@pytest.fixture
def tiny_init(tmp_path: Path) -> Path:
    """`untrained`, in a folder of the test's."""
    return untrained(tmp_path / "init")


@pytest.fixture
def task_model(tmp_path: Path) -> Callable[..., Path]:
    """``task_model(name, labels, ...)``: a run whose model knows nothing; no labels: of masks."""

    def make(name, labels=(), *, multilabel=True, seed=0, preset="minmax") -> Path:
        torch.manual_seed(seed)
        encoder = VisionTransformer(image_px=SIDE, patch_px=8, width=24, depth=4, heads=3)
        task = {"kind": "classify", "labels": list(labels), "multilabel": multilabel}
        head = ClassificationHead(width=24, classes=max(len(labels), 1))
        torch.nn.init.normal_(head.fc.weight, std=0.5)
        if not labels:
            task = {"kind": "segment", "structures": ["square"], "base_channels": 4}
            head = UNETRDecoder(width=24, patch_px=8, out_channels=2, base_channels=4)
        save_model_folder(
            tmp_path / name / "model",
            encoder,
            preprocess=Preprocess(preset=preset, size_px=SIDE).to_dict(),
            mean=0.25,
            std=0.25,
            task=task,
            head=head,
            provenance={},
        )
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def trained_segmenter(tmp_path_factory):
    """A segment run that finds the bright squares, trained once."""
    folder = tmp_path_factory.mktemp("segmenter")
    settings = segment.SegmentConfig(
        data=str(write_store(folder / "store", [True] * 64).path),
        init=str(untrained(folder / "init")),
        out=str(folder / "segment"),
        epochs=6,
        batch_size=8,
        base_lr=3e-2,
        base_channels=4,
        device="cpu",
        precision="fp32",
    )
    return segment.run(settings)


@pytest.fixture
def segmenter(trained_segmenter, tmp_path):
    """A copy of the segment run, to be broken."""
    return shutil.copytree(trained_segmenter, tmp_path / "segment")
