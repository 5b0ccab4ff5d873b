"""The resampler against Pillow's, and what it must refuse."""

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr.errors import SpcxrError
from spcxr.ops.crop_resize import crop_resize


def no_flip(batch):
    return torch.zeros(batch, dtype=torch.bool)


def whole(batch, height, width):
    return torch.tensor([[0.0, 0.0, height, width]]).repeat(batch, 1)


def random_boxes(rng, batch, height, width):
    sides = rng.uniform(0.05, 1.0, (batch, 2)) * (height, width)
    corners = rng.uniform(0, 1, (batch, 2)) * ((height, width) - sides)
    return np.concatenate([corners, sides], 1)


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (7, 200), (150, 131)])
@pytest.mark.parametrize(("height", "width"), [(150, 131), (64, 200)])
def test_equals_pillow_on_random_boxes(size, height, width):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (12, height, width), dtype=np.uint8)
    boxes = random_boxes(rng, 12, height, width)
    ours = crop_resize(
        torch.from_numpy(images)[:, None], torch.from_numpy(boxes), no_flip(12), size
    )
    for image, (top, left, h, w), made in zip(images, boxes, ours[:, 0].numpy(), strict=True):
        box = (left, top, left + w, top + h)
        pillow = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, box=box)
        assert np.abs(np.asarray(pillow, np.float32) - made).max() <= 1.0
        exact = Image.fromarray(image.astype(np.float32))
        pillow = exact.resize(size[::-1], Image.Resampling.BILINEAR, box=box)
        assert np.abs(np.asarray(pillow) - made).max() < 0.05


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_identity_is_exact(dtype):
    images = torch.arange(2 * 3 * 40 * 56).reshape(2, 3, 40, 56).remainder(251).to(dtype)
    if dtype == torch.uint16:
        images = (images.int() * 261).to(dtype)
    made = crop_resize(images, whole(2, 40, 56), no_flip(2), (40, 56))
    assert made.dtype == torch.float32
    assert torch.equal(made, images.float())


def test_integer_crop_is_exact():
    images = torch.randint(0, 256, (3, 1, 50, 60), dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 7.0, 20.0, 30.0]]).repeat(3, 1)
    made = crop_resize(images, boxes, no_flip(3), (20, 30))
    assert torch.equal(made, images[:, :, 4:24, 7:37].float())


def test_flip_mirrors_only_the_images_asked_for():
    images = torch.randint(0, 65536, (2, 2, 30, 41)).to(torch.uint16)
    boxes = torch.tensor([[1.5, 2.25, 20.0, 30.5]]).repeat(2, 1)
    plain = crop_resize(images, boxes, no_flip(2), (16, 24))
    mixed = crop_resize(images, boxes, torch.tensor([True, False]), (16, 24))
    assert torch.allclose(mixed[0], plain[0].flip(-1), rtol=1e-5)
    assert torch.equal(mixed[1], plain[1])


def test_each_image_gets_its_own_box():
    images = torch.rand(4, 1, 33, 47)
    rng = np.random.default_rng(0)
    boxes = torch.from_numpy(random_boxes(rng, 4, 33, 47))
    together = crop_resize(images, boxes, no_flip(4), (16, 16))
    for i in range(4):
        alone = crop_resize(images[i : i + 1], boxes[i : i + 1], no_flip(1), (16, 16))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-6)


def test_constant_stays_constant():
    images = torch.full((1, 1, 37, 53), 77, dtype=torch.uint8)
    made = crop_resize(images, torch.tensor([[0.3, 0.7, 36.5, 9.1]]), no_flip(1), (64, 5))
    assert torch.allclose(made, torch.tensor(77.0))


def test_autocast_does_not_round_the_pixels():
    images, size = torch.rand(2, 1, 40, 50), (16, 24)
    plain = crop_resize(images, None, None, size)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_resize(images, None, None, size), plain)


def test_empty_batch():
    made = crop_resize(
        torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, 4), no_flip(0), (4, 4)
    )
    assert made.shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    "box",
    [
        (0.0, 0.0, 8.5, 8.0),
        (-0.5, 0.0, 4.0, 4.0),
        (0.0, 5.0, 4.0, 4.0),
        (2.0, 2.0, 0.0, 4.0),
        (2.0, 2.0, 4.0, -1.0),
        (float("nan"), 0.0, 4.0, 4.0),
        (0.0, 0.0, float("inf"), 4.0),
    ],
)
def test_refuses_a_box_that_cannot_be(box):
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], box])
    with pytest.raises(SpcxrError, match=r"box 1 .* outside its image of 8x8 px"):
        crop_resize(images, boxes, no_flip(2), (4, 4))


@pytest.mark.parametrize(
    ("images", "boxes", "flip", "size", "message"),
    [
        (torch.zeros(1, 8, 8), whole(1, 8, 8), no_flip(1), (4, 4), r"give .B, C, H, W."),
        (torch.zeros(1, 1, 8, 8).double(), whole(1, 8, 8), no_flip(1), (4, 4), "float64"),
        (torch.zeros(2, 1, 8, 8), whole(1, 8, 8), no_flip(2), (4, 4), "for 2 images"),
        (torch.zeros(1, 1, 8, 8), whole(1, 8, 8), torch.zeros(1), (4, 4), "bool"),
        (torch.zeros(1, 1, 8, 8), whole(1, 8, 8), no_flip(1), (0, 4), "at least 1 px"),
    ],
)
def test_refuses_what_does_not_fit(images, boxes, flip, size, message):
    with pytest.raises(SpcxrError, match=message):
        crop_resize(images, boxes, flip, size)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_cuda_equals_the_cpu(dtype):
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (5, 2, 90, 70))).to(dtype)
    boxes = torch.from_numpy(random_boxes(rng, 5, 90, 70))
    flip = torch.tensor([True, False, True, False, True])
    made = crop_resize(images.cuda(), boxes, flip, (48, 64))
    assert made.is_cuda
    assert torch.allclose(made.cpu(), crop_resize(images, boxes, flip, (48, 64)), atol=1e-2)
    whole_images = crop_resize(images.cuda(), whole(5, 90, 70), no_flip(5), (90, 70))
    assert torch.equal(whole_images.cpu(), images.float())
