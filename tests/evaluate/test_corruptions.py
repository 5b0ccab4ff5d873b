"""Corruptions: what each one does, that it grows with its strength, and whom its chance heeds."""

import math

import numpy as np
import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.evaluate.corruptions import CORRUPTIONS, corrupt

EVERY = [(name, s) for name, c in CORRUPTIONS.items() for s in range(1, len(c.levels) + 1)]
ROWS = np.array([5, 900, 7])


def scene(height=128, width=128, stripes=0.1):
    """Three pictures of an off-centre spot on fine stripes, in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spots = [
        torch.exp(-((y - 0.3 * height) ** 2 + (x - a * width) ** 2) / (0.02 * height * width))
        for a in (0.3, 0.5, 0.7)
    ]
    return (0.2 + 0.6 * torch.stack(spots) + stripes * (x % 4 < 2))[:, None].float()


@pytest.mark.parametrize(("name", "strength"), EVERY)
def test_shape_range_and_chance(name, strength):
    images = scene(96, 128)
    before = images.clone()
    made = corrupt(images, ROWS, name, strength, seed=3)
    assert made.shape == images.shape
    assert made.dtype == torch.float32
    assert 0 <= float(made.min()) <= float(made.max()) <= 1
    assert torch.equal(images, before), "the images given are not to be written to"
    assert torch.equal(made, corrupt(images, ROWS, name, strength, seed=3))
    alone = corrupt(images[1:2], ROWS[1:2], name, strength, seed=3)
    torch.testing.assert_close(made[1:2], alone, rtol=0, atol=1e-6)
    assert float((made - images).abs().mean()) > 1e-3


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("inversion", "blur")])
def test_seed_and_row_decide(name):
    image = scene()[:1].expand(6, -1, -1, -1)
    made = corrupt(image, np.arange(6), name, 2)
    assert any(not torch.equal(made[0], other) for other in made[1:])
    seeds = [corrupt(image, np.arange(6), name, 2, seed=s) for s in range(3)]
    assert any(not torch.equal(seeds[0], other) for other in seeds[1:])


@pytest.mark.parametrize("name", [n for n, c in CORRUPTIONS.items() if len(c.levels) > 1])
def test_stronger_is_further_from_the_image(name):
    images = scene(stripes=0.1 if name == "blur" else 0.0)
    far = [float((corrupt(images, ROWS, name, s) - images).abs().mean()) for s in (1, 2, 3)]
    assert far[0] < far[1] < far[2]


def test_noise_has_its_deviation():
    flat = torch.full((4, 1, 64, 64), 0.5)
    made = corrupt(flat, np.arange(4), "noise", 2)
    assert float(made.std()) == pytest.approx(0.05, rel=0.05)
    assert float(made.mean()) == pytest.approx(0.5, abs=0.01)


def test_blur_keeps_the_mean_and_spreads_a_point_as_a_gaussian():
    image = torch.zeros(1, 1, 101, 101)
    image[0, 0, 50, 50] = 1
    made = corrupt(image, np.array([0]), "blur", 3)
    assert float(made.sum()) == pytest.approx(1, abs=1e-4)
    sigma = 0.02 * 101
    assert float(made.max()) == pytest.approx(1 / (2 * math.pi * sigma**2), rel=0.02)
    flat = torch.full((1, 1, 16, 16), 0.3)
    torch.testing.assert_close(corrupt(flat, np.array([0]), "blur", 1), flat)


def test_gamma_is_a_power_either_way():
    image = torch.full((40, 1, 2, 2), 0.25)
    made = corrupt(image, np.arange(40), "gamma", 1)[:, 0, 0, 0]
    ends = sorted({round(float(v), 5) for v in made})
    assert ends == [round(0.25**1.3, 5), round(0.25 ** (1 / 1.3), 5)]


def test_text_is_white_near_the_border_and_nothing_else_changes():
    image = torch.full((20, 1, 128, 128), 0.5)
    made = corrupt(image, np.arange(20), "text", 2)
    changed = made != image
    assert bool(changed.flatten(1).any(1).all())
    assert bool((made[changed] > 0.5).all())
    assert float(made.max()) > 0.9  # thin letters are grey at their edges
    assert not changed[:, :, 45:75].any(), "words stand above or below, not on the lungs"


def test_rotation_turns_by_its_angle_in_pixels():
    """The spot's place turns about the centre by the angle, in a picture that is not square too."""
    for height, width in ((101, 101), (81, 121)):
        image = torch.zeros(1, 1, height, width)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cy, cx = (height - 1) / 2, (width - 1) / 2
        image[0, 0] = torch.exp(-((y - cy) ** 2 + (x - cx - 25) ** 2) / 8.0)
        made = corrupt(image, np.array([0]), "rotation", 3)[0, 0]
        dy = float((made * (y - cy)).sum() / made.sum())
        dx = float((made * (x - cx)).sum() / made.sum())
        assert math.hypot(dx, dy) == pytest.approx(25, abs=0.2)
        assert abs(math.degrees(math.atan2(dy, dx))) == pytest.approx(20, abs=0.5)


def test_crop_is_a_window_of_the_image():
    ramp = torch.linspace(0, 1, 100).expand(1, 1, 100, 100)
    made = corrupt(ramp, np.array([1]), "crop", 3)[0, 0, 50]
    step = float((made[1:] - made[:-1]).mean()) * 99
    assert step == pytest.approx(0.7, abs=0.01)
    assert float(made.min()) >= 0


def test_inversion_twice_is_nothing():
    images = scene()
    twice = corrupt(corrupt(images, ROWS, "inversion", 1), ROWS, "inversion", 1)
    torch.testing.assert_close(twice, images)


@pytest.mark.parametrize(("name", "strength"), [("fog", 1), ("noise", 0), ("inversion", 2)])
def test_what_there_is_not_is_refused(name, strength):
    with pytest.raises(SpcxrError, match=r"choose of|give 1 to"):
        corrupt(scene(), ROWS, name, strength)
