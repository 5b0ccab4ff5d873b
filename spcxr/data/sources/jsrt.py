"""JSRT (Shiraishi et al., AJR 2000): 247 films with and without a nodule; SCR's lung masks.

The masks (van Ginneken et al., Med Image Anal 2006) come apart from the images, at half their size.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.made import FOLDER, make_once, png
from spcxr.data.sources.set_tables import PICTURES, sex_of
from spcxr.errors import SpcxrError

NAME = re.compile(r"JPC(L|N)N\d{3}")
FOLDERS = ("", "All247images", "Nodule154images", "NonNodule93images")
RAW = "JPC[LN]N*.[iI][mM][gG]"
MASKS = re.compile(r"(^|/)(left|right)[ _]lung/JPC[LN]N\d{3}\.(gif|png)$")
CLINICAL = ("CLNDAT_EN.txt", "CNNDAT_EN.TXT")
SIDE, WHITE = 2048, 4095  # of a raw film: 12 bits in 16, big-endian, no header, 0 = white
LABELS = ("nodule", "malignant")


def matches(root: Path) -> bool:
    """Whether raw films stand where the set's archives put them.

    Films saved otherwise are read as well, but not known by themselves: ``--source jsrt``.
    """
    films = (file for folder in FOLDERS for file in (root / folder).glob(RAW))
    return next(films, None) is not None


def index(root: Path) -> Manifest:
    """``JPCLN001.IMG`` (nodule) and ``JPCNN001.IMG`` (none), or the same names as PNG or DICOM.

    Raw films are written as 16-bit PNG, bright bone, into ``spcxr-made`` below the set's folder,
    once; so are lung masks of another size than their film. ``malignant`` (unknown where the
    clinical table is not there), age and sex come from ``CLNDAT_EN.txt`` and ``CNNDAT_EN.TXT``.
    Every film is a patient.
    """
    files = [file for file in walk(root) if not file.startswith(f"{FOLDER}/")]
    drawn: dict[str, list[str]] = {}
    films: dict[str, str] = {}
    for file in files:
        stem, suffix = Path(file).stem, Path(file).suffix.lower()
        if MASKS.search(file):
            drawn.setdefault(stem, []).append(file)
        elif not NAME.fullmatch(stem) or "masks/" in file:
            continue  # of another organ, or no film
        elif suffix == ".img" or (suffix in PICTURES and stem not in films):
            films[stem] = file
    if not films:
        raise SpcxrError(f"{root}: no JPCLN001.IMG or the like; give the folder of the films")
    told = _clinical(root, files)
    stems = sorted(films)
    facts = [told.get(stem, {}) for stem in stems]
    columns = {
        "path": [_film(root, films[stem]) for stem in stems],
        "patient_id": [f"jsrt-{stem}" for stem in stems],
        "view": ["PA"] * len(stems),
        "site": ["jsrt"] * len(stems),
        "age": [fact.get("age", "") for fact in facts],
        "sex": [fact.get("sex", "") for fact in facts],
        "mask_path": [_mask(root, films[stem], drawn.get(stem, [])) for stem in stems],
        "nodule": [str(int(stem[3] == "L")) for stem in stems],
        "malignant": [
            "0" if stem[3] == "N" else fact.get("malignant", "")
            for stem, fact in zip(stems, facts, strict=True)
        ],
    }
    return Manifest.from_columns(columns, root=root, labels=LABELS, name=str(root))


def _film(root: Path, file: str) -> str:
    """The path of a film that `prepare` can read."""
    if not file.lower().endswith(".img"):
        return file
    return make_once(root, f"{Path(file).stem}.png", lambda: png(raw_film(root / file)))


def raw_film(file: Path) -> np.ndarray:
    """``(2048, 2048)`` uint16 of a raw film: air dark, the 12 bits spread over 16.

    Raises
    ------
    SpcxrError
        it has another length, or more than 12 bits.
    """
    raw = np.fromfile(file, ">u2")
    if raw.size != SIDE * SIDE or raw.max() > WHITE:
        raise SpcxrError(
            f"{file}: not {SIDE} x {SIDE} pixels of 12 bits in 16, as the set's films are; "
            "get it anew, or move it away"
        )
    bright = WHITE - raw.astype(np.uint16).reshape(SIDE, SIDE)
    return (bright << 4) | (bright >> 8)


def _mask(root: Path, film: str, drawn: list[str]) -> str:
    """The lungs' masks, joined; enlarged where the film is a multiple of their size."""
    if not drawn:
        return ""
    if len(drawn) != 2:
        raise SpcxrError(f"{root}: {Path(film).stem} has {len(drawn)} lung masks; add both lungs")
    size = (SIDE, SIDE) if film.lower().endswith(".img") else _size(root / film)
    if size is None or size == _size(root / drawn[0]):
        return "|".join(drawn)

    def make() -> bytes:
        left, right = (_inside(root / file) for file in drawn)
        both = Image.fromarray(np.where(left | right, 255, 0).astype(np.uint8))
        return png(np.asarray(both.resize(size, Image.Resampling.NEAREST)))

    return make_once(root, f"lungs-{Path(film).stem}-{size[0]}x{size[1]}.png", make)


def _inside(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("L")) > 0


def _size(file: Path) -> tuple[int, int] | None:
    """Width and height, or None of what is no picture (a DICOM): `prepare` looks then."""
    try:
        with Image.open(file) as image:
            return image.size
    except (UnidentifiedImageError, OSError):
        return None


def _clinical(root: Path, files: list[str]) -> dict[str, dict[str, str]]:
    """Age, sex and malignancy by film, of the clinical tables wherever they are below the root."""
    told: dict[str, dict[str, str]] = {}
    named = {name.lower() for name in CLINICAL}
    for file in files:
        if Path(file).name.lower() in named:
            for line in (root / file).read_text(errors="replace").splitlines():
                told |= _facts(line)
    return told


def _facts(line: str) -> dict[str, dict[str, str]]:
    """A line's film and what it says; cells are parted by tabs in one table, spaces in the other.

    >>> _facts("JPCLN001.IMG\\t5\\t15\\t53\\tmale\\t1634\\t692\\tmalignant\\tl.upper lobe")
    {'JPCLN001': {'age': '53', 'sex': 'M', 'malignant': '1'}}
    >>> _facts("JPCNN001.IMG  55  female  non-nodule")
    {'JPCNN001': {'age': '55', 'sex': 'F'}}
    """
    words = line.split()
    at = next((i for i, word in enumerate(words) if word.lower() in {"male", "female"}), 0)
    if at < 2 or not NAME.fullmatch(stem := words[0].partition(".")[0]):
        return {}
    age = words[at - 1] if words[at - 1].isdecimal() else ""
    said = {"malignant": "1", "benign": "0"}
    found = next((said[word.lower()] for word in words if word.lower() in said), None)
    made = {"age": age, "sex": sex_of(words[at])}
    return {stem: made if found is None else made | {"malignant": found}}
