"""The reconstruction loss, forward and backward, against the formula in eager torch.

    pytest benchmarks/bench_masked_reconstruction_loss.py

64 images of 224x224, 50 to 75 % of the pixels hidden, predictions in float32. `whole`: uint8 images
at native size. `cropped`: the target is resampled from 256x256 again, where the eager formula has
the clean views at hand for nothing. One thread, and all of them. Peak memory is what a call
allocates beyond its inputs, predictions and clean views included in those.
"""

import pytest
import torch
from record import CORES

from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.patches import patchify
from spcxr.ops.views import Views, clean_images, whole_views

IMAGES, PATCH, SIDE = 64, 16, 224
cases = pytest.mark.parametrize("case", ["whole", "cropped"])
threads = pytest.mark.parametrize("threads", sorted({1, CORES}), indirect=True)


def views_of(case: str) -> Views:
    side = SIDE if case == "whole" else 256
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 1, side, side), generator=draw, dtype=torch.uint8)
    views = whole_views(pixels, patch_px=PATCH, scale=1 / (255 * 0.25), shift=-2.0)
    if case == "whole":
        return views
    boxes, flip = sample_crops(torch.arange(IMAGES), seed=0, epoch=0, source_px=side)
    return Views(pixels, boxes, flip, views.scale, views.shift, (SIDE, SIDE), PATCH)


def inputs(case: str, device: str):
    views = views_of(case).to(device)
    law = Corruption(alien_ratio=0.0)
    fill = sample_fill(
        torch.arange(IMAGES), law, seed=0, epoch=0, size=(SIDE, SIDE), patch_px=PATCH
    )
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(IMAGES, (SIDE // PATCH) ** 2, PATCH**2, generator=draw)
    return rows.to(device).requires_grad_(), views, fill.mask.to(device)


def eager(rows: torch.Tensor, clean: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As the ancestors' objective has it: all pixels, times the mask."""
    error = (rows - patchify(clean, PATCH)).abs() * patchify(mask[:, None].float(), PATCH)
    return error.sum() / mask.sum()


def both_ways(loss: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss, rows)[0]


@cases
@threads
def test_fused(timed, require_backend, device, case, threads):
    require_backend("masked_reconstruction_loss", "native")
    rows, views, mask = inputs(case, device)

    def call():
        return both_ways(masked_reconstruction_loss(rows, views, mask, backend="native"), rows)

    made, wanted = call(), both_ways(eager(rows, clean_images(views), mask), rows)
    torch.testing.assert_close(made[0], wanted[0], rtol=1e-5, atol=0)
    assert torch.isclose(made[1], wanted[1], rtol=1e-4, atol=1e-9).float().mean() > 0.999
    del made, wanted  # not at hand while memory is measured
    timed(
        call,
        what="native",
        group=f"{case}, {threads} threads",
        images=IMAGES,
        memory=True,
    )
    timed.target("speed", at_least=3, of="eager")
    timed.target("peak_mib", at_most=0.5, of="eager")


@cases
@threads
def test_eager(timed, device, case, threads):
    rows, views, mask = inputs(case, device)
    clean = clean_images(views)
    timed(
        lambda: both_ways(eager(rows, clean, mask), rows),
        what="eager",
        group=f"{case}, {threads} threads",
        images=IMAGES,
        memory=True,
    )
