"""The fused input path against what a user would write: eager torch, and torch.compile of it.

    pytest benchmarks/bench_masked_patch_gather.py

One CPU thread, 256 images. `visible`: 224x224 uint8, 98 of 196 patches kept, to bfloat16; the
contenders get the kept patches' numbers for nothing. `noise`: pixel rectangles over 50 to 75 % of
each image filled with N(0, 1). `cropped`: random boxes of 256x256 resampled to 224x224 and
flipped, against crop, `F.interpolate(antialias=True)` and flip image by image. `step`: the share of
one pretraining step (ViT-S/16, 16 images, all threads) that drawing, cropping and corrupting take.
"""

import time

import pytest
import torch
import torch.nn.functional as F
from record import CORES

from spcxr.models.vit import build_vit
from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.objectives.gmml import build_gmml
from spcxr.ops.masked_patch_gather import masked_patch_gather, visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.patches import patchify
from spcxr.ops.views import Views, whole_views
from spcxr.train.optim import build_adamw, set_rates, take_step

IMAGES, PATCH, KEPT = 256, 16, 98
SCALE, SHIFT = 1 / (255 * 0.25), -2.0
HALF = torch.bfloat16
COMPILED = ["eager", "torch.compile"]


def images(side: int = 224, count: int = IMAGES) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, side, side), generator=draw, dtype=torch.uint8)


def written_as(how: str, formula):
    """The formula as it stands, or compiled for these shapes."""
    if how == "eager":
        return formula
    torch._dynamo.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False)


def close(made: torch.Tensor, wanted: torch.Tensor, levels: float = 0.02) -> None:
    """In bfloat16, values of up to 4: equal to rounding, or to so many grey levels."""
    torch.testing.assert_close(made.float(), wanted.float(), rtol=2**-7, atol=levels * SCALE)


# --- visible patches alone ------------------------------------------------------------------


def kept() -> tuple[torch.Tensor, torch.Tensor]:
    """A mask [B, 14, 14] that hides half of each image, and the numbers of the kept patches."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.rand(IMAGES, 196, generator=draw).argsort(1)[:, :KEPT].sort(1).values
    mask = torch.ones(IMAGES, 196, dtype=torch.bool).scatter_(1, ids, False)
    return mask.view(IMAGES, 14, 14), ids


def visible_formula(pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = patchify(pixels.float() * SCALE + SHIFT, PATCH)
    return rows.gather(1, ids[..., None].expand(-1, -1, PATCH**2)).to(HALF)


def test_visible(timed, require_backend, device):
    require_backend("visible_patch_gather", "native")
    views = whole_views(images(), patch_px=PATCH, scale=SCALE, shift=SHIFT).to(device)
    mask, ids = (t.to(device) for t in kept())
    rows = IMAGES * KEPT

    def call():
        return visible_patch_gather(views, mask, rows=rows, dtype=HALF, backend="native")

    close(call().tokens.view(IMAGES, KEPT, -1), visible_formula(views.pixels, ids))
    timed(
        call,
        what="native",
        group="visible",
        images=IMAGES,
        nbytes=rows * PATCH**2 * 3,
    )
    timed.target("speed", at_least=50, of="eager")
    timed.target("speed", at_least=10, of="torch.compile")


@pytest.mark.parametrize("how", COMPILED)
def test_visible_otherwise(timed, device, how):
    pixels, (_, ids) = images().to(device), kept()
    call, ids = written_as(how, visible_formula), ids.to(device)
    close(call(pixels, ids), visible_formula(pixels, ids))
    timed(lambda: call(pixels, ids), what=how, group="visible", images=IMAGES)


# --- corrupted with noise -------------------------------------------------------------------


def noisy(count: int = IMAGES):
    """The fill of the first images; an image's own does not depend on how many there are."""
    law, ids = Corruption(alien_ratio=0.0), torch.arange(count)
    return sample_fill(ids, law, seed=0, epoch=0, size=(224, 224), patch_px=PATCH)


def noise_formula(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    clean = pixels.float() * SCALE + SHIFT
    return patchify(torch.where(mask, torch.randn_like(clean), clean), PATCH).to(HALF)


def test_noise(timed, require_backend, device):
    require_backend("masked_patch_gather", "native")
    views = whole_views(images(), patch_px=PATCH, scale=SCALE, shift=SHIFT).to(device)
    fill = noisy().to(device)
    few = whole_views(images()[:8], patch_px=PATCH, scale=SCALE, shift=SHIFT)

    def call():
        return masked_patch_gather(views, fill, dtype=HALF, backend="native")

    close(call()[:8].cpu(), masked_patch_gather(few, noisy(8), dtype=HALF, backend="reference"))
    timed(
        call,
        what="native",
        group="noise",
        images=IMAGES,
        nbytes=views.pixels.numel() * 4,  # pixel and mask in, two bytes out
    )
    timed.target("speed", at_least=10, of="torch.compile")


@pytest.mark.parametrize("how", COMPILED)
def test_noise_otherwise(timed, device, how):
    pixels, mask = images().to(device), noisy().mask[:, None].to(device)
    call = written_as(how, noise_formula)
    seen = ~patchify(mask, PATCH)
    close(call(pixels, mask)[seen], noise_formula(pixels, mask)[seen])
    timed(lambda: call(pixels, mask), what=how, group="noise", images=IMAGES)


# --- cropped and resampled ------------------------------------------------------------------


def crops() -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of whole pixels, which the contender needs."""
    boxes, flip = sample_crops(torch.arange(IMAGES), seed=0, epoch=0, source_px=256)
    return boxes.floor().clamp(min=1), flip


def crop_each(pixels: torch.Tensor, boxes: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    views = []
    for image, (top, left, high, wide), mirror in zip(
        pixels, boxes.int().tolist(), flip.tolist(), strict=True
    ):
        box = image[None, :, top : top + high, left : left + wide]
        view = F.interpolate(box, size=(224, 224), mode="bilinear", antialias=True)
        views.append(view.flip(3) if mirror else view)
    return patchify(torch.cat(views).float() * SCALE + SHIFT, PATCH).to(HALF)


def test_cropped(timed, require_backend, device):
    require_backend("masked_patch_gather", "native")
    pixels, (boxes, flip) = images(256), crops()
    whole = whole_views(pixels, patch_px=PATCH, scale=SCALE, shift=SHIFT)
    views = Views(pixels, boxes, flip, whole.scale, whole.shift, (224, 224), PATCH)
    small = views._replace(**{n: getattr(views, n)[:16] for n in views._fields[:5]})
    wanted = masked_patch_gather(small, dtype=HALF, backend="reference")
    views = views.to(device)

    def call():
        return masked_patch_gather(views, dtype=HALF, backend="native")

    close(call()[:16].cpu(), wanted)
    timed(
        call,
        what="native",
        group="cropped",
        images=IMAGES,
        nbytes=int((boxes[:, 2] * boxes[:, 3]).sum()) + IMAGES * 224 * 224 * 2,
    )
    timed.target("speed", at_least=8, of="F.interpolate")


def test_cropped_otherwise(timed, device):
    """The contender's filter stays inside the box, ours may look one pixel past its edge."""
    pixels, (boxes, flip) = images(256), crops()
    whole = whole_views(pixels[:16], patch_px=PATCH, scale=SCALE, shift=SHIFT)
    views = Views(pixels[:16], boxes[:16], flip[:16], whole.scale, whole.shift, (224, 224), PATCH)
    ours = masked_patch_gather(views, backend="reference")
    made = crop_each(pixels[:16], boxes[:16], flip[:16]).float()
    assert ((made - ours).abs() < 1.5 * SCALE).float().mean() > 0.97
    pixels = pixels.to(device)
    timed(
        lambda: crop_each(pixels, boxes, flip),
        what="F.interpolate",
        group="cropped",
        images=IMAGES,
    )


# --- a step of pretraining ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [CORES], indirect=True)
@pytest.mark.parametrize("device", ["cpu"])
def test_share_of_a_step(timed, require_backend):
    require_backend("masked_patch_gather", "native")
    count, pixels = 16, images(256, 16)
    objective = build_gmml(build_vit("vit_small", image_px=224))
    optimizer = build_adamw(objective)
    set_rates(optimizer, lr=1e-4, weight_decay=0.05)
    ids, levels, seconds = torch.arange(count), torch.ones(count), {"input": 0.0, "all": 0.0}

    def step(epoch: int) -> float:
        began = time.perf_counter()
        boxes, flip = sample_crops(ids, seed=0, epoch=epoch, source_px=256)
        views = Views(pixels, boxes, flip, levels * SCALE, levels * SHIFT, (224, 224), PATCH)
        fill = sample_fill(ids, Corruption(), seed=0, epoch=epoch, size=(224, 224), patch_px=PATCH)
        rows = masked_patch_gather(views, fill, backend="native")
        seconds["input"] += time.perf_counter() - began
        loss = masked_reconstruction_loss(objective.rebuild(rows, views.grid), views, fill.mask)
        loss.backward()
        take_step(optimizer, loss, clip=3.0)
        seconds["all"] += time.perf_counter() - began
        return loss.item()

    losses = [step(0), step(1)]  # the warm-up
    assert all(0 < loss < 10 for loss in losses)
    seconds.update(input=0.0, all=0.0)
    epochs = iter(range(2, 100))
    timed(lambda: step(next(epochs)), what="one step", group="step", images=count, rounds=6)
    timed.row["input_share"] = seconds["input"] / seconds["all"]
    timed.target("input_share", at_most=0.03)
