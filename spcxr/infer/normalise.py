"""Stored pixels -> what a network reads: its size, and the mean and deviation of its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from spcxr.ops.crop_resize import crop_resize


@dataclass(frozen=True)
class Normalisation:
    """``(x - mean) / std`` of pixels in [0, 1]: the pair that the weights were trained with."""

    mean: float
    std: float

    def of_grey(self, grey: Tensor, channels: int) -> Tensor:
        """Grey ``[B, 1, h, w]`` in [0, 1] -> what a network of 1 or 3 channels (grey given thrice)
        reads, ``[B, channels, h, w]``.

        >>> Normalisation(0.5, 0.25).of_grey(torch.ones(1, 1, 1, 1), 3).flatten()
        tensor([2., 2., 2.])
        """
        return ((grey - self.mean) / self.std).expand(-1, channels, -1, -1)


GREY = Normalisation(0.0, 1.0)  # pixels in [0, 1] as they are


def network_input(
    pixels: NDArray[Any] | Tensor,
    size: tuple[int, int],
    normalisation: Normalisation,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Stored pixels -> what the network reads.

    Parameters
    ----------
    pixels
        ``[B, S, S]`` uint8 or uint16, the whole range of the type.
    size
        (height, width) of the result: the encoder's ``image_px``. The whole image is resampled
        with the antialiased bilinear filter of `crop_resize`.

    Returns
    -------
    ``[B, 1, h, w]`` float32, normalised.

    >>> pixels = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    >>> float(network_input(pixels, (2, 2), Normalisation(0.5, 0.25))[0, 0, 0, 0])
    2.0
    """
    images = torch.as_tensor(pixels).to(device)[:, None]
    white = float(torch.iinfo(images.dtype).max)
    grey = crop_resize(images, None, None, size)
    return (grey / white - normalisation.mean) / normalisation.std
