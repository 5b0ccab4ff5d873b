"""The model card on a report's page: the same statements as ``model_card.md``, and the facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spcxr.evaluate.report import Section
from spcxr.infer.predict import TrainedModel
from spcxr.train.model_card import STATEMENTS

# Of the weights' provenance, in words; what is not named here stands under its own name.
NAMES = {
    "recipe": "trained by",
    "init": "started from",
    "data": "training data (hash)",
    "phantoms": "drawn phantoms among them",
    "training_rows": "training images",
    "training_patients": "training patients",
    "validation": "best validation",
}


def card_section(trained: TrainedModel) -> Section:
    """What the model is, what it was made of, what it is for and what it is not.

    Of the training data it tells what the weights carry (``config.json``): how many images, of how
    many patients where that was written, the hash of the store. Nothing is guessed: a fact that is
    not there is not in the table.
    """
    config, encoder = trained.config, trained.model.encoder
    grey = trained.normalisation
    facts = {
        "task": task_of(trained),
        "labels": ", ".join(trained.names),
        "encoder": f"vision transformer of {encoder.depth} blocks, width {encoder.width}, "
        f"{encoder.heads} heads, patches of {encoder.patch_px} px",
        "input": " x ".join(map(str, (encoder.channels, *encoder.image_px))),
        "preprocessing": words(config["preprocess"]),
        "grey levels": f"mean {grey.mean:.4g}, deviation {grey.std:.4g}",
    }
    if (task := config["task"]).get("attend") == "lungs":
        greys = ", their greys equalised" if task.get("equalise") else ""
        facts["read"] = f"the patches of the lungs alone{greys}"
    for name, value in config.get("provenance", {}).items():
        facts[NAMES.get(name, name.replace("_", " "))] = words(value)
    facts["made with"] = f"spcxr {config.get('spcxr_version', 'of unknown version')}"
    return Section("Model card", facts=facts | STATEMENTS)


def task_of(trained: TrainedModel) -> str:
    """What is predicted, in words."""
    if trained.kind == "segment":
        return "outlines of structures"
    return "several findings an image" if trained.multilabel else "one class of many"


def words(value: Any) -> str:
    """A value of ``config.json`` as text.

    >>> words({"preset": "minmax", "size_px": 224}), words(False), words(0.98765), words(None)
    ('preset minmax, size_px 224', 'no', '0.9877', 'none')
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {words(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(words(part) for part in value)
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)
