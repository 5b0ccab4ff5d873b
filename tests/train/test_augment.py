"""Augmentation: image and mask move together, nothing is invented outside the image."""

from dataclasses import replace

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


@pytest.mark.parametrize("bent", [{}, {"stretch": 0.3, "elastic": 0.04}], ids=["rigid", "elastic"])
def test_image_and_mask_move_together(bent):
    images, masks = discs()
    warps = plan(draws(len(images)), Augmentation((0.4, 1.0), 25, 0, 0, 0.5, **bent))
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


# --- elastic deformation ----------------------------------------------------------------------


def ramps(count, size):
    """Images whose grey is the place: x in one, y in the other, ``[count, 2, S, S]`` in [0, 1]."""
    axis = (torch.arange(size) + 0.5) / size
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(count, 2, size, size)


def moved_by(law, count=400, size=33):
    """How far a pixel was fetched from, in shares of the side, away from the black outside."""
    places = ramps(count, size)
    warps = plan(draws(count), law)
    mean_kept = warps.gain.eq(1).all() and warps.shift.eq(0).all()
    assert mean_kept, "light would read as movement"
    return (warp_images(places, warps) - places)[:, :, 6:-6, 6:-6]


def test_points_are_displaced_by_the_deviation_asked_for_and_smoothly():
    moved = moved_by(Augmentation((1.0, 1.0), 0, 0, 0, elastic=0.02))
    knot = moved[:, :, 10, 10]  # row 16 of 33, the middle of five control points
    assert float(knot.std()) == pytest.approx(0.02, rel=0.1)
    assert abs(float(knot.mean())) < 0.002
    assert abs(float(torch.corrcoef(knot.T)[0, 1])) < 0.15  # across and down are drawn apart
    assert float(moved.diff(dim=-1).abs().max()) < 0.02  # no tears: pixels are .03 apart


def test_an_image_is_stretched_about_its_middle_each_way_by_itself():
    moved = moved_by(Augmentation((1.0, 1.0), 0, 0, 0, stretch=0.2))
    away = ramps(1, 33)[0, :, 6:-6, 6:-6] - 0.5
    share = (moved * away).sum((2, 3)) / (away * away).sum((1, 2))
    torch.testing.assert_close(moved, share[..., None, None] * away, atol=1e-4, rtol=0)
    assert -0.2 <= float(share.min()) < -0.18
    assert 0.18 < float(share.max()) <= 0.2
    assert abs(float(torch.corrcoef(share.T)[0, 1])) < 0.15


def test_elastic_comes_first_and_moves_with_the_crop():
    """Displacements are of the output: what a crop shows is bent as whole images are."""
    law = Augmentation((0.25, 0.25), 20, 0, 0, 1.0, elastic=0.02)
    warps = plan(draws(4), law)
    still = replace(warps, bend=None)
    flat = replace(warps, bend=torch.zeros_like(warps.bend))
    places = ramps(4, 40)
    torch.testing.assert_close(warp_images(places, flat), warp_images(places, still))
    bent = warp_images(places, warps) - warp_images(places, still)
    assert float(bent[..., 8:-8, 8:-8].std()) == pytest.approx(0.01 * 0.7, rel=0.4)  # half as large


def test_no_deformation_draws_the_warps_of_old():
    numbers = draws(16)
    law = Augmentation((0.5, 1.0), 10, 0.1, 0.1, 0.5)
    plain, bent = plan(numbers, law), plan(numbers, replace(law, elastic=0.02))
    assert plain.bend is None
    assert torch.equal(plain.theta, bent.theta)
    side = (0.5 + 0.5 * numbers[:, 0]).sqrt()
    torch.testing.assert_close(plain.theta[:, :, :2].det().abs(), side**2)
