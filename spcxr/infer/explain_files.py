"""Files and folders through a trained classifier: what its answers rest on, drawn over each.

Attention rollout tells what the encoder's summary is made of, the same for every label; Grad-CAM
which patches speak for one label. Both are maps on the patch grid. Neither proves what the model
thought: they are there to find a model that looks at the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.cases import above_even
from spcxr.infer import pictures
from spcxr.infer.heat import heat_picture, on_the_file
from spcxr.infer.mask_scores import InMemory
from spcxr.infer.normalise import GREY, network_input
from spcxr.infer.operating import RULE
from spcxr.infer.predict import as_read, load_trained, patches_read
from spcxr.infer.predict_files import Answer as Logits
from spcxr.infer.predict_files import Labeller
from spcxr.infer.reading import Ready
from spcxr.infer.result_table import Row, Table, open_table
from spcxr.infer.stream import Work, refuse_nothing, work_through, writing_to
from spcxr.models.attention_maps import rollout
from spcxr.models.grad_cam import grad_cam
from spcxr.models.heads import Classifier
from spcxr.train.device import Compute

TABLE, SETTINGS = "explain.csv", "explain.json"
Map = NDArray[np.float32]


@dataclass(frozen=True)
class Explained:
    """A file's answer and the maps behind it.

    ``labels`` are numbers of the labels explained, ``grad_cam (L, Gh, Gw)`` a map of each,
    ``rollout (Gh, Gw)``; ``read (Gh, Gw)`` the patches that were read, None: all.
    """

    logits: Logits
    labels: tuple[int, ...]
    rollout: Map
    grad_cam: Map
    read: NDArray[np.bool_] | None


def explain_files(
    model: str | Path,
    given: Sequence[str | Path],
    out: str | Path,
    compute: Compute,
    *,
    labels: Sequence[str] = (),
    rule: str = RULE,
    png: bool = False,
) -> Table:
    """Explain every file of ``given``; pictures and maps are in ``out``, a row in ``explain.csv``.

    Called again with the same ``out``, files that have a row are left as they are.

    Parameters
    ----------
    labels
        to explain; if none are given the class that is the likeliest, or of several labels those
        that are called (none is: the likeliest).
    rule
        of `evaluate.thresholds.RULES`, by which labels are called.
    png
        write the maps on the file's own grid as 8-bit PNG as well.

    Returns
    -------
    the closed table, with its counts.

    Raises
    ------
    SpcxrError
        a model without labels, or without those; inputs that are not there; an ``out`` of other
        settings.
    NothingDone
        every file was rejected.
    Interrupted
        Ctrl-C or SIGTERM; what has a row is kept.
    """
    labeller = Labeller(load_trained(model, compute.device), compute, rule=rule)
    tool = Explainer(labeller, Path(out), labels, png=png)
    work = Work("explain", labeller.read, tool.answer, tool.row, compute.batch_size)
    file, kept = tool.out / TABLE, tool.out / SETTINGS
    opened = open_table(file, tool.columns, tool.settings, kept=kept)
    with writing_to(tool.out), opened as table:
        work_through(work, given, table, tool.out)
    refuse_nothing(table, file)
    return table


class Explainer:
    """A classifier, which of its labels are to be explained, and where.

    Raises
    ------
    SpcxrError
        a label that the model does not know.
    """

    def __init__(self, labeller: Labeller, out: Path, labels: Sequence[str], *, png: bool) -> None:
        self.labeller, self.out, self.png = labeller, out, png
        self.names = labeller.trained.names
        if unknown := [name for name in labels if name not in self.names]:
            raise SpcxrError(
                f"{labeller.trained.folder}: knows no label {unknown[0]!r}; choose of "
                f"{', '.join(self.names)}"
            )
        self.asked = tuple(self.names.index(name) for name in dict.fromkeys(labels))
        self.folders = folder_names(self.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the table."""
        return (
            *("path", "name", "status", "reason", "notes", "explained"),
            *("rollout", "grad_cam", "maps"),
            *(name for name in self.labeller.columns if name.startswith("p_")),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the pictures mean, as plain values."""
        asked = [self.names[k] for k in self.asked]
        return {**self.labeller.settings, "explained": asked or "what is called", "png": self.png}

    def answer(self, ready: list[Ready]) -> list[Explained]:
        """Logits and maps of each file of a batch."""
        logits = self.labeller.answer(ready)
        chosen = [self._chosen(one) for one, _ in logits]
        most = max(map(len, chosen))
        # as many for every file of the batch: the last again
        filled = torch.tensor([[*some, *(some[-1:] * (most - len(some)))] for some in chosen])
        images, read = self._shown(ready)
        model = cast(Classifier, self.labeller.trained.model)
        over = rollout(model.encoder, images, read).cpu().numpy()
        cams = grad_cam(model, images, filled.to(images.device), read).cpu().numpy()
        patches = None if read is None else read.cpu().numpy()
        return [
            Explained(
                logits[k],
                some,
                over[k],
                cams[k, : len(some)],
                None if patches is None else patches[k],
            )
            for k, some in enumerate(chosen)
        ]

    def _shown(self, ready: list[Ready]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Images ``[B, C, h, w]`` as they are read, and the patches that are."""
        trained, compute = self.labeller.trained, self.labeller.compute
        squares = np.stack([one.prepared.pixels for one in ready])
        encoder: Any = trained.model.encoder
        grey = network_input(squares, encoder.image_px, GREY, compute.device)
        store = cast(Store, InMemory(squares, self.labeller.preprocess))
        with torch.inference_mode(), compute.autocast():
            read = patches_read(trained.model, grey, np.arange(len(ready)), store)
        if read is not None:
            read = read.clone()  # made without gradients it cannot take part where there are some
        return as_read(trained.model, grey, read, trained.normalisation), read

    def _chosen(self, logits: NDArray[np.float32]) -> tuple[int, ...]:
        """The labels to explain of a file."""
        if self.asked:
            return self.asked
        scores = self.labeller.scores(logits)
        called: list[int] = []
        if self.labeller.trained.multilabel:
            called = np.flatnonzero(scores >= self.labeller.thresholds).tolist()
        return tuple(called) or (int(scores.argmax()),)

    def row(self, ready: Ready, one: Explained) -> Row:
        """Draw and write the maps of a file: the cells of its row."""
        name, (logits, share) = ready.given.name, one.logits
        scores = self.labeller.scores(logits)
        named = [self.names[k] for k in one.labels]
        row: Row = {f"p_{n}": float(p) for n, p in zip(self.names, scores, strict=True)}
        row["explained"] = "; ".join(named)
        row["rollout"] = self._draw(f"rollout/{name}", above_even(one.rollout), ready, one.read)
        drawn, silent = [], []
        for k, cam in zip(one.labels, one.grad_cam, strict=True):
            top = float(cam.max())
            silent += [] if top > 0 else [f"no patch speaks for {self.names[k]}"]
            place = f"grad_cam/{self.folders[k]}/{name}"
            drawn.append(self._draw(place, cam / (top or 1.0), ready, one.read))
        row["grad_cam"] = "; ".join(drawn)
        row["notes"] = "; ".join(n for n in (self.labeller.notes(ready, share), *silent) if n)
        row["maps"] = f"maps/{name}.npz"
        self._place(row["maps"])
        np.savez(
            self.out / row["maps"],
            rollout=one.rollout,
            grad_cam=one.grad_cam,
            labels=np.array(named),
            read=np.ones_like(one.rollout, bool) if one.read is None else one.read,
        )
        return row

    def _draw(self, place: str, share: Map, ready: Ready, read: NDArray[np.bool_] | None) -> str:
        """Write a map ``(Gh, Gw)`` in [0, 1] over its file; the picture's path below ``out``."""
        wide = on_the_file(share.astype(np.float32), ready, self.labeller.preprocess, read)
        self._place(f"{place}.jpg")
        picture = heat_picture(ready.study.pixels, wide)
        picture.save(self.out / f"{place}.jpg", quality=pictures.JPEG_QUALITY)
        if self.png:
            pictures.save_map(wide, self.out / f"{place}.png")
        return f"{place}.jpg"

    def _place(self, name: str) -> None:
        (self.out / name).parent.mkdir(parents=True, exist_ok=True)


def folder_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The name of a folder for each label, no two alike.

    >>> folder_names(["covid", "Lung Opacity", "lung/opacity", ".."])
    ('covid', 'Lung_Opacity', 'lung_opacity-2', '_')
    """
    made: list[str] = []
    for number, label in enumerate(labels):
        plain = re.sub(r"[^\w.-]+|^\.+", "_", label)  # ".." is the folder above
        taken = {name.lower() for name in made}
        made.append(plain if plain.lower() not in taken else f"{plain}-{number}")
    return tuple(made)
