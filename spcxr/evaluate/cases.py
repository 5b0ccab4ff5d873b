"""The cases to look at: called best and called worst, with what the encoder looked at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spcxr.errors import SpcxrError
from spcxr.evaluate.overlays import BACKGROUND, BICUBIC, DRAWN_PX, WORDS, grey8, sheet
from spcxr.evaluate.report import Picture

Array = NDArray[Any]

# Blue to yellow, made to look alike with any colour vision (Nunez et al., PLoS ONE 2018).
HEAT = colormaps["cividis"]
STRONGEST = 0.65  # how much of the image the colour of the most attention covers
BAR_PX = (280, 44)
KINDS = {
    "best": "with it, scored highest",
    "missed": "with it, scored lowest",
    "alarm": "without it, scored highest",
}


@dataclass(frozen=True)
class Case:
    """One image picked for one label.

    ``label`` and ``row`` are places in what was given to `pick_cases`; ``kind`` is a key of
    `KINDS`; ``truth`` is 1 or 0, ``score`` the probability.
    """

    label: int
    kind: str
    row: int
    truth: int
    score: float


def pick_cases(labels: Array, scores: Array, patients: Array, n: int = 1) -> list[Case]:
    """For each label the ``n`` images with it scored highest and lowest, and those without it
    scored highest: what the model is surest of, what it misses, its false alarms.

    A patient stands once in a label's cases. Of equal scores the earlier row is taken. A label
    without a known row has none.

    Parameters
    ----------
    labels
        ``(n, K)`` 1, 0, NaN = unknown.
    scores
        ``(n, K)`` probabilities.
    patients
        ``(n,)`` pseudonyms.

    Raises
    ------
    SpcxrError
        sizes that do not fit, or a score that is no number.

    >>> labels = np.array([[1.0], [1.0], [0.0], [1.0], [np.nan]])
    >>> scores = np.array([[0.9], [0.2], [0.6], [0.8], [1.0]])
    >>> [(c.kind, c.row) for c in pick_cases(labels, scores, np.array(["a", "b", "c", "a", "d"]))]
    [('best', 0), ('missed', 1), ('alarm', 2)]
    """
    if labels.shape != scores.shape or len(patients) != len(labels):
        raise SpcxrError(
            f"labels {labels.shape}, scores {scores.shape}, patients {np.shape(patients)}: one row "
            "an image each, one column a label"
        )
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(1))[0])
        raise SpcxrError(f"row {row}: a score is not finite; predict it again with fp32")
    made = []
    for k in range(labels.shape[1]):
        truth, score, seen = labels[:, k], scores[:, k], set[Any]()
        for kind, value, sign in (("best", 1, -1), ("missed", 1, 1), ("alarm", 0, -1)):
            rows = np.flatnonzero(truth == value)
            taken = 0
            for row in rows[np.argsort(sign * score[rows], kind="stable")].tolist():
                if taken < n and patients[row] not in seen:
                    seen.add(patients[row])
                    made.append(Case(k, kind, row, value, float(score[row])))
                    taken += 1
    return made


def heat_overlay(image: Array, heat: Array) -> NDArray[np.uint8]:
    """Attention over a radiograph: yellow where most is, the plain image where no more is than an
    even share, or none.

    Ours: the scale runs from the even share (the mean of the patches that are read) to the largest
    of this image, since in rollout every patch has some; `times_even` says how far that is.

    Parameters
    ----------
    image
        ``(H, W)`` uint8 or uint16.
    heat
        ``(Gh, Gw)`` of the patch grid, resampled bilinearly to the image; 0 or NaN = not read.

    Returns
    -------
    ``(k H, k W, 3)`` uint8, enlarged as by `overlays.overlay`.

    >>> drawn = heat_overlay(np.zeros((4, 4), np.uint8), np.array([[0.1, 0.2]]))
    >>> drawn.shape, drawn[0, 0].tolist(), drawn[0, -1].tolist()
    ((224, 224, 3), [0, 0, 0], [165, 151, 36])
    """
    height, width = image.shape
    times = -(-DRAWN_PX // min(image.shape))
    size = (times * width, times * height)
    share = above_even(heat)
    wide = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR))[..., None]
    plain = np.asarray(Image.fromarray(grey8(image)).resize(size, BICUBIC).convert("RGB"))
    cover = STRONGEST * wide
    colour = 255 * HEAT(wide[..., 0])[..., :3]
    return ((1 - cover) * plain + cover * colour).round().astype(np.uint8)


def above_even(heat: Array) -> NDArray[np.float32]:
    """Attention ``(Gh, Gw)`` from 0, an even share or less, to 1, the largest of this image.

    >>> above_even(np.array([[0.0, 0.1], [0.1, 0.4]])).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    known = np.nan_to_num(heat, nan=0.0)
    even = _even(known)
    above = max(float(known.max()) - even, 1e-6 * even + 1e-12)  # all even: nothing is shown
    return ((known - even) / above).clip(0, 1).astype(np.float32)


def times_even(heat: Array) -> float:
    """The largest share of attention ``(Gh, Gw)``, in even shares of the patches that are read.

    >>> round(times_even(np.array([[0.0, 0.1], [0.1, 0.4]])), 3)
    2.0
    """
    known = np.nan_to_num(heat, nan=0.0)
    even = _even(known)
    return float(known.max()) / even if even else 0.0


def _even(known: Array) -> float:
    read = known[known > 0]
    return float(read.mean()) if len(read) else 0.0


def case_pictures(
    cases: Sequence[Case], names: Sequence[str], images: Array, heats: Array
) -> list[Picture]:
    """One picture a label: its cases side by side, the plain images above, attention below.

    Parameters
    ----------
    cases
        as `pick_cases` made them.
    names
        of the labels.
    images
        ``(len(cases), H, W)`` uint8 or uint16.
    heats
        ``(len(cases), Gh, Gw)``, as `heat_overlay` takes them.

    >>> case = Case(label=0, kind="best", row=3, truth=1, score=0.93)
    >>> case_pictures([case], ["covid"], np.zeros((1, 8, 8), np.uint8), np.ones((1, 2, 2)))[0].alt
    'Radiographs of covid, attention below: with it, scored highest, 0.930.'
    """
    made = []
    for k, name in enumerate(names):
        places = [place for place, case in enumerate(cases) if case.label == k]
        if not places:
            continue
        said = "; ".join(f"{KINDS[cases[p].kind]}, {cases[p].score:.3f}" for p in places)
        most = ", ".join(f"{times_even(heats[p]):.2f}" for p in places)
        captions = [f"{'with' if cases[p].truth else 'without'}: {cases[p].score:.3f}"
                    for p in places]  # fmt: skip
        drawn = [heat_overlay(images[p], heats[p]) for p in places]
        picture = sheet([[images[p] for p in places], drawn], captions)
        made.append(
            Picture(
                f"{name}: {said}. Below, yellow marks patches with more than an even share in the "
                f"encoder's summary; the largest has {most} times the even one.",
                f"Radiographs of {name}, attention below: {said}.",
                png=with_bar(picture),
            )
        )
    return made


def with_bar(picture: Image.Image) -> bytes:
    """A picture with the colours of attention explained below it -> JPEG.

    >>> with_bar(Image.new("RGB", (224, 448)))[:2]
    b'\\xff\\xd8'
    """
    width, height = min(BAR_PX[0], picture.width), BAR_PX[1]
    made = Image.new("RGB", (picture.width, picture.height + height), BACKGROUND)
    made.paste(picture, (0, 0))
    level = np.linspace(0, 1, width - 20)[None].repeat(10, 0)[..., None]
    cover = STRONGEST * level  # as over a grey of the middle
    strip = (1 - cover) * 128 + cover * 255 * HEAT(level[..., 0])[..., :3]
    top = picture.height + 8
    made.paste(Image.fromarray(strip.astype(np.uint8)), (10, top))
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    pen.text((10, top + 14), "even share", fill=WORDS, font=font)
    pen.text((width - 10, top + 14), "most", fill=WORDS, font=font, anchor="ra")
    buffer = io.BytesIO()
    made.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
