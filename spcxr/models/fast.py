"""The encoder for use: the same numbers without gradients, by the fastest kernels at hand."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spcxr.models.blocks import Block
from spcxr.models.sequences import DENSE, Sequences, pack_images
from spcxr.models.vit import VisionTransformer
from spcxr.ops import dispatch
from spcxr.ops.encoder_layers import (
    MULTIPLE,
    BlockEnd,
    Norm,
    TiledLinear,
    norm_linear,
    residual_mlp,
    tiled,
)


def for_inference(encoder: VisionTransformer, dtype: torch.dtype) -> VisionTransformer:
    """A frozen copy of an encoder in eval mode, its weights and activations in ``dtype``.

    Every method answers as the encoder's own does (no gradients); the encoder given is left as
    it is. In bfloat16 on a CPU that multiplies it, blocks run by `norm_linear`, `masked_attention`
    and `residual_mlp`; elsewhere, and where a gradient is asked for, they are the encoder's own.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> for_inference(encoder, torch.bfloat16)(torch.zeros(1, 1, 32, 32).bfloat16()).dtype
    torch.bfloat16
    """
    made = copy.deepcopy(encoder).requires_grad_(False).to(dtype)
    made.blocks = nn.ModuleList(FastBlock(block) for block in made.blocks)
    made.__class__ = FastEncoder  # to build one anew would draw weights only to replace them
    return made.eval()


class FastBlock(Block):
    """A block in use, with its weights tiled beside the plain ones, under timm's names."""

    qkv_tiles: Tensor
    proj_tiles: Tensor
    fc1_tiles: Tensor
    fc2_tiles: Tensor

    def __init__(self, block: Any) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.mlp, self.drop_path = block.mlp, block.drop_path
        layers = {
            "qkv": self.attn.qkv,
            "proj": self.attn.proj,
            "fc1": self.mlp.fc1,
            "fc2": self.mlp.fc2,
        }
        weights = [layer.weight for layer in layers.values()]
        self.tiled = (
            dispatch.unavailable("norm_linear", "native", "cpu") is None
            and all(w.dtype == torch.bfloat16 and w.device.type == "cpu" for w in weights)
            and not any(side % MULTIPLE for w in weights for side in w.shape)
        )
        for name, layer in layers.items() if self.tiled else ():
            self.register_buffer(f"{name}_tiles", tiled(layer.weight), persistent=False)

    def forward(
        self, tokens: Tensor, sequences: Sequences = DENSE, survivors: Tensor | None = None
    ) -> Tensor:
        """As `Block`."""
        if survivors is not None or self.training:
            return super().forward(tokens, sequences, survivors)
        return self._end(tokens, self._attended(tokens, sequences))

    def of_cls(self, tokens: Tensor, sequences: Sequences = DENSE) -> Tensor:
        """The cls token of each image alone, ``[B, D]``: what comes after attention is left out
        for the patches."""
        attended = self._attended(tokens, sequences)
        if sequences.cu_seqlens is None:
            return self._end(tokens[:, 0], attended[:, 0])
        rows = sequences.cu_seqlens[:-1].long()
        return self._end(tokens[rows], attended[rows])

    def _serves(self, tokens: Tensor) -> bool:
        wanted = torch.is_grad_enabled() and tokens.requires_grad
        return (
            self.tiled
            and tokens.dtype == torch.bfloat16
            and tokens.device.type == "cpu"
            and not wanted
        )

    def _attended(self, tokens: Tensor, sequences: Sequences) -> Tensor:
        if self._serves(tokens):
            layer = TiledLinear(self.qkv_tiles, self.attn.qkv.bias)
            qkv = norm_linear(tokens.contiguous(), _norm(self.norm1), layer)
        else:
            qkv = self.attn.qkv(self.norm1(tokens))
        return sequences.attend(qkv.unflatten(-1, (3, self.attn.heads, -1)))

    def _end(self, tokens: Tensor, attended: Tensor) -> Tensor:
        if self._serves(tokens):
            layers = BlockEnd(
                TiledLinear(self.proj_tiles, self.attn.proj.bias),
                _norm(self.norm2),
                TiledLinear(self.fc1_tiles, self.mlp.fc1.bias),
                TiledLinear(self.fc2_tiles, self.mlp.fc2.bias),
            )
            return residual_mlp(tokens.contiguous(), attended.contiguous(), layers)
        tokens = tokens + self.attn.proj(attended)
        branch: Tensor = self.mlp(self.norm2(tokens))
        return tokens + branch


def _norm(layer: nn.LayerNorm) -> Norm:
    return Norm(layer.weight, layer.bias, layer.eps)


class FastEncoder(VisionTransformer):
    """What `for_inference` makes."""

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        visible: Tensor | Sequence[Tensor] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """As `VisionTransformer.forward`; the last block works for the cls tokens alone."""
        if key_mask is not None or self.training:
            return super().forward(images, visible, key_mask)
        if visible is None and isinstance(images, Tensor):
            tokens, sequences = self.embed(images), DENSE
        else:
            packed = pack_images(images, visible, self.patch_px)
            (tokens, *_), sequences = self.embed_packed(*packed)
        if self.depth > 1:
            (tokens,) = self.outputs_of(tokens, [self.depth - 2], sequences)
        last: Any = self.blocks[-1]
        cls: Tensor = self.norm(last.of_cls(tokens, sequences))
        return cls
