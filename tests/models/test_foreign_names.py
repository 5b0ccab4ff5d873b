"""Names and shapes as timm and transformers really have them (golden), read and written.

The golden file lists the state dicts of models that those libraries built; see "made by" in it.
"""

import json
from pathlib import Path

import pytest
import torch

from spcxr.models import foreign
from spcxr.models.vit import VIT_SIZES, build_vit

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "foreign_names.json").read_text())
# Their model -> our size, the side of its images and patches, what it holds beside an encoder.
MODELS = {
    **{f"timm {size}_patch16_224": (size, 224, 16, ("head.",)) for size in VIT_SIZES},
    "timm vit_small_patch14_dinov2": ("vit_small", 518, 14, ()),
    "transformers ViTModel": ("vit_small", 224, 16, ("pooler.",)),
    "transformers ViTForImageClassification": ("vit_small", 224, 16, ("classifier.",)),
    "transformers Dinov2Model": ("vit_base", 518, 14, ("mask_token",)),
    "transformers ViTMAEForPreTraining": ("vit_small", 224, 16, ("decoder.",)),
}


def theirs(name):
    """Name -> shape, each block written out."""
    model = GOLDEN[name]
    shapes = dict(model["rest"])
    for number in range(model["blocks"]):
        prefix = model["prefix"].format(number)
        shapes |= {prefix + key: shape for key, shape in model["block"].items()}
    return shapes


def ours(name):
    size, side, patch_px, _ = MODELS[name]
    with torch.device("meta"):
        encoder = build_vit(size, image_px=side, patch_px=patch_px, channels=3)
    return {key: list(value.shape) for key, value in encoder.state_dict().items()}


def test_every_model_of_the_golden_file_is_read():
    assert set(GOLDEN) == {"made by", *MODELS}


@pytest.mark.parametrize("size", VIT_SIZES)
def test_what_we_write_is_what_timm_looks_for(size):
    name = f"timm {size}_patch16_224"
    wanted = {k: v for k, v in theirs(name).items() if not k.startswith("head.")}
    assert ours(name) == wanted


@pytest.mark.parametrize("name", MODELS)
def test_their_names_become_ours(name, tmp_path, monkeypatch):
    shapes, beside = theirs(name), MODELS[name][3]
    # One number each, shown as often as needed: ViT-L takes no gigabyte.
    state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
    monkeypatch.setattr(foreign, "read_checkpoint", lambda path: {"state_dict": state})
    found = foreign.read_foreign(tmp_path / "w.pth")
    assert {key: list(value.shape) for key, value in found.state.items()} == ours(name)
    assert len(found.aside) == len([k for k in shapes if any(part in k for part in beside)])
    assert all(any(part in key for part in beside) for key in found.aside)
