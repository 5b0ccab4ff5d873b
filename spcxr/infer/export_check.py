"""An exported file is held against the model it was made from, before anyone is told it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spcxr.data.phantom import draw
from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError
from spcxr.infer.inputs import Input
from spcxr.infer.normalise import GREY, network_input
from spcxr.infer.reading import Refused, quiet, read_prepared

LIMIT = 1e-4  # of the largest value: float32 added up in another order differs by 1e-6 or so
DRAWN = 3  # phantoms, where no files are given
SIDE = 128  # px, of a phantom


@dataclass(frozen=True)
class Check:
    """How far a file's outputs lie from the model's: by name, relative to the largest value."""

    file: str
    differences: dict[str, float]
    by: str

    def __str__(self) -> str:
        said = ", ".join(f"{name} {value:.1e}" for name, value in self.differences.items())
        return f"{self.file}: largest difference {said} (of the largest value; by {self.by})"


def check_images(
    files: Sequence[str | Path], config: dict[str, Any], size: tuple[int, int]
) -> Tensor:
    """Grey images ``[B, 1, h, w]`` float32 in [0, 1]: of files, or drawn phantoms where none are.

    Raises
    ------
    SpcxrError
        a file that is no radiograph or cannot be read.

    >>> check_images([], {}, (32, 48)).shape
    torch.Size([3, 1, 32, 48])
    """
    if not files:
        drawn = [draw(i, size_px=SIDE).pixels[:SIDE].astype(np.float64) for i in range(DRAWN)]
        square = [(x - x.min()) / max(np.ptp(x), 1.0) * 255 for x in drawn]
        pixels = np.stack(square).round().astype(np.uint8)
        return network_input(pixels, size, GREY)
    preprocess = Preprocess.from_dict(config["preprocess"])
    found = []
    with quiet():
        for path in map(Path, files):
            ready = read_prepared(Input(path, path.stem), preprocess)
            if isinstance(ready, Refused):
                raise SpcxrError(f"{path}: {ready.reason}; give another --images")
            found.append(ready.prepared.pixels)
    return network_input(np.stack(found), size, GREY)


def compare(
    file: str, names: Sequence[str], wanted: Sequence[Tensor], got: Sequence[Tensor], by: str
) -> Check:
    """The differences, or a refusal.

    Raises
    ------
    SpcxrError
        outputs of another shape, not finite, or further away than `LIMIT`.

    >>> str(compare("a.onnx", ["cls"], [torch.ones(2)], [torch.ones(2)], "onnxruntime"))
    'a.onnx: largest difference cls 0.0e+00 (of the largest value; by onnxruntime)'
    """
    differences = {}
    for name, one, other in zip(names, wanted, got, strict=True):
        if one.shape != other.shape:
            raise SpcxrError(
                f"{file}: {name} is {list(other.shape)}, the model's {list(one.shape)}; not written"
            )
        scale = float(one.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
        differences[name] = float((one - other).abs().max()) / scale
        if not differences[name] <= LIMIT:  # NaN is no number within it
            raise SpcxrError(
                f"{file}: {name} is {differences[name]:.1e} of its largest value away from the "
                f"model's, more than {LIMIT:.0e}; not written: try another --opset or torch"
            )
    return Check(file, differences, by)
