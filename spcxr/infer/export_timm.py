"""The encoder as a folder that ``timm.create_model("local-dir:DIR", pretrained=True)`` loads."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import Tensor

from spcxr.infer.export_check import Check
from spcxr.infer.export_files import Job, held_against
from spcxr.infer.export_graphs import Exported
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import convert_channels, load_encoder_weights, save_model_folder

FILTERS = "patch_embed.proj.weight"


def with_channels(encoder: VisionTransformer, channels: int) -> VisionTransformer:
    """The same encoder for images of 1 or 3 channels, by `convert_channels`.

    >>> import torch
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> grey, rgb = torch.rand(1, 1, 32, 32), with_channels(encoder, 3)
    >>> torch.allclose(rgb(grey.expand(-1, 3, -1, -1)), encoder(grey), atol=1e-5)
    True
    """
    if channels == encoder.channels:
        return encoder
    made = _like(encoder, channels)
    state = encoder.state_dict()
    made.load_state_dict(state | {FILTERS: convert_channels(state[FILTERS], channels)})
    return made


def _like(encoder: VisionTransformer, channels: int) -> VisionTransformer:
    """An encoder of the same build, frozen, its weights not yet those."""
    made = VisionTransformer(
        image_px=encoder.image_px,
        patch_px=encoder.patch_px,
        channels=channels,
        width=encoder.width,
        depth=encoder.depth,
        heads=encoder.heads,
        mlp_ratio=encoder.mlp_ratio,
    )
    return made.eval().requires_grad_(False)


def write_timm(exported: Exported, job: Job) -> list[Check]:
    """Write the folder (a model folder of ours as well) and read it back: by timm where it can be
    imported, else as we read timm's files."""
    encoder, numbers = with_channels(exported.encoder, job.channels), exported.normalisation
    save_model_folder(
        job.folder,
        encoder,
        preprocess=exported.config["preprocess"],
        mean=numbers.mean,
        std=numbers.std,
        task=None,
        head=None,
        provenance=job.facts["provenance"],
    )
    reader, by = _read_back(job.folder, encoder)

    def answers(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = reader.forward_features((images - numbers.mean) / numbers.std)
        return tokens[:, 0], tokens[:, 1:].unflatten(1, encoder.grid)

    return [held_against("model.safetensors", exported.graphs[0], job, answers, by)]


def _read_back(folder: Path, encoder: VisionTransformer) -> tuple[Any, str]:
    """A model that read the folder anew, and whose it is."""
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision's, beside another build of torch
        again = _like(encoder, encoder.channels)
        load_encoder_weights(again, folder / "model.safetensors")
        return again, f"spcxr's reader of timm files, for timm cannot be imported: {_line(error)}"
    made = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    return made, f"timm {timm.__version__}"


def _line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
