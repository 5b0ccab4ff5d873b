"""Drawn chest radiographs as DICOM files: phantoms that look like chests and belong to nobody.

Everything from reading a file to a report can be shown and tested on them. They are drawings: no
number measured on them says anything about patients.
"""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from spcxr.data.phantom_detector import SITES
from spcxr.data.phantom_dicom import NOTICE, SYNTAXES, save, to_dataset
from spcxr.data.phantom_disease import LABELS
from spcxr.data.phantom_draw import Phantom, check_choice, draw, patient_of
from spcxr.data.phantom_marker import choose_marker
from spcxr.errors import SpcxrError

__all__ = ["LABELS", "NOTICE", "SITES", "Phantom", "Series", "draw", "patient_of", "plan", "write"]

COLUMNS = ("path", "patient_id", "split", "view", "site", "age", "sex", "mask_path", "label")
SPLITS = {"train": 0.6, "val": 0.15, "test": 0.25}
README = """{notice}

The files here are phantoms: chests drawn by spcxr.data.phantom (seed {seed}, {count} images, {size}
pixels across). No patient, no hospital, no diagnosis stands behind them. They exist to show and
test software. Nothing measured on them says anything about people.

dicom/        one DICOM file an image: site-a DX, MONOCHROME2; site-b CR, MONOCHROME1
masks/        the lungs without heart and mediastinum: PNG, 0 and 255, the image's own size
manifest.csv  {columns}
"""


@dataclass(frozen=True)
class Series:
    """What is to be drawn.

    Labels come in equal shares. About ``drift_ratio`` of the patients come from site-b and stand in
    split ``drift``; those of site-a are split by patient into ``train``, ``val`` and ``test`` (60,
    15, 25 %). About ``child_ratio`` are children. ``severity``: the lowest and the highest that a
    disease may have, from 0 (hardly seen) to 1 (plain). ``compression``: ``none``, ``deflated``,
    ``rle`` or ``jpeg2000``. ``shortcut``: with what probability a sick chest of site-a, and one of
    site-b, has a text burned into a corner; a normal one has it with 1 less that. At .95 the text
    nearly tells the label, at .5 nothing, at .05 the opposite (`phantom_marker`). None: no text.

    Raises
    ------
    SpcxrError
        A count below 1, an unknown compression, or a probability outside [0, 1].

    >>> Series(count=0)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: count 0: ask for 1 phantom or more
    """

    count: int = 240
    seed: int = 0
    size_px: int = 512
    drift_ratio: float = 0.25
    child_ratio: float = 0.25
    severity: tuple[float, float] = (0.0, 1.0)
    compression: str = "none"
    shortcut: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_choice("compression", self.compression, tuple(SYNTAXES))
        if self.count < 1:
            raise SpcxrError(f"count {self.count}: ask for 1 phantom or more")
        if self.shortcut is not None and not all(0 <= p <= 1 for p in self.shortcut):
            raise SpcxrError(f"shortcut {self.shortcut}: choose probabilities from 0 to 1")


def write(folder: str | Path, series: Series, *, workers: int = 0) -> Path:
    """Write phantoms below a folder that is new or empty; return its ``manifest.csv``.

    ``dicom/phantom-00000.dcm ...``, ``masks/phantom-00000.png ...``, ``manifest.csv`` (columns
    ``path, patient_id, split, view, site, age, sex, mask_path, label``) and ``README.txt``.
    ``workers``: processes that draw, 0 for none beside this one; the files are the same.
    ``manifest.csv`` is written last, so a folder with one is whole.

    Raises
    ------
    SpcxrError
        A folder that holds something, or a size, ratio or severity out of range.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise SpcxrError(f"{folder}: not empty; choose a new folder for the phantoms")
    for room in ("dicom", "masks"):
        (folder / room).mkdir(parents=True, exist_ok=True)
    drawn = _rows(folder, series, workers)
    rows = list(tqdm(drawn, "phantoms", series.count, unit="image", mininterval=1.0))
    facts = {"seed": series.seed, "count": series.count, "size": series.size_px}
    text = README.format(notice=NOTICE, columns=", ".join(COLUMNS), **facts)
    (folder / "README.txt").write_text(text)
    manifest = folder / "manifest.csv"
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return manifest


def _rows(folder: Path, series: Series, workers: int) -> Iterator[tuple[str, ...]]:
    """Write every image, in this process or in others, and give the manifest's rows in order."""
    work = partial(_write_one, folder, series)
    if workers == 0:
        yield from map(work, range(series.count))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(work, range(series.count), chunksize=4)


def _write_one(folder: Path, series: Series, index: int) -> tuple[str, ...]:
    """Draw and save one image and its mask; its row of the manifest."""
    site, split, label, child = plan(index, series.drift_ratio, series.child_ratio)
    phantom = draw(
        index,
        seed=series.seed,
        site=site,
        label=label,
        child=child,
        size_px=series.size_px,
        severity=series.severity,
        marker=_marker(index, series, site, label),
    )
    path, mask = f"dicom/phantom-{index:05d}.dcm", f"masks/phantom-{index:05d}.png"
    save(to_dataset(phantom, str(index)), folder / path, series.compression)
    Image.fromarray(phantom.lung_mask.astype(np.uint8) * 255).save(folder / mask)
    person = (phantom.view, site, f"{phantom.age:.0f}", phantom.sex)
    return (path, phantom.patient_id, split, *person, mask, label)


def _marker(index: int, series: Series, site: str, label: str) -> str:
    """The text burned into image ``index``, by its site's habit; blank: none."""
    if series.shortcut is None:
        return ""
    sick = series.shortcut[tuple(SITES).index(site)]
    return choose_marker(series.seed, index, sick if label != LABELS[0] else 1 - sick)


def plan(
    index: int, drift_ratio: float = 0.25, child_ratio: float = 0.25
) -> tuple[str, str, str, bool]:
    """(site, split, label, child) of image ``index`` of a written series, by its patient's number.

    Three patients in a row, one of each label, share site, split and age group, so that no label
    can be told from those. Shares are met by low-discrepancy sequences, in small series as well.

    Raises
    ------
    SpcxrError
        A ratio outside [0, 1].

    >>> [plan(index)[2] for index in range(4)]
    ['normal', 'pneumonia', 'covid', 'covid']
    >>> plan(0)
    ('site-a', 'train', 'normal', False)
    """
    for name, ratio in (("drift_ratio", drift_ratio), ("child_ratio", child_ratio)):
        if not 0 <= ratio <= 1:
            raise SpcxrError(f"{name} {ratio}: choose a share from 0 to 1")
    group, place = divmod(patient_of(index)[0], len(LABELS))
    # Two additive recurrences (golden ratio, plastic number): even shares from the first rows on.
    share, youth = group * 0.6180339887 % 1, (0.9 + group * 0.7548776662) % 1
    label = LABELS[(place + group) % len(LABELS)]
    bounds = np.cumsum([ratio * (1 - drift_ratio) for ratio in SPLITS.values()])
    split = (*SPLITS, "drift")[int(np.searchsorted(bounds, share, side="right"))]
    return "site-b" if split == "drift" else "site-a", split, label, youth < child_ratio
