"""Montgomery County tuberculosis set (Jaeger et al., QIMS 2014; NLM), left and right lungs."""

from __future__ import annotations

import re
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import by_stem, walk
from spcxr.errors import SpcxrError

NAME = re.compile(r"MCUCXR_\d+_[01]")


def matches(root: Path) -> bool:
    """Whether the folder holds the set's images and its two mask folders."""
    return (root / "CXR_png").is_dir() and (root / "ManualMask").is_dir()


def index(root: Path) -> Manifest:
    """``CXR_png/MCUCXR_0001_0.png`` with ``ManualMask/{left,right}Mask`` of the same name.

    The two lungs are merged into one mask (``left|right`` in ``mask_path``). The name's last digit
    is the label ``tuberculosis``; age and sex come from ``ClinicalReadings`` where present. Every
    image is a patient.
    """
    images = by_stem([f for f in walk(root) if f.startswith("CXR_png/")], root)
    images = {stem: file for stem, file in images.items() if NAME.fullmatch(stem)}
    if not images:
        raise SpcxrError(f"{root}: no CXR_png/MCUCXR_*.png; give the folder MontgomerySet")
    sides = [
        by_stem([f for f in walk(root) if f.startswith(f"ManualMask/{side}/")], root)
        for side in ("leftMask", "rightMask")
    ]
    for stem in images:
        if (stem in sides[0]) != (stem in sides[1]):
            raise SpcxrError(f"{root}: {stem} has the mask of one lung only; add the other")
    readings = [_reading(root / "ClinicalReadings" / f"{stem}.txt") for stem in images]
    columns = {
        "path": list(images.values()),
        "patient_id": [f"montgomery-{stem.split('_')[1]}" for stem in images],
        "view": ["PA"] * len(images),
        "site": ["montgomery"] * len(images),
        "age": [age for age, _ in readings],
        "sex": [sex for _, sex in readings],
        "mask_path": ["|".join(s[stem] for s in sides if stem in s) for stem in images],
        "tuberculosis": [stem[-1] for stem in images],
    }
    return Manifest.from_columns(columns, root=root, labels=("tuberculosis",), name=str(root))


def _reading(file: Path) -> tuple[str, str]:
    """(age in years, sex) of one reading: ``Patient's Sex: F`` and ``Patient's Age: 027Y``."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    age, sex = re.search(r"Age:\s*(\d+)Y", text), re.search(r"Sex:\s*([MF])", text)
    return (str(int(age[1])) if age else ""), (sex[1] if sex else "")
