"""Grad-CAM where it is known what it has to show."""

import pytest
import torch
from torch import nn

from spcxr.errors import SpcxrError
from spcxr.models.grad_cam import grad_cam
from spcxr.models.heads import ClassificationHead, Classifier
from spcxr.models.neighbours import NeighbourHead
from spcxr.models.vit import VisionTransformer

SIDE, PATCH = 32, 8
GRID = SIDE // PATCH


def encoder(seed=0):
    torch.manual_seed(seed)
    return VisionTransformer(image_px=SIDE, patch_px=PATCH, width=24, depth=3, heads=3)


def model(classes=3):
    made = Classifier(encoder(), ClassificationHead(width=24, classes=classes))
    nn.init.normal_(made.head.fc.weight)
    return made.eval()


def squares(count, seed):
    """Noise, and in every second image a bright patch: images, places (row, column), there."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, SIDE, SIDE, generator=generator) - 0.5
    places = torch.randint(0, GRID, (count, 2), generator=generator)
    there = torch.arange(count) % 2 == 0
    for image, (row, column), has in zip(images, places.tolist(), there, strict=True):
        if has:
            image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 3
    return images, places, there


def test_it_is_the_formula_of_the_paper():
    """Recomputed with hooks on the whole forward pass, label by label."""
    made, images = model(), torch.rand(2, 1, SIDE, SIDE)
    found = grad_cam(made, images, torch.tensor([[2, 0], [1, 2]]))
    for image, label, place in ((0, 2, 0), (0, 0, 1), (1, 1, 0), (1, 2, 1)):
        kept = []
        hook = made.encoder.blocks[-1].register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0])
        )
        logit = made(images[image : image + 1])[0, label]
        hook.remove()
        tokens = kept[-1]
        (slope,) = torch.autograd.grad(logit, tokens)
        shown = (tokens[0, 1:] @ slope[0, 1:].mean(0)).relu().view(GRID, GRID)
        torch.testing.assert_close(found[image, place], shown.detach(), atol=1e-6, rtol=1e-4)


class ReadsOnePatch(nn.Module):
    """A head whose one label is how much the mean patch looks like one remembered token."""

    def __init__(self, wanted):
        super().__init__()
        self.wanted = wanted

    def of_features(self, features):
        return features[:, 24:] @ self.wanted[:, None]


def test_a_head_that_looks_for_one_patch_peaks_there():
    images, places, _ = squares(6, seed=1)
    vit = encoder().eval()
    with torch.no_grad():
        tokens = vit.forward_features(images[::2])[:, 1:]
    for image, place, token in zip(images[::2], places[::2], tokens, strict=True):
        number = int(place[0] * GRID + place[1])
        others = (token.sum(0) - token[number]) / (len(token) - 1)
        made = Classifier(vit, ReadsOnePatch(token[number] - others)).eval()
        shown = grad_cam(made, image[None], torch.tensor([[0]]))[0, 0]
        assert int(shown.argmax()) == number


def test_a_square_that_was_learned_is_where_it_peaks():
    """Trained for seconds to tell images with a bright square from those without.

    From small weights, so that what is learned stays in the patch it is about: by large ones tokens
    are mixed before anything is learned, and the map shows where the mixture lies.
    """
    made = model(classes=1)
    with torch.no_grad():
        for weight in made.encoder.blocks.parameters():
            if weight.ndim > 1:
                nn.init.trunc_normal_(weight, std=0.02)
        nn.init.trunc_normal_(made.encoder.pos_embed, std=0.02)
        tokens = made.encoder.forward_features(squares(64, seed=99)[0])
        made.head.standardise(ClassificationHead.features(tokens))
    optimiser = torch.optim.AdamW(made.parameters(), 3e-3, weight_decay=0.0)
    for step in range(60):
        images, _, there = squares(32, seed=step)
        loss = nn.functional.binary_cross_entropy_with_logits(made(images)[:, 0], there.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    images, places, there = squares(64, seed=1000)
    with torch.no_grad():
        assert ((made(images)[:, 0] > 0) == there).float().mean() > 0.95
    shown = grad_cam(made, images[there], torch.zeros(32, 1, dtype=torch.int64))[:, 0]
    number = places[there][:, 0] * GRID + places[there][:, 1]
    assert (shown.flatten(1).argmax(1) == number).float().mean() > 0.9


def test_patches_that_are_not_read_are_blank_and_change_nothing():
    made, images = model(), torch.rand(2, 1, SIDE, SIDE)
    visible = torch.rand(2, GRID, GRID, generator=torch.Generator().manual_seed(3)) < 0.5
    labels = torch.tensor([[0], [1]])
    shown = grad_cam(made, images, labels, visible)
    assert not shown[:, 0][~visible].any()
    assert shown[:, 0][visible].any()
    pixels = visible.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    other = torch.where(pixels, images, torch.rand_like(images))
    torch.testing.assert_close(grad_cam(made, other, labels, visible), shown)
    whole = torch.ones_like(visible)
    torch.testing.assert_close(
        grad_cam(made, images, labels, whole), grad_cam(made, images, labels), atol=1e-6, rtol=1e-4
    )
    with pytest.raises(SpcxrError, match=r"visible is .* give \[2, 4, 4\] bool"):
        grad_cam(made, images, labels, visible[:, 1:])


def test_weights_get_no_gradient_and_the_model_answers_as_before():
    made, images = model(), torch.rand(2, 1, SIDE, SIDE)
    before = made(images).detach()
    with torch.no_grad():  # as a caller may be
        grad_cam(made, images, torch.tensor([[0], [1]]))
    assert all(p.grad is None for p in made.parameters())
    torch.testing.assert_close(made(images).detach(), before)


def test_neighbours_can_be_explained_too():
    vit = encoder().eval()
    head = NeighbourHead(width=24, rows=8, classes=2, k=3, multilabel=True)
    torch.manual_seed(1)
    head.remember(torch.randn(8, 48), torch.arange(16).view(8, 2) % 2)
    shown = grad_cam(Classifier(vit, head), torch.rand(1, 1, SIDE, SIDE), torch.tensor([[0, 1]]))
    assert torch.isfinite(shown).all()
