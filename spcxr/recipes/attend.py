"""``--attend lungs``: the classifier is given the patches that touch the lungs, and no others.

find the lungs of every row once -> warp them as the images are warped -> the patches they touch;
at the end the model that finds them goes into the model folder.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.infer.normalise import GREY, network_input
from spcxr.infer.predict import load_finder
from spcxr.infer.regions import WITHIN, StoredLungs
from spcxr.models.regions import LungSource, equalised, no_lungs, patches_touched, touching
from spcxr.models.weights import load_model_folder
from spcxr.recipes.finetune import Cohort, Start
from spcxr.recipes.images import refuse_other_preprocess
from spcxr.train.augment import Warps, warp_masks
from spcxr.train.device import Compute

Rows = NDArray[np.int64]
LUNGS = "lungs"
AT_ONCE = 256


@dataclass(frozen=True)
class KnownLungs:
    """The lungs of a run's rows, found once and kept at the encoder's size, a bit a pixel.

    ``rows (n,)`` in rising order, ``bits (n, ceil(h * w / 8))`` uint8, ``size`` (h, w) in pixels,
    ``segmenter`` the model folder that found them (None: the data's masks), ``equalise`` whether
    the greys of what is read are `equalised`.
    """

    rows: Rows
    bits: NDArray[np.uint8]
    size: tuple[int, int]
    patch_px: int
    segmenter: Path | None = None
    equalise: bool = False

    def masks(self, grey: Tensor, rows: Rows, store: Store | None = None) -> Tensor:
        """``[B, h, w]`` bool of unchanged images, on the device of ``grey``.

        Raises
        ------
        IndexError
            rows whose lungs were not looked for.
        """
        del store
        places = np.searchsorted(self.rows, rows).clip(max=len(self.rows) - 1)
        if not np.array_equal(self.rows[places], rows):
            raise IndexError(f"rows {rows}: lungs were looked for in {self.rows} alone")
        pixels = self.size[0] * self.size[1]
        found = np.unpackbits(self.bits[places], axis=1, count=pixels)
        return torch.from_numpy(found).view(-1, *self.size).bool().to(grey.device)

    def warped(self, images: Tensor, rows: Rows, warps: Warps) -> tuple[Tensor, Tensor]:
        """Images ``[B, C, h, w]`` that went through ``warps`` -> the images as they are read, and
        the patches to read, ``[B, Gh, Gw]`` bool."""
        masks = self.masks(images, rows).to(torch.uint8)
        visible = patches_touched(warp_masks(masks, warps, self.size[1]) == 1, self.patch_px)
        return equalised(images, visible, self.patch_px) if self.equalise else images, visible

    def shares(self, rows: Rows) -> NDArray[np.float64]:
        """``(n,)`` the share of each unchanged image's patches that is read; 1: no lung found."""
        shares, cpu = np.zeros(len(rows)), torch.empty(0)
        for first in range(0, len(rows), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            shares[part] = shares_of(patches_touched(self.masks(cpu, rows[part]), self.patch_px))
        return shares

    def without_lungs(self) -> int:
        """In how many of the unchanged images no lung was found."""
        count, cpu = 0, torch.empty(0)
        for first in range(0, len(self.rows), AT_ONCE):
            masks = self.masks(cpu, self.rows[first : first + AT_ONCE])
            count += int(no_lungs(touching(masks, self.patch_px)).sum())
        return count

    @cached_property
    def said(self) -> str:
        """What is read, in a line for the log."""
        greys = ", their greys equalised" if self.equalise else ""
        return f"reads the lungs' patches alone{greys}: {told_shares(self.shares(self.rows))}"

    @property
    def block(self) -> dict[str, Any]:
        """What `load_trained` has to know of it."""
        source = "masks" if self.segmenter is None else "model"
        return {"attend": LUNGS, "lungs_from": source, "equalise": self.equalise}

    def export(self, folder: Path) -> None:
        """Put the segmenter, if there is one, into the model folder."""
        if self.segmenter is not None:
            shutil.copytree(self.segmenter, folder / WITHIN, dirs_exist_ok=True)


def shares_of(visible: Tensor) -> NDArray[np.float64]:
    """Patches read ``[B, Gh, Gw]`` bool -> their share of each image, ``(B,)``.

    >>> shares_of(torch.tensor([[[True, False]]])).tolist()
    [0.5]
    """
    found: NDArray[np.float64] = visible.flatten(1).double().mean(1).cpu().numpy()
    return found


def told_shares(shares: NDArray[np.float64]) -> str:
    """How much of the images ``(n,)`` is read, and of how many no lung was found, in a line.

    >>> told_shares(np.array([0.4, 0.5, 1.0, 0.3]))
    '40 % of an image; NO LUNG FOUND in 1 of 4 images, which are read whole'
    >>> told_shares(np.array([0.4, 0.5]))
    '45 % of an image; lungs found in all 2'
    """
    whole = shares >= 1.0
    part = f"{100 * shares[~whole].mean():.0f} % of an image" if (~whole).any() else "nothing"
    if whole.any():
        return (
            f"{part}; NO LUNG FOUND in {whole.sum()} of {len(shares)} images, which are read whole"
        )
    return f"{part}; lungs found in all {len(shares)}"


@dataclass
class SharesRead:
    """Listens to the prediction loop (`predict_classes`, ``told``): how much of each image is read.

    >>> heard = SharesRead()
    >>> heard(np.array([3]), torch.ones(1, 2, 2, dtype=torch.bool)); heard.shares.tolist()
    [1.0]
    """

    heard: list[NDArray[np.float64]] = field(default_factory=list)

    def __call__(self, rows: Rows, visible: Tensor) -> None:
        """The patches ``[B, Gh, Gw]`` that were read of ``rows``."""
        del rows
        self.heard.append(shares_of(visible))

    @property
    def shares(self) -> NDArray[np.float64] | None:
        """``(n,)`` in the order of the predictions; None where whole images are read."""
        return np.concatenate(self.heard) if self.heard else None


# --- finding them ---------------------------------------------------------------------------


def find_lungs(
    start: Start,
    cohort: Cohort,
    compute: Compute,
    lungs_from: str | None,
    *,
    equalise: bool = False,
) -> KnownLungs:
    """The lungs of all rows of a cohort: by the segment run ``lungs_from``, or by the masks.
    ``equalise`` is kept with them.

    Raises
    ------
    SpcxrError
        a run that does not segment lungs, one that learned from images prepared otherwise, rows
        without masks, or no lungs in more than half of the images.
    """
    store, folder = start.store, None
    source: LungSource = StoredLungs()
    if lungs_from is not None:
        loaded = load_model_folder(lungs_from)
        folder = loaded.folder
        source = load_finder(folder, compute.device)
        refuse_other_preprocess(store, loaded.config["preprocess"], lungs_from)
    elif not store.has_masks:
        raise SpcxrError(
            f"{store.path}: no row has a mask to find the lungs by; give --lungs-from a segment "
            "run, or prepare a manifest with mask_path"
        )
    rows = np.unique(np.concatenate([cohort.train, cohort.val, cohort.test]))
    bits = _look(source, store, rows, start.encoder.image_px, compute)
    size, patch_px = start.encoder.image_px, start.encoder.patch_px
    known = KnownLungs(rows, bits, size, patch_px, folder, equalise)
    print(known.said, file=sys.stderr)
    if (none := known.without_lungs()) > len(rows) / 2:
        # Most would be read whole, text and borders and all, and the model called one of lungs.
        raise SpcxrError(
            f"{lungs_from or store.path}: no lungs in {none} of {len(rows)} images; look at its "
            "masks, and give --lungs-from a segment run that finds lungs in images like these"
        )
    return known


@torch.inference_mode()
def _look(
    source: LungSource, store: Store, rows: Rows, size: tuple[int, int], compute: Compute
) -> NDArray[np.uint8]:
    """Masks of ``rows`` at ``size``, packed, ``(n, ceil(h * w / 8))`` uint8."""
    found = np.empty((len(rows), -(-size[0] * size[1] // 8)), np.uint8)
    pace = 0.2 if sys.stderr.isatty() else 10.0
    with tqdm(total=len(rows), desc="lungs", unit="image", mininterval=pace) as bar:
        for first in range(0, len(rows), compute.batch_size):
            batch = rows[first : first + compute.batch_size]
            grey = network_input(store.images(batch), size, GREY, compute.device)
            with compute.autocast():
                masks = source.masks(grey, batch, store)
            flat = masks.flatten(1).cpu().numpy()
            found[first : first + len(batch)] = np.packbits(flat, axis=1)
            bar.update(len(batch))
    return found
