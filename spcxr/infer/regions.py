"""Where a loaded model finds the lungs: by the segmenter in its folder, or by the data's masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spcxr.data.store import NO_MASK, Store
from spcxr.errors import SpcxrError
from spcxr.models.regions import resized

WITHIN = "lungs"  # the segmenter's place in a classifier's model folder
FINDER = "finder"  # the place of the one that finds the box, in a segmenter's


def lung_numbers(structures: Sequence[str]) -> tuple[int, ...]:
    """The class numbers that are lung, or a part of one.

    >>> lung_numbers(["left lung", "heart", "Right Lung"])
    (1, 3)
    """
    return tuple(k for k, name in enumerate(structures, 1) if "lung" in name.lower())


@dataclass(frozen=True)
class StoredLungs:
    """The masks that came with the data.

    >>> StoredLungs()
    StoredLungs(equalise=False)
    """

    equalise: bool = False

    def masks(self, grey: Tensor, rows: Any, store: Store) -> Tensor:
        """``[B, h, w]`` bool of the store's rows, at the size of ``grey [B, 1, h, w]``.

        Raises
        ------
        SpcxrError
            masks of other structures; a row without a mask: reading some images whole and others
            in part would tell the model which are which.
        """
        found = store.masks(rows) if store.has_masks else None
        bare = np.ones(len(rows), bool) if found is None else (found == NO_MASK).all((1, 2))
        if found is None or bare.any():
            row = int(np.asarray(rows)[bare][0])
            raise SpcxrError(
                f"{store.path}: row {row} has no mask, and the lungs are to be read by the masks; "
                "prepare a manifest with mask_path for every row, or train with --lungs-from a "
                "segment run"
            )
        numbers = lung_numbers(store.structures)
        if not numbers:
            raise SpcxrError(
                f"{store.path}: its masks show {', '.join(store.structures)}, not lungs; train "
                "with --lungs-from a segment run"
            )
        lungs = torch.from_numpy(np.isin(found, numbers)).to(grey.device)
        return resized(lungs, (grey.shape[2], grey.shape[3]))


def lungs_within(folder: Path, name: str = WITHIN) -> Path:
    """The segmenter's model folder, ``name``, in a model folder.

    Raises
    ------
    SpcxrError
        it is not there.
    """
    if not (folder / name / "config.json").is_file():
        raise SpcxrError(
            f"{folder}: reads by the lungs, but {name}/ (the model that finds them) is not "
            "there; copy the whole model folder"
        )
    return folder / name
