"""Small untrained models in folders, to be exported."""

import torch

from spcxr.data.presets import Preprocess
from spcxr.models.decoder import DECODERS, PatchDecoder
from spcxr.models.heads import ClassificationHead
from spcxr.models.neighbours import NeighbourHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder

LUNG = {"kind": "segment", "structures": ["lung"]}
FINDINGS = {"kind": "classify", "labels": ["covid", "pneumonia"], "multilabel": True}


def encoder(image_px=(32, 48), channels=1, depth=4, width=24, heads=3, patch_px=8):
    torch.manual_seed(depth + channels)
    made = VisionTransformer(
        image_px=image_px,
        patch_px=patch_px,
        channels=channels,
        width=width,
        depth=depth,
        heads=heads,
    )
    # Far from the start, where hardly anything depends on the image.
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made.eval().requires_grad_(False)


def save(folder, model, task=None, head=None):
    """A run folder whose ``model/`` holds it."""
    save_model_folder(
        folder / "model",
        model,
        preprocess=Preprocess(size_px=64).to_dict(),
        mean=0.25,
        std=0.125,
        task=task,
        head=head,
        provenance={
            "recipe": "test",
            "init": "/home/somebody/runs/a",
            "training_rows": 12,
            "phantoms": True,
        },
    )
    return folder


def classifier(folder, **task):
    head = ClassificationHead(width=24, classes=2)
    torch.nn.init.normal_(head.fc.weight)
    return save(folder, encoder(), FINDINGS | task, head)


def neighbours(folder):
    head = NeighbourHead(width=24, rows=5, classes=2, k=2, multilabel=True)
    return save(folder, encoder(), FINDINGS | {"method": "knn", "neighbours": 2}, head)


def segmenter(folder, decoder="unetr", **task):
    head = (
        DECODERS[decoder](width=24, patch_px=8, out_channels=2, base_channels=4)
        if decoder in DECODERS
        else PatchDecoder(width=24, out_channels=2)
    )
    said = LUNG | {"base_channels": 4, "decoder": decoder} | task
    return save(folder, encoder((32, 32)), said, head)
