"""What of a model is exported: grey images in, features or answers out, nothing to prepare.

The graphs take grey levels in [0, 1] and normalise them inside: a mean and deviation left out, or
taken twice, is the first mistake made with other people's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.infer.predict import Normalisation, TrainedModel, load_trained
from spcxr.models.heads import Classifier
from spcxr.models.neighbours import NeighbourHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import load_model_folder

Outputs = tuple[Tensor, Tensor]


class GreyInput(nn.Module):
    """Grey levels ``[B, c, H, W]`` in [0, 1] -> what the encoder reads, normalised.

    Of three channels the mean is read by an encoder of one, which is what filters of a third each
    do; one channel is given thrice to an encoder of three, which is the sum of its filters.

    >>> import torch
    >>> GreyInput(Normalisation(0.5, 0.25), 3, 1)(torch.ones(2, 3, 4, 4))[0, :, 0, 0]
    tensor([2.])
    """

    def __init__(self, normalisation: Normalisation, given: int, read: int) -> None:
        super().__init__()
        self.normalisation, self.given, self.read = normalisation, given, read

    def forward(self, images: Tensor) -> Tensor:
        """``[B, given, H, W]`` -> ``[B, read, H, W]`` of the same dtype."""
        images = (images - self.normalisation.mean) / self.normalisation.std
        if self.given == self.read:
            return images
        if self.read == 1:
            return images.mean(1, keepdim=True)
        return images.expand(-1, self.read, -1, -1)


class EncoderGraph(nn.Module):
    """Grey images -> cls ``[B, D]`` and patches ``[B, Gh, Gw, D]``, after the final norm.

    >>> import torch
    >>> encoder = VisionTransformer(image_px=(32, 48), patch_px=16, width=24, depth=2, heads=3)
    >>> graph = EncoderGraph(encoder, GreyInput(Normalisation(0.5, 0.25), 1, 1))
    >>> [tuple(made.shape) for made in graph(torch.zeros(5, 1, 32, 48))]
    [(5, 24), (5, 2, 3, 24)]
    """

    def __init__(self, encoder: VisionTransformer, grey: GreyInput) -> None:
        super().__init__()
        self.encoder, self.grey = encoder, grey

    def forward(self, images: Tensor) -> Outputs:
        """``[B, C, H, W]`` in [0, 1] -> cls, patches."""
        tokens = self.encoder.forward_features(self.grey(images))
        return tokens[:, 0], tokens[:, 1:].unflatten(1, self.encoder.grid)


class TaskGraph(nn.Module):
    """Grey images -> logits and probabilities of a classifier ``[B, K]`` or a segmenter
    ``[B, K, H, W]``; the probabilities are the logits' own, not tempered."""

    def __init__(self, model: nn.Module, grey: GreyInput, *, multilabel: bool) -> None:
        super().__init__()
        self.model, self.grey, self.multilabel = model, grey, multilabel

    def forward(self, images: Tensor) -> Outputs:
        """``[B, C, H, W]`` in [0, 1] -> logits, probabilities."""
        logits: Tensor = self.model(self.grey(images))
        return logits, logits.sigmoid() if self.multilabel else logits.softmax(1)


@dataclass(frozen=True)
class Graph:
    """A module to export, by what its file is called; ``reference`` is the model as it is used
    here, on grey ``[B, 1, H, W]``: what the file is held against."""

    name: str
    module: nn.Module
    reference: nn.Module
    outputs: tuple[str, str]


@dataclass(frozen=True)
class Exported:
    """A model taken apart for export.

    ``names`` are the labels or structures (without background), () for an encoder; ``channels``
    those of the images that the files take.
    """

    encoder: VisionTransformer
    graphs: tuple[Graph, ...]
    channels: int
    normalisation: Normalisation
    config: dict[str, Any]
    names: tuple[str, ...]
    folder: Path


def take_apart(path: str | Path, channels: int | None, *, encoder_only: bool) -> Exported:
    """Load a run or model folder, and say what can be exported of it.

    Parameters
    ----------
    channels
        1 or 3 of the images that the files shall take; None: the encoder's own.

    Raises
    ------
    SpcxrError
        no model, or one that looks at images in a way that no single graph can.
    """
    loaded = load_model_folder(path)
    numbers = loaded.config["pretrained_cfg"]
    normalisation = Normalisation(numbers["mean"][0], numbers["std"][0])
    encoder = loaded.encoder.requires_grad_(False)
    given = encoder.channels if channels is None else channels
    grey = GreyInput(normalisation, given, encoder.channels)
    plain = GreyInput(normalisation, 1, encoder.channels)
    made = [
        Graph(
            "encoder",
            EncoderGraph(encoder, grey),
            EncoderGraph(encoder, plain),
            ("cls", "patches"),
        )
    ]
    names: tuple[str, ...] = ()
    if loaded.config.get("task") is not None and not encoder_only:
        trained = load_trained(path)
        refuse_what_is_no_graph(trained, path)
        model, names = trained.model.requires_grad_(False), trained.names
        head = TaskGraph(model, grey, multilabel=trained.multilabel)
        beside = TaskGraph(model, plain, multilabel=trained.multilabel)
        made.append(Graph(trained.kind, head, beside, ("logits", "probabilities")))
    for graph in made:
        graph.module.eval()
        graph.reference.eval()
    parts = (encoder, tuple(made), given, normalisation, loaded.config, names, loaded.folder)
    return Exported(*parts)


def refuse_what_is_no_graph(trained: TrainedModel, path: str | Path) -> None:
    """Raise for a model that is more than one pass over an image."""
    model = trained.model
    reason = None
    if isinstance(model, Classifier):
        if model.lungs is not None:
            reason = "it finds the lungs first and reads their patches alone"
        elif isinstance(model.head, NeighbourHead):
            reason = "its k-NN head holds features of the training patients"
    elif model.framing is not None:
        reason = f"it looks at images part by part ({type(model.framing).__name__})"
    if reason is not None:
        raise SpcxrError(
            f"{path}: {reason}, which no exported graph does; export its encoder: --encoder-only"
        )
