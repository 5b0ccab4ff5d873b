"""The encoder for other programs: however an image is given, the features are the network's."""

import numpy as np
import pytest
import torch
from encoder_cases import GRID, PATCH, SIDE, WIDTH, grey, made, normalised, phantom
from PIL import Image

from spcxr.data.study import Rejected, Study, read_study
from spcxr.errors import SpcxrError
from spcxr.infer.encoder_inputs import frame_of
from spcxr.models.attention_maps import cls_attention, rollout
from spcxr.models.regions import patches_touched


def close(one, other, atol=1e-5):
    torch.testing.assert_close(one.cls, other.cls, rtol=1e-4, atol=atol)
    torch.testing.assert_close(one.patches, other.patches, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_the_networks_tokens(channels):
    encoder = made(channels=channels)
    squares = np.stack([encoder.preprocess(Study(grey(seed=n), 8)).pixels for n in range(3)])
    tokens = encoder.vit.forward_features(normalised(encoder, squares))
    features = encoder.encode(squares)
    assert features.cls.shape == (3, WIDTH)
    assert features.patches.shape == (3, *GRID, WIDTH)
    assert features.cls.dtype == features.patches.dtype == torch.float32
    torch.testing.assert_close(features.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    flat = features.patches.flatten(1, 2)
    torch.testing.assert_close(flat, tokens[:, 1:], rtol=1e-4, atol=1e-5)
    assert features.cls.std(0).min() > 1e-3  # or nothing below could fail


def test_files_arrays_and_tensors_of_one_image_are_one(tmp_path):
    encoder, array = made(), grey()
    Image.fromarray(array).save(tmp_path / "a.png")
    Image.fromarray(array).save(tmp_path / "a.tif")
    square = encoder.preprocess(Study(array, 8)).pixels
    wanted = encoder.encode(square[None])
    ways = [
        str(tmp_path / "a.png"),
        tmp_path / "a.tif",
        array,
        array[None],
        [array],
        array.astype(np.uint16) * 257,
        torch.from_numpy(square)[None],
        torch.from_numpy(square)[None, None],
        [torch.from_numpy(square)],
        normalised(encoder, square[None]),
    ]
    for way in ways:
        close(encoder(way), wanted)
    close(encoder(array.astype(np.float64) / 255), wanted, atol=1e-3)


def test_a_dicom_is_prepared_as_the_weights_say(tmp_path):
    file = phantom(tmp_path / "x.dcm")
    encoder, other = made(), made(preset="chexpert-jpg", fit="stretch")
    close(encoder(file), encoder.encode(encoder.preprocess(read_study(file)).pixels[None]))
    assert (encoder(file).cls - other(file).cls).abs().max() > 0.01


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4", ">u2"])
def test_arrays_of_any_width_and_byte_order_are_one_image(kind):
    encoder, levels = made(), np.linspace(0, 1, 257)[:, None] * np.linspace(0.5, 1, 33)
    top = 65535 if kind == ">u2" else 1
    given = (levels * top).astype(kind)
    wanted = encoder((given.astype(np.float64) * (65535 / top) + 0.5).astype(np.uint16))
    close(encoder(given), wanted)


def test_order_and_batches_do_not_matter(tmp_path):
    encoder, arrays = made(), [grey(100 + 7 * n, 90, n) for n in range(5)]
    Image.fromarray(arrays[1]).save(tmp_path / "1.png")
    mixed = [arrays[0], tmp_path / "1.png", *arrays[2:]]
    whole = encoder(mixed)
    close(encoder(mixed, batch_size=2), whole)
    for n, array in enumerate(arrays):
        torch.testing.assert_close(encoder(array).cls[0], whole.cls[n], rtol=1e-4, atol=1e-5)


def test_bfloat16_is_near_and_float32_comes_out():
    arrays = np.stack([grey(seed=n) for n in range(4)])
    exact, quick = made()(arrays), made(torch.bfloat16)(arrays)
    assert quick.cls.dtype == torch.float32
    assert torch.cosine_similarity(exact.cls, quick.cls).min() > 0.999
    assert not torch.equal(exact.cls, quick.cls)


# -- parts of images ---------------------------------------------------------------------------


def seen(images: int, seed=1):
    """``[B, Gh, Gw]`` bool, some in each."""
    return torch.rand(images, *GRID, generator=torch.Generator().manual_seed(seed)) < 0.5


def test_only_visible_patches_are_read():
    encoder, arrays, mask = made(), np.stack([grey(seed=n) for n in range(3)]), seen(3)
    features = encoder(arrays, visible=mask)
    squares = np.stack([encoder.preprocess(Study(array, 8)).pixels for array in arrays])
    images = normalised(encoder, squares)
    close(encoder(images, visible=mask), features)
    close(encoder.encode(squares, mask), features)
    wanted = encoder.vit(images, visible=mask)
    torch.testing.assert_close(features.cls, wanted, rtol=1e-4, atol=1e-5)
    assert (features.patches[~mask] == 0).all()
    assert (features.patches[mask].abs().amax(1) > 0).all()
    # what is not read is not looked at
    changed = images.clone()
    for image, hidden in zip(changed, ~mask, strict=True):
        image[0, hidden.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)] = 1.5
    close(encoder(changed, visible=mask), features)
    close(encoder(images, visible=torch.ones_like(mask)), encoder(images))


def test_one_image_may_have_its_mask_alone(tmp_path):
    encoder, mask, lungs = made(), seen(1), np.zeros((120, 90), bool)
    lungs[30:70, 20:60] = True
    Image.fromarray(grey()).save(tmp_path / "a.png")
    for image in (grey(), tmp_path / "a.png", str(tmp_path / "a.png")):
        close(encoder(image, visible=mask[0]), encoder([image], visible=mask))
        close(encoder(image, visible=lungs), encoder([image], visible=[lungs]))
        close(encoder(image, visible=mask), encoder([image], visible=mask))


def test_an_image_of_which_nothing_is_read():
    encoder, arrays = made(), np.stack([grey(), grey(seed=1)])
    mask = torch.zeros(2, *GRID, dtype=torch.bool)
    features = encoder(arrays, visible=mask)
    assert (features.patches == 0).all()
    torch.testing.assert_close(features.cls[0], features.cls[1])


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_a_mask_of_pixels_lies_where_the_image_does(fit):
    """Where everything seen is grey and the rest is blackened, the network is given the same."""
    encoder, array = made(fit=fit), grey(120, 90)
    lungs = np.zeros((120, 90), bool)
    lungs[30:70, 20:60] = True
    features = encoder(array, visible=[lungs])
    square = torch.from_numpy(encoder.preprocess.mask(lungs.astype(np.uint8))) > 0
    rows = (torch.arange(SIDE) * 80 + 40) // SIDE
    grid = patches_touched(square[rows][:, rows][None], PATCH)
    assert 0 < grid.sum() < grid.numel()
    close(features, encoder(array, visible=grid))


def test_pixels_of_a_tensor_and_an_empty_mask():
    encoder, images = made(), normalised(made(), np.stack([grey(80, 80)] * 2))
    pixels = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
    pixels[0, :20, :20] = True
    close(encoder(images, visible=pixels), encoder(images, visible=patches_touched(pixels, PATCH)))
    # no lung: the whole image is read
    torch.testing.assert_close(encoder(images, visible=pixels).cls[1], encoder(images).cls[1])


@pytest.mark.parametrize(
    ("inputs", "visible"),
    [
        (np.stack([grey()] * 2), seen(3)),
        (np.stack([grey()] * 2), np.ones((2, 5, 5), bool)),
        (torch.zeros(2, 1, SIDE, SIDE), seen(3)),
        (torch.zeros(2, 1, SIDE, SIDE), np.ones((2, 5, 5), bool)),
    ],
)
def test_masks_that_do_not_fit_are_refused(inputs, visible):
    with pytest.raises(
        SpcxrError, match=r"masks for 2 images|visible.* is \[.*; give (its|the) patches"
    ):
        made()(inputs, visible=visible)


# -- images of any aspect ----------------------------------------------------------------------


def test_each_image_keeps_its_aspect_and_is_alone():
    encoder, arrays = made(), [grey(160, 80), grey(90, 140, 1), grey(100, 100, 2)]
    ragged = encoder(arrays, keep_aspect=True, batch_size=2)
    assert [tuple(patches.shape[:2]) for patches in ragged.patches] == [(6, 2), (3, 5), (4, 4)]
    for n, array in enumerate(arrays):
        alone = encoder(array, keep_aspect=True)
        torch.testing.assert_close(ragged.cls[n], alone.cls[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ragged.patches[n], alone.patches[0], rtol=1e-4, atol=1e-5)


def test_a_frame_is_the_networks_own_image_where_aspects_agree():
    encoder, array = made(size_px=SIDE), grey(100, 100)
    ragged, plain = encoder(array, keep_aspect=True), encoder(array)
    torch.testing.assert_close(ragged.cls, plain.cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ragged.patches[0], plain.patches[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3000, 2500), (2000, 3000), (1000, 1001), (100, 5000)])
def test_a_frame_distorts_nothing_and_has_about_as_many_patches(shape):
    frame = frame_of(shape, 196, 16)
    assert frame[0] % 16 == frame[1] % 16 == 0
    assert 0.85 * 196 <= frame[0] * frame[1] / 256 <= 196
    prepared = made().preprocess.framed(Study(grey(*(s // 10 for s in shape)), 8), frame)
    top, left, height, width = prepared.box
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.05)
    assert max(height / frame[0], width / frame[1]) == 1
    inside = prepared.pixels[top : top + height, left : left + width]
    assert np.count_nonzero(prepared.pixels) == np.count_nonzero(inside)


def test_tensors_of_several_sizes_and_their_masks():
    encoder = made()
    images = [torch.rand(1, 64, 32) - 0.5, torch.rand(1, 32, 96) - 0.5]
    masks = [torch.ones(4, 2, dtype=torch.bool), torch.tensor([[1, 0, 0, 1, 1, 0]] * 2) > 0]
    ragged = encoder(images, visible=masks, keep_aspect=True)
    for n, (image, mask) in enumerate(zip(images, masks, strict=True)):
        alone = encoder(image[None], visible=mask[None])
        torch.testing.assert_close(ragged.cls[n], alone.cls[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ragged.patches[n], alone.patches[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(SpcxrError, match="several sizes"):
        encoder(images)
    with pytest.raises(SpcxrError, match="a list of tensors"):
        encoder(torch.zeros(1, 1, 64, 64), keep_aspect=True)


def test_a_mask_of_pixels_in_a_frame():
    encoder, array = made(), grey(160, 80)
    lungs = np.zeros((160, 80), bool)
    lungs[:80] = True  # the upper three of six rows of patches, and a margin
    patches = encoder(array, visible=[lungs], keep_aspect=True).patches[0]
    assert (patches.abs().amax(2) > 0).tolist() == [[True] * 2] * 4 + [[False] * 2] * 2


# -- where it looks, and the names that others know --------------------------------------------


def test_attention_and_rollout_are_the_models(tmp_path):
    encoder, array = made(), grey()
    square = encoder.preprocess(Study(array, 8)).pixels
    images, mask = normalised(encoder, square[None]), seen(1)
    for given in (array, torch.from_numpy(square)[None], images, images[0]):
        torch.testing.assert_close(
            encoder.attention(given, layer=1), cls_attention(encoder.vit, images, 1)[0]
        )
        torch.testing.assert_close(encoder.rollout(given), rollout(encoder.vit, images)[0])
    found = encoder.attention(array, visible=mask[0])
    assert found.shape == (3, *GRID)
    assert (found[:, ~mask[0]] == 0).all()
    torch.testing.assert_close(found, encoder.attention(images, visible=mask[0]))
    back = encoder.preprocess.to_original(
        encoder.rollout(array).repeat_interleave(20, 0).repeat_interleave(20, 1).numpy(),
        (120, 90),
        encoder.preprocess(Study(array, 8)).box,
    )
    assert back.shape == (120, 90)
    with pytest.raises(SpcxrError, match="2 images; give one"):
        encoder.attention(np.stack([array] * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_tokens_by_the_names_of_others(dtype):
    encoder, images = made(dtype), torch.rand(2, 1, SIDE, SIDE) - 0.5
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.2}
    tokens = encoder.forward_features(images)
    torch.testing.assert_close(tokens, encoder.vit.forward_features(images), **tolerance)
    mine = encoder.get_intermediate_layers(images, [0, 2], reshape=True, return_class_token=True)
    wanted = encoder.vit.get_intermediate_layers(
        images, [0, 2], reshape=True, return_class_token=True
    )
    for pair, others in zip(mine, wanted, strict=True):
        for one, other in zip(pair, others, strict=True):
            torch.testing.assert_close(one, other, **tolerance)
    (last,) = encoder.get_intermediate_layers(images, norm=False)
    assert last.dtype == torch.float32
    torch.testing.assert_close(
        last, encoder.vit.get_intermediate_layers(images, norm=False)[0], **tolerance
    )
    hidden = seen(2)
    torch.testing.assert_close(
        encoder.forward_features(images, hidden),
        encoder.vit.forward_features(images, hidden),
        **tolerance,
    )


@pytest.mark.shared
def test_real_files_are_encoded_or_refused_in_one_line(shared_data):
    encoder, quick = made(), made(torch.bfloat16)
    files = sorted((shared_data / "dicom").iterdir())
    done, refused = [], []
    for file in files:
        try:
            done.append(encoder(file).cls)
        except Rejected as error:
            refused.append((str(file), str(error)))
    assert len(done) >= len(files) / 2
    assert all(said.startswith(f"{file}: ") and "\n" not in said for file, said in refused)
    assert torch.isfinite(torch.cat(done)).all()
    pictures = sorted((shared_data / "originals").iterdir())[:6]
    exact, near = encoder(pictures).cls, quick(pictures).cls
    assert torch.cosine_similarity(exact, near).min() > 0.999
    ragged = encoder(pictures, keep_aspect=True)
    assert len({tuple(patches.shape) for patches in ragged.patches}) > 1
    assert torch.cosine_similarity(exact, ragged.cls).mean() > 0.8
