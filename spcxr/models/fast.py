"""The encoder for use: the same numbers without gradients, by the fastest kernels at hand."""

from __future__ import annotations

import copy

import torch

from spcxr.models.vit import VisionTransformer


def for_inference(encoder: VisionTransformer, dtype: torch.dtype) -> VisionTransformer:
    """A frozen copy of an encoder in eval mode, its weights and activations in ``dtype``.

    Every method answers as the encoder's own does (no gradients); the encoder given is left as
    it is.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> for_inference(encoder, torch.bfloat16)(torch.zeros(1, 1, 32, 32).bfloat16()).dtype
    torch.bfloat16
    """
    return copy.deepcopy(encoder).eval().requires_grad_(False).to(dtype)
