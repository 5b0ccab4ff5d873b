"""The numpy entry to the fused input path, for loader workers that do not import torch."""

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr.ops.philox import normal

_native = pytest.importorskip("spcxr._native")

B, P, SIZE = 3, 4, (12, 20)
GRID = (SIZE[0] // P, SIZE[1] // P)
N = GRID[0] * GRID[1]
KEY = {"size": SIZE, "patch": P}
draw = np.random.default_rng(0)
IDS = np.array([5, 2**40 + 1, 0])
MASK = draw.random((B, *GRID)) < 0.5
PIXEL_MASK = draw.random((B, *SIZE)) < 0.5
SCALE = np.array([1 / 64, 1 / 50, 1 / 70], np.float32)
SHIFT = np.array([-2.0, -1.5, -1.0], np.float32)


def images(dtype=np.uint8, channels=1, size=SIZE):
    return draw.integers(0, 256, (B, channels, *size)).astype(dtype)


def cut(views):
    """``[B, C, H, W]`` as ``[B, N, C*P*P]``."""
    b, c, h, w = views.shape
    parts = views.reshape(b, c, h // P, P, w // P, P)
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(b, N, c * P * P)


def scaled(pixels):
    column = (slice(None), None, None, None)
    return pixels.astype(np.float32) * SCALE[column] + SHIFT[column]


def gather(pixels, **given):
    return _native.masked_patch_gather(
        pixels, **{**KEY, "scale": SCALE[: len(pixels)], "shift": SHIFT[: len(pixels)], **given}
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_whole_images_in_patches(dtype, channels):
    pixels = images(dtype, channels)
    assert np.array_equal(gather(pixels), cut(scaled(pixels)))
    half = gather(pixels, dtype="float16")
    assert half.dtype == np.float16
    assert np.array_equal(half, cut(scaled(pixels)).astype(np.float16))
    brain = gather(pixels, dtype="bfloat16")
    expected = torch.from_numpy(cut(scaled(pixels))).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(brain, expected.view(np.uint16))


def test_strides_are_followed():
    wide = images(channels=3, size=(SIZE[0], 31))
    for view in (wide[:, :, :, 3 : 3 + SIZE[1]], wide[::-1, 1:2, ::-1, : SIZE[1]]):
        assert np.array_equal(gather(view), cut(scaled(view)))


def test_resampling_is_pillows():
    """Within 1 grey level, up and down, flipped."""
    pixels = images(size=(40, 33))
    boxes = np.array([[1.5, 2.25, 30, 20.5], [0, 0, 40, 33], [10, 3, 7, 9.5]], np.float32)
    flip = np.array([False, True, False])
    one, none = np.ones(B, np.float32), np.zeros(B, np.float32)
    got = gather(pixels, boxes=boxes, flip=flip, scale=one, shift=none)
    for b, (top, left, height, width) in enumerate(boxes.tolist()):
        view = Image.fromarray(pixels[b, 0]).resize(
            SIZE[::-1], Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        expected = np.asarray(view)[:, ::-1] if flip[b] else np.asarray(view)
        assert np.abs(got[b] - cut(expected[None, None].astype(np.float32))[0]).max() <= 1


@pytest.mark.parametrize("mask", [MASK, PIXEL_MASK], ids=["patches", "pixels"])
def test_fills(mask):
    pixels = images()
    clean = cut(scaled(pixels))
    cell = P if mask is MASK else 1
    hidden = cut(mask.repeat(cell, 1).repeat(cell, 2)[:, None])
    noise = normal(torch.from_numpy(IDS), N * P * P, seed=7, epoch=2, stream="noise-1")
    partner = np.array([1, 2, 0])
    fills = {
        0: noise.numpy().reshape(B, N, P * P),
        1: np.zeros_like(clean),
        2: clean[partner],
    }
    for number, fill in fills.items():
        got = gather(
            pixels,
            mask=mask,
            kind=np.full(B, number, np.int32),
            image_ids=IDS,
            partner=partner,
            seed=7,
            epoch=2,
            view=1,
        )
        assert np.array_equal(got, np.where(hidden, fill, clean)), number


def test_shuffle_moves_rectangles():
    pixels = images()
    blocks = np.array([[[0, 0, 5, 6], [3, 4, 6, 9], [0, 0, 0, 0]]] * B, np.int32)
    sources = np.array([[[7, 14], [6, 0], [0, 0]]] * B, np.int32)
    moved = pixels.copy()
    for (top, left, h, w), (y, x) in zip(blocks[0], sources[0], strict=True):
        moved[:, :, top : top + h, left : left + w] = pixels[:, :, y : y + h, x : x + w]
    got = gather(
        pixels,
        mask=PIXEL_MASK,
        kind=np.full(B, 3, np.int32),
        blocks=blocks,
        sources=sources,
    )
    expected = np.where(PIXEL_MASK[:, None], scaled(moved), scaled(pixels))
    assert np.array_equal(got, cut(expected))


def test_visible_patches_are_packed():
    pixels = images(np.uint16, 3)
    tokens, ids, starts = _native.visible_patch_gather(
        pixels, mask=MASK, scale=SCALE, shift=SHIFT, **KEY
    )
    shown = ~MASK.reshape(B, N)
    assert np.array_equal(tokens, cut(scaled(pixels))[shown])
    assert np.array_equal(ids, np.nonzero(shown)[1])
    assert np.array_equal(starts, [0, *np.cumsum(shown.sum(1))])
    assert ids.dtype == starts.dtype == np.int32


def test_an_empty_batch_is_served():
    none = np.zeros((0, 1, *SIZE), np.uint8)
    assert gather(none).shape == (0, N, P * P)
    _, ids, starts = _native.visible_patch_gather(
        none, mask=MASK[:0], scale=SCALE[:0], shift=SHIFT[:0], **KEY
    )
    assert ids.shape == (0,)
    assert starts.tolist() == [0]


def box(*values):
    return np.array([values] * B, np.float32)


ALL = np.ones((B, *GRID), bool)
MOVED = np.zeros((B, 1, 2), np.int32)
REFUSED = {
    "dtype of the images": {"pixels": np.zeros((B, 1, *SIZE))},
    "rank": {"pixels": np.zeros((B, *SIZE), np.uint8)},
    "two channels": {"pixels": np.zeros((B, 2, *SIZE), np.uint8)},
    "no pixels": {"pixels": np.zeros((B, 1, 0, 4), np.uint8)},
    "every other pixel": {"pixels": np.zeros((B, 1, 12, 40), np.uint8)[..., ::2]},
    "big endian": {"pixels": np.zeros((B, 1, *SIZE), ">u2")},
    "not aligned": {
        "pixels": np.zeros(B * 240 * 2 + 1, np.uint8)[1:].view(np.uint16).reshape(B, 1, *SIZE)
    },
    "no whole patches": {"size": (12, 21)},
    "no size": {"size": (0, 20)},
    "no patch": {"patch": 0},
    "output": {"dtype": "float64"},
    "scale of another batch": {"scale": np.ones(2, np.float32)},
    "scale in double": {"scale": np.ones(B)},
    "scale is NaN": {"scale": np.full(B, np.nan, np.float32)},
    "box outside": {"boxes": box(0, 0, 13, 20)},
    "box before": {"boxes": box(-1, 0, 5, 5)},
    "box empty": {"boxes": box(0, 0, 0, 5)},
    "box NaN": {"boxes": box(0, np.nan, 5, 5)},
    "box infinite": {"boxes": box(0, 0, np.inf, 5)},
    "boxes of another shape": {"boxes": np.zeros((B, 2), np.float32)},
    "flip in numbers": {"flip": np.zeros(B, np.uint8)},
    "mask of another grid": {"mask": np.ones((B, 4, 4), bool)},
    "mask in numbers": {"mask": np.ones((B, *GRID), np.uint8)},
    "a mask and no kind": {"kind": None},
    "unknown kind": {"kind": np.full(B, 4, np.int32)},
    "partner itself": {"partner": np.arange(B)},
    "partner outside": {"partner": np.array([1, 3, 0])},
    "no partner": {"partner": None},
    "block outside": {"blocks": np.array([[[0, 0, 13, 2]]] * B, np.int32)},
    "source outside": {"sources": MOVED + 12},
    "negative block": {"blocks": np.array([[[0, 0, -1, 2]]] * B, np.int32)},
    "sources of another number": {"sources": np.zeros((B, 2, 2), np.int32)},
    "no sources": {"sources": None},
    "image id": {"image_ids": np.array([2**48, 1, 2])},
    "no image ids": {"image_ids": None},
    "seed": {"seed": -1},
    "epoch": {"epoch": 2**32},
    "view": {"view": 256},
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_bad_calls_are_refused(change):
    good = {
        "pixels": np.zeros((B, 1, *SIZE), np.uint8),
        "mask": ALL,
        "kind": np.array([0, 2, 3], np.int32),
        "partner": np.array([1, 2, 0]),
        "blocks": np.array([[[0, 0, 3, 2]]] * B, np.int32),
        "sources": MOVED,
        "image_ids": IDS,
    }
    call = {**good, **change}
    gather(**good)
    with pytest.raises(ValueError, match=r"^[a-zA-Z].{10,110}$") as refused:
        gather(**call)
    remedies = ("give", "choose", "keep", "number", "call numpy", "must", "use another", "needs")
    assert any(word in str(refused.value) for word in remedies)


def test_visible_wants_a_cell_a_patch():
    with pytest.raises(ValueError, match="one cell a patch"):
        _native.visible_patch_gather(images(), mask=PIXEL_MASK, scale=SCALE, shift=SHIFT, **KEY)
