"""Shenzhen tuberculosis set (Jaeger et al., QIMS 2014; NLM), with the lung masks made for it later.

The masks (Stirenko et al., 2018) come apart from the images, for 566 of the 662.
"""

from __future__ import annotations

import re
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import by_stem, walk
from spcxr.errors import SpcxrError

NAME = re.compile(r"CHNCXR_\d+_[01]")
MASK = re.compile(r"CHNCXR_\d+_[01]_mask")


def matches(root: Path) -> bool:
    """Whether the folder holds the set's images."""
    folder = root / "CXR_png"
    return folder.is_dir() and next(folder.glob("CHNCXR_*.png"), None) is not None


def index(root: Path) -> Manifest:
    """``CXR_png/CHNCXR_0001_0.png``; masks ``CHNCXR_0001_0_mask.png`` in any folder.

    The name's last digit is the label ``tuberculosis``; age and sex come from ``ClinicalReadings``
    where present. Every image is a patient.
    """
    files = walk(root)
    images = by_stem([f for f in files if f.startswith("CXR_png/")], root)
    images = {stem: file for stem, file in images.items() if NAME.fullmatch(stem)}
    if not images:
        raise SpcxrError(f"{root}: no CXR_png/CHNCXR_*.png; give the folder ChinaSet_AllFiles")
    drawn = [f for f in files if MASK.fullmatch(Path(f).stem)]
    masks = {s.removesuffix("_mask"): file for s, file in by_stem(drawn, root).items()}
    readings = [_reading(root / "ClinicalReadings" / f"{stem}.txt") for stem in images]
    columns = {
        "path": list(images.values()),
        "patient_id": [f"shenzhen-{stem.split('_')[1]}" for stem in images],
        "view": ["PA"] * len(images),
        "site": ["shenzhen"] * len(images),
        "age": [age for age, _ in readings],
        "sex": [sex for _, sex in readings],
        "mask_path": [masks.get(stem, "") for stem in images],
        "tuberculosis": [stem[-1] for stem in images],
    }
    return Manifest.from_columns(columns, root=root, labels=("tuberculosis",), name=str(root))


def _reading(file: Path) -> tuple[str, str]:
    """(age in years, sex) of one reading: ``male 45yrs`` or ``Female, 30 yrs``, line one."""
    text = file.read_text(errors="replace").lower() if file.is_file() else ""
    age, sex = re.search(r"(\d+)\s*y", text), re.search(r"\b(female|male)", text)
    return (age[1] if age else ""), (sex[1][0].upper() if sex else "")
