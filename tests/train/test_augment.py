"""Augmentation: image and mask move together, nothing is invented outside the image."""

import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.train.augment import (
    DRAWS,
    IGNORE,
    Augmentation,
    plan,
    rest,
    warp_images,
    warp_masks,
)

STRONG = Augmentation(crop_scale=(0.4, 1.0), rotation_deg=25, flip_p=0.5)


def discs(count=8, size=64):
    """Bright discs on black, and the masks they are drawn from."""
    generator = torch.Generator().manual_seed(1)
    centre = 20 + 24 * torch.rand(count, 2, 1, 1, generator=generator)
    axis = torch.arange(size) + 0.5
    distance = (axis[:, None] - centre[:, 0]) ** 2 + (axis[None] - centre[:, 1]) ** 2
    masks = (distance < 12**2).to(torch.uint8)
    return masks[:, None].float(), masks


def draws(count, seed=0):
    return torch.rand(count, DRAWS, generator=torch.Generator().manual_seed(seed))


def test_image_and_mask_move_together():
    images, masks = discs()
    warps = plan(draws(len(images)), Augmentation((0.4, 1.0), 25, 0, 0, 0.5))
    moved, moved_masks = warp_images(images, warps), warp_masks(masks, warps, 64)
    inside = (moved[:, 0] > 0.5) & (moved_masks != IGNORE)
    differs = (inside != (moved_masks == 1)).float().mean((1, 2))
    assert differs.max() < 0.01  # a rim of the disc at most
    untouched = (images[:, 0] > 0.5) != (moved_masks == 1)
    assert untouched.float().mean() > 0.05  # the warps did move the discs


def test_masks_hold_only_their_own_classes():
    _, masks = discs()
    masks[:, :10] = 7
    out = warp_masks(masks, plan(draws(len(masks)), STRONG), 48)
    assert set(out.unique().tolist()) <= {0, 1, 7, IGNORE}


def test_outside_is_black_and_ignored():
    images, masks = torch.ones(4, 1, 32, 32), torch.ones(4, 32, 32, dtype=torch.uint8)
    turned = torch.full((4, DRAWS), 0.5)
    turned[:, 3] = 1.0
    warps = plan(turned, Augmentation((1.0, 1.0), 45, 0, 0, 0))
    assert (warp_masks(masks, warps, 32)[:, 0, 0] == IGNORE).all()
    assert (warp_images(images, warps)[:, 0, 0, 0] == 0).all()
    assert (warp_masks(masks, warps, 32)[:, 16, 16] == 1).all()


def test_at_rest_nothing_changes():
    images, masks = torch.rand(3, 1, 33, 33), torch.randint(0, 3, (3, 33, 33), dtype=torch.uint8)
    torch.testing.assert_close(warp_images(images, rest(3)), images, atol=1e-5, rtol=0)
    assert torch.equal(warp_masks(masks, rest(3), 33), masks)


def test_flip_is_a_mirror_and_off_by_default():
    images, numbers = torch.rand(2, 1, 32, 32), torch.full((2, DRAWS), 0.5)
    flipped = warp_images(images, plan(numbers, Augmentation((1.0, 1.0), 0, 0, 0, 1.0)))
    torch.testing.assert_close(flipped, images.flip(-1), atol=1e-5, rtol=0)
    assert Augmentation().flip_p == 0


def test_crops_stay_inside_without_rotation():
    masks = torch.ones(64, 40, 40, dtype=torch.uint8)
    warps = plan(draws(64), Augmentation((0.3, 1.0), 0, 0, 0, 0.5))
    assert (warp_masks(masks, warps, 40) == 1).all()


def test_light_stays_in_range_and_is_bounded():
    images = torch.full((64, 1, 16, 16), 0.5)
    light = warp_images(images, plan(draws(64), Augmentation((1.0, 1.0), 0, 0.1, 0.5, 0)))
    assert light.min() >= 0.4 - 1e-4
    assert light.max() <= 0.6 + 1e-4
    assert light.std() > 0.02


def test_bad_settings_and_shapes():
    with pytest.raises(SpcxrError, match="crop_scale"):
        Augmentation(crop_scale=(0.9, 0.5))
    with pytest.raises(SpcxrError, match="square"):
        warp_images(torch.zeros(1, 1, 16, 32), rest(1))
