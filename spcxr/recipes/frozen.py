"""Heads on a frozen encoder whose features are computed once: a linear probe, and k-NN.

features of all rows -> one head for each candidate setting -> the best on the validation rows.
The features stay in memory, so a candidate costs seconds; images are not augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spcxr.infer.predict import forward_batches, probabilities
from spcxr.models.heads import ClassificationHead, Features
from spcxr.models.neighbours import NeighbourHead, neighbour_shares, share_logits
from spcxr.recipes.attend import KnownLungs
from spcxr.recipes.cohort import macro_auroc
from spcxr.recipes.finetune import Rows
from spcxr.recipes.fitting import Course, introduce
from spcxr.recipes.linear import LinearProblem, Matrix
from spcxr.train.checkpoint import Position
from spcxr.train.journal import Journal, Silent
from spcxr.train.parallel import predict_together

if TYPE_CHECKING:
    from spcxr.recipes.classify import Classification

# What is tried, from the most to the least regularised. Ours; of equal scores the first is kept.
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
NEIGHBOURS = (200, 100, 50, 20, 10, 5)
SETTING = {"linear": "penalty", "knn": "neighbours"}  # the one that is chosen
AT_ONCE = 4096  # features through a head


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried: its value, and logits ``(n, K)`` of the judged rows."""

    value: float
    logits: Matrix
    head: Callable[[], nn.Module]


@dataclass(frozen=True)
class Cache:
    """Features ``(n, 2D)`` float32: of the training rows, and of those that are judged."""

    train: Matrix
    judged: Matrix


def learn(course: Course, task: Classification) -> tuple[Course, Position, Matrix]:
    """Fit the head that ``--method`` names, the one setting of it chosen on the validation rows.

    Returns
    -------
    the course, whose model has the head; where it stands; logits ``(n, K)`` of the judged rows.

    Raises
    ------
    SpcxrError
        features that are not finite.
    """
    method = task.config.method
    with _open_books(course) as journal:
        introduce(course, task, journal)
        best, score = _choose(course, task, method, journal)
    name = SETTING[method]
    settled = {"method": method, name: int(best.value) if method == "knn" else best.value}
    course.model.head = best.head().to(course.world.device)
    data = str(course.start.store.facts["content_hash"])
    return replace(course, settled=settled), Position(data=data, best=score), best.logits


def begin_linear(course: Course, task: Classification) -> Course:
    """Give the model's head the weights of `learn`'s linear probe, to fine-tune from.

    Source: LP-FT (arXiv 2202.10054): a head that begins as noise sends noise into the encoder
    first, and distorts what it has learned.

    Returns
    -------
    the course, whose ``start`` says so.

    Raises
    ------
    SpcxrError
        features that are not finite.
    """
    best, score = _choose(course, task, "linear", Silent())
    course.model.get_submodule("head").load_state_dict(best.head().state_dict())
    said = f"head from a linear probe, penalty {best.value:g}, validation {task.score} {score:.4f}"
    return replace(course, start=replace(course.start, origin=f"{course.start.origin}; {said}"))


def _choose(
    course: Course, task: Classification, method: str, journal: Journal
) -> tuple[Candidate, float]:
    """The candidate that does best on the validation rows, and its score there."""
    cohort, name = task.cohort, SETTING[method]
    tried = {"linear": linear_heads, "knn": neighbour_heads}[method]
    values, multilabel = cohort.targets.values[cohort.val], cohort.targets.multilabel
    best, score = None, -np.inf
    train, judged = (
        features_of(course, rows, journal, task.lungs) for rows in (cohort.train, cohort.judged)
    )
    for number, made in enumerate(tried(course, task, Cache(train, judged)), 1):
        own = probabilities(made.logits[cohort.parts["validation"]], multilabel=multilabel)
        found = macro_auroc(values, own)
        journal.record("choice", number, {name: made.value, task.score: found})
        journal.say(f"{name} {made.value:g}: {task.score} {found:.4f}")
        if found > score:
            best, score = made, found
    assert best is not None, "validation rows hold both values of a label"
    journal.say(f"chosen: {name} {best.value:g}")
    return best, score


def _open_books(course: Course) -> Journal:
    if not course.world.first:
        return Silent()
    images = len(course.rows) + len(course.cohort.judged)
    return Journal(course.folder, step=0, images_done=0, images_total=images)


def features_of(
    course: Course, rows: Rows, journal: Journal, lungs: KnownLungs | None = None
) -> Matrix:
    """Concat(cls, mean patch) ``(n, 2D)`` float32 of ``rows``, each rank its share of them."""
    start, model = course.start, Features(course.start.encoder, lungs)
    width = 2 * start.encoder.width

    def computed(some: Rows) -> Matrix:
        made, done = np.empty((len(some), width), np.float32), 0
        batches = forward_batches(model, start.store, some, start.normalisation, course.compute)
        for batch, output in batches:
            made[done : done + len(batch)] = output.cpu().numpy()
            done += len(batch)
            journal.advance(len(batch) * course.world.size, {})
        return made

    return predict_together(course.world, computed, rows)


def linear_heads(course: Course, task: Classification, cache: Cache) -> Iterator[Candidate]:
    """A logistic regression for each of `PENALTIES`: the usual head, fitted to its optimum."""
    targets, width = task.cohort.targets, course.start.encoder.width
    train = torch.from_numpy(cache.train)
    usual = ClassificationHead(width=width, classes=len(targets.names))
    usual.standardise(train)
    problem = LinearProblem(
        (train - usual.mean) / usual.deviation,
        targets.values[course.rows],
        multilabel=targets.multilabel,
        weights=None if task.weight is None else task.weight.cpu().numpy(),
    )
    start: Tensor | None = None
    for penalty in PENALTIES:
        weight, bias = problem.fit(penalty, start)
        start = problem.solution
        state = {"fc.weight": weight.T.contiguous(), "fc.bias": bias}
        head = partial(_usual, width, state | {"mean": usual.mean, "deviation": usual.deviation})
        yield Candidate(penalty, _logits(course, head(), cache.judged), head)


def _usual(width: int, state: dict[str, Tensor]) -> ClassificationHead:
    made = ClassificationHead(width=width, classes=len(state["fc.bias"]))
    made.load_state_dict(state)
    return made


@torch.inference_mode()
def _logits(course: Course, head: ClassificationHead, features: Matrix) -> Matrix:
    """What the exported model answers: computed as precisely as it would."""
    head, device = head.to(course.world.device), course.world.device
    made = []
    for part in torch.from_numpy(features).split(AT_ONCE):
        with course.compute.autocast():
            made.append(head.of_features(part.to(device)).float().cpu())
    return torch.cat(made).numpy()


def neighbour_heads(course: Course, task: Classification, cache: Cache) -> Iterator[Candidate]:
    """k-NN for each of `NEIGHBOURS` that the training rows are enough for."""
    targets, device = task.cohort.targets, course.world.device
    train, values = torch.from_numpy(cache.train), torch.from_numpy(targets.values[course.rows])
    counts = [k for k in NEIGHBOURS if k <= len(train)] or [len(train)]
    queries = torch.from_numpy(cache.judged)
    there = (queries.to(device), train.to(device), values.to(device))
    shares = neighbour_shares(there[0], there[1], there[2], counts).cpu()

    def head(k: int) -> nn.Module:
        sizes: dict[str, Any] = {"rows": len(train), "classes": len(targets.names), "k": k}
        width = course.start.encoder.width
        made = NeighbourHead(width=width, multilabel=targets.multilabel, **sizes)
        made.remember(train, values)
        return made

    for k, share in zip(counts, shares, strict=True):
        logits = share_logits(share, multilabel=targets.multilabel).numpy()
        yield Candidate(k, logits, partial(head, k))
