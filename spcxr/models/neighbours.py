"""k-NN as a head: it remembers the features and labels of the images it was taught by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcxr.models.heads import ClassificationHead

TEMPERATURE = 0.07  # DINO's (arXiv 2104.14294)
LEAST = 1e-6  # a share is moved this far from 0 and 1, so that its logit is finite
AT_ONCE = 2**25  # cosines at a time: 128 MiB
REACH = 2  # times as many neighbours as wanted are looked at, for labels that some do not know


def neighbour_shares(
    queries: Tensor, features: Tensor, labels: Tensor, counts: Sequence[int]
) -> Tensor:
    """Share of each label among the nearest remembered rows: DINO's weighted votes.

    Neighbours are the ``k`` rows (all, where fewer) of largest cosine similarity ``s`` whose label
    is known; each votes with weight ``exp(s / 0.07)``.

    Parameters
    ----------
    queries, features
        ``[m, F]`` and ``[n, F]`` float32 of any length; rows are scaled to unit length.
    labels
        ``[n, K]`` 1, 0, NaN = unknown, each label known somewhere.
    counts
        the ``k`` to answer for, all from one search.

    Returns
    -------
    ``[len(counts), m, K]`` float64 in [0, 1].

    >>> features = torch.tensor([[1, 0], [0.9, 0.1], [0, 1]])
    >>> votes = neighbour_shares(features[[0, 2]], features, torch.tensor([[1.0], [1], [0]]), [1])
    >>> votes[0].tolist()
    [[1.0], [0.0]]
    """
    unit, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    size = max(AT_ONCE // max(len(unit), 1), 1)
    made = [_votes(part @ unit.T, labels, counts) for part in queries.split(size)]
    return torch.cat(made, 1)


def _votes(likeness: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """``[len(counts), m, K]`` of cosines ``[m, n]``."""
    known = ~torch.isnan(labels)
    most = max(counts)
    whole = min(most if bool(known.all()) else REACH * most, len(labels))
    near, place = likeness.topk(whole, 1)
    sizes = (len(counts), len(likeness), labels.shape[1])
    made = torch.empty(sizes, dtype=torch.float64, device=likeness.device)
    for column, (truth, there) in enumerate(zip(labels.T, known.T, strict=True)):
        close, spot, counted = near, place, there[place]
        wanted = min(most, int(there.sum()))
        if int(counted.sum(1).min()) < wanted:
            # Too many of the nearest do not know this label: look among those that do.
            close, spot = likeness[:, there].topk(wanted, 1)
            spot = there.nonzero()[:, 0][spot]
            counted = there[spot]
        rank = counted.cumsum(1)
        # float64: of votes that differ by a factor of 10^7 the lesser one still counts.
        weight = ((close.double() - 1) / TEMPERATURE).exp() * counted
        votes = weight * truth.nan_to_num(0.0)[spot]
        for number, k in enumerate(counts):
            used = rank <= k
            made[number, :, column] = (votes * used).sum(1) / (weight * used).sum(1)
    return made


class NeighbourHead(nn.Module):
    """Logits from the labels of the nearest remembered images (`neighbour_shares`).

    Its state holds a feature and the labels of each training image: a megabyte for some 300 of
    ViT-S. They are numbers about patients: hand a k-NN model on with the care the images need.

    Parameters
    ----------
    width
        of the encoder; features are concat(cls, mean patch), ``2 * width`` long.
    rows, classes
        how many images are remembered, and labels of each.
    k
        neighbours that vote.
    multilabel
        logits of single labels, or of one of many: `infer.predict.probabilities` gives the shares
        back either way.

    >>> head = NeighbourHead(width=24, rows=5, classes=3, k=2, multilabel=True)
    >>> head.remember(torch.randn(5, 48), torch.ones(5, 3))
    >>> head(torch.randn(2, 7, 24)).shape
    torch.Size([2, 3])
    """

    features: Tensor
    labels: Tensor

    def __init__(self, *, width: int, rows: int, classes: int, k: int, multilabel: bool) -> None:
        super().__init__()
        self.k, self.multilabel = k, multilabel
        self.register_buffer("features", torch.zeros(rows, 2 * width))
        self.register_buffer("labels", torch.zeros(rows, classes))

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Keep features ``[n, 2D]``, scaled to unit length, and labels ``[n, K]``."""
        self.features.copy_(F.normalize(features.float(), dim=1))
        self.labels.copy_(labels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Normed tokens ``[B, 1 + N, D]``, cls first -> logits ``[B, K]``."""
        return self.of_features(ClassificationHead.features(tokens))

    def of_features(self, features: Tensor) -> Tensor:
        """Features ``[B, 2D]`` -> logits ``[B, K]``."""
        # In bfloat16 near neighbours are all equally near.
        with torch.autocast(features.device.type, enabled=False):
            shares = neighbour_shares(features.float(), self.features, self.labels, [self.k])[0]
        return share_logits(shares, multilabel=self.multilabel)


def share_logits(shares: Tensor, *, multilabel: bool) -> Tensor:
    """Shares ``[..., K]`` -> float32 logits whose probabilities they are.

    >>> share_logits(torch.tensor([[0.5, 1.0]]), multilabel=True)[0, 0].item()
    0.0
    """
    if multilabel:
        return shares.clamp(LEAST, 1 - LEAST).logit().float()
    return shares.clamp(min=LEAST).log().float()


def class_head(
    task: Mapping[str, Any], *, width: int, state: Mapping[str, Tensor]
) -> ClassificationHead | NeighbourHead:
    """The empty head that a ``task`` of ``config.json`` describes, ready for its ``state``.

    >>> class_head({"labels": ["tb"], "method": "full"}, width=24, state={}).fc.out_features
    1
    """
    classes = len(task["labels"])
    if task.get("method") != "knn":
        return ClassificationHead(width=width, classes=classes)
    return NeighbourHead(
        width=width,
        rows=len(state["features"]) if "features" in state else 0,
        classes=classes,
        k=int(task["neighbours"]),
        multilabel=bool(task["multilabel"]),
    )
