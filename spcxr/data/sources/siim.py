"""SIIM-ACR Pneumothorax Segmentation (Kaggle 2019): DICOM files, masks as run lengths."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.made import FOLDER, make_once, png
from spcxr.data.sources.set_tables import header_of, here_of, need, pictures_by_stem
from spcxr.data.tables import read_table
from spcxr.errors import SpcxrError

TABLES = ("stage_2_train.csv", "train-rle.csv")  # the later stage first: it has more images
SIDE = 1024  # of every image and mask of the set
NONE = "-1"
LABEL = "pneumothorax"


def matches(root: Path) -> bool:
    """Whether the folder holds the set's table of run lengths."""
    wanted = {"ImageId", "EncodedPixels"}
    return any(wanted <= set(header_of(root / name)) for name in TABLES)


def index(root: Path) -> Manifest:
    """One row an image: label ``pneumothorax``, and its mask where there is one.

    Several masks of one image are united; ``-1`` is an empty mask. They are written as PNG into
    ``spcxr-made`` below the set's folder, once. Patient, age, sex and view come from the DICOM
    headers.
    """
    table = next((root / name for name in TABLES if (root / name).is_file()), None)
    if table is None:
        raise SpcxrError(f"{root}: no {' or '.join(TABLES)}; put the set's table at its top")
    rows = read_table(table)
    need(rows, ("ImageId", "EncodedPixels"), table)
    runs: dict[str, list[str]] = {}
    for row, (image, cell) in enumerate(zip(rows["ImageId"], rows["EncodedPixels"], strict=True)):
        runs.setdefault(image, [])
        if cell != NONE:
            decode(cell, f"{table}: row {row + 2}")  # refused here, where the row is known
            runs[image].append(cell)
    files = [file for file in walk(root) if not file.startswith(f"{FOLDER}/")]
    on_disk = pictures_by_stem(files)
    images = list(runs)
    here, notes = here_of(images, on_disk, "siim", table)
    kept = [images[row] for row in here]
    columns = {
        "path": [on_disk[image] for image in kept],
        "site": ["siim"] * len(kept),
        "mask_path": [_mask(root, runs[image]) for image in kept],
        LABEL: [str(int(bool(runs[image]))) for image in kept],
    }
    return Manifest.from_columns(columns, root=root, labels=(LABEL,), name=str(table), notes=notes)


def decode(cell: str, where: str = "EncodedPixels", side: int = SIDE) -> np.ndarray:
    """Run lengths of the competition -> ``(side, side)`` uint8 of 1 and 0; ``-1`` is empty.

    Pairs "skip length": ``skip`` pixels from the end of the last run (not from the start of the
    image), then ``length`` pixels of the mask; pixels are counted down the columns.

    Raises
    ------
    SpcxrError
        no such pairs, or runs that end beyond the image.

    >>> decode("1 2 1 1", side=3).tolist()
    [[0, 0, 0], [1, 1, 0], [1, 0, 0]]
    """
    flat = np.zeros(side * side, np.uint8)
    if cell == NONE:
        return flat.reshape(side, side)
    parts = cell.split()
    if not parts or len(parts) % 2 or not all(part.isdecimal() for part in parts):
        raise SpcxrError(f"{where}: column 'EncodedPixels' holds no pairs of numbers and no -1")
    at = 0
    for skip, length in zip(map(int, parts[::2]), map(int, parts[1::2]), strict=True):
        flat[at + skip : at + skip + length] = 1
        at += skip + length
    if at > flat.size:
        raise SpcxrError(
            f"{where}: column 'EncodedPixels' runs to pixel {at} of {side} x {side}; "
            "runs are counted from the end of the last one"
        )
    return flat.reshape(side, side).T


def _mask(root: Path, cells: list[str]) -> str:
    """The path of the union of an image's masks; its name is of the runs, not of the patient."""
    digest = hashlib.blake2b("\n".join(cells).encode(), digest_size=12).hexdigest()

    def make() -> bytes:
        masks = [decode(cell) for cell in cells] or [decode(NONE)]
        return png(255 * np.maximum.reduce(masks))

    return make_once(root, f"mask-{digest if cells else 'empty'}.png", make)
