"""Lungs' patches alone: which they are, and that the classifier then equals a masked one."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata

from spcxr.errors import SpcxrError
from spcxr.models.decoder import Segmenter, UNETRDecoder
from spcxr.models.heads import ClassificationHead, Classifier, Features
from spcxr.models.regions import LungFinder, equalised, no_lungs, patches_touched, resized
from spcxr.models.sequences import PackedTokens
from spcxr.models.vit import VisionTransformer
from spcxr.train.device import autocast


def classifier(drop_path=0.0):
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_px=(32, 48), patch_px=8, width=24, depth=3, heads=3, drop_path=drop_path
    )
    head = ClassificationHead(width=24, classes=3)
    head.standardise(torch.randn(20, 48))
    return Classifier(encoder, head)


def batch(count=4):
    draw = torch.Generator().manual_seed(1)
    visible = (
        torch.rand(count, 4, 6, generator=draw)
        < torch.tensor([0.1, 0.4, 0.8, 1.0])[:count, None, None]
    )
    visible[0, 2, 3] = True
    return torch.randn(count, 1, 32, 48, generator=draw), visible


def masked(model, images, visible):
    """The same by padding: every patch encoded, no one looks at the hidden, a mean that skips."""
    tokens = model.encoder.forward_features(images, key_mask=~visible)
    kept = visible.flatten(1)[..., None].float()
    mean = (tokens[:, 1:] * kept).sum(1) / kept.sum(1)
    features = torch.cat([tokens[:, 0], mean], 1)
    return model.head.fc((features - model.head.mean) / model.head.deviation)


# --- the classifier -------------------------------------------------------------------------


def test_visible_patches_alone_equal_the_masked_whole():
    model, (images, visible) = classifier(), batch()
    assert len(set(visible.flatten(1).sum(1).tolist())) > 2, "counts must differ"

    def gradients(logits):
        loss = (logits * torch.arange(1.0, 4)).square().sum()
        return torch.autograd.grad(loss, list(model.parameters()))

    ours, wanted = model(images, visible), masked(model, images, visible)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(gradients(ours), gradients(wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_all_patches_visible_is_the_whole_image():
    model, (images, visible) = classifier(), batch()
    torch.testing.assert_close(
        model(images, torch.ones_like(visible)), model(images), rtol=1e-4, atol=1e-5
    )


def test_what_is_not_visible_changes_nothing_and_learns_nothing():
    model, (images, visible) = classifier(), batch()
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    painted = torch.where(hidden, 9.0, images).requires_grad_()
    logits = model(painted, visible)
    torch.testing.assert_close(logits, model(images, visible))
    logits.square().sum().backward()
    assert (painted.grad[hidden] == 0).all()
    assert (painted.grad[~hidden] != 0).any()
    assert not torch.allclose(model(painted), model(images), atol=1e-3)


def test_bf16_is_near_fp32():
    model, (images, visible) = classifier(), batch()
    exact = model(images, visible)
    with autocast(torch.device("cpu"), "bf16"):
        rounded = model(images, visible)
    assert torch.allclose(rounded.float(), exact, atol=0.05 * float(exact.detach().abs().max()))


def test_training_with_stochastic_depth_learns_everywhere():
    model, (images, visible) = classifier(drop_path=0.2).train(), batch()
    model(images, visible).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_features_are_what_the_head_reads():
    model, (images, visible) = classifier().eval(), batch()
    features = Features(model.encoder)(images, visible)
    head = model.head
    wanted = head.fc((features - head.mean) / head.deviation)
    torch.testing.assert_close(model(images, visible), wanted)


def test_means_skip_cls_tokens_padding_and_images_without_patches():
    tokens = torch.arange(14.0).view(7, 2)
    ids = torch.tensor([-1, 4, 5, -1, -1, 0, -1], dtype=torch.int32)
    starts = torch.tensor([0, 3, 4, 6], dtype=torch.int32)  # row 6 is padding
    found = PackedTokens(tokens, ids, starts).cls_and_mean
    assert found.tolist() == [[0, 1, 3, 4], [6, 7, 0, 0], [8, 9, 10, 11]]
    assert PackedTokens(tokens[:0], ids[:0], starts[:1]).cls_and_mean.shape == (0, 4)


def test_a_mask_of_another_grid_is_refused():
    model, (images, visible) = classifier(), batch()
    with pytest.raises(SpcxrError, match="give bool of that grid"):
        model(images, visible[:, :, :5])


# --- their greys ----------------------------------------------------------------------------


def over_read(images, visible):
    """``[n]`` of each image: its pixels that are read."""
    read = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return [image[0][there] for image, there in zip(images, read, strict=True)]


def test_equalised_greys_are_the_normal_quantiles_of_their_ranks():
    images, visible = batch()
    for made, grey in zip(
        over_read(equalised(images, visible, 8), visible), over_read(images, visible), strict=True
    ):
        exact = norm.ppf((rankdata(grey) - 0.5) / len(grey))
        # Greys that share one of 1024 levels share its middle rank: coarse in the tails alone.
        assert np.abs(made.numpy() - exact).max() < 0.35
        assert np.abs(made.numpy() - exact).mean() < 0.02
        assert abs(float(made.mean())) < 0.01
        assert float(made.std()) == pytest.approx(1, abs=0.05)


def test_a_rising_curve_and_what_is_not_read_change_no_equalised_grey():
    images, visible = batch()
    images = images.sigmoid()
    made = over_read(equalised(images, visible, 8), visible)
    hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    letters = torch.where(hidden, 50.0, images)
    for same, one in zip(over_read(equalised(letters, visible, 8), visible), made, strict=True):
        assert torch.equal(same, one)
    for near, one in zip(over_read(equalised(images**1.7, visible, 8), visible), made, strict=True):
        assert float((near - one).abs().mean()) < 0.01
    for turned, one in zip(
        over_read(equalised(1 - images, visible, 8), visible), made, strict=True
    ):
        assert float((turned + one).abs().mean()) < 0.01


def test_equalised_flat_images_and_three_channels():
    images, visible = batch()
    rounding = 1e-6 * images  # what resampling leaves of a flat image
    assert (equalised(0.3 + rounding, visible, 8) == 0).all()
    once, thrice = (equalised(images.expand(-1, c, -1, -1), visible, 8) for c in (1, 3))
    assert torch.equal(thrice, once.expand(-1, 3, -1, -1))
    assert equalised(images.bfloat16(), visible, 8).dtype == torch.float32


def test_a_pixel_that_is_no_number_stays_none_and_one_that_is_not_read_changes_nothing():
    images, visible = batch()
    read = visible.repeat_interleave(8, 1).repeat_interleave(8, 2)
    broken = images.clone()
    broken[0, 0][tuple(read[0].nonzero()[0])] = math.nan
    broken[1, 0][tuple((~read[1]).nonzero()[0])] = math.nan
    made = over_read(equalised(broken, visible, 8), visible)
    assert made[0].isnan().any()
    assert torch.equal(made[1], over_read(equalised(images, visible, 8), visible)[1])


# --- the patches ----------------------------------------------------------------------------


def test_patches_are_read_where_lung_covers_enough_of_them_and_their_margin():
    masks = torch.zeros(1, 64, 96, dtype=torch.bool)
    masks[0, 16:48, 33:48] = True  # patches (1..2, 2), to 1 pixel of their left edge
    touched = patches_touched(masks, 16)[0]
    # Windows of 24 x 24. Above and below 4 rows of lung lie in them, at the sides 3 or 4 columns:
    # a twentieth is 29 pixels, which 4 x 15 and 20 x 3 are, and the corners' 4 x 4 are not.
    assert touched.int().tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 0],
    ]


def test_stray_pixels_are_no_lung_and_no_lung_is_read_whole():
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[:, 24:40, 8:56] = True
    stray = masks.clone()
    stray[:, 1:5, 58:62] = True  # 16 of 576 pixels
    assert torch.equal(patches_touched(stray, 16), patches_touched(masks, 16))
    assert not patches_touched(masks, 16).all()
    nothing = torch.zeros(1, 64, 64, dtype=torch.bool)
    assert patches_touched(nothing, 16).all()
    speck = nothing.clone()
    speck[0, 4:16, 4:16] = True
    assert patches_touched(speck, 4).float().mean() < 1
    assert no_lungs(torch.zeros(1, 8, 8, dtype=torch.bool)).all()


def test_masks_keep_their_places_at_another_size():
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    masks[0, 1, 2] = 1
    assert resized(masks, (8, 8)).nonzero()[:, 1:].tolist() == [[2, 4], [2, 5], [3, 4], [3, 5]]
    assert resized(masks, (4, 4)) is masks


# --- the finder -----------------------------------------------------------------------------


class Bright(torch.nn.Module):
    """Segments without learning: lung is what its input, normalised, holds above 1."""

    def __init__(self, side):
        super().__init__()
        self.encoder = VisionTransformer(image_px=side, patch_px=16, width=24, depth=4, heads=3)
        self.image_px = self.encoder.image_px
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return torch.cat([1 - images, images - 1], 1)


@pytest.mark.parametrize("side", [32, 64])
def test_the_finder_sees_its_own_size_and_numbers(side):
    finder = LungFinder(Bright(side), 0.5, 0.25)
    grey = torch.full((2, 1, 32, 32), 0.5)
    grey[:, :, 8:24, 4:12] = 1.0
    masks = finder.masks(grey)
    assert finder.segmenter.seen[0].shape == (2, 1, side, side)
    assert float(finder.segmenter.seen[0].max()) == pytest.approx(2.0)
    assert torch.equal(masks[0], grey[0, 0] > 0.75)


def test_the_finder_within_a_model_stays_as_it_is():
    encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    decoder = UNETRDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
    model = classifier()
    names = [n for n, _ in model.named_parameters()]
    model.lungs = LungFinder(Segmenter(encoder, decoder), 0.5, 0.25)
    model.train()
    assert not any(m.training for m in model.lungs.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert any(name.startswith("lungs.") for name in model.state_dict())
