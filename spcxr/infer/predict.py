"""The prediction loop: rows of a store through a trained model, in batches.

The same loop serves validation while training, `spcxr-train evaluate`, and inference. What the
model sees is the store's pixels resampled to the encoder's size and normalised with the numbers
that travel with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.infer.normalise import GREY, Normalisation, network_input
from spcxr.infer.regions import FINDER, StoredLungs, lung_numbers, lungs_within
from spcxr.models.decoder import Framing, Segmenter, build_decoder
from spcxr.models.framing import LungBox, Windows
from spcxr.models.heads import Classifier
from spcxr.models.neighbours import class_head
from spcxr.models.regions import LungFinder, LungSource, equalised, patches_touched
from spcxr.models.weights import LoadedModel, load_model_folder
from spcxr.train.device import Compute

Rows = NDArray[np.int64]
# Grey images [B, 1, h, w] in [0, 1] and their rows -> images of the same shape and range.
Change = Callable[[Tensor, Rows], Tensor]
# Told the rows of each batch and the patches of them that were read, [B, Gh, Gw] bool.
Told = Callable[[Rows, Tensor], None]


@dataclass(frozen=True)
class TrainedModel:
    """A model with its head, ready to predict, and what its ``config.json`` says of it.

    ``kind`` is ``classify`` or ``segment``; ``names`` are the labels, or the structures in the
    order of the mask's class numbers from 1; ``multilabel`` is False for segmentation. ``folder``
    holds its files.
    """

    model: Classifier | Segmenter
    kind: str
    names: tuple[str, ...]
    multilabel: bool
    normalisation: Normalisation
    config: dict[str, Any]
    folder: Path


def load_trained(path: str | Path, device: torch.device | str = "cpu") -> TrainedModel:
    """Load the encoder and head of a finished `classify` or `segment` run, in eval mode.

    Raises
    ------
    SpcxrError
        no run, a run without a task (pretraining only), a head that does not fit, or a model that
        reads the lungs alone without the one that finds them.
    """
    loaded = load_model_folder(path)
    task, encoder = loaded.config.get("task"), loaded.encoder
    if task is None or loaded.head_state is None:
        raise SpcxrError(
            f"{path}: holds an encoder without a task; fine-tune it by classify or segment first"
        )
    if task.get("kind") == "classify":
        names = tuple(task["labels"])
        classifier = Classifier(
            encoder,
            class_head(task, width=encoder.width, state=loaded.head_state),
            _lungs(task, loaded.folder),
        )
        head: nn.Module = classifier.head
        model: Classifier | Segmenter = classifier
    elif task.get("kind") == "segment":
        names = tuple(task["structures"])
        head = build_decoder(task, encoder)
        model = Segmenter(encoder, head, _framing(loaded, task))
    else:
        raise SpcxrError(f"{path}: task {task.get('kind')!r} is not known; use a newer spcxr")
    try:
        head.load_state_dict(loaded.head_state)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise SpcxrError(f"{path}: the head does not fit its task ({line}); export it again") from (
            error
        )
    statistics = loaded.config["pretrained_cfg"]
    return TrainedModel(
        model=model.eval().to(device),
        kind=task["kind"],
        names=names,
        multilabel=bool(task.get("multilabel", False)),
        normalisation=Normalisation(statistics["mean"][0], statistics["std"][0]),
        config=loaded.config,
        folder=loaded.folder,
    )


def _framing(loaded: LoadedModel, task: dict[str, Any]) -> Framing | None:
    """How a segmenter looks at images larger than its encoder's input; None: it does not."""
    own, side = loaded.encoder.image_px, task.get("image_px", 0)
    if "window_px" in task:
        return Windows((side, side), own)
    if "crop" in task:
        finder = load_finder(lungs_within(loaded.folder, FINDER))
        numbers = loaded.config["pretrained_cfg"]
        return LungBox(finder, numbers["mean"][0], numbers["std"][0], (side, side), own)
    return None


def _lungs(task: dict[str, Any], folder: Path) -> LungSource | None:
    """How a classifier trained by ``--attend lungs`` finds them; None for one of whole images."""
    if task.get("attend") != "lungs":
        return None
    equalise = bool(task.get("equalise", False))
    if task.get("lungs_from") == "model":
        return load_finder(lungs_within(folder), equalise=equalise)
    return StoredLungs(equalise)


def load_finder(
    path: str | Path, device: torch.device | str = "cpu", *, equalise: bool = False
) -> LungFinder:
    """The lung finder that a finished `segment` run is.

    Raises
    ------
    SpcxrError
        no such run, or one that does not segment lungs.
    """
    trained = load_trained(path, device)
    lungs = lung_numbers(trained.names)
    if not isinstance(trained.model, Segmenter) or not lungs:
        raise SpcxrError(
            f"{path}: finds {', '.join(trained.names)}, not lungs; give a run of segment"
        )
    numbers = trained.normalisation
    return LungFinder(trained.model, numbers.mean, numbers.std, lungs, equalise=equalise)


def patches_read(model: Any, grey: Tensor, rows: Rows, store: Store) -> Tensor | None:
    """The patches of these rows that a model reads, ``[B, Gh, Gw]`` bool; None: all of them.

    Parameters
    ----------
    grey
        ``[B, 1, h, w]`` in [0, 1], at the encoder's size, changed or not.

    Raises
    ------
    SpcxrError
        masks that are lacking where a model reads by them.
    """
    lungs: LungSource | None = getattr(model, "lungs", None)
    if lungs is None:
        return None
    return patches_touched(lungs.masks(grey, rows, store), model.encoder.patch_px)


def as_read(
    model: Any, grey: Tensor, visible: Tensor | None, normalisation: Normalisation
) -> Tensor:
    """Grey images ``[B, 1, h, w]`` in [0, 1] -> what the encoder reads of them, ``[B, C, h, w]``:
    normalised, or `equalised` over the patches that are read where a model asks for that."""
    images = normalisation.of_grey(grey, model.encoder.channels)
    lungs: LungSource | None = getattr(model, "lungs", None)
    if visible is None or lungs is None or not lungs.equalise:
        return images
    return equalised(images, visible, model.encoder.patch_px)


@torch.inference_mode()
def forward_batches(
    model: nn.Module,
    store: Store,
    rows: Rows,
    normalisation: Normalisation,
    compute: Compute,
    change: Change | None = None,
    told: Told | None = None,
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield ``(rows of the batch, the model's output in float32 on the device)``.

    The model is put into eval mode for each batch and back as it was afterwards. ``change`` is
    done to the images at that size, before they are normalised. A model with ``lungs``
    is given the patches alone that touch them (`patches_touched`), as they are found in the
    changed images; ``told`` hears which. Images are given at the model's own size
    (`Segmenter.image_px`), which may be larger than the encoder's.

    Raises
    ------
    SpcxrError
        an output that is not finite; the message names the store, row and image. Masks that
        are lacking where a model reads by them.
    """
    encoder: Any = model.encoder
    for start in range(0, len(rows), compute.batch_size):
        batch = rows[start : start + compute.batch_size]
        pixels = store.images(batch)
        size = getattr(model, "image_px", encoder.image_px)
        grey = network_input(pixels, size, GREY, compute.device)
        if change is not None:
            grey = change(grey, batch)
        if was_training := model.training:  # to set hundreds of modules takes milliseconds
            model.eval()
        with compute.autocast():
            visible = patches_read(model, grey, batch, store)
            images = as_read(model, grey, visible, normalisation)
            output = model(images) if visible is None else model(images, visible)
        if was_training:
            model.train()
        if told is not None and visible is not None:
            told(batch, visible)
        output = output.float()
        finite = torch.isfinite(output).flatten(1).all(1).cpu().numpy()
        if not finite.all():
            raise SpcxrError(
                f"{store.named(int(batch[~finite][0]))}: the model's output is not finite; try "
                "--precision fp32, or an earlier checkpoint"
            )
        yield batch, output


def predict_classes(
    model: nn.Module,
    store: Store,
    rows: Rows,
    normalisation: Normalisation,
    compute: Compute,
    change: Change | None = None,
    told: Told | None = None,
) -> NDArray[np.float32]:
    """Logits ``(n, K)`` float32 of a `Classifier` for ``rows`` of a store, in their order."""
    batches = forward_batches(model, store, rows, normalisation, compute, change, told)
    found = [output.cpu().numpy() for _, output in batches]
    return np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def predict_masks(
    model: nn.Module,
    store: Store,
    rows: Rows,
    normalisation: Normalisation,
    compute: Compute,
    change: Change | None = None,
) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
    """Yield ``(rows, masks)`` of a `Segmenter`, batch by batch, so that memory stays flat.

    Masks are ``(b, S, S)`` uint8 class numbers (0 = background) at the store's size: logits are
    resampled bilinearly from the model's size before the largest is taken, which gives smoother
    borders than resampling the decision. Images in which a model that looks at the lungs' box
    found none are segmented whole, and counted (`read_whole`).
    """
    for batch, logits in forward_batches(model, store, rows, normalisation, compute, change):
        logits = at_side(logits, store.preprocess.size_px)
        yield batch, logits.argmax(1).to(torch.uint8).cpu().numpy()


def read_whole(model: nn.Module) -> int:
    """In how many images so far a model that looks at the lungs' box found none.

    >>> read_whole(nn.Identity())
    0
    """
    return int(getattr(getattr(model, "framing", None), "missed", 0))


def at_side(logits: Tensor, side: int) -> Tensor:
    """Logits ``[B, K, h, w]`` resampled bilinearly to ``[B, K, side, side]``, if need be.

    >>> at_side(torch.zeros(1, 2, 4, 4), 8).shape
    torch.Size([1, 2, 8, 8])
    """
    if logits.shape[2:] == (side, side):
        return logits
    size = (side, side)
    return torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)


def probabilities(logits: NDArray[np.float32], *, multilabel: bool) -> NDArray[np.float64]:
    """Logits ``(n, K)`` -> sigmoid of each (multi-label) or softmax over the K (one of many).

    >>> probabilities(np.zeros((1, 4), np.float32), multilabel=False).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    if multilabel:
        # tanh form: no overflow at either end
        return 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    shifted = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
