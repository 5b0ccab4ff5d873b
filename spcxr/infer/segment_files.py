"""Files and folders through a trained `Segmenter`: masks, pictures, DICOM SEG, and a table.

predict in batches -> mend, bring back onto the file's own grid, measure and write in threads, by
the loop of `infer.stream`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spcxr.data.presets import Prepared, Preprocess
from spcxr.data.study import Rejected, Study
from spcxr.errors import SpcxrError
from spcxr.infer import dicom_seg, pictures
from spcxr.infer.inputs import Input
from spcxr.infer.mask_scores import Scores, entropy, mean_of_two, scores_of, to_original
from spcxr.infer.measures import LEFT, RIGHT, as_shown, direction, measure, square_mm
from spcxr.infer.postprocess import POSTS, tidy
from spcxr.infer.predict import TrainedModel, load_trained, read_whole
from spcxr.infer.quality import flags
from spcxr.infer.reading import Ready, Refused, read_prepared
from spcxr.infer.result_table import Row, Table, open_table
from spcxr.infer.segment_table import SETTINGS, TABLE, columns, measured
from spcxr.infer.stream import Work, refuse_nothing, version_of, work_through, writing_to
from spcxr.train.device import Compute

# Log-probabilities ``(1 + K, S, S)`` of a file; of its mirror image, if asked.
Answer = tuple[Scores, Scores | None]
NO_SIDES = "it is turned, by its header: a DICOM SEG of left and right would be a guess"
NO_SPACING = "pixel spacing is not known: mm2 left blank"


@dataclass(frozen=True)
class Wanted:
    """What is made of each file beside its mask, and how the mask is mended (`tidy`)."""

    overlay: bool = True
    dicom_seg: bool = False
    post: str = "default"
    uncertainty: bool = False


def segment_files(
    model: str | Path,
    given: Sequence[str | Path],
    out: str | Path,
    wanted: Wanted,
    compute: Compute,
) -> Table:
    """Segment every file of ``given``; results are in ``out``, one row a file in ``segment.csv``.

    Called again with the same ``out``, files that have a row are left as they are.

    Returns
    -------
    the closed table, with its counts.

    Raises
    ------
    SpcxrError
        a model that draws no masks, inputs that are not there, an ``out`` of other settings, or
        structures that have no code where a SEG is wanted.
    NothingDone
        every file was rejected.
    Interrupted
        Ctrl-C or SIGTERM; what has a row is kept.
    """
    tool = Tool(load_trained(model, compute.device), Path(out), wanted, compute)
    settings = {**asdict(wanted), "model": tool.version}
    file, kept = tool.out / TABLE, tool.out / SETTINGS
    opened = open_table(file, columns(tool.trained.names), settings, kept=kept)
    with writing_to(tool.out), opened as table:
        work = Work("segment", tool.read, tool.predict, tool.results, compute.batch_size)
        work_through(work, given, table, tool.out)
        if tool.read_whole:
            print(f"no lung found in {tool.read_whole} images: read whole", file=sys.stderr)
    refuse_nothing(table, file)
    return table


class Tool:
    """A model and what is wanted of it: reads, predicts and finishes files one by one.

    Raises
    ------
    SpcxrError
        a model that draws no masks, an unknown ``post``, structures without a code for a SEG.
    """

    def __init__(self, trained: TrainedModel, out: Path, wanted: Wanted, compute: Compute) -> None:
        if trained.kind != "segment":
            raise SpcxrError(
                f"{trained.folder}: answers {', '.join(trained.names)} and draws no masks; give a "
                "run of spcxr-train segment"
            )
        if wanted.post not in POSTS:
            raise SpcxrError(f"post is {wanted.post!r}; choose one of: {', '.join(POSTS)}")
        if wanted.dicom_seg:
            dicom_seg.refuse_uncoded(trained.names)
        self.trained, self.out, self.wanted, self.compute = trained, out, wanted, compute
        self.preprocess = Preprocess.from_dict(trained.config["preprocess"])
        self.read_whole = 0
        self.version = version_of(trained.folder)

    def read(self, given: Input) -> Ready | Refused:
        """One file, prepared as the model's images were."""
        return read_prepared(given, self._prepared, with_header=self.wanted.dicom_seg)

    def _prepared(self, study: Study) -> Prepared:
        return self.preprocess(replace(study, pixels=as_shown(study.pixels, study)))

    def predict(self, ready: list[Ready]) -> list[Answer]:
        """The scores of each file of a batch."""
        squares = np.stack([one.prepared.pixels for one in ready])
        arguments = (self.trained, squares, self.preprocess, self.compute)
        before = read_whole(self.trained.model)
        plain = scores_of(*arguments)
        self.read_whole += read_whole(self.trained.model) - before
        if not self.wanted.uncertainty:
            return [(one, None) for one in plain]
        return list(zip(plain, scores_of(*arguments, mirrored=True), strict=True))

    def results(self, ready: Ready, answer: Answer) -> Row:
        """Mend, bring back, measure, write: the cells of the file's row."""
        names, (plain, mirrored) = self.trained.names, answer
        study, box = ready.study, ready.prepared.box
        shape = (study.pixels.shape[0], study.pixels.shape[1])
        scores = plain if mirrored is None else mean_of_two(plain, mirrored)
        decided = tidy(scores.argmax(0).astype(np.uint8), names, self.wanted.post)
        mask = as_shown(to_original(scores, decided, self.preprocess, shape, box), study)
        found, seen = measure(mask, names, study), self.preprocess.window(shape)
        row: Row = {
            "flags": "; ".join(flags(mask, names, study, found, seen)),
            "notes": "; ".join((*study.notes, *(() if study.spacing_mm else (NO_SPACING,)))),
            "height_px": shape[0],
            "width_px": shape[1],
            "cardiothoracic_ratio": found.cardiothoracic,
        }
        if study.spacing_mm is not None:
            row |= {"spacing_row_mm": study.spacing_mm[0], "spacing_column_mm": study.spacing_mm[1]}
        for name in measured(names):
            area, called = found.areas_px.get(name), name.replace(" ", "_")
            row[f"area_px_{called}"] = area
            if area is not None:
                row[f"area_mm2_{called}"] = square_mm(area, study.spacing_mm)
        return row | self._written(ready, mask) | self._doubt(ready, answer, scores, decided)

    def _written(self, ready: Ready, mask: NDArray[np.uint8]) -> Row:
        """The files of a mask; a SEG of nothing is none."""
        name, names, row = ready.given.name, self.trained.names, {}
        if ready.source is not None and mask.any():
            self._refuse_guessed_sides(ready)
            seg = dicom_seg.to_seg(ready.given.path, ready.source, mask, names, self.version)
            row["dicom_seg"] = self._place("dicom_seg", f"{name}.dcm")
            seg.save_as(self.out / row["dicom_seg"], enforce_file_format=True)
        row["mask"] = self._place("masks", f"{name}.png")
        pictures.save_mask(mask, self.out / row["mask"])
        if self.wanted.overlay:
            row["overlay"] = self._place("overlays", f"{name}.jpg")
            drawn = pictures.overlay(ready.study.pixels, mask, names)
            drawn.save(self.out / row["overlay"], quality=pictures.JPEG_QUALITY)
        return row

    def _refuse_guessed_sides(self, ready: Ready) -> None:
        sided = not {LEFT, RIGHT}.isdisjoint(name.lower() for name in self.trained.names)
        if sided and direction(ready.study) is None:
            raise Rejected(ready.given.path, NO_SIDES)

    def _doubt(
        self, ready: Ready, answer: Answer, scores: Scores, decided: NDArray[np.uint8]
    ) -> Row:
        """Mean entropy of what was found, and how far the mirror image's answer agrees (Dice)."""
        plain, mirrored = answer
        if mirrored is None:
            return {}
        doubt, inside = entropy(scores), decided > 0
        row: Row = {
            "uncertainty": float(doubt[inside].mean()) if inside.any() else None,
            "uncertainty_map": self._place("uncertainty", f"{ready.given.name}.png"),
        }
        first, second = plain.argmax(0), mirrored.argmax(0)
        total = np.count_nonzero(first) + np.count_nonzero(second)
        if total:
            same = np.count_nonzero((first == second) & (first > 0))
            row["flip_dice"] = 2 * same / total
        shape = (ready.study.pixels.shape[0], ready.study.pixels.shape[1])
        drawn = self.preprocess.to_original(doubt, shape, ready.prepared.box)
        pictures.save_map(as_shown(drawn, ready.study), self.out / row["uncertainty_map"])
        return row

    def _place(self, folder: str, name: str) -> str:
        """A path below ``out``, its folder made."""
        (self.out / folder / name).parent.mkdir(parents=True, exist_ok=True)
        return f"{folder}/{name}"
