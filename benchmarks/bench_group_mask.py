"""Microseconds an image of group_mask, against the ancestors' per-image Python loop.

    pytest benchmarks/bench_group_mask.py

One CPU thread. Targets at 14x14, native: at most 10 us an image on one core, and 100 times the
speed of the loop. With a GPU the CUDA and Triton kernels too (a batch's time over its images).
"""

import numpy as np
import pytest
import torch

from spcxr.ops import dispatch
from spcxr.ops.group_mask import group_mask, reference

IMAGES = 256
PATCHES = (14, 14)


def named(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


grids = pytest.mark.parametrize("grid", [PATCHES, (224, 224)], ids=named)


def loop(images: int, grid: tuple[int, int], draw: np.random.Generator) -> np.ndarray:
    """The law with one numpy draw a number and a full count a rectangle, as the ancestors do."""
    height, width = grid
    masks = np.zeros((images, height, width), dtype=bool)
    for mask in masks:
        target = draw.uniform(0.5, 0.75) * height * width
        while mask.sum() < target:
            top, left = draw.integers(0, height - 1), draw.integers(0, width - 1)
            rows = round(draw.uniform(1, 0.3 * height))
            columns = round(draw.uniform(1, 0.3 * width))
            mask[top : top + rows, left : left + columns] = True
    return masks


def assert_correct(backend: str, device: str, grid: tuple[int, int]) -> None:
    ids = torch.arange(16)
    made = group_mask(ids.to(device), seed=1, epoch=2, grid=grid, backend=backend)
    expected = reference(ids, seed=1, epoch=2, grid=grid)
    assert torch.equal(made.blocks.cpu(), expected.blocks)
    assert torch.equal(made.mask.cpu(), expected.mask)


@grids
@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_group_mask(timed, require_backend, device, backend, grid):
    require_backend("group_mask", backend)
    assert_correct(backend, device, grid)
    ids = torch.arange(IMAGES, device=device)
    # The plain-torch reference waits for the device, so no CUDA graph can hold it.
    timed(
        lambda: group_mask(ids, seed=1, epoch=2, grid=grid, backend=backend),
        what=backend,
        group=named(grid),
        images=IMAGES,
        graph=False if backend == "reference" else None,
    )
    if (backend, device, grid) == ("native", "cpu", PATCHES):
        timed.target("median_us_an_image", at_most=10)
        timed.target("speed", at_least=100, of="per-image loop")


@grids
@pytest.mark.parametrize("device", ["cpu"])
def test_loop(timed, grid):
    draw = np.random.default_rng(0)
    assert abs(loop(200, grid, draw).mean() - 0.63) < 0.03
    timed(
        lambda: loop(IMAGES, grid, draw),
        what="per-image loop",
        group=named(grid),
        images=IMAGES,
    )
