"""`load_encoder`: a trained encoder for other programs, with the preprocessing of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.data.presets import Preprocess
from spcxr.infer.normalise import Normalisation, network_input
from spcxr.models.fast import for_inference
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import load_model_folder
from spcxr.ops.patches import patch_grid
from spcxr.train.device import pick_device, pick_precision

GREY = Normalisation(0.0, 1.0)  # pixels in [0, 1] as they are
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Features(NamedTuple):
    """What an encoder makes of images: ``cls [B, D]`` and ``patches [B, Gh, Gw, D]``, float32."""

    cls: Tensor
    patches: Tensor


class Encoder(nn.Module):
    """A frozen encoder, and what its weights say of the images they are for."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        vit: VisionTransformer,
        preprocess: Preprocess,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.vit = vit.eval().requires_grad_(False)
        self.preprocess, self.dtype = preprocess, dtype
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._fast: list[VisionTransformer] = [for_inference(self.vit, dtype)]

    @torch.no_grad()
    def encode(self, squares: NDArray[Any] | Tensor) -> Features:
        """Prepared images ``[B, S, S]`` uint8 or uint16 (`Prepared.pixels`) -> `Features`.

        They are resampled to the encoder's size and normalised as its training images were.
        """
        grey = network_input(squares, self.vit.image_px, GREY, self.mean.device)
        images = (grey - self.mean) / self.std
        tokens = self._fast[0].forward_features(images.to(self.dtype)).float()
        grid = patch_grid(images.shape[2], images.shape[3], self.vit.patch_px)
        return Features(tokens[:, 0], tokens[:, 1:].unflatten(1, grid))


def load_encoder(path: str | Path, device: str = "auto", dtype: str = "auto") -> Encoder:
    """Load the encoder of a run or a model folder."""
    loaded = load_model_folder(path)
    where = pick_device(device)
    statistics = loaded.config["pretrained_cfg"]
    encoder = Encoder(
        loaded.encoder,
        Preprocess.from_dict(loaded.config["preprocess"]),
        tuple(statistics["mean"]),
        tuple(statistics["std"]),
        DTYPES[pick_precision(dtype, where)],
    )
    return encoder.to(where)
