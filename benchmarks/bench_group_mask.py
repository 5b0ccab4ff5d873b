"""Microseconds an image of group_mask, against the ancestors' per-image Python loop.

    python benchmarks/bench_group_mask.py

One CPU thread; target at 14x14: at most 10 us an image. On a machine with a GPU the CUDA and
Triton kernels too (their figure is the batch's time divided by its images).
"""

import functools

import numpy as np
import torch
from harness import time_call, write

from spcxr.ops import dispatch
from spcxr.ops.group_mask import group_mask, reference

IMAGES = 256
GRIDS = ((14, 14), (224, 224))
TARGET_US = 10.0  # an image at 14x14, native on one core


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


def check(backend: str, device: str, grid: tuple[int, int]) -> None:
    """No timing of a wrong answer."""
    ids = torch.arange(16)
    made = group_mask(ids.to(device), seed=1, epoch=2, grid=grid, backend=backend)
    expected = reference(ids, seed=1, epoch=2, grid=grid)
    assert torch.equal(made.blocks.cpu(), expected.blocks), (backend, device, grid)
    assert torch.equal(made.mask.cpu(), expected.mask), (backend, device, grid)


def row(name: str, grid: tuple[int, int], call, device: str) -> dict:
    timing = time_call(call, device=device)
    scale = 1e6 / IMAGES
    return {
        "what": name,
        "grid": f"{grid[0]}x{grid[1]}",
        "images": IMAGES,
        "min_us_an_image": timing.min_s * scale,
        "median_us_an_image": timing.median_s * scale,
        "repeats": timing.repeats,
    }


def measure(device: str) -> list[dict]:
    rows = []
    ids = torch.arange(IMAGES, device=device)
    for grid in GRIDS:
        for backend in dispatch.BACKENDS:
            reason = dispatch.unavailable("group_mask", backend, device)
            if reason is not None:
                print(f"{backend} on {device}: {reason}")
                continue
            check(backend, device, grid)
            call = functools.partial(group_mask, ids, seed=1, epoch=2, grid=grid, backend=backend)
            rows.append(row(backend, grid, call, device))
        if device == "cpu":
            draw = np.random.default_rng(0)
            assert abs(loop(200, grid, draw).mean() - 0.63) < 0.03
            call = functools.partial(loop, IMAGES, grid, draw)
            rows.append(row("per-image loop", grid, call, device))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = measure("cpu")
    write("group_mask", rows)
    native = [r for r in rows if r["what"] == "native" and r["grid"] == "14x14"]
    for r in native:
        held = "held" if r["median_us_an_image"] <= TARGET_US else "MISSED"
        print(f"target {TARGET_US} us an image at 14x14, one core: {held}")
    if torch.cuda.is_available():
        write("group_mask", measure("cuda"), "cuda")
