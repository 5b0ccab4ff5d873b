"""What a transformer's weights are before it has learned anything."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw_matrices(module: nn.Module) -> None:
    """Xavier's uniform law (Glorot and Bengio, 2010) for every linear layer, zero biases.

    As in MAE (arXiv 2111.06377). With DeiT's truncated normal of std .02 a head of four layers
    leaves hardly any gradient, and group-masked pretraining needs two to three times as many epochs
    (docs/LOG.md).

    >>> layer = nn.Linear(8, 16)
    >>> draw_matrices(layer)
    >>> bool((layer.weight.abs() <= 0.5).all()), bool(layer.bias.any())  # sqrt(6 / (8 + 16))
    (True, False)
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def sine_cosine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Where a patch lies, as sines and cosines of its column and row: float32 ``[N, width]``.

    A quarter of the width each, of wavelengths from 2 pi up to 10,000 times that (arXiv 1706.03762;
    in two dimensions as in MoCo v3, arXiv 2104.02057, and MAE); what four does not divide is 0.

    >>> sine_cosine_positions((2, 3), 8)[4, ::2]  # second row, second column
    tensor([0.8415, 0.5403, 0.8415, 0.5403])
    """
    quarter = width // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter) / max(quarter, 1))
    rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    waves = [
        wave(place.flatten()[:, None] * frequencies)
        for place in (columns, rows)
        for wave in (torch.sin, torch.cos)
    ]
    rest = torch.zeros(grid[0] * grid[1], width - 4 * quarter)
    return torch.cat([*waves, rest], 1)
