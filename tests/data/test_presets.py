"""Grey levels against the recipes they name, geometry against itself, the resize against two."""

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr.data import presets
from spcxr.data.presets import PRESET_VERSIONS, PRESETS, Preprocess, equalise
from spcxr.data.resize import resize, resize_nearest
from spcxr.data.study import Study, read_study
from spcxr.errors import SpcxrError

RNG = np.random.default_rng(0)


def chest_like(height=300, width=260, top=3500) -> np.ndarray:
    """Smooth and noisy 12-bit pixels, skewed as radiographs are."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    smooth = np.sin(5 * x) ** 2 * np.cos(3 * y) ** 2 + 0.1 * RNG.random((height, width))
    return (300 + smooth / smooth.max() * (top - 300)).astype(np.uint16)


SIZES = [
    ((300, 260), (224, 194)),
    ((1024, 1024), (512, 512)),
    ((37, 53), (80, 120)),
    ((9, 1), (4, 3)),
]


@pytest.mark.parametrize(("source", "out"), SIZES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_resize_is_torchs_and_pillows(source, out, dtype):
    image = RNG.integers(0, np.iinfo(dtype).max, source, endpoint=True).astype(dtype)
    made = resize(image, out)
    as_float = torch.from_numpy(image.astype(np.float32))[None, None]
    theirs = torch.nn.functional.interpolate(as_float, out, mode="bilinear", antialias=True)
    step = (np.iinfo(dtype).max + 1) / 256  # one of 256 grey levels
    assert np.abs(made - theirs[0, 0].numpy()).max() < 0.01 * step
    if dtype == np.uint8:
        pillow = Image.fromarray(image).resize(out[::-1], Image.Resampling.BILINEAR)
        assert np.abs(np.rint(made) - np.asarray(pillow)).max() <= 1


def test_resize_is_what_models_crop_with():
    from spcxr.ops.crop_resize import crop_resize

    image = RNG.integers(0, 4096, (120, 90)).astype(np.uint16)
    box, no = torch.tensor([[0.0, 0.0, 120.0, 90.0]]), torch.tensor([False])
    theirs = crop_resize(torch.from_numpy(image)[None, None], box, no, (50, 40))[0, 0]
    np.testing.assert_allclose(resize(image, (50, 40)), theirs.numpy(), atol=0.05)


def test_resize_to_the_same_size_changes_nothing():
    image = chest_like()
    np.testing.assert_array_equal(resize(image, image.shape), image)


def test_nearest_takes_the_pixel_under_the_centre():
    image = np.arange(5)[None]
    assert resize_nearest(image, (1, 3)).tolist() == [[0, 2, 4]]
    assert resize_nearest(np.array([[1, 2]]), (1, 4)).tolist() == [[1, 1, 2, 2]]


# -- grey levels ------------------------------------------------------------------------------


def same(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fill_the_range_and_stay_in_it(name):
    pixels = chest_like()
    prepared = Preprocess(preset=name, size_px=96, fit="stretch")(Study(pixels, bits=12))
    assert prepared.pixels.dtype == np.uint8
    assert prepared.pixels.min() < 30
    assert prepared.pixels.max() > 200


def test_minmax_is_the_same_for_a_radiograph_and_its_eight_bit_export():
    pixels = chest_like()
    exported = np.rint((pixels - 300.0) / (pixels.max() - 300.0) * 255).astype(np.uint8)
    one, other = (
        Preprocess(size_px=64)(s).pixels.astype(int)
        for s in (Study(pixels, bits=12), Study(exported, bits=8))
    )
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize("inverted", [False, True])
def test_mimic_jpg_repeats_the_published_steps(inverted):
    stored = chest_like()
    shifted = stored.astype(np.float64) - stored.min()
    eight = (shifted / shifted.max() * 255).astype(np.uint8)
    expected = equalise(255 - eight if inverted else eight)
    study = Study(4095 - stored if inverted else stored, bits=12, inverted=inverted)
    made = np.rint(presets.mimic_jpg(study, same) * 255)
    # Dividing before or after multiplying may truncate to the next level, rarely.
    assert (made == expected).mean() > 0.99
    assert np.abs(made - expected).max() <= 8


@pytest.mark.parametrize("inverted", [False, True])
def test_chexpert_jpg_repeats_its_steps(inverted):
    stored = chest_like()
    eight = (stored.astype(np.float64) * 255 / stored.max()).astype(np.uint8)
    expected = equalise(255 - eight if inverted else eight)
    study = Study(4095 - stored if inverted else stored, bits=12, inverted=inverted)
    np.testing.assert_array_equal(np.rint(presets.chexpert_jpg(study, same) * 255), expected)


def test_rad_dino_scales_after_the_resize():
    pixels = chest_like()
    pixels[5, 5] = 4095  # a hot pixel, which the resize blurs away
    made = Preprocess("rad-dino", size_px=64, fit="crop")(Study(pixels, bits=12)).pixels
    assert (made.min(), made.max()) == (0, 255)
    assert Preprocess("minmax", size_px=64, fit="crop")(Study(pixels, bits=12)).pixels.max() < 255


def test_voi_applies_the_window_and_minmax_stands_in_without():
    study = Study(chest_like(), bits=12, window=(1000.0, 500.0))
    made = presets.voi(study, same)
    assert (made[study.pixels <= 749] == 0).all()
    assert (made[study.pixels >= 1250] == 1).all()
    bare = Study(study.pixels, bits=12)
    np.testing.assert_array_equal(presets.voi(bare, same), presets.minmax(bare, same))


@pytest.mark.parametrize("values", [(0, 256), (40, 90), (7, 9)])
def test_equalise_is_opencvs(values):
    cv2 = pytest.importorskip("cv2")
    levels = (RNG.random((200, 170)) ** 3 * (values[1] - values[0]) + values[0]).astype(np.uint8)
    np.testing.assert_array_equal(equalise(levels), cv2.equalizeHist(levels))


def test_equalise_leaves_one_level_alone():
    np.testing.assert_array_equal(equalise(np.full((3, 3), 9, np.uint8)), 9)


def test_sixteen_bits_keep_what_eight_cannot():
    study = Study(chest_like(), bits=12)
    deep = Preprocess(size_px=128, dtype="uint16")(study).pixels
    assert deep.dtype == np.uint16
    assert len(np.unique(deep)) > 1000
    shallow = Preprocess(size_px=128)(study).pixels
    assert np.abs(deep / 257.0 - shallow).max() <= 0.51


@pytest.mark.parametrize("name", PRESETS)
def test_constant_images_are_refused(name):
    with pytest.raises(SpcxrError, match="same value"):
        Preprocess(preset=name, size_px=8)(Study(np.full((9, 9), 7, np.uint8), bits=8))


# -- settings ---------------------------------------------------------------------------------


def test_settings_travel():
    made = Preprocess("mimic-jpg", size_px=512, fit="crop", dtype="uint16")
    assert Preprocess.from_dict(made.to_dict()) == made
    assert made.version == PRESET_VERSIONS["mimic-jpg"] == 1
    assert set(PRESETS) == set(PRESET_VERSIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99.*install the spcxr that wrote it"),
        ({"version": 0}, "version is 0"),
        ({"preset": "minmaxx"}, "choose: minmax, voi"),
        ({"fit": "squash"}, "choose: pad, crop, stretch"),
        ({"dtype": "int8"}, "choose: uint8, uint16"),
        ({"size_px": 0}, "size_px"),
        ({"gamma": 2}, "unknown or missing: gamma"),
    ],
)
def test_what_this_spcxr_cannot_repeat_is_refused(change, words):
    with pytest.raises(SpcxrError, match=words):
        Preprocess.from_dict({**Preprocess().to_dict(), **change})


# -- geometry ---------------------------------------------------------------------------------

SHAPES = [(300, 260), (224, 224), (1000, 37), (37, 1000), (501, 499)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", presets.FITS)
def test_masks_come_back_to_the_pixel(fit, shape):
    """From the square to a larger study and back is the identity, wherever content lies."""
    preprocess = Preprocess(size_px=32, fit=fit)
    box = preprocess(Study(RNG.integers(0, 256, shape).astype(np.uint8), bits=8)).box
    inside = np.zeros((32, 32), bool)
    inside[box[0] : box[0] + box[2], box[1] : box[1] + box[3]] = True
    mask = RNG.integers(1, 5, (32, 32)).astype(np.uint8) * inside
    back = preprocess.to_original(mask, shape, box)
    assert back.shape == shape
    np.testing.assert_array_equal(preprocess.mask(back), mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fit", presets.FITS)
def test_image_and_mask_lie_on_each_other(fit, shape):
    """A bright rectangle and its mask have the same centre after preprocessing."""
    pixels = np.zeros(shape, np.uint8)
    rows = slice(int(shape[0] * 0.3), int(shape[0] * 0.8))
    columns = slice(int(shape[1] * 0.35), int(shape[1] * 0.7))
    pixels[rows, columns] = 255
    preprocess = Preprocess(size_px=200, fit=fit)
    prepared = preprocess(Study(pixels, bits=8))
    mask = preprocess.mask((pixels > 0).astype(np.uint8))
    # At most the pixels on the outline differ.
    assert np.abs((prepared.pixels >= 128).astype(int) - mask).sum() <= 2 * 4 * 200 * 0.6
    for axis in (0, 1):
        weights = np.arange(200)
        centres = [(a.sum(axis) * weights).sum() / a.sum() for a in (prepared.pixels / 255, mask)]
        assert abs(centres[0] - centres[1]) < 0.6


def test_pad_keeps_everything_centred_on_black():
    prepared = Preprocess(size_px=100)(Study(chest_like(300, 150), bits=12))
    assert prepared.box == (0, 25, 100, 50)
    assert (prepared.pixels[:, :25] == 0).all()
    assert (prepared.pixels[:, 75:] == 0).all()
    assert prepared.pixels[:, 25:75].mean() > 30


def test_crop_is_the_central_square():
    pixels = chest_like(300, 150)
    cropped = Preprocess("rad-dino", size_px=60, fit="crop")(Study(pixels, bits=12))
    square = Preprocess("rad-dino", size_px=60)(Study(pixels[75:225].copy(), bits=12))
    np.testing.assert_array_equal(cropped.pixels, square.pixels)
    back = Preprocess(size_px=60, fit="crop").to_original(
        np.ones((60, 60), np.uint8), (300, 150), cropped.box
    )
    assert back[:75].sum() == back[225:].sum() == 0
    assert back[75:225].all()


def test_maps_are_interpolated_back():
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (2, 64, 1))  # two maps
    preprocess = Preprocess(size_px=64)
    back = preprocess.to_original(ramp, (128, 128), (0, 0, 64, 64))
    assert back.shape == (2, 128, 128)
    expected = ((np.arange(128) + 0.5) / 2 - 0.5) / 63
    np.testing.assert_allclose(back[1, 5, 2:-2], expected[2:-2], atol=1e-5)


def test_a_box_of_another_study_is_refused():
    with pytest.raises(SpcxrError, match="shape and box it was prepared with"):
        Preprocess(size_px=8).to_original(np.zeros((8, 8)), (20, 10), (0, 0, 8, 8))


@pytest.mark.shared
def test_shared_images_keep_aspect_and_range(shared_data):
    for path in sorted((shared_data / "originals").iterdir())[:4]:
        study = read_study(path)
        prepared = Preprocess(size_px=128)(study)
        top, left, height, width = prepared.box
        assert height / width == pytest.approx(
            study.pixels.shape[0] / study.pixels.shape[1], rel=0.02
        )
        content = prepared.pixels[top : top + height, left : left + width]
        assert content.max() - content.min() > 150
