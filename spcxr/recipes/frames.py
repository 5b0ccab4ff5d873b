"""Which part of each image a segmenter is shown in training: a window, or the lungs' box."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.infer.normalise import GREY, network_input
from spcxr.infer.predict import load_finder
from spcxr.models.decoder import Segmenter
from spcxr.models.framing import LungBox, Windows, into
from spcxr.models.weights import load_model_folder
from spcxr.recipes.images import refuse_other_preprocess
from spcxr.train.augment import Augmentation, Warps
from spcxr.train.device import Compute

if TYPE_CHECKING:
    from spcxr.recipes.fitting import Course

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Frames:
    """The parts, as the warps of augmentation cut them out of whole images.

    ``image_px`` (height, width) is the size at which images are read. ``share`` is a window's side
    over the image's. ``boxes [n, 3]`` are those of ``rows (n,)``, in rising order.

    >>> half = Frames((64, 64), share=0.5).law(Augmentation())
    >>> [round(x, 3) for x in half.crop_scale]
    [0.175, 0.25]
    """

    image_px: tuple[int, int]
    share: float = 1.0
    rows: Rows | None = None
    boxes: Tensor | None = None

    def law(self, law: Augmentation) -> Augmentation:
        """How far images are changed: a window is a crop that anywhere in the image will do."""
        low, high = (scale * self.share**2 for scale in law.crop_scale)
        return replace(law, crop_scale=(low, high))

    def placed(self, warps: Warps, rows: Rows) -> Warps:
        """Warps of ``rows`` within their boxes: first what they do, then where the box lies."""
        if self.boxes is None or self.rows is None:
            return warps
        outer = into(self.boxes[torch.from_numpy(np.searchsorted(self.rows, rows))])
        theta = outer[:, :, :2] @ warps.theta
        theta[:, :, 2] += outer[:, :, 2]
        return replace(warps, theta=theta)


def in_windows(side: int, course: Course, model: Segmenter) -> tuple[Course, dict[str, Any]]:
    """Have the model look at windows of images of ``side``; what its ``task`` says of it.

    Raises
    ------
    SpcxrError
        the images are smaller than a window.
    """
    window, store = model.encoder.image_px, course.start.store
    if side < window[1]:
        raise SpcxrError(
            f"{store.path}: images of {side} px are smaller than --window-px {window[1]}; "
            "prepare larger ones, or leave it out"
        )
    model.framing = Windows((side, side), window)
    frames = Frames((side, side), share=window[1] / side)
    return replace(course, frames=frames), {"window_px": window[1], "image_px": side}


def in_lung_box(folder: Path, course: Course, model: Segmenter) -> tuple[Course, dict[str, Any]]:
    """Have the model look at the lungs' box alone, found by the segment model in ``folder``; what
    its ``task`` says of it.

    Images are read at the size at which the median box is as large as the encoder's input (ours),
    and no larger than they are stored.

    Raises
    ------
    SpcxrError
        a model that does not segment lungs, or that learned from images prepared otherwise.
    """
    start, compute = course.start, course.compute
    store, own, numbers = start.store, start.encoder.image_px, start.normalisation
    finder = load_finder(folder, compute.device)
    refuse_other_preprocess(store, load_model_folder(folder).config["preprocess"], str(folder))
    framing = LungBox(finder, numbers.mean, numbers.std, own, own)
    rows = np.unique(course.rows)
    boxes, missed = find_boxes(framing, store, rows, compute)
    side = round(own[1] / float(boxes[:, 2].median()))
    side = max(own[1], min(side, store.preprocess.size_px))
    model.framing = replace(framing, image_px=(side, side))
    lost = f"; NO LUNG FOUND in {missed}, which are read whole" if missed else ""
    print(f"lungs' boxes of {len(rows)} training images, read at {side} px{lost}", file=sys.stderr)
    frames = Frames((side, side), rows=rows, boxes=boxes)
    return replace(course, frames=frames), {"crop": "lungs", "image_px": side}


@torch.inference_mode()
def find_boxes(framing: LungBox, store: Store, rows: Rows, compute: Compute) -> tuple[Tensor, int]:
    """The lungs' boxes ``[n, 3]`` in unchanged images of ``rows``; in how many none was found."""
    made, missed = [], 0
    pace = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(rows), desc="lungs", unit="image", mininterval=pace) as bar:
        for first in range(0, len(rows), compute.batch_size):
            batch = rows[first : first + compute.batch_size]
            size = framing.finder.segmenter.image_px
            grey = network_input(store.images(batch), size, GREY, compute.device)
            with compute.autocast():
                boxes, found = framing.find(grey)
            made.append(boxes.cpu())
            missed += int((~found).sum())
            bar.update(len(batch))
    return torch.cat(made), missed
